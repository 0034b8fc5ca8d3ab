"""Evaluates how well a model predicts a text: perplexity, and the divergence between two models.

A text is cut into windows. Each sweep carries as many windows as the budgets allow, since many cost
no more than one. Logits are reduced slice by slice of the vocabulary as the head gives them, and
never held whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

import numpy as np

from jlayer.api import Model
from jlayer.engine.scores import Scores
from jlayer.errors import UsageError
from jlayer.measure.scratch import Scratch
from jlayer.plan.shapes import RunShape
from jlayer.sizes import counted

MOST_WINDOWS = 64  # a sweep; more only cost activations


@dataclass(frozen=True)
class Window:
    """The tokens from `begin` to `end` of a text; those from `first` on are predicted."""

    begin: int
    end: int
    first: int

    @property
    def n_predicted(self) -> int:
        return self.end - self.first


def windows(n_tokens: int, *, length: int, stride: int) -> list[Window]:
    """Windows of `length` tokens that begin `stride` apart.

    Each predicts the tokens that no earlier window did, except its own first token.
    """
    cut, done = [], 0
    for begin in range(0, n_tokens, stride):
        end, first = min(begin + length, n_tokens), max(done, begin + 1)
        if end > first:
            cut.append(Window(begin, end, first))
        done = end
        if end == n_tokens:
            break
    return cut


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on a text; `nll` is in nats per predicted token."""

    perplexity: float
    nll: float
    n_predicted: int
    n_windows: int
    window: int
    stride: int
    windows_a_sweep: int
    sweeps: int


class Compared(Scores):
    """Predictions whose logits are kept, or compared with those that another model's were.

    `keep`: an array [predictions, V] to write logits to. `against`: an array [predictions, V] with
    the logits of another model, and `log_totals` [predictions] the logarithms of the sums of their
    exponentials. `rows` [tokens]: the prediction's row in these arrays.
    """

    def __init__(self, targets, *, rows=None, keep=None, against=None, log_totals=None):
        super().__init__(targets)
        self._rows, self._keep = rows, keep
        self._against, self._log_totals_of_other = against, log_totals
        self._cross = np.zeros(targets.shape)

    def reduce(self, at, logits, row):
        super().reduce(at, logits, row)
        if self._keep is not None:
            self._keep[self._rows[at], row : row + logits.shape[1]] = logits
        if self._against is not None:
            other = self._against[self._rows[at], row : row + logits.shape[1]]
            totals = self._log_totals_of_other[self._rows[at]]
            share = np.exp(other - totals[:, None].astype(np.float32))
            self._cross[at] += (share * (other - logits)).sum(1, dtype=np.float64)

    @property
    def divergence(self) -> np.ndarray:
        """The Kullback-Leibler divergence of each prediction from the other model's, in nats."""
        rows = self._rows[self.asked]
        return self._cross[self.asked] - self._log_totals_of_other[rows] + self.log_total


