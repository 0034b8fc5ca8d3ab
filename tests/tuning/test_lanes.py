"""Lanes: what is cut, packed and given to each step, counted token by token."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.errors import UsageError
from jlayer.tuning.data import Example
from jlayer.tuning.lanes import (
    MOST_OPEN,
    Steps,
    counts,
    cut,
    filled,
    n_places,
    order,
    packed,
    packing,
    padded,
)


def text(*weights, first=1):
    """A text whose ids are one after another from `first`, with these weights after the first."""
    return Example(tuple(range(first, first + len(weights) + 1)), (0.0, *weights))


def texts_of(seed, n, *, longest=40):
    """Texts with ids that no other has."""
    draw, first, found = random.Random(seed), 1, []
    for _ in range(n):
        weights = [draw.choice((0.0, 0.5, 1.0)) for _ in range(draw.randrange(1, longest))]
        found.append(text(*weights, 1.0, first=first))
        first += len(weights) + 2
    return found


weights = st.lists(st.sampled_from((0.0, 0.25, 1.0)), max_size=30)
lists_of_texts = st.lists(weights.map(lambda found: text(*found)), min_size=1, max_size=12)


def predicted(lanes):
    """How often each (id, the id that is predicted from it, weight) is in lanes."""
    there = lanes.weights > 0
    found = zip(lanes.ids[there], lanes.targets[there], lanes.weights[there], strict=True)
    return Counter((int(a), int(b), float(w)) for a, b, w in found)


def predictions(examples):
    """The same of texts."""
    return Counter(
        (a, b, float(w))
        for one in examples
        for a, b, w in zip(one.ids, one.ids[1:], one.weights[1:], strict=False)
        if w
    )


# Cutting


@given(lists_of_texts, st.integers(1, 12))
def test_every_id_but_the_first_of_a_text_is_predicted_once(examples, length):
    if not any(any(one.weights) for one in examples):
        with pytest.raises(UsageError, match="nothing to learn"):
            cut(examples, length)
        return
    pieces = cut(examples, length)
    assert predictions(pieces) == predictions(examples)
    assert sum(sum(one.weights) for one in pieces) == sum(sum(one.weights) for one in examples)
    assert all(1 <= n_places(one) <= length and one.weights[0] == 0 for one in pieces)
    assert all(any(one.weights) for one in pieces)
    found = counts(examples, length)
    assert found.n_pieces == len(pieces)
    assert found.n_tokens == sum(map(n_places, pieces))
    assert found.n_predicted == sum(predictions(pieces).values())
    assert found.n_cut == sum(len(one.ids) > length + 1 for one in examples)


def test_pieces_overlap_by_one_and_those_without_weight_are_left_out():
    one = text(1.0, 1.0, 0.0, 0.0, 0.0, 2.0, 0.5)
    assert [piece.ids for piece in cut([one], 2)] == [(1, 2, 3), (5, 6, 7), (7, 8)]
    assert [piece.weights for piece in cut([one], 2)] == [(0, 1, 1), (0, 0, 2), (0, 0.5)]
    assert counts([one], 2).n_left_out == 1
    assert cut([one], 7) == [one]
    assert [len(piece.ids) for piece in cut([one], 6)] == [7, 2]


# Lanes


def test_a_lane_of_two_texts_number_by_number():
    lanes = filled([[text(1.0, 0.5, first=4), text(0.25, first=8)], [text(2.0, first=9)]], 4)
    assert lanes.ids.tolist() == [[4, 5, 8, 0], [9, 0, 0, 0]]
    assert lanes.targets.tolist() == [[5, 6, 9, 0], [10, 0, 0, 0]]
    assert lanes.weights.tolist() == [[1, 0.5, 0.25, 0], [2, 0, 0, 0]]
    assert lanes.positions.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert lanes.texts.tolist() == [[1, 1, 2, 0], [1, 0, 0, 0]]
    ints = (lanes.ids, lanes.targets, lanes.positions, lanes.texts)
    assert {array.dtype for array in ints} == {np.dtype("int32")}
    assert lanes.weights.dtype == np.float32


def assert_well_formed(lanes):
    """Texts stand from the left without holes, numbered from 1, their positions from 0."""
    for lane in range(len(lanes.ids)):
        numbers = lanes.texts[lane]
        n = int((numbers > 0).sum())
        assert n
        assert (numbers[:n] > 0).all()
        begins = np.flatnonzero(np.diff(numbers[:n], prepend=0))
        assert numbers[begins].tolist() == list(range(1, len(begins) + 1))
        spans = np.split(lanes.positions[lane, :n], begins[1:])
        assert all(span.tolist() == list(range(len(span))) for span in spans)
        for array in (lanes.ids, lanes.targets, lanes.weights, lanes.positions):
            assert not array[lane, n:].any()
        assert lanes.weights[lane].any()


@pytest.mark.parametrize("arranged", [packed, padded])
@pytest.mark.parametrize("seed", range(5))
def test_lanes_have_every_text_once(arranged, seed):
    examples = cut(texts_of(seed, 100), 32)
    lanes = arranged(examples, 32)
    assert_well_formed(lanes)
    assert predicted(lanes) == predictions(examples)
    assert (arranged is padded) == (len(lanes.ids) == len(examples))


@given(st.lists(st.integers(1, 16), max_size=200))
def test_packing_has_every_text_once_and_no_lane_too_full(sizes):
    lanes = packing(sizes, 16)
    assert sorted(number for lane in lanes for number in lane) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in lane) <= 16 for lane in lanes)
    assert [lane[0] for lane in lanes] == sorted(lane[0] for lane in lanes)
    if len(lanes) <= MOST_OPEN:  # no two would have fitted into one
        half_empty = [lane for lane in lanes if sum(sizes[number] for number in lane) <= 8]
        assert len(half_empty) <= 1


def test_packing_leaves_few_places_empty():
    draw = random.Random(1)
    sizes = [draw.randrange(1, 512) for _ in range(5000)]
    assert sum(sizes) / (512 * len(packing(sizes, 512))) > 0.97


# Steps


def test_the_order_is_decided_by_the_seed_and_the_epoch():
    assert order(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    orders = [order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(found) == list(range(50)) for found in orders)
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("lanes_per_step", [1, 4, 7, 200])
def test_each_epoch_has_every_text_once_across_its_steps(packs, lanes_per_step):
    """200 lanes a step are several epochs at once."""
    examples = cut(texts_of(3, 60), 24)
    steps = Steps(examples, 24, lanes_per_step, seed=5, packs=packs)
    n_epochs, whole, n_lanes = 3, Counter(), 0
    while steps.epoch_of(n_lanes // lanes_per_step) < n_epochs:
        lanes = steps.step(n_lanes // lanes_per_step)
        assert lanes.ids.shape == (lanes_per_step, 24)
        assert_well_formed(lanes)
        whole += predicted(lanes)
        n_lanes += lanes_per_step
    assert n_lanes // lanes_per_step == steps.n_steps(n_epochs)
    once = predictions(examples)
    assert all(whole[key] >= n_epochs * once[key] for key in once)
    assert whole.keys() == once.keys()
    if lanes_per_step == 1:  # then no step has lanes of the next epoch
        assert whole == Counter({key: n_epochs * n for key, n in once.items()})


@settings(max_examples=30)
@given(st.integers(0, 100), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_a_run_that_goes_on_sees_what_one_that_never_stopped_would(number, n, packs, seed):
    examples = cut(texts_of(1, 12), 16)
    through = Steps(examples, 16, n, seed=seed, packs=packs)
    for before in range(number):
        through.step(before)
    again = Steps(examples, 16, n, seed=seed, packs=packs)
    one, other = through.step(number), again.step(number)
    for name in ("ids", "targets", "weights", "positions", "texts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert through.epoch_of(number) == again.epoch_of(number)
    assert again.step(0).ids.tolist() == through.step(0).ids.tolist()


def test_epochs_differ_and_are_counted():
    steps = Steps(texts_of(2, 10), 64, 4, seed=0, packs=False)
    assert [steps.epoch_of(number) for number in (0, 1, 5)] == [0, 0.4, 2]
    assert [steps.n_steps(epochs) for epochs in (0.1, 0.4, 1, 2, 0.1 + 0.2)] == [1, 1, 3, 5, 1]
    assert Steps(texts_of(2, 10), 64, 1, seed=0, packs=False).n_steps(0.1 + 0.2) == 3
    first, later = (steps.step(number).ids.tolist() for number in (0, 5))
    assert first != later


def test_what_no_lane_can_have_is_refused():
    silent = text(0.0, 0.0)
    with pytest.raises(UsageError, match="text 2 has no weight"):
        Steps([text(1.0), silent], 8, 1, seed=0)
    with pytest.raises(UsageError, match="0 texts and 1 lanes"):
        Steps([], 8, 1, seed=0)
    with pytest.raises(UsageError, match="none of 2 texts has a weight above 0"):
        cut([silent, silent], 8)
