"""Input shapes come from short lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.plan.limits import chunk_limits
from jlayer.plan.shapes import (
    CHUNK_ROWS,
    PackedRows,
    RunShape,
    capacity_for,
    chunks,
    pack,
    pool_rows,
    rows_for,
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


@given(
    st.lists(st.tuples(st.integers(1, 1300), st.integers(0, 2)), max_size=60),
    st.sampled_from(CHUNK_ROWS),
)
def test_rows_of_panes_are_counted_lane_by_lane(lanes, most):
    rows, packed = PackedRows(most), [[], [], []]
    for n_tokens, rank in lanes:
        expected = rows.beside(n_tokens, rank)
        rows.add(n_tokens, rank)
        packed[rank].append(n_tokens)
        panes = [pane for some in packed for pane in pack(some, most, shared=0)]
        assert rows.n_rows == expected == sum(pane.n_rows for pane in panes)


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


def test_a_run_whose_lanes_share_entries_has_fewer_rows():
    alone = RunShape(100, 300, 310).shapes()
    shared = RunShape(100, 300, 310, rides=3000).shapes()
    assert (alone.n_rows, alone.prefills) == (100 * 320, 1)
    assert (shared.n_rows, shared.prefills) == (3000, 1)
    assert shared.n_chunks == 6
    limited = RunShape(100, 300, 310, rides=3000).shapes(rows=1600)
    assert (limited.n_rows, limited.prefills) == (1600, 2)
    assert limited.chunk == 512
    assert RunShape(100, 1, 310, rides=3000).shapes() == RunShape(100, 1, 310).shapes()


def test_runs_that_share_forward_passes_need_room_for_all_lanes():
    one, many = RunShape(1, 40, 100).shapes(), RunShape(64, 1, 512).shapes()
    found = together([one, many])
    assert (found.batch, found.capacity, found.entries) == (65, 512, 100 + 64 * 512)
    assert (found.n_rows, found.chunk) == (128 + 64, 128)
    assert found.capacities == (128, 512)


# Guessed tokens


@given(st.integers(1, 70), st.integers(0, 511), st.integers(0, 69), st.sampled_from(CHUNK_ROWS))
def test_each_lane_has_its_share_of_the_guessed_tokens_in_one_chunk(lanes, share, rest, most):
    run = RunShape(lanes, 20, 100, nodes=lanes * share + min(rest, lanes - 1))
    if most < run.least_chunk:
        assert most not in chunk_limits(run)
        return
    assert most in chunk_limits(run)
    found, panes = run.shapes(most), pack([1 + share] * lanes, most, whole=range(lanes))
    assert all(member.count == 1 + share for pane in panes for member in pane.members)
    assert found.n_decode_chunks == len(panes)
    assert found.chunk == max(run.shapes(most).chunk, *(pane.n_rows for pane in panes))
    assert found.chunk <= most
    assert found.n_rows >= sum(pane.n_rows for pane in panes)
    assert found.entries == lanes * 100 + run.nodes
    assert found.wanted == lanes + run.nodes


def test_a_run_without_guessed_tokens_has_the_shapes_that_it_had():
    assert RunShape(3, 20, 100, nodes=2).least_chunk == 2  # less than one for each
    one, many = RunShape(1, 1, 64).shapes(), RunShape(1, 1, 64, nodes=63).shapes()
    assert (one.chunk, one.n_rows, one.nodes, one.wanted) == (2, 2, 0, 1)
    assert (many.chunk, many.n_rows, many.nodes, many.wanted) == (64, 64, 63, 64)


def test_a_tree_is_not_split_where_a_prompt_is():
    assert [pane.tokens for pane in pack([65, 65])] == [64, 64, 1]
    assert [(p.lanes, p.tokens) for p in pack([65, 65], whole=[0, 1])] == [(2, 128)]
    found = [(p.tokens, [m.lane for m in p.members]) for p in pack([65, 65], whole=[1])]
    assert found == [(64, [0]), (128, [1]), (1, [0])]


def test_chunks_are_not_smaller_than_the_largest_tree():
    runs = RunShape(2, nodes=20), RunShape(1, nodes=30), RunShape()
    assert [run.least_chunk for run in runs] == [16, 32, 2]
    assert chunk_limits(*runs) == (512, 256, 128, 64, 32)
    assert chunk_limits(runs[2]) == CHUNK_ROWS[::-1]
    with pytest.raises(AssertionError):
        runs[1].shapes(16)
    with pytest.raises(AssertionError):
        RunShape(nodes=512)


def test_runs_that_share_forward_passes_bring_their_trees_together():
    one, two = RunShape(2, 1, 100, nodes=30).shapes(), RunShape(1, 40, 100, nodes=31).shapes()
    found = together([one, two])
    assert (found.nodes, found.batch, found.wanted) == (61, 3, 64)
    assert found.entries == 3 * 100 + 61
    panes = pack([16, 16, 32], whole=range(3))
    assert found.n_decode_chunks == len(panes)
    assert found.n_rows == sum(pane.n_rows for pane in panes) + rows_for(40)