def perplexity(
    model: Model,
    ids: list[int],
    *,
    length: int | None = None,
    stride: int | None = None,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Evaluates how well `model` predicts `ids`.

    `length`: of a window (default: the model's context, at most 1,024). `stride`: between the
    begins of two windows (default: `length`). `told(done, of)`: called after each sweep with
    numbers of windows. Raises UsageError for an invalid length or stride, and what a sweep raises.
    """
    evaluation, _ = _evaluate(model, ids, length, stride, told, lambda targets, rows: {})
    return evaluation


@dataclass(frozen=True)
class Comparison:
    """Two models on one text: how far the second model's predictions are from the first's."""

    first: Evaluation
    second: Evaluation
    mean_kl: float
    same_top_1: float


def compare(
    open_first: Callable[[], AbstractContextManager[Model]],
    open_second: Callable[[], AbstractContextManager[Model]],
    ids: Callable[[Model], list[int]],
    *,
    length: int | None = None,
    stride: int | None = None,
    scratch: str | None = None,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Compares two models on one text.

    Gives the perplexity of both, the mean Kullback-Leibler divergence of the second's predictions
    from the first's in nats per token, and the share of predictions with the same likeliest token.
    One model is open at a time, so that each has the whole budget; the second is opened twice. The
    logits of the first are kept in a file in the folder `scratch` (default: the system's for
    temporary files), 4 bytes per token and vocabulary entry. `ids(model)` encodes the text; both
    models must give the same tokens.

    Raises UsageError, DoesNotFitError (no space in `scratch`, before the first sweep), StorageError
    and what a sweep raises.
    """
    with Scratch(scratch) as logits:
        with open_second() as model:  # what speaks against it is said before the first one runs
            expected, most = (model.config.vocab_size, ids(model)), _longest(model)
            window, _ = sizes_of(model, expected[1], length, stride, most)
            model.engine.plan_for(_shape(1, window, sweeps=1)).check()
        with open_first() as model:
            tokens, vocab = ids(model), model.config.vocab_size
            if (vocab, tokens) != expected:
                raise UsageError("compare: the two models read this text as different tokens")
            length, stride = sizes_of(model, tokens, length, stride, min(most, _longest(model)))
            cut = windows(len(tokens), length=length, stride=stride)
            logits.reserve(sum(window.n_predicted for window in cut), vocab)
            first, scores = _evaluate(
                model, tokens, length, stride, told, lambda *_: {"keep": logits}
            )
            log_totals = np.concatenate([one.log_total for one in scores])
            best = np.concatenate([one.best for one in scores])
        with open_second() as model:
            given = {"against": logits, "log_totals": log_totals}
            second, scores = _evaluate(model, tokens, length, stride, told, lambda *_: given)
        kl = np.concatenate([one.divergence for one in scores])
        same = np.concatenate([one.best for one in scores]) == best
    return Comparison(first, second, float(kl.mean()), float(same.mean()))


def _evaluate(model, ids, length, stride, told, options):
    """Scores all windows, as many per sweep as fit.

    Returns (the evaluation, the scores of each sweep in the order of the text).
    """
    length, stride = sizes_of(model, ids, length, stride)
    cut = windows(len(ids), length=length, stride=stride)
    batch = _windows_a_sweep(model, len(cut), length)
    found, numbers = [], iter(range(sum(window.n_predicted for window in cut)))
    shape = _shape(batch, length, sweeps=-(-len(cut) // batch))
    with closing(model.engine.start(shape)) as forward:
        for begin in range(0, len(cut), batch):
            some = cut[begin : begin + batch]
            targets, rows = targets_of(ids, some, numbers)
            scores = Compared(targets, rows=rows, **options(targets, rows))
            forward.score([ids[w.begin : w.end] for w in some], scores)
            found.append(scores)
            told(min(begin + batch, len(cut)), len(cut))
    nll = np.concatenate([scores.nll for scores in found])
    mean = float(nll.mean())
    evaluation = Evaluation(
        perplexity=perplexity_of(mean),
        nll=mean,
        n_predicted=len(nll),
        n_windows=len(cut),
        window=length,
        stride=stride,
        windows_a_sweep=batch,
        sweeps=len(found),
    )
    return evaluation, found


def targets_of(
    ids: Sequence[int], some: Sequence[Window], numbers: Iterator[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(what each token of a sweep should predict, -1: nothing; the number of each prediction)."""
    targets, rows = [], []
    for window in some:
        for position in range(window.begin + 1, window.end + 1):
            asked = window.first <= position < window.end
            targets.append(ids[position] if asked else -1)
            rows.append(next(numbers) if asked else 0)
    return np.array(targets, np.int64), np.array(rows, np.int64)


def perplexity_of(nll: float) -> float:
    """Of nats a token."""
    return math.exp(nll) if nll < 700 else math.inf


def _longest(model):
    """The tokens of a window where nobody says how many."""
    return min(model.context_limit, 1024)


def sizes_of(
    model: Model, ids: list[int], length: int | None, stride: int | None, default: int | None = None
) -> tuple[int, int]:
    """(the length of a window, the stride) for a text. `default`: the length where none is given.
    Raises UsageError."""
    limit = model.context_limit
    length = (default or _longest(model)) if length is None else length
    stride = length if stride is None else stride
    if len(ids) < 2:
        raise UsageError(f"text: {counted(len(ids), 'token')}, expected at least 2")
    if not 2 <= length <= limit:
        raise UsageError(f"window: found {length}, expected from 2 to the context of {limit}")
    if not 1 <= stride <= length:
        raise UsageError(f"stride: found {stride}, expected from 1 to the window's {length}")
    model.engine.check_ids(ids)
    return min(length, len(ids)), min(stride, len(ids))


def _shape(batch, length, *, sweeps):
    return RunShape(batch, length, length, all_logits=True, sweeps=sweeps)


def _windows_a_sweep(model, n_windows, length):
    """The most windows per sweep that fit the budgets, found by doubling."""
    batch = 1
    while batch < min(n_windows, MOST_WINDOWS):
        more = min(2 * batch, n_windows, MOST_WINDOWS)
        if not model.engine.plan_for(_shape(more, length, sweeps=n_windows // more)).fits:
            break
        batch = more
    return batch
