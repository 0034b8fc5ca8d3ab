"""The digest of rows: any order, any cut, and any change shows."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from jlayer.checkpoint.digest import Checks, Expected, TensorDigest, rows_of
from jlayer.errors import CheckpointError


def digest_of(array):
    found = TensorDigest(array.shape, array.nbytes)
    found.update(array.tobytes())
    return found.hexdigest()


def checks_of(array):
    return Checks({"x": Expected("file", digest_of(array), rows_of(array.shape))})


def array_of(n_rows, n_columns):
    return np.random.default_rng(n_rows).integers(0, 1 << 16, (n_rows, n_columns), np.uint16)


def test_it_is_the_sum_of_each_row_hashed_with_its_number():
    array = array_of(3, 5)
    rows = [xxhash.xxh3_128(row.tobytes(), seed=i).intdigest() for i, row in enumerate(array)]
    assert int(digest_of(array), 16) == sum(rows) % 2**128


@given(st.integers(1, 20), st.integers(1, 9), st.randoms())
def test_bytes_in_chunks_of_any_size_give_the_same(n_rows, n_columns, random):
    array = array_of(n_rows, n_columns)
    found, rest = TensorDigest(array.shape, array.nbytes), array.tobytes()
    while rest:
        size = random.randint(1, len(rest))
        found.update(rest[:size])
        rest = rest[size:]
    assert found.hexdigest() == digest_of(array)


@given(st.integers(1, 20), st.randoms(), st.booleans())
def test_rows_in_any_order_and_any_ranges_are_the_same_tensor(n_rows, random, is_damaged):
    """A sound one passes; a damaged one is refused with its last range, and not before."""
    array, checks = array_of(n_rows, 4), checks_of(array_of(n_rows, 4))
    if is_damaged:
        array[random.randrange(n_rows), random.randrange(4)] ^= 1 << random.randrange(16)
    cuts = sorted({0, n_rows, *(random.randint(0, n_rows) for _ in range(4))})
    ranges = list(pairwise(cuts))
    random.shuffle(ranges)
    refused = []
    for first, end in ranges:
        try:
            checks.add("x", array[first:end].tobytes(), n_rows=end - first, first_row=first)
        except CheckpointError:
            refused.append((first, end))
    assert refused == (ranges[-1:] if is_damaged else [])


@given(st.integers(2, 20), st.data())
def test_any_flipped_bit_is_refused_at_the_last_row_and_from_then_on(n_rows, data):
    array, checks = array_of(n_rows, 4), checks_of(array_of(n_rows, 4))
    bit = data.draw(st.integers(0, array.nbytes * 8 - 1))
    array.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
    checks.add("x", array[1:].tobytes(), n_rows=n_rows - 1, first_row=1)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"^file: tensor x: damaged"):
            checks.add("x", array[:1].tobytes(), n_rows=1)


def test_exchanged_rows_are_refused():
    array = array_of(4, 4)
    checks = checks_of(array)
    with pytest.raises(CheckpointError, match="damaged"):
        checks.add("x", array[[1, 0, 2, 3]].tobytes(), n_rows=4)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_restart_forgets_what_was_seen_in_part(is_damaged):
    """Neither are rows counted that will come again, nor is their digest added twice."""
    array = array_of(4, 4)
    checks = checks_of(array)
    checks.add("x", array[:2].tobytes(), n_rows=2)
    checks.restart()
    array[3, 3] ^= is_damaged
    checks.add("x", array[:3].tobytes(), n_rows=3)
    with pytest.raises(CheckpointError, match="damaged") if is_damaged else nullcontext():
        checks.add("x", array[3:].tobytes(), n_rows=1, first_row=3)
    if not is_damaged:  # known to be sound: what comes again is let through
        checks.restart()
        checks.add("x", array[::-1].tobytes(), n_rows=4)
