"""Numbers, one by one: every pattern of 16 bits and many of 32, against torch."""

import numpy as np
import pytest

from jlayer.convert.transform.cast import NUMPY_DTYPE, cast, count_nonfinite
from jlayer.encodings.blocks import BLOCKS
from tests.encoded import random_pieces

BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def patterns(dtype):
    """Every pattern of 16 bits; of 32, some of each exponent, and every tie of bfloat16."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return np.concatenate([(high[:, None] | low).reshape(-1), random])


def wide(bits, dtype):
    with np.errstate(invalid="ignore"):
        return bits.view(NUMPY_DTYPE[dtype]).astype(np.float64)


@pytest.mark.parametrize("target", BITS)
@pytest.mark.parametrize("dtype", BITS)
def test_casts_are_torchs(dtype, target):
    torch = pytest.importorskip("torch")
    bits = patterns(dtype)
    found = np.frombuffer(cast(bits.tobytes(), dtype, target), BITS[target])
    numbers = torch.from_numpy(bits.copy()).view(getattr(torch, dtype))
    expected = numbers.to(getattr(torch, target)).view(getattr(torch, BITS[target].__name__))
    expected = expected.numpy()
    are_nan = np.isnan(wide(bits, dtype))
    assert np.array_equal(found[~are_nan], expected[~are_nan])
    assert np.isnan(wide(found[are_nan], target)).all()


@pytest.mark.parametrize("dtype", BITS)
def test_what_is_not_finite_is_counted(dtype):
    bits = patterns(dtype)
    expected = int((~np.isfinite(wide(bits, dtype))).sum())
    assert count_nonfinite(bits.tobytes(), dtype) == expected > 0


def test_a_single_one_is_found_wherever_it_is():
    for at in (0, 131_071, 131_072, 399_999):
        numbers = np.zeros(400_000, np.float32)
        numbers[at] = np.nan
        assert count_nonfinite(numbers.tobytes(), "float32") == 1


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_numbers_of_blocks_are_counted_wherever_chunks_begin(row):
    q = random_pieces(row.name, 3, 5 * row.weights)["q"]
    assert count_nonfinite(q.tobytes(), row.name) == 0
    blocks, planted = q.reshape(-1, row.n_block_bytes), 0
    for block, number in ((2, np.inf), (3, -np.inf), (14, np.nan)):
        for at, dtype in row.numbers:
            raw = np.array([number], "<f2").view(np.uint8) if dtype == "float16" else [255]
            blocks[block, at : at + len(raw)] = raw
            planted += 1
    raw = q.tobytes()
    for size in (1, 7, 16, row.n_block_bytes, len(raw)):
        begins = range(0, len(raw), size)
        counts = [count_nonfinite(raw[at : at + size], row.name, begin=at) for at in begins]
        assert sum(counts) == planted
