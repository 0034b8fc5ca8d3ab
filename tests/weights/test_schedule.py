"""Properties of the schedule: what may never happen to a slot, whatever the number of tiles and
slots."""

from hypothesis import given
from hypothesis import strategies as st

from jlayer.weights.schedule import Free, Put, Read, Run, next_phase, prologue, sweep

tiles = st.integers(2, 30)
slots = st.integers(1, 6)


def several_sweeps(n_tiles, n_slots, n_sweeps=4):
    steps, phase = prologue(n_tiles, n_slots), 0
    for _ in range(n_sweeps):
        steps += sweep(n_tiles, n_slots, phase)
        phase = next_phase(n_tiles, n_slots, phase)
    return steps


@given(tiles, slots)
def test_a_slot_goes_read_put_run_free_and_round_again(n_tiles, n_slots):
    after = {Read: Put, Put: Run, Run: Free, Free: Read}
    last = {}
    for step in several_sweeps(n_tiles, n_slots):
        if step.slot in last:
            before = last[step.slot]
            assert after[type(before)] is type(step), (before, step)
            if not isinstance(step, Read):
                assert step.tile == before.tile
        else:
            assert isinstance(step, Read)
        last[step.slot] = step


@given(tiles, slots)
def test_every_sweep_runs_every_tile_once_in_order(n_tiles, n_slots):
    ran = [step.tile for step in several_sweeps(n_tiles, n_slots) if isinstance(step, Run)]
    assert ran == list(range(n_tiles)) * 4


@given(tiles, slots)
def test_at_most_two_tiles_are_on_the_device(n_tiles, n_slots):
    live, most = 0, 0
    for step in several_sweeps(n_tiles, n_slots):
        live += isinstance(step, Put) - isinstance(step, Free)
        most = max(most, live)
    assert most == min(2, n_slots)


@given(tiles, st.integers(2, 6))
def test_the_next_tile_is_on_its_way_while_one_runs(n_tiles, n_slots):
    steps = several_sweeps(n_tiles, n_slots)
    for i, step in enumerate(steps):
        if isinstance(step, Free):
            coming = (step.tile + 1) % n_tiles
            put = max(j for j in range(i) if steps[j] == Put(coming, (step.slot + 1) % n_slots))
            ran = max(j for j in range(i) if steps[j] == Run(step.tile, step.slot))
            assert ran < put < i


@given(tiles, slots)
def test_order_wraps(n_tiles, n_slots):
    """A sweep ends with the next one's first tile put, and as many reads under way as there are
    slots left."""
    phase = 0
    for _ in range(3):
        steps = sweep(n_tiles, n_slots, phase)
        phase = next_phase(n_tiles, n_slots, phase)
        puts = [step for step in steps if isinstance(step, Put)]
        assert puts[-1] == Put(0, phase)
        assert sum(isinstance(step, Read) for step in steps) == n_tiles
