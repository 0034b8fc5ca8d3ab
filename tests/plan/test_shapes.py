"""Input shapes come from short lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.plan.shapes import (
    CHUNK_ROWS,
    RunShape,
    capacity_for,
    chunks,
    pack,
    pool_rows,
    together,
)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 150, 255, 256, 257, 511, 512, 513, 700, 4096])
@pytest.mark.parametrize("most", CHUNK_ROWS)
def test_chunks_hold_all_tokens_with_little_padding(n, most):
    sizes = chunks(n, most)
    assert set(sizes) <= {size for size in CHUNK_ROWS if size <= most}
    assert n <= sum(sizes) < n + 256
    assert sum(sizes) - n < max(8, n)
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.lists(st.integers(1, 1300), min_size=1, max_size=80), st.sampled_from(CHUNK_ROWS))
def test_panes_hold_every_token_of_every_lane_once_and_in_order(lengths, most):
    found = {lane: [] for lane in range(len(lengths))}
    for pane in pack(lengths, most):
        assert len(pane.members) <= pane.lanes
        assert pane.n_rows in CHUNK_ROWS
        assert pane.lanes * pane.tokens <= pane.n_rows <= max(most, 2)
        assert len({member.lane for member in pane.members}) == len(pane.members)
        for member in pane.members:
            assert 1 <= member.count <= pane.tokens
            found[member.lane] += range(member.first, member.first + member.count)
    assert found == {lane: list(range(n)) for lane, n in enumerate(lengths)}


def test_lanes_with_a_token_each_are_one_chunk_and_long_prompts_have_their_own():
    assert [(p.lanes, p.tokens, p.n_rows) for p in pack([1] * 64)] == [(64, 1, 64)]
    assert [(p.lanes, p.tokens, p.n_rows) for p in pack([1])] == [(1, 1, 2)]
    found = pack([1] * 64 + [600])
    assert [(p.lanes, p.tokens, p.n_rows) for p in found] == [
        (1, 512, 512),
        (1, 128, 128),
        (64, 1, 64),
    ]
    few = pack([1, 1, 20])  # a second chunk would cost more than the padding
    assert [(p.lanes, p.tokens, p.n_rows) for p in few] == [(4, 32, 128)]


def test_capacity_doubles_then_goes_in_steps():
    found = [capacity_for(n) for n in (1, 64, 65, 128, 129, 1000, 1025, 4160, 5121)]
    assert found == [64, 64, 128, 128, 256, 1024, 2048, 5120, 6144]


def test_pools_grow_in_few_steps_with_little_to_spare():
    sizes = {pool_rows(n) for n in range(1, 100_000)}
    assert len(sizes) < 80
    assert all(n <= pool_rows(n) < n + max(64, n / 7) for n in range(1, 100_000, 7))


def test_the_shapes_of_a_run_are_those_of_its_longest_forward_pass():
    found = RunShape(batch=3, longest=150, context=200, all_logits=True).shapes(64)
    assert (found.batch, found.capacity, found.chunk, found.entries) == (3, 256, 64, 600)
    assert (found.n_rows, found.n_chunks) == (480, 8)  # each 64 + 64 + 32
    assert found.all_logits
    assert not found.single_array


@given(st.integers(1, 100), st.integers(1, 1300), st.sampled_from(CHUNK_ROWS))
def test_the_shapes_of_lanes_that_are_alike_are_those_of_their_chunks(n_lanes, n_tokens, most):
    found = RunShape(n_lanes, n_tokens, 2000).shapes(most)
    prefill, decode = pack([n_tokens] * n_lanes, most), pack([1] * n_lanes, most)
    assert (found.n_chunks, found.n_decode_chunks) == (len(prefill), len(decode))
    assert found.chunk == max(pane.n_rows for pane in [*prefill, *decode])
    assert found.n_rows == max(sum(pane.n_rows for pane in some) for some in (prefill, decode))


def test_a_prompt_may_take_several_forward_passes():
    found = RunShape(longest=100_000, context=100_100).shapes(rows=8192)
    assert (found.n_rows, found.prefills) == (8192, 13)


def test_runs_that_share_forward_passes_need_room_for_all_lanes():
    one, many = RunShape(1, 40, 100).shapes(), RunShape(64, 1, 512).shapes()
    found = together([one, many])
    assert (found.batch, found.capacity, found.entries) == (65, 512, 100 + 64 * 512)
    assert (found.n_rows, found.chunk) == (128 + 64, 128)
    assert found.capacities == (128, 512)
