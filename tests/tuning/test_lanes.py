"""Lanes: what is in them follows from the texts, and nothing is lost or doubled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.errors import UsageError
from jlayer.tuning.examples import Example
from jlayer.tuning.lanes import Lanes, Steps, cut, order, packed, padded, placed

LENGTH = 11


@st.composite
def texts(draw, most=40, least=1):
    """Examples of which each id tells its text and its place there."""
    sizes = draw(st.lists(st.integers(least, most), min_size=1, max_size=25))
    weight = st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])
    found = []
    for number, size in enumerate(sizes, 1):
        weights = draw(st.lists(weight, min_size=size, max_size=size))
        found.append(Example.of(range(1000 * number, 1000 * number + size), [0.0, *weights[1:]]))
    if not any(example.n_learned for example in found):
        found.append(Example.of([1, 2], [0.0, 1.0]))
    return found


def of_sizes(sizes):
    """Examples with so many tokens to learn each."""
    return [Example.of(range(size + 1), [0.0] + [1.0] * size) for size in sizes]


def total(examples):
    return sum(float(example.all_weights.sum(dtype=np.float64)) for example in examples)


def rows(lanes):
    """{(id, its target): weight} of all tokens that have a weight."""
    some = lanes.weights > 0
    pairs = zip(lanes.ids[some].tolist(), lanes.targets[some].tolist(), strict=True)
    return dict(zip(pairs, lanes.weights[some].tolist(), strict=True))


def learned(examples):
    """The same of examples."""
    return {
        (int(example.ids[at - 1]), int(example.ids[at])): float(example.all_weights[at])
        for example in examples
        for at in range(1, len(example.ids))
        if example.all_weights[at]
    }


# Cutting


@given(texts(), st.integers(1, 12))
def test_cut_keeps_each_weight_once(examples, length):
    found = cut(examples, length)
    assert total(found) == total(examples)
    assert learned(found) == learned(examples)
    for piece in found:
        assert 2 <= len(piece.ids) == len(piece.all_weights) <= length + 1
        assert piece.all_weights[0] == 0.0
        assert piece.n_learned


def test_pieces_follow_one_another():
    (example,) = of_sizes([10])
    found = [list(piece.ids) for piece in cut([example], 4)]
    assert found == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10]]
    assert cut([example], 10) == [example]


def test_nothing_that_counts():
    with pytest.raises(UsageError, match="every weight is 0; give some text weight"):
        cut([Example.of([1, 2, 3], [0, 0, 0]), Example.of([1], [0])], 4)


# Lanes


@pytest.mark.parametrize("put", [packed, padded])
@given(examples=texts())
def test_what_a_lane_holds(put, examples):
    examples = cut(examples, LENGTH)
    lanes = put(examples, LENGTH)
    assert {name: array.dtype for name, array in vars(lanes).items()} == {
        "ids": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "positions": np.int32,
        "texts": np.int32,
    }
    seen = []
    for lane in range(len(lanes.ids)):
        ids, targets, weights, positions, numbers = (
            array[lane].tolist() for array in vars(lanes).values()
        )
        n = sum(number > 0 for number in numbers)
        assert sorted(set(numbers[:n])) == list(range(1, max(numbers) + 1))
        assert numbers[:n] == sorted(numbers[:n])
        for rest in (ids, targets, weights, positions, numbers):
            assert not any(rest[n:])
        for number in range(1, max(numbers) + 1):
            at = [place for place in range(LENGTH) if numbers[place] == number]
            assert [positions[place] for place in at] == list(range(len(at)))
            text = [ids[at[0]], *(targets[place] for place in at)]
            assert [ids[place] for place in at] == text[:-1]
            seen.append(Example.of(text, [0.0, *(weights[place] for place in at)]))
        assert put is packed or max(numbers) == 1

    def key(example):
        return list(example.ids)

    assert sorted(seen, key=key) == sorted(examples, key=key)


def first_fit_decreasing(sizes, length):
    """How many lanes it takes."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        for at, room in enumerate(rooms):
            if room >= size:
                rooms[at] -= size
                break
        else:
            rooms.append(length - size)
    return len(rooms)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 30))
def test_lanes_are_about_as_many_as_if_the_long_texts_came_first(sizes, length):
    lanes = placed(of_sizes(sizes), length)
    assert sorted(number for lane in lanes for number in lane) == list(range(len(sizes)))
    found = [sum(sizes[number] for number in lane) for lane in lanes]
    assert max(found) <= length
    # No two lanes would have room in one: so none was begun without need.
    assert len(found) == 1 or sum(sorted(found)[:2]) > length
    assert len(lanes) <= 1.7 * first_fit_decreasing(sizes, length)  # best fit's own bound


