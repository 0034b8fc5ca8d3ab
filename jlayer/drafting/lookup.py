"""Guesses without a model: the tokens that followed the same few tokens elsewhere.

An Index holds one or several texts and counts what followed. The counts of longer and longer
contexts are merged into probabilities as in prediction by partial matching (PPM), on top of a
draft model's where there is one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.drafting.scores import Sharpness, log_softmax

SEPARATOR = -1
LONGEST = 8  # tokens of a context that are looked up
MOST_PLACES = 512  # of one context, the latest


@dataclass(frozen=True)
class Trust:
    """How to look up: from which orders on, and the kappas of `merged`. All found by simulation."""

    own_order: int  # of the text itself
    others_order: int  # of other texts
    own: float
    others: float


# With a draft model, short contexts tell nothing that it does not know.
WITH_DRAFT = Trust(own_order=2, others_order=4, own=10.0, others=100.0)
# Without one, any guess is better than none: order 0 is the text's most frequent tokens.
ALONE = Trust(own_order=0, others_order=1, own=5.0, others=5.0)
# Logits, as of a draft: counts of few sightings say less than a draft model does. With the noise
# weighed by 0.6 as for a draft, trees were worse than without any noise.
ALONE_SHARPNESS = 1.5


@dataclass(frozen=True)
class Matches:
    """What followed the last tokens of a context.

    `ids`: int32 [n], ascending. `counts`: int64 [orders, n]: how often each followed the last
    `least_order` tokens, the last `least_order` + 1 and so on, as far as there are any.
    """

    ids: np.ndarray
    counts: np.ndarray
    least_order: int


NO_MATCHES = Matches(np.zeros(0, np.int32), np.zeros((0, 0), np.int64), 0)


class Index:
    """Texts, and where every run of `least_order` tokens stands in them; 0: every token follows.

    A token takes 40 to 250 bytes, the more the fewer runs repeat. With `most_tokens` the older
    half is dropped when there are more.
    """

    def __init__(self, least_order: int, most_tokens: int | None = None):
        self._order = least_order
        self._most = most_tokens
        self._clear()

    def __len__(self) -> int:
        """Tokens, separators included."""
        return self._length

    def append(self, tokens: Sequence[int]) -> None:
        """Continues the current text."""
        self._write(tokens)
        if self._most is not None and self._length > self._most:
            kept = self._tokens[self._length - self._most // 2 : self._length].copy()
            self._clear()
            self._write(kept.tolist())

    def end_text(self) -> None:
        """What is appended from now on is another text."""
        if self._tokens[self._length - 1] != SEPARATOR:
            self._write([SEPARATOR])

    def find(self, context: Sequence[int], longest: int = LONGEST) -> Matches:
        """What followed the last `least_order` to `longest` tokens of `context`, by length."""
        gram = tuple(context[len(context) - self._order :])
        places = self._places.get(gram) if len(gram) == self._order else None
        if not places:
            return NO_MATCHES
        places = np.frombuffer(places, np.int32)[-MOST_PLACES:]
        longest = min(longest, len(context))
        more = np.arange(self._order + 1, longest + 1)
        lengths = np.full(len(places), self._order)
        if len(more):
            # Place 0 holds a separator, which equals no token.
            before = self._tokens[np.maximum(places[:, None] - more, 0)]
            same = before == np.array(context)[-more]
            lengths += np.logical_and.accumulate(same, axis=1).sum(axis=1)
        ids, which = np.unique(self._tokens[places], return_inverse=True)
        n_orders = int(lengths.max()) - self._order + 1
        exact = np.bincount(
            (lengths - self._order) * len(ids) + which, minlength=n_orders * len(ids)
        ).reshape(n_orders, len(ids))
        # A match of 5 tokens is also one of 4.
        return Matches(ids, exact[::-1].cumsum(axis=0)[::-1], self._order)

    def _clear(self):
        self._tokens = np.zeros(1024, np.int32)
        self._tokens[0] = SEPARATOR
        self._length = 1
        self._gram: tuple[int, ...] = ()  # the text's last tokens, at most least_order
        self._places: dict[tuple[int, ...], array] = {}  # gram -> where its followers stand

    def _write(self, tokens):
        end = self._length + len(tokens)
        if end > len(self._tokens):
            longer = np.zeros(max(end, 2 * len(self._tokens)), np.int32)
            longer[: self._length] = self._tokens[: self._length]
            self._tokens = longer
        self._tokens[self._length : end] = tokens
        gram = self._gram
        for place, token in enumerate(tokens, self._length):
            if token == SEPARATOR:
                gram = ()
                continue
            if len(gram) == self._order:
                places = self._places.get(gram)
                if places is None:
                    places = self._places[gram] = array("i")
                places.append(place)
                if len(places) > 2 * MOST_PLACES:
                    del places[:-MOST_PLACES]
            gram = (*gram, token)[-self._order :] if self._order else ()
        self._gram = gram
        self._length = end


def merged(
    ids: np.ndarray, p: np.ndarray, sources: Sequence[tuple[Matches, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """(ascending ids, probabilities) of tokens, after counts of longer and longer contexts.

    `ids`, `p`: [n], distinct tokens. `sources`: (matches, kappa); where several have counts of one
    order, the later ones have the last word. For each of them p <- (kappa·p + counts) / (kappa +
    total): kappa is how many sightings the probabilities so far are worth. What p lacks to 1
    belongs to other tokens, and shrinks likewise.
    """
    sources = [(matches, kappa) for matches, kappa in sources if len(matches.ids)]
    if not sources:
        return ids, p
    union = np.unique(np.concatenate([ids, *(matches.ids for matches, _ in sources)]))
    sum_p = np.zeros(len(union))
    sum_p[np.searchsorted(union, ids)] = p
    # By order before by source: a long match in one text says more than a short one in another.
    steps = sorted(
        (matches.least_order + number, source)
        for source, (matches, _) in enumerate(sources)
        for number in range(len(matches.counts))
    )
    there = [np.searchsorted(union, matches.ids) for matches, _ in sources]
    for order, source in steps:
        matches, kappa = sources[source]
        counts = matches.counts[order - matches.least_order]
        sum_p *= kappa
        sum_p[there[source]] += counts
        sum_p /= kappa + counts.sum()
    return union, sum_p


def children(
    candidates: tuple[np.ndarray, np.ndarray] | None,
    context: Sequence[int],
    *,
    own: Index | None,
    others: Index | None,
    temperature: float = 0.0,
    noise_of: Callable[[np.ndarray], np.ndarray] | None = None,
    sharpness: float = Sharpness.START,
    coverage: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) of the tokens that may follow `context`; without any, both empty.

    `candidates`: (ids, logits) of a draft model's best tokens, without noise; None without a model.
    `context`: the text's last LONGEST tokens, then those of the node's path. `own`: the text
    itself; `others`: other texts. `noise_of`: int ids [n] -> float [n], the noise at the place
    where they would be drawn; it may be None if greedy. `sharpness`, `coverage`: the draft's.
    """
    if candidates is None:
        ids, p, sharpness, kappas = np.zeros(0, np.int64), np.zeros(0), ALONE_SHARPNESS, ALONE
    else:
        ids, logits = candidates
        p = coverage * np.exp(log_softmax(np.asarray(logits, np.float64) / sharpness))
        kappas = WITH_DRAFT
    sources = []
    if others is not None:
        sources.append((others.find(context), kappas.others))
    if own is not None:
        sources.append((own.find(context), kappas.own))
    ids, p = merged(ids, p, sources)
    if not len(ids):
        return ids, p
    with np.errstate(divide="ignore"):  # a logit far below the others
        log_p = np.log(p)
    if temperature == 0:
        return ids, log_p
    # Of a draft alone this is softmax((logits + T·noise) / s). What p lacks to 1 stays as it is.
    known = log_softmax(log_p + temperature / sharpness * noise_of(ids))
    return ids, known + np.log(p.sum())
