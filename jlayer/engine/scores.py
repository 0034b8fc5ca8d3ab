"""How likely given tokens are, from logits that are reduced as the head gives them: slice by slice
of the vocabulary, and never held whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.sample import Choice

PIECE = 1 << 20  # logits that are looked at together on the host
SORTED_PIECE = 1 << 17  # the same, where several of the likeliest are wanted: it takes more memory


class Scores:
    """The predictions of one forward pass.

    `targets` [rows]: what each row should predict; -1: nothing. `n_likeliest`: so many of the
    likeliest tokens are known in the end.
    """

    def __init__(self, targets: np.ndarray, *, n_likeliest: int = 1):
        shape = targets.shape
        self._targets = targets
        self._likeliest = np.zeros((*shape, n_likeliest), np.uint64)  # keys, the highest first
        self._sum = np.zeros(shape)
        self._logit = np.zeros(shape)
        self.finite = np.ones(shape, bool)  # whether all logits of a row were so far

    def add(self, output: np.ndarray, places: np.ndarray, row: int) -> None:
        """Takes logits [some rows, some of the vocabulary]; see `Forward.score`."""
        piece = PIECE if self._likeliest.shape[1] == 1 else SORTED_PIECE
        step = max(1, piece // output.shape[1])
        asked = np.flatnonzero(self._targets[places] >= 0)
        for first in range(0, len(asked), step):
            some = asked[first : first + step]
            self.reduce(places[some], output[some], row)

    def reduce(self, at: np.ndarray, logits: np.ndarray, row: int) -> None:
        """Takes logits [rows `at`, v] that begin at vocabulary row `row`."""
        finite = np.isfinite(logits).all(1)
        if not finite.all():
            self.finite[at] &= finite
            logits = np.where(finite[:, None], logits, np.float32(0))
        before, n_likeliest = self._likeliest[at], self._likeliest.shape[1]
        keys = np.concatenate([before, _highest(logits, row, n_likeliest)], axis=1)
        keys = np.sort(keys, axis=1)[:, : -n_likeliest - 1 : -1]
        top = _logits(keys[:, 0])
        shifted = np.exp(logits - top[:, None])
        scale = np.where(before[:, 0] > 0, np.exp(_logits(before[:, 0]).astype(float) - top), 0)
        self._sum[at] = self._sum[at] * scale + shifted.sum(1, dtype=np.float64)
        self._likeliest[at] = keys
        wanted = self._targets[at] - row
        here = np.flatnonzero((wanted >= 0) & (wanted < logits.shape[1]))
        self._logit[at[here]] = logits[here, wanted[here]]

    @property
    def are_finite(self) -> bool:
        return bool(self.finite.all())

    @property
    def asked(self) -> np.ndarray:
        return self._targets >= 0

    @property
    def log_total(self) -> np.ndarray:
        """The logarithm of the sum of exponentials, for each prediction that was asked for."""
        return self._log_totals()[self.asked]

    @property
    def nll(self) -> np.ndarray:
        """The negative log-probability of each target, in nats."""
        return self.log_total - self._logit[self.asked]

    @property
    def best(self) -> np.ndarray:
        """The likeliest token of each prediction; of equals the one with the lower id."""
        return _ids(self._likeliest[self.asked, 0])

    def choices(self, places: slice, n_top: int) -> list[Choice]:
        """The targets of some rows, with so many of the likeliest tokens. A target that is one of
        them has the same log-probability there."""
        keys, totals = self._likeliest[places, :n_top], self._log_totals()[places]
        ids, logprobs = _ids(keys), _logits(keys).astype(float) - totals[:, None]
        found = zip(
            self._targets[places].tolist(),
            (self._logit[places] - totals).tolist(),
            ids.tolist(),
            logprobs.tolist(),
            strict=True,
        )
        return [
            Choice(token, logprob, tuple(zip(top, values, strict=True)))
            for token, logprob, top, values in found
        ]

    def _log_totals(self):
        return _logits(self._likeliest[:, 0]).astype(float) + np.log(np.maximum(self._sum, 1e-300))


# A key is a logit and a token in one number, which is higher for a higher logit and, of equal ones,
# for a lower id. No logit has key 0.
SIGN, LOW_BITS = np.uint32(1 << 31), np.uint64((1 << 32) - 1)


def _highest(logits, row, count):
    """The keys of the highest logits of each row, or of all: in any order."""
    n_rows, width = logits.shape
    if count == 1:
        best = logits.argmax(1)
        return _keys(logits[np.arange(n_rows), best], best + row)[:, None]
    keys = _keys(logits, np.arange(row, row + width))
    return keys if width <= count else np.partition(keys, width - count, axis=1)[:, -count:]


def _keys(logits, ids):
    bits = (logits + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits & SIGN, ~bits, bits | SIGN).astype(np.uint64)
    return (ordered << np.uint64(32)) | (LOW_BITS - ids.astype(np.uint64))


def _logits(keys):
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    return np.where(ordered & SIGN, ordered ^ SIGN, ~ordered).view(np.float32)


def _ids(keys):
    return (LOW_BITS - (keys & LOW_BITS)).astype(np.int64)


class PromptScores:
    """Log-probabilities of the tokens of a prompt, each after those before it.

    `first`: the place of the first token that is scored. `n_top`: so many of the likeliest tokens
    are told beside each. `found`: by place, None where there is none yet or never.
    """

    def __init__(self, ids: Sequence[int], *, first: int, n_top: int):
        self.n_top, self._ids = n_top, ids
        self.next = max(1, first) - 1  # the row that is scored next: of the token before
        self.found: list[Choice | None] = [None] * len(ids)

    @classmethod
    def of(cls, row: Row, options: SamplingOptions) -> PromptScores | None:
        """None where the options do not ask for them."""
        if options.prompt_logprobs is None:
            return None
        return cls(row.ids, first=first_scored(row, options), n_top=options.prompt_logprobs)

    @property
    def is_done(self) -> bool:
        return self.next >= len(self._ids) - 1

    def rows(self, first: int, end: int) -> range:
        """Which of these tokens must ride for the logits that follow them."""
        return range(max(first, self.next), max(first, self.next, min(end, len(self._ids) - 1)))

    def targets(self, rows: range) -> list[int]:
        """The tokens that follow."""
        return list(self._ids[rows.start + 1 : rows.stop + 1])

    def add(self, rows: range, choices: Sequence[Choice]) -> None:
        """Takes what a forward pass has found for the tokens after `rows`."""
        self.found[rows.start + 1 : rows.stop + 1] = choices
        self.next = max(self.next, rows.stop)


def first_scored(row: Row, options: SamplingOptions) -> int:
    """The place of the first token of a prompt that is scored."""
    return options.prompt_logprobs_from if row.scored_from is None else row.scored_from


def as_json(choices: Sequence[Choice | None]) -> list[dict | None]:
    """Tokens with their log-probabilities, as `generate --json` prints them."""
    return [
        one and {"token_id": one.token_id, "logprob": one.logprob, "top": [*map(list, one.top)]}
        for one in choices
    ]