def drawn(name, n):
    rng = np.random.default_rng(5)
    return {
        "short": lambda: rng.integers(30, 300, n),
        "most short": lambda: np.clip(rng.lognormal(5.3, 0.8, n), 5, 2048).astype(int),
        "all lengths": lambda: rng.integers(1, 2049, n),
        "three a lane": lambda: rng.integers(600, 800, n),
    }[name]().tolist()


# By first fit decreasing it is 0.998, 0.998, 0.994 and 0.866.
@pytest.mark.parametrize(
    ("name", "fill"),
    [("short", 0.99), ("most short", 0.99), ("all lengths", 0.96), ("three a lane", 0.87)],
)
def test_how_full_lanes_are(name, fill):
    sizes = drawn(name, 3000)
    n_lanes = len(placed(of_sizes(sizes), 2048))
    assert sum(sizes) / (2048 * n_lanes) > fill
    assert n_lanes < 1.03 * first_fit_decreasing(sizes, 2048)


# Order


def test_an_order_is_of_its_seed_and_epoch():
    assert order(6, 0, 0).tolist() == [3, 2, 5, 4, 0, 1]
    found = {tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(found) == 9
    assert all(sorted(each) == list(range(50)) for each in found)


# Steps


def lanes_of(steps, first, end):
    """The lanes of some steps, one by one."""
    for lanes in map(steps.step, range(first, end)):
        for lane in range(len(lanes.ids)):
            yield Lanes(*(array[lane : lane + 1] for array in vars(lanes).values()))


def bytes_of(lanes):
    return [array.tobytes() for array in vars(lanes).values()]


@given(
    examples=texts(most=15), count=st.integers(1, 9), seed=st.integers(0, 3), packs=st.booleans()
)
def test_each_epoch_has_all_that_is_learned_once(examples, count, seed, packs):
    examples = cut(examples, LENGTH)
    steps = Steps(examples, LENGTH, count, seed, packs)
    lanes = lanes_of(steps, 0, 1000)
    n_lanes = 0
    for epoch in range(1, 4):
        found, weight = {}, 0.0
        while weight < total(examples):
            lane = next(lanes)
            n_lanes += 1
            weight += float(lane.weights.sum())
            assert not found.keys() & rows(lane).keys()
            found |= rows(lane)
        assert found == learned(examples)
        assert weight == total(examples)
        assert steps.n_steps(epoch) == -(-n_lanes // count)
        if n_lanes % count == 0:
            assert steps.epoch_of(n_lanes // count) == epoch


@given(examples=texts(most=15), count=st.integers(1, 9), packs=st.booleans())
def test_a_step_is_the_same_whatever_was_asked_before(examples, count, packs):
    examples = cut(examples, LENGTH)
    steps = Steps(examples, LENGTH, count, 7, packs)
    found = [bytes_of(steps.step(number)) for number in range(12)]
    assert all(len(steps.step(number).ids) == count for number in range(12))
    for number in (11, 0, 5, 10, 1):
        assert bytes_of(Steps(examples, LENGTH, count, 7, packs).step(number)) == found[number]
        assert bytes_of(steps.step(number)) == found[number]


@pytest.mark.parametrize("packs", [True, False])
def test_another_seed_gives_other_lanes(packs):
    examples = of_sizes(range(1, 40))
    one, same, other = (Steps(examples, 40, 3, seed, packs) for seed in (1, 1, 2))
    assert bytes_of(one.step(0)) == bytes_of(same.step(0))
    assert bytes_of(one.step(0)) != bytes_of(other.step(0))


def test_how_many_steps_a_share_of_the_data_takes():
    steps = Steps(of_sizes([5] * 10), 5, 1, 0, packs=False)
    found = {epochs: steps.n_steps(epochs) for epochs in (1e-9, 0.1, 0.3, 0.31, 1, 1.1, 2.0, 12)}
    assert found == {1e-9: 1, 0.1: 1, 0.3: 3, 0.31: 4, 1: 10, 1.1: 11, 2.0: 20, 12: 120}
    for number in range(25):
        assert steps.epoch_of(number) == pytest.approx(number / 10)
    by_three = Steps(of_sizes([5] * 10), 5, 3, 0, packs=False)
    assert [by_three.n_steps(epochs) for epochs in (0.1, 1, 3)] == [1, 4, 10]


@pytest.mark.slow
def test_many_epochs_of_many_texts():
    examples = of_sizes(drawn("short", 100_000))
    n_steps = Steps(examples, 2048, 2, 0, packs=True).n_steps(10)
    last = Steps(examples, 2048, 2, 0, packs=True).step(n_steps - 1)
    assert len(last.ids) == 2
    n_lanes = sum(len(example.ids) - 1 for example in examples) * 10 / 2048
    assert n_lanes / 2 < n_steps < 1.02 * n_lanes / 2
