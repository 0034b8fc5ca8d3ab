"""The state of one sequence of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jlayer.engine.batch import NONE
from jlayer.engine.hidden import Pooled
from jlayer.engine.ids import Row
from jlayer.engine.joint import Joint
from jlayer.engine.options import SamplingOptions
from jlayer.engine.pool import Table
from jlayer.engine.report import Account
from jlayer.engine.sample import Choice, NoiseKey, choose, pick, processed
from jlayer.engine.scores import PromptScores
from jlayer.engine.stops import StopStrings
from jlayer.errors import JlayerError
from jlayer.text.stream import StopWatcher, TextStream


@dataclass(frozen=True)
class Step:
    """What one sweep added to a text: complete characters only, so `text` may lag behind
    `token_ids`. `finish_reason`: why the text ends with it, None where it goes on. `choices`: the
    tokens with their log-probabilities, where these were asked for. `vector`: float32 [D], where
    the prompt is pooled, with the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    choices: tuple[Choice, ...] = ()
    vector: np.ndarray | None = field(default=None, compare=False)


class Constraint(Protocol):
    """What a text may be: a grammar, at the state after the tokens that it was told of."""

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end may follow."""
        ...

    def allowed(self, more: Sequence[int]) -> np.ndarray:
        """bool [V]: which tokens may follow those it was told of, and `more`."""
        ...

    def accept(self, ids: Sequence[int]) -> None:
        """Tells it of tokens that were drawn."""
        ...

    def copy(self) -> Constraint: ...


class Keeper(Protocol):
    """What keeps the cache entries of a prompt: see `PromptCache`."""

    def most(self, first: int, n_tokens: int) -> int:
        """How many of the next tokens ride in one pass."""
        ...

    def after_pass(self, lane: Lane) -> None:
        """Takes note of a pass in which the lane rode."""
        ...


class Lane:
    """One sequence that is continued: its ids, its text, and whether and why it has ended.

    `table`: the pool rows of its entries, once it is admitted; the tokens behind them are its next
    rows. `unread`: steps that nobody has taken yet.
    """

    def __init__(
        self,
        row: Row,
        *,
        options: SamplingOptions,
        limit: int,
        number: int,
        account: Account,
        most_unread: int | None = 1,
        text=None,
        stops: StopStrings | None = None,
        switches_at: int | None = None,
        constraint: Constraint | None = None,
        shown: Collection[int] = (),
        scores: PromptScores | None = None,
        adapter: int = NONE,
    ):
        """`account`: of its run. `most_unread`: with so many steps unread
        it waits; None: it never does. `text`: the tokenizer, where text is wanted; `stops`: what
        else ends the sequence. `switches_at`: see `ModelConfig.switches_at`. `constraint`: what its
        text may be; the lane's own. `shown`: special tokens that stand in the text all the same.
        `scores`: of its prompt, where they are wanted; with a `limit` of 0 nothing else is.
        `adapter`: the number of the one that it is computed with."""
        prompt = row.ids
        self.scores, self.adapter = scores, adapter
        self.draws, self.pooled = limit > 0, Pooled.of(row)
        # Nothing follows the last token of a prompt that is only scored.
        self.history = list(prompt if self.draws or self.pooled else prompt[:-1])
        self.n_prompt = len(prompt)
        self.options = options
        self.account = account
        self.table: Table | None = None  # until it is admitted
        self.keeper: Keeper | None = None  # of its prompt, where that is to be kept
        self.capacity = 0
        self.unread: deque[Step] = deque()
        self.error: Exception | None = None
        self.has_left = False
        self.last_pass = -1  # of the scheduler's passes, in which it rode
        self._switches_at, self.is_long = switches_at, False
        self._most_unread = most_unread
        has_work = self.draws or self.pooled or (scores is not None and not scores.is_done)
        self.finish_reason: str | None = None if has_work else "length"
        self.choices: list[Choice] = []
        self.row, self.limit, self._number = row, limit, number
        self.joint: Joint | None = None  # those that its tokens are decided with
        self.constraint = constraint
        # What follows text keeps its leading space; what follows nothing but BOS has none.
        continues = bool(text.decode(prompt)) if text else False
        self._stream = TextStream(text, continues=continues, shown=shown) if text else None
        self._stops = StopWatcher(options.stop)
        self.stop_strings = stops
        special = text.special_tokens if text else {}  # they are in no text that is watched
        self.ends = {*options.eos_token_id, *(special[s] for s in options.stop if s in special)}
        self._pieces: list[str] = []

    def board(self, table: Table, capacity: int) -> None:
        """Admits it; `capacity`: of its table, which may have entries of its first tokens."""
        self.table, self.capacity = table, capacity
        self.is_long = self.has_switched and len(table) > 0

    def leave_board(self) -> None:
        """Takes its table away; admitted again, it computes the entries of all its tokens anew."""
        self.table, self.is_long = None, False

    @property
    def has_switched(self) -> bool:
        """Whether its history is one for the rotary embedding of long texts."""
        return self._switches_at is not None and len(self.history) > self._switches_at

    def switch(self) -> None:
        """Where its text has grown longer than the rotary embedding of short ones is for, all of it
        is computed anew with that of long ones, as transformers does."""
        if self.has_switched and not self.is_long:
            self.table.cut(0)
        self.is_long = self.has_switched

    @property
    def deepest(self) -> int:
        """The most tokens that may be guessed after its history: its end, and what turns as the
        tokens before do."""
        if self._switches_at is None or self.is_long:
            return self.n_left - 1
        return min(self.n_left - 1, max(0, self._switches_at - len(self.history)))

    @property
    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self.finish_reason is None and self.error is None and not self.has_left

    @property
    def is_hungry(self) -> bool:
        """Whether it is admitted, and whoever reads its steps has taken enough of them."""
        if self.table is None or (self.joint is not None and self.joint.sleeps(self)):
            return False
        return self._most_unread is None or len(self.unread) < self._most_unread

    def is_sibling(self, other: Lane) -> bool:
        """Whether both continue one prompt of one run."""
        return self.row is other.row

    @property
    def n_shareable(self) -> int:
        """The entries of so many first tokens may be another's; the others must ride, for the
        logits after them or for their hidden states."""
        wanting = [one for one in (self.scores, self.pooled) if one is not None and not one.is_done]
        return min([len(self.history) - 1, *(one.next for one in wanting)])

    @property
    def n_pending(self) -> int:
        """Its tokens that no forward pass has carried."""
        return len(self.history) - len(self.table)

    @property
    def n_embedded(self) -> int:
        """So many of its first tokens are embeddings, and what stands for them in its history is no
        id."""
        return 0 if self.row.vectors is None else self.n_prompt

    def vectors(self, first: int, end: int) -> np.ndarray | None:
        """[some, D]: those in place of its tokens `first` to `end`, the first ones of these."""
        return self.row.vectors[first:end] if first < self.n_embedded else None

    @property
    def token_ids(self) -> list[int]:
        """The new ones."""
        return self.history[self.n_prompt :]

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def choose(self, logits: np.ndarray, more: Sequence[int] = ()) -> Choice:
        """The token after its history and `more`, from `logits` [V]; changes nothing."""
        return choose(
            logits,
            options=self.options,
            history=[*self.row.given, *self.token_ids, *more],
            n_prompt=len(self.row.given),
            sequence=self._number,
            padding=self.row.padding,
            allowed=None if self.constraint is None else self.constraint.allowed(more),
        )

    def scores_of(
        self, values: np.ndarray, tokens: Sequence[int], constraint: Constraint | None
    ) -> np.ndarray:
        """float32 [V]: `values` of the token after the prompt and these tokens, as options and a
        constraint change them."""
        return processed(
            values,
            options=self.options,
            history=[*self.row.given, *tokens],
            n_prompt=len(self.row.given),
            padding=self.row.padding,
            allowed=None if constraint is None else constraint.allowed(()),
        )

    def pick(self, scores: np.ndarray, logits: np.ndarray) -> Choice:
        """The token after its history, from scores [V] that were made of `logits`."""
        return pick(scores, logits, options=self.options, key=self.noise_key(1))

    def noise_key(self, depth: int) -> NoiseKey:
        """Of the noise that `choose` adds for the token so many places after its history (1: the
        next one)."""
        length = self.row.width + len(self.token_ids) - self.row.padding.n_tokens
        return NoiseKey(self.options.seed, self._number, length + depth - 1)

    @property
    def n_left(self) -> int:
        """The most tokens that it may still get."""
        return self.limit - len(self.token_ids)

    def ends_with(self, token: int, count: int) -> bool:
        """Whether it ends for sure once it has `count` more tokens, of which this is the last."""
        return token in self.ends or count >= self.n_left

    def add(self, choices: Sequence[Choice], *, ends: bool = False) -> int:
        """Adds tokens that were drawn, up to the one with which it ends; their step waits to be
        read. `ends`: it ends after them in any case. -> how many were added."""
        pieces, count = [], 0
        for choice in choices:
            pieces.append(self._add(choice))
            count += 1
            if self.finish_reason or self.error:
                break
        if ends and not self.finish_reason and not self.error:
            self.finish_reason = "stop"
            if self._stream:
                pieces.append(self._rest())
                self._pieces.append(pieces[-1])
        self.account.n_tokens += count
        added = tuple(choices[:count])
        self.unread.append(
            Step(
                "".join(pieces),
                tuple(choice.token_id for choice in added),
                self.finish_reason,
                added if self.options.logprobs is not None else (),
            )
        )
        return count

    def replay(self, choices: Sequence[Choice]) -> None:
        """Adds tokens that an earlier process drew: no step waits for them, and no figure counts
        them."""
        for choice in choices:
            self._add(choice)

    def become(self, choices: Sequence[Choice]) -> None:
        """Ends it with this text in place of what it has, of which the cache entries that are not
        this text's are given back."""
        tokens = [choice.token_id for choice in choices]
        pairs = zip(self.token_ids, tokens, strict=False)
        n_same = next((n for n, (own, new) in enumerate(pairs) if own != new), len(tokens))
        if self.table is not None:
            self.table.cut(min(len(self.table), self.n_prompt + n_same))
        del self.history[self.n_prompt :]
        self.add(choices, ends=True)

    def _add(self, choice):
        self.choices.append(choice)
        self.history.append(choice.token_id)
        ended = choice.token_id in self.ends
        if self.stop_strings is not None:
            ended |= self.stop_strings.end_in(choice.token_id)
        if self.constraint is not None and not ended:
            try:
                self.constraint.accept([choice.token_id])
            except JlayerError as error:  # it has met a limit of its own: the others ride on
                self.fail(error)
            ended = self.constraint.is_over  # a pass for the end alone would take as long
        piece = self._read(choice.token_id)
        if ended or self._stops.stopped is not None:
            self.finish_reason = "stop"
        elif self.n_left <= 0:
            self.finish_reason = "length"
        if self.finish_reason and self._stream:
            piece += self._rest()
        self._pieces.append(piece)
        return piece

    def end(self) -> None:
        """Ends it with a step without tokens: its prompt is scored or pooled, and nothing else was
        wanted."""
        self.finish_reason = "length"
        vector = None if self.pooled is None else self.pooled.value
        self.unread.append(Step("", (), self.finish_reason, vector=vector))

    def fail(self, error: Exception) -> None:
        """Ends it with an error, which whoever reads its steps gets; and those that it is decided
        with."""
        self.error = error
        if self.joint is not None:
            self.joint.fail(error)

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
