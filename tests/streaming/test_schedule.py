"""Properties of the schedule: what may never happen to a slot, whatever stays where."""

from collections import Counter
from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from jlayer.plan.machine import PLATFORMS
from jlayer.plan.tiles import Tier
from jlayer.streaming.schedule import MANY_AHEAD, sweeps
from jlayer.streaming.steps import Free, Put, Read, Run

N_SWEEPS = 4
plans = st.tuples(
    st.lists(st.sampled_from(Tier), min_size=1, max_size=25),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sets(st.integers(0, 24)),
    st.sets(st.integers(0, 24)),  # multiplied by the host, where not on the device
)


def steps_of(plan):
    """(steps before the first sweep, steps of each sweep)."""
    tiers, ring, ahead, in_place, _ = plan
    lists = sweeps(tiers, ring=ring, ahead=ahead, in_place=in_place, hosted=hosted_in(plan))
    begin, *rest = (list(steps) for steps in islice(lists, N_SWEEPS + 1))
    return begin, rest


def hosted_in(plan):
    tiers, *_, hosted = plan
    return {i for i in hosted if i < len(tiers) and tiers[i] is not Tier.DEVICE}


def flat(plan):
    begin, rest = steps_of(plan)
    return [*begin, *(step for one in rest for step in one)]


@given(plans)
def test_a_slot_is_written_only_after_what_it_held_was_freed(plan):
    held = {}
    for step in flat(plan):
        slot = getattr(step, "slot", None)
        match step:
            case Read(tile, int()):
                assert slot not in held, (step, held)
                held[slot] = tile
            case Put(tile, int()):
                assert held[slot] == tile
            case Free(tile, int()):
                assert held.pop(slot) == tile
    assert len(held) <= plan[1]


@given(plans)
def test_a_tile_is_read_before_it_is_put_and_put_before_it_runs(plan):
    tiers, _, _, in_place, _ = plan
    hosted = hosted_in(plan)
    in_host = {i for i in in_place if i < len(tiers) and tiers[i] is Tier.HOST}
    on_device, under_way, ran = set(), set(), set()
    for step in flat(plan):
        match step:
            case Read(tile, _):
                assert tile not in under_way
                under_way.add(tile)
                if tiers[tile] is Tier.HOST:
                    in_host.add(tile)
            case Put(tile, _):
                assert tile in under_way or tile in in_host
                assert tile not in on_device
                under_way.discard(tile)
                on_device.add(tile)
            case Run(tile, on):
                assert on == ("host" if tile in hosted else "device")
                assert tile in (on_device if on == "device" else under_way | in_host)
                ran.add(tile)
            case Free(tile, _, after):
                assert (after is None) == (tiers[tile] is Tier.DEVICE)
                if after is not None:
                    assert after in ran
                    (under_way if tile in hosted else on_device).remove(tile)
                    ran.remove(after)


@given(plans)
def test_a_free_names_a_run_that_came_before_it_and_used_what_was_put(plan):
    """Between the put of a tile and its free; nothing is freed twice, or left for good."""
    tiers, hosted = plan[0], hosted_in(plan)
    since_put = {}  # tile on the device and passing -> the runs since it came there
    freed = Counter()
    for step in flat(plan):
        match step:
            case Put(tile, _) if tiers[tile] is not Tier.DEVICE:
                since_put[tile] = []
            case Read(tile, int()) if tile in hosted:
                since_put[tile] = []
            case Run(tile):
                for runs in since_put.values():
                    runs.append(tile)
            case Free(tile, _, after) if tiers[tile] is not Tier.DEVICE:
                assert after == tile  # a tile is used by its own run
                assert after in since_put.pop(tile)
                freed[tile] += 1
            case Free(_, slot, after):
                assert after is None
                assert slot is not None
    for tile, tier in enumerate(tiers):
        has_none = tier is Tier.DEVICE or (tier is Tier.HOST and tile in hosted)
        assert freed[tile] == (0 if has_none else N_SWEEPS)


@given(plans)
def test_every_sweep_runs_every_tile_once_in_order(plan):
    _, rest = steps_of(plan)
    for one in rest:
        ran = [step.tile for step in one if isinstance(step, Run)]
        assert ran == list(range(len(plan[0])))


@given(plans)
def test_what_passes_on_the_device_never_exceeds_what_was_planned(plan):
    tiers, _, ahead, _, _ = plan
    hosted, passing = hosted_in(plan), 0
    for step in flat(plan):
        assert not (isinstance(step, Put) and step.tile in hosted)
        if step.tile in hosted:
            continue
        if tiers[step.tile] is not Tier.DEVICE:
            passing += isinstance(step, Put) - isinstance(step, Free)
        assert 0 <= passing <= ahead


@given(plans)
def test_what_stays_is_read_once_and_the_rest_every_sweep(plan):
    tiers, _, _, in_place, _ = plan
    _, rest = steps_of(plan)
    steady = Counter(step.tile for step in rest[-1] if isinstance(step, Read))
    all_reads = Counter(step.tile for step in flat(plan) if isinstance(step, Read))
    for tile, tier in enumerate(tiers):
        if tier is Tier.DISK:
            assert steady[tile] == 1
        else:
            assert steady[tile] == 0
            assert all_reads[tile] == (0 if tile in in_place and tier is Tier.HOST else 1)
    puts = Counter(step.tile for step in flat(plan) if isinstance(step, Put))
    assert all(puts[tile] == 1 for tile, tier in enumerate(tiers) if tier is Tier.DEVICE)


