"""The state of one sequence of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jlayer.engine.options import SamplingOptions
from jlayer.engine.sample import Choice, choose
from jlayer.text.stream import StopWatcher, TextStream


@dataclass(frozen=True)
class Step:
    """What one forward pass added to a text.

    `text` has complete characters only, so it may lag behind `token_ids`.
    """

    text: str
    token_ids: tuple[int, ...]


class Lane:
    """One sequence that is continued: its ids, its text, and whether and why it has ended."""

    def __init__(
        self, prompt: list[int], *, options: SamplingOptions, limit: int, number: int, text=None
    ):
        self.history = list(prompt)
        self.n_prompt = len(prompt)
        self.finish_reason: str | None = "length" if limit == 0 else None
        self.choices: list[Choice] = []
        self._options, self._limit, self._number = options, limit, number
        # After text the first piece keeps its leading space; after BOS alone it has none.
        self._stream = TextStream(text, continues=bool(text.decode(prompt))) if text else None
        self._stops = StopWatcher(options.stop)
        self._pieces: list[str] = []

    @property
    def token_ids(self) -> list[int]:
        return self.history[self.n_prompt :]

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def draw(self, logits: np.ndarray) -> Step:
        """Chooses a token from `logits` [V] and adds it; returns the step."""
        choice = choose(
            logits,
            options=self._options,
            history=self.history,
            n_prompt=self.n_prompt,
            sequence=self._number,
        )
        self.choices.append(choice)
        self.history.append(choice.token_id)
        ended = choice.token_id in self._options.eos_token_id
        piece = self._read(choice.token_id)
        if ended or self._stops.stopped is not None:
            self.finish_reason = "stop"
        elif len(self.history) - self.n_prompt >= self._limit:
            self.finish_reason = "length"
        if self.finish_reason and self._stream:
            piece += self._rest()
        self._pieces.append(piece)
        return Step(piece, (choice.token_id,))

    def interrupt(self):
        """Ends the sequence now; the text so far stays."""
        if self.finish_reason is None:
            self.finish_reason = "interrupted"
            if self._stream:
                self._pieces.append(self._rest())

    def _read(self, token):
        return "" if self._stream is None else self._stops.feed(self._stream.step(token))

    def _rest(self):
        return self._stops.feed(self._stream.finish()) + self._stops.finish()
