"""Properties of the schedule where experts are put before their layer has decided: whatever is
guessed, what is kept is what would be kept without, and what moves more is what was guessed in
vain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.plan.tiles import Tier
from jlayer.streaming.experts import followers
from jlayer.streaming.guesses import CREDIT, LEAST_REST, MOST_CREDIT, MOST_REST, Score
from jlayer.streaming.schedule import sweeps
from jlayer.streaming.steps import Decision, Drop, Fetch, Free, Keep, Put, Read, Run
from tests.streaming.decided import (
    AFTER,
    BEFORE,
    CHOICES,
    EXPERT_OF,
    N_EXPERTS,
    N_LAYERS,
    N_PLACES,
    N_SWEEPS,
    TILES,
    runs,
    steps_of,
    stream_of,
)

ON_DEVICE = [Tier.DEVICE] * (BEFORE + AFTER)
PER_LAYER = N_LAYERS * N_SWEEPS
guesses = st.lists(st.integers(0, N_EXPERTS - 1), unique=True, max_size=N_EXPERTS)
# Half of the sweeps: prompts between them keep the caches full.
guessed_runs = st.builds(
    lambda run, rooms, guessed: {**run, "tiers": ON_DEVICE, "rooms": rooms, "guessed": guessed},
    runs,
    st.integers(0, 3),
    st.lists(guesses, min_size=PER_LAYER, max_size=PER_LAYER),
)


def without(run):
    return {key: value for key, value in run.items() if key not in ("rooms", "guessed")}


def both(run):
    """(steps, totals) of a run with its guesses, and of the same without any."""
    found = []
    for each in (run, without(run)):
        experts = stream_of(each)
        begin, rest = steps_of(each, experts)
        found.append(([*begin, *(step for one in rest for step in one)], experts.totals))
    return found


def of_experts(steps, kind):
    return [step for step in steps if isinstance(step, kind) and step.tile in EXPERT_OF]


@given(guessed_runs)
def test_a_guess_changes_neither_what_runs_nor_what_is_kept_nor_what_is_read(run):
    (steps, totals), (plain, plain_totals) = both(run)
    for kind in (Run, Read):
        assert [s for s in steps if isinstance(s, kind)] == [
            s for s in plain if isinstance(s, kind)
        ]
    for name in ("experts_used", "experts_on_device", "experts_in_host"):
        assert getattr(totals, name) == getattr(plain_totals, name)


@given(guessed_runs)
def test_what_moves_more_is_what_was_guessed_in_vain(run):
    """Each expert that is used and not there is put once, by guess or not."""
    (steps, totals), (plain, _) = both(run)
    n_guessed = sum(step.guessed for step in of_experts(steps, Put))
    more = len(of_experts(steps, Put)) - len(of_experts(plain, Put))
    assert n_guessed == N_PLACES * totals.experts_guessed
    assert more == N_PLACES * totals.experts_wasted
    if run["rooms"] == 0:
        assert n_guessed == 0


@given(guessed_runs)
def test_what_runs_was_put_and_no_room_holds_more_than_it_was_planned_for(run):
    """Also: of what was guessed in vain the transfer is waited for before it is dropped; and memory
    of the host is not written to while a tile that will run is on its way from it."""
    (steps, _), _ = both(run)
    on_device, by_guess, passing, arrived, spoilt = set(), set(), set(), set(), set()
    slot_of = {}
    for step in steps:
        match step:
            case Read(_, slot):
                spoilt |= {t for t in by_guess - arrived if slot_of[t] == slot}
            case Put(tile, slot, stays, guessed):
                assert tile not in on_device
                on_device.add(tile)
                slot_of[tile] = slot
                if guessed:
                    arrived.discard(tile)
                    by_guess.add(tile)
                elif tile in EXPERT_OF and not stays:
                    passing.add(tile)
            case Keep(tile):
                by_guess.remove(tile)
            case Run(tile, _, also):
                assert {tile, *also} <= on_device | set(range(len(TILES))) - set(EXPERT_OF)
                assert not {tile, *also} & spoilt
            case Free(tile, _, None):
                arrived.add(tile)
            case Free(tile):
                on_device.remove(tile)
                passing.discard(tile)
                by_guess.discard(tile)
            case Drop(tile):
                assert tile in arrived or tile not in by_guess
                on_device.remove(tile)
                by_guess.discard(tile)
                spoilt.discard(tile)
        assert len(passing) <= run["ahead"]
        assert len(by_guess) <= 2 * N_PLACES * run["rooms"]
        kept = {EXPERT_OF[tile] for tile in on_device - passing - by_guess if tile in EXPERT_OF}
        for layer, most in enumerate(run["on_device"]):
            assert sum(of_layer == layer for of_layer, _ in kept) <= most


@given(guessed_runs)
def test_guesses_are_put_from_host_memory_once_all_that_the_layer_uses_is_on_its_way(run):
    """The likeliest first; for no first layer, since none is before it."""
    _, rest = steps_of(run, stream_of(run))
    steps, decisions = [step for one in rest for step in one], iter(run["guessed"])
    asked, found, used = (), [], None
    for step in steps:
        if isinstance(step, Fetch):
            assert found == [expert for expert in asked if expert in found]
            asked, found = () if step.guess is None else next(decisions), []
            used = EXPERT_OF[step.tile][0]
        elif isinstance(step, Put) and step.guessed:
            layer, expert = EXPERT_OF[step.tile]
            assert layer == used + 1
            assert isinstance(step.slot, tuple)
            found += [expert] if expert not in found else []
        elif isinstance(step, Put) and step.tile in EXPERT_OF:
            assert not found


@pytest.mark.parametrize(("kept", "put"), [([], [3, 1]), ([3, 2], [1, 4]), ([1, 3, 4], [2])])
def test_what_is_on_the_device_is_not_put_by_guess(kept, put):
    run = {"on_device": [len(kept)] * N_LAYERS, "in_host": [N_EXPERTS] * N_LAYERS, "ring": 2}
    run |= {"ahead": 2, "tiers": ON_DEVICE, "rooms": 2, "guessed": [[3, 1, 4, 2]] * PER_LAYER}
    everything, some = list(range(N_EXPERTS)), sorted(kept) or [0]
    run["chosen"] = [everything] * N_LAYERS + [some] * (PER_LAYER - N_LAYERS)
    _, rest = steps_of(run, stream_of(run))
    found = [EXPERT_OF[s.tile] for s in rest[-1] if isinstance(s, Put) and s.guessed]
    assert found == [(layer, n) for layer in (1, 2) for n in put for _ in range(N_PLACES)]


@given(guessed_runs, st.integers(1, 60))
def test_a_pass_that_is_given_up_leaves_no_guess_behind(run, n_steps):
    """Whatever was put by guess when it ended."""
    experts = stream_of(run)
    tiers = [Tier.DISK if n in EXPERT_OF else Tier.DEVICE for n in range(len(TILES))]
    lists = sweeps(tiers, ring=run["ring"], ahead=run["ahead"], experts=experts)
    list(next(lists))
    chosen, guessed = iter([range(N_EXPERTS)] * N_LAYERS + run["chosen"]), iter(run["guessed"])
    for most in (1000, n_steps):  # the first pass fills the host memory
        steps, decision = next(lists), None
        for _ in range(most):
            try:
                step = steps.send(decision)
            except StopIteration:
                break
            is_fetch = isinstance(step, Fetch)
            decision = Decision(next(chosen), next(guessed)) if is_fetch else None
        steps.close()
    experts.restart(list(EXPERT_OF))
    _, rest = steps_of(run, experts)
    on_device = set()
    for step in (step for one in rest for step in one if step.tile in EXPERT_OF):
        match step:
            case Put(tile, _, _, by_guess):
                assert not (by_guess and EXPERT_OF[tile][0] == 0)
                on_device.add(tile)
            case Run(tile, _, also):
                assert {tile, *also} <= on_device
            case Drop(tile):
                on_device.remove(tile)
            case Free(tile, _, after) if after is not None:
                on_device.remove(tile)


@given(guessed_runs, st.integers(0, BEFORE + AFTER - 1), st.sampled_from([Tier.HOST, Tier.DISK]))
def test_nothing_is_guessed_where_the_link_has_something_else_to_carry(run, place, tier):
    tiers = [tier if n == place else Tier.DEVICE for n in range(BEFORE + AFTER)]
    (steps, totals), _ = both({**run, "tiers": tiers})
    assert all(step.guess is None for step in steps if isinstance(step, Fetch))
    assert totals.experts_guessed == 0


def test_the_next_layer_is_guessed_if_it_has_experts_and_nothing_passes_before_them():
    first, second, third = CHOICES
    assert followers(CHOICES, ()) == {first.first: second.first, second.first: third.first}
    assert followers(CHOICES, [second.end]) == {first.first: second.first}
    assert followers(CHOICES, [first.end - 1, second.first, 0, third.end]) == followers(CHOICES, ())
    assert followers([first, third], ()) == {}  # the layer between has none
    assert followers([first], ()) == {}


def test_what_passes_on_the_link_are_neither_tiles_of_the_hosts_cores_nor_caches():
    run = {"on_device": [0] * N_LAYERS, "in_host": [5] * N_LAYERS, "ring": 2, "ahead": 2}
    run |= {"rooms": 1, "guessed": ()}
    tiers = [Tier.DISK if n in EXPERT_OF else Tier.HOST for n in range(len(TILES))]
    certain = [n for n in range(len(TILES)) if n not in EXPERT_OF]
    everything = Decision(range(N_EXPERTS))
    for options, n_guessed in (
        ({}, 0),
        ({"hosted": certain}, N_LAYERS - 1),
        ({"hosted": certain, "attending": certain[:: BEFORE + AFTER]}, 0),
    ):
        lists = sweeps(tiers, ring=2, ahead=2, experts=stream_of(run), **options)
        list(next(lists))
        found, steps, decision = 0, next(lists), None
        while True:
            try:
                step = steps.send(decision)
            except StopIteration:
                break
            decision = everything if isinstance(step, Fetch) else None
            found += isinstance(step, Fetch) and step.guess is not None
        assert found == n_guessed, options


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=400))
def test_guessing_never_loses_more_than_its_credit_before_it_pauses(passes):
    score, lost, n_guesses = Score(), 0, 0
    for right, wrong in passes:
        if not score.may_guess():
            lost = 0
            continue
        n_guesses += 1
        lost = max(-MOST_CREDIT, lost + wrong - right)
        score.count(right, wrong)
        assert lost <= MOST_CREDIT + CREDIT + 4
    assert n_guesses or not passes


def test_a_layer_whose_guesses_are_wrong_pauses_for_longer_and_longer():
    score, pauses = Score(), []
    for _ in range(9):
        n = 0
        while score.may_guess():
            score.count(1, 3)
            n += 1
        assert n == CREDIT // 2 + 1
        pauses.append(1)
        while not score.may_guess():
            pauses[-1] += 1
        score.count(0, 0)
    assert pauses[:3] == [LEAST_REST, 2 * LEAST_REST, 4 * LEAST_REST]
    assert pauses[-1] == MOST_REST


@pytest.mark.parametrize("right", [1, 4])
def test_a_layer_whose_guesses_are_mostly_right_never_pauses(right):
    score = Score()
    for _ in range(10_000):
        assert score.may_guess()
        score.count(right, 1)
