"""Lookup: counts equal those of a naive search, and merging keeps probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.drafting.lookup import MOST_PLACES, NO_MATCHES, Index, Matches, children, merged
from jlayer.drafting.scores import log_softmax

token = st.integers(0, 2)  # few tokens, so that long contexts repeat
texts = st.lists(st.lists(token, max_size=40), min_size=1, max_size=4)


def naive(texts, context, *, least, longest):
    """counts[order][token]: how often it followed the last `order` tokens of the context."""
    counts = {}
    for order in range(least, min(longest, len(context)) + 1):
        wanted = context[len(context) - order :]
        for text in texts:
            for at in range(order, len(text)):
                if text[at - order : at] == wanted:
                    found = counts.setdefault(order, {})
                    found[text[at]] = found.get(text[at], 0) + 1
    return counts


def as_counts(matches, *, least):
    return {
        order: {int(i): int(n) for i, n in zip(matches.ids, row, strict=True) if n}
        for order, row in enumerate(matches.counts, least)
    }


@given(texts, st.lists(token, max_size=10), st.integers(0, 4), st.integers(4, 8), st.data())
def test_counts_are_those_of_a_naive_search(texts, context, least, longest, data):
    index = Index(least)
    for text in texts:
        cut = data.draw(st.integers(0, len(text)))
        index.append(text[:cut])
        index.append(text[cut:])
        index.end_text()
    found = as_counts(index.find(context, longest), least=least)
    assert found == naive(texts, context, least=least, longest=longest)


def test_the_oldest_half_is_dropped():
    index = Index(2, most_tokens=20)
    index.append([1, 2, 3, 4, 5, 6])
    assert index.find([1, 2]).ids.tolist() == [3]
    for _ in range(30):
        index.append([7, 8, 9])
        assert len(index) <= 20
    assert index.find([1, 2]) is NO_MATCHES
    assert index.find([7, 8]).ids.tolist() == [9]
    index.append([1])
    assert index.find([8, 9]).ids.tolist() == [1, 7]


def test_of_one_context_the_latest_places_count():
    index = Index(1)
    for follower in (5, 6, 7):  # so many that the first ones are forgotten
        index.append([4, follower] * MOST_PLACES)
    found = index.find([4])
    assert found.ids.tolist() == [7]
    assert found.counts.tolist() == [[MOST_PLACES]]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), max_size=3),
    st.floats(0.1, 100),
)
def test_merged_probabilities_sum_to_one_at_most(p, counts, kappa):
    p = np.array(p) / max(1.0, sum(p))
    ids = np.arange(0, 3 * len(p), 3)
    matches = Matches(np.array([1, 3, 4, 6], np.int32), np.array(counts).reshape(-1, 4), 2)
    union, after = merged(ids, p, [(matches, kappa)])
    assert set(union) == set(ids) | {1, 3, 4, 6}
    left = 1 - p.sum()
    for row in matches.counts:
        left *= kappa / (kappa + row.sum())
    assert after.min() >= 0
    assert after.sum() == pytest.approx(1 - left)


def test_longer_matches_weigh_more():
    matches = Matches(np.array([4, 5], np.int32), np.array([[3, 1], [0, 1]]), 2)
    ids, p = merged(np.array([9]), np.array([1.0]), [(matches, 2.0)])
    assert ids.tolist() == [4, 5, 9]
    assert np.allclose(p, [3 / 6 * 2 / 3, (1 / 6 * 2 + 1) / 3, 2 / 6 * 2 / 3])


def test_sources_are_merged_by_order_and_the_later_has_the_last_word():
    short = Matches(np.array([4], np.int32), np.array([[6]]), 1)
    long = Matches(np.array([5], np.int32), np.array([[1], [1]]), 1)
    none = (np.zeros(0, np.int64), np.zeros(0))
    _, p = merged(*none, [(long, 2.0), (short, 2.0)])
    # Order 1: long, then short; order 2: long again.
    assert np.allclose(p, [6 / 8 * 2 / 3, (1 / 3 * 2 / 8 * 2 + 1) / 3])
    _, p = merged(*none, [(short, 2.0), (long, 2.0)])
    assert np.allclose(p, [6 / 8 * 4 / 9, (1 / 3 * 2 + 1) / 3])


def noise_of(ids):
    return np.sin(17.0 * np.asarray(ids))


@pytest.mark.parametrize("candidates", [None, (np.array([3, 6]), np.array([1.0, 1.5]))])
def test_small_temperatures_come_near_greedy(candidates):
    own = Index(2)
    own.append([1, 2, 3, 1, 2, 4, 1, 2, 3])

    def at(temperature):
        return children(
            candidates,
            [9, 1, 2],
            own=own,
            others=None,
            temperature=temperature,
            noise_of=noise_of,
            coverage=0.9,
        )

    ids, greedy = at(0.0)
    assert ids.tolist() == ([3, 4] if candidates is None else [3, 4, 6])
    assert np.allclose(at(1e-9)[1], greedy)
    warm = at(0.5)[1]
    assert not np.allclose(warm, greedy)
    assert np.exp(warm).sum() == pytest.approx(np.exp(greedy).sum()), "the noise moves no mass away"
    assert np.exp(greedy).sum() < 1


def test_a_draft_alone_knows_the_noise():
    ids, logits = np.array([5, 2, 9]), np.array([2.0, 1.0, 0.5])
    known = log_softmax((logits + 0.7 * noise_of(ids)) / 0.5)
    found, log_p = children(
        (ids, logits),
        [1, 2],
        own=Index(2),
        others=None,
        temperature=0.7,
        noise_of=noise_of,
        sharpness=0.5,
        coverage=0.8,
    )
    assert found.tolist() == ids.tolist()
    assert np.allclose(log_p, known + np.log(0.8))


def test_other_texts_help_where_the_text_itself_has_nothing():
    others = Index(4)
    others.append([1, 2, 3, 4, 5, 6])
    candidates = (np.array([7]), np.array([0.0]))
    ids, log_p = children(candidates, [2, 3, 4, 5], own=Index(2), others=others)
    assert ids.tolist() == [6, 7]
    assert np.allclose(np.exp(log_p), [1 / 101, 100 / 101])


def test_nothing_known_means_no_children():
    ids, log_p = children(None, [1, 2], own=Index(2), others=Index(4))
    assert len(ids) == len(log_p) == 0
