"""The state of one sequence of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.sample import Choice, choose
from jlayer.engine.stops import StopStrings
from jlayer.text.stream import StopWatcher, TextStream


@dataclass(frozen=True)
class Step:
    """What one sweep added to a text: complete characters only, so `text` may lag behind
    `token_ids`. `finish_reason`: why the text ends with it, None where it goes on."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


class Lane:
    """One sequence that is continued: its ids, its text, and whether and why it has ended."""

    def __init__(
        self,
        row: Row,
        *,
        options: SamplingOptions,
        limit: int,
        number: int,
        text=None,
        stops: StopStrings | None = None,
    ):
        """`text`: the tokenizer, where text is wanted; `stops`: what else ends the sequence."""
        prompt = row.ids
        self.history = list(prompt)
        self.n_prompt = len(prompt)
        self.options = options
        self.finish_reason: str | None = "length" if limit == 0 else None
        self.choices: list[Choice] = []
        self._row, self.limit, self._number = row, limit, number
        # What follows text keeps its leading space; what follows nothing but BOS has none.
        self._stream = TextStream(text, continues=bool(text.decode(prompt))) if text else None
        self._stops = StopWatcher(options.stop)
        self._all_stops = stops
        special = text.special_tokens if text else {}  # they are in no text that is watched
        self._ends = {*options.eos_token_id, *(special[s] for s in options.stop if s in special)}
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
            options=self.options,
            history=[*self._row.given, *self.token_ids],
            n_prompt=len(self._row.given),
            sequence=self._number,
            padding=self._row.padding,
        )
        self.choices.append(choice)
        self.history.append(choice.token_id)
        ended = choice.token_id in self._ends
        if self._all_stops is not None:
            ended |= self._all_stops.end_in(choice.token_id)
        piece = self._read(choice.token_id)
        if ended or self._stops.stopped is not None:
            self.finish_reason = "stop"
        elif len(self.history) - self.n_prompt >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason and self._stream:
            piece += self._rest()
        self._pieces.append(piece)
        return Step(piece, (choice.token_id,), self.finish_reason)

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
