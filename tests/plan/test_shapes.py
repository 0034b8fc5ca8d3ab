"""Input shapes come from short lists."""

import pytest

from jlayer.plan.shapes import CHUNK_TOKENS, RunShape, capacity_for, chunks


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 150, 255, 256, 257, 511, 512, 513, 700, 4096])
@pytest.mark.parametrize("most", CHUNK_TOKENS)
def test_chunks_hold_all_tokens_with_little_padding(n, most):
    sizes = chunks(n, most)
    assert set(sizes) <= {size for size in CHUNK_TOKENS if size <= most}
    assert n <= sum(sizes) < n + 256
    assert list(sizes) == sorted(sizes, reverse=True)


def test_capacity_doubles_then_goes_in_steps():
    found = [capacity_for(n) for n in (1, 64, 65, 128, 129, 1000, 1025, 4160, 5121)]
    assert found == [64, 64, 128, 128, 256, 1024, 2048, 5120, 6144]


def test_the_shapes_of_a_run_are_those_of_its_longest_forward_pass():
    found = RunShape(batch=3, longest=150, context=200, all_logits=True).shapes(64)
    assert (found.batch, found.capacity, found.chunk) == (3, 256, 64)
    assert (found.n_columns, found.n_chunks) == (192, 3)
    assert found.all_logits
    assert not found.single_array
