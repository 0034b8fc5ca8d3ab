"""Properties of the schedule where experts are chosen as it goes: what moves, what is kept, and
what may never happen to a slot, whatever is chosen."""

from hypothesis import given
from hypothesis import strategies as st

from jlayer.plan.experts import ExpertRooms
from jlayer.streaming.lru import Lru
from jlayer.streaming.steps import Drop, Free, Put, Read, Run
from tests.streaming.decided import (
    AFTER,
    BEFORE,
    CHOICES,
    EXPERT_OF,
    FIRST,
    N_EXPERTS,
    N_LAYERS,
    N_PLACES,
    N_SWEEPS,
    TILES,
    place_of,
    run_in_order,
    runs,
    simulated,
    sizes,
    steps_of,
    stream_of,
)


@given(runs)
def test_what_is_chosen_runs_in_order_and_nothing_else_does(run):
    _, rest = steps_of(run, stream_of(run))
    decisions = iter(run["chosen"])
    for one in rest:
        expected = []
        for layer, choice in enumerate(CHOICES):
            start = layer * (len(TILES) // N_LAYERS)
            expected += range(start, start + BEFORE)
            expected += [tile for expert in next(decisions) for tile in choice.tiles[expert]]
            expected += range(choice.end, choice.end + AFTER)
        assert run_in_order(one) == expected


@given(runs)
def test_what_runs_was_put_and_what_is_put_was_read(run):
    """Also: never more on the device than was planned, and a slot holds one tile at a time."""
    begin, rest = steps_of(run, stream_of(run))
    in_slot, on_device, passing = {}, set(), set()
    for step in [*begin, *(step for one in rest for step in one)]:
        match step:
            case Read(tile, slot):
                if isinstance(slot, int):
                    assert slot not in in_slot
                in_slot[place_of(step)] = tile
            case Put(tile, slot, stays):
                assert in_slot[place_of(step)] == tile
                assert tile not in on_device
                on_device.add(tile)
                if tile in EXPERT_OF and not stays:
                    passing.add(tile)
            case Run(tile, _, also):
                assert {tile, *also} <= on_device
            case Drop(tile):
                on_device.remove(tile)
            case Free(tile, slot, after):
                if isinstance(slot, int):
                    assert in_slot.pop(slot) == tile
                if after is not None:
                    on_device.remove(tile)
                    passing.discard(tile)
        assert len(passing) <= run["ahead"]
        kept = {EXPERT_OF[tile] for tile in on_device - passing if tile in EXPERT_OF}
        for layer, most in enumerate(run["on_device"]):
            assert sum(of_layer == layer for of_layer, _ in kept) <= most


@given(runs)
def test_hits_are_those_of_a_simulated_cache_and_what_moves_is_the_rest(run):
    experts = stream_of(run)
    _, rest = steps_of(run, experts)
    hits, missed = simulated(run["on_device"], run["chosen"])
    assert experts.totals.experts_on_device == hits
    assert experts.totals.experts_used == sum(map(len, run["chosen"]))
    puts = [step.tile for one in rest for step in one if isinstance(step, Put)]
    found = [EXPERT_OF[tile] for tile in puts if tile in EXPERT_OF]
    assert found == [each for each in missed for _ in range(N_PLACES)]
    reads = [step.tile for one in rest for step in one if isinstance(step, Read)]
    n_read = sum(tile in EXPERT_OF for tile in reads)
    assert n_read == N_PLACES * (len(missed) - experts.totals.experts_in_host)


@given(runs, st.integers(0, N_LAYERS * N_SWEEPS))
def test_after_a_pass_that_is_given_up_only_what_is_there_counts(run, n_lost):
    experts = stream_of(run)
    steps_of(run, experts)
    lost = sorted(EXPERT_OF)[:n_lost]
    there = [tile for tile in EXPERT_OF if tile not in lost]
    experts.restart(there)
    before = experts.totals.experts_on_device, experts.totals.experts_in_host
    _, rest = steps_of({**run, "chosen": [[0]] * (N_LAYERS * N_SWEEPS)}, experts)
    first = [step for step in rest[0] if isinstance(step, Put | Read) and step.tile in EXPERT_OF]
    assert experts.totals.experts_on_device - before[0] <= N_LAYERS * (N_SWEEPS - 1)
    for choice in CHOICES:
        assert any(isinstance(step, Put) and step.tile == choice.tiles[0][0] for step in first)
        if choice.tiles[0][0] in lost:
            assert any(isinstance(step, Read) and step.tile == choice.tiles[0][0] for step in first)


def test_numbers_that_are_used_at_once_make_no_room_for_one_another():
    kept = Lru(2)
    assert kept.take([4, 7, 9]).placed == {4: 0, 7: 1}
    found = kept.take([7, 8])
    assert (found.hits, found.placed, found.evicted) == ({7}, {8: 0}, {0: 4})
    found = kept.take([1, 7, 8, 2])
    assert (found.hits, found.placed) == ({7, 8}, {})
    assert kept.numbers() == (7, 8)
    kept.forget([7])
    assert kept.take([5]).placed == {5: 1}


def test_fewer_slots_keep_what_was_used_last_and_more_keep_all():
    kept = Lru(4)
    kept.take([1, 2, 3])
    assert kept.resize(2) == [3, 0]  # a free one, then that of 1
    assert kept.numbers() == (2, 3)
    assert kept.resize(4) == []
    assert kept.take([5, 6]).placed == {5: 4, 6: 5}
    assert kept.numbers() == (2, 3, 5, 6)


@given(runs, sizes, sizes)
def test_what_is_kept_may_change_between_sweeps(run, on_device, in_host):
    """What still has room in host memory is not read again."""
    experts = stream_of(run)
    steps_of(run, experts)
    before = {first: set(kept) for first, kept in experts.kept_in_host().items()}
    gone = experts.resize(ExpertRooms(on_device, in_host))
    after = {first: set(kept) for first, kept in experts.kept_in_host().items()}
    experts.restart(list(EXPERT_OF))
    for first, most in zip(after, in_host, strict=True):
        assert after[first] <= before[first]
        assert len(after[first]) == min(most, len(before[first]))
    assert len(set(gone)) == len(gone)
    everything = {**run, "chosen": [list(range(N_EXPERTS))] * (N_LAYERS * N_SWEEPS)}
    _, rest = steps_of(everything, experts)
    read = {EXPERT_OF[s.tile] for s in rest[0] if isinstance(s, Read) and s.tile in EXPERT_OF}
    for first, kept in after.items():
        assert not {expert for layer, expert in read if layer == FIRST[first]} & kept
    assert all(place_of(s) not in gone for s in rest[0] if isinstance(s, Read))