@given(st.integers(3, 25), st.integers(2, 6), st.integers(2, 4))
def test_order_wraps(n_tiles, spare, ahead):
    """A sweep ends with the next one's first tiles put, and every slot that is left being read."""
    ahead = min(ahead, n_tiles - 1)
    ring = ahead + spare
    plan = ([Tier.DISK] * n_tiles, ring, ahead, (), ())
    begin, rest = steps_of(plan)
    reads = sum(isinstance(step, Read) for step in begin)
    frees = 0
    for one in rest:
        ends_with = [step.tile for step in one if isinstance(step, Put)][-(ahead - 1) :]
        assert ends_with == list(range(ahead - 1))
        reads += sum(isinstance(step, Read) for step in one)
        frees += sum(isinstance(step, Free) for step in one)
        assert reads - frees == min(ring, n_tiles)


@given(st.integers(3, 25), st.integers(2, 4))
def test_the_next_tiles_are_on_their_way_before_a_sweep_waits_for_one(n_tiles, ahead):
    ahead = min(ahead, n_tiles)
    order = flat(([Tier.HOST] * n_tiles, 0, ahead, range(n_tiles), ()))
    on_device = 0
    for step in order:
        on_device += isinstance(step, Put) - isinstance(step, Free)
        if isinstance(step, Free):
            assert on_device == ahead - 1  # all but the one that leaves


@given(plans)
def test_the_next_tile_is_called_before_one_is_waited_for_where_many_are_ahead(plan):
    """Else the device rests while the host wakes up and calls."""
    assert PLATFORMS["gpu"].ahead >= MANY_AHEAD
    tiers, ring, ahead, _, _ = plan
    passing = [tier is not Tier.DEVICE and i not in hosted_in(plan) for i, tier in enumerate(tiers)]
    has_room = all(tier is not Tier.DISK for tier in tiers) or ring > ahead
    for one in steps_of(plan)[1]:
        at = {(type(step), step.tile): number for number, step in enumerate(one)}
        for tile in range(len(tiers) - 1):
            if passing[tile] and passing[tile + 1]:
                is_called = at[Run, tile + 1] < at[Free, tile]
                assert not is_called or ahead >= MANY_AHEAD
                if ahead >= MANY_AHEAD and has_room:
                    assert is_called


@given(st.lists(st.booleans(), min_size=1, max_size=25), st.integers(2, 4))
def test_the_host_begins_before_anything_waits_for_the_tile_before(sides, ahead):
    """What the host multiplies comes right after the run before it, ahead of its free."""
    hosted = {tile for tile, on_host in enumerate(sides) if on_host}
    order = flat(([Tier.HOST] * len(sides), 0, ahead, range(len(sides)), hosted))
    for before, step in pairwise(order):
        if isinstance(step, Run) and step.on == "host" and step.tile:
            assert before == Run(step.tile - 1, "host" if step.tile - 1 in hosted else "device")


@st.composite
def layers_back(draw):
    """(tiers, ahead, a tile -> the one before it whose slot is kept for it, slots): layers that are
    gone through twice, the second time in reverse, with some of their tiles kept for that."""
    tiers, again, most = [], {}, 0
    for _ in range(draw(st.integers(1, 4))):
        size, first = draw(st.integers(1, 5)), len(tiers)
        n_kept = draw(st.integers(0, size))
        tiers += [Tier.DISK] * (2 * size)
        again |= {first + 2 * size - 1 - n: first + n for n in range(size - n_kept, size)}
        most = max(most, n_kept)
    return tiers, draw(st.integers(1, 5)), again, most + draw(st.integers(1, 3))


@given(layers_back())
def test_a_slot_that_is_kept_for_a_later_tile_is_not_written_before_that_is_freed(plan):
    tiers, ahead, again, ring = plan
    lists = sweeps(tiers, ring=ring, ahead=ahead, again=again)
    steps = [step for one in islice(lists, N_SWEEPS + 1) for step in one]
    held, slot_of, reads = {}, {}, Counter()
    for step in steps:
        match step:
            case Read(tile, slot):
                assert slot not in held
                held[slot] = tile
                reads[tile] += 1
            case Put(tile, slot):
                first = again.get(tile, tile)
                assert held[slot] == first
                if tile in again:  # not where it was read to for the next sweep
                    assert slot == slot_of[first]
                slot_of[tile] = slot
            case Free(tile, None):
                assert tile in again.values()
            case Free(tile, slot):
                assert held.pop(slot) == again.get(tile, tile)
    assert not reads.keys() & again.keys()
    assert min(reads[tile] for tile in range(len(tiers)) if tile not in again) >= N_SWEEPS
    ran = [step.tile for step in steps if isinstance(step, Run)]
    assert ran == [*range(len(tiers))] * N_SWEEPS
