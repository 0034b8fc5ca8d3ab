"""The host's cores go on helping as long as passes are faster with them."""

from types import SimpleNamespace

import pytest

from jlayer.engine.helping import BACK, ENOUGH, TRY_S, Helping

TILES = frozenset({3, 4})


def plan_of(*, hosted=TILES, has_link=True, always=False, tiling="tiles"):
    """A plan of which a pass takes 1 s, if the cores do not help."""
    return SimpleNamespace(
        hosted=lambda n_rows: hosted,
        unaided_seconds=lambda n_rows: 1.0,
        always_hosted=always,
        machine=SimpleNamespace(kind=SimpleNamespace(has_link=has_link)),
        tiling=tiling,
    )


def passes(helping, plan, count, *, aided, unaided, n_rows=64):
    """How many of so many passes the cores help with, when passes take so long."""
    n_aided = 0
    for _ in range(count):
        helps = bool(helping.hosted(plan, n_rows))
        n_aided += helps
        helping.learn(plan, n_rows=n_rows, seconds=aided if helps else unaided)
    return n_aided


def test_cores_that_slow_passes_down_rest_once_as_much_is_lost_as_trying_costs():
    helping, plan = Helping(), plan_of()
    tried_after = int(TRY_S) + 1  # each pass loses a second
    assert passes(helping, plan, 200, aided=2.0, unaided=1.0) == tried_after
    assert helping.hosted(plan, 1) == TILES  # other passes are judged by themselves
    assert passes(helping, plan, 5, aided=0.5, unaided=1.0, n_rows=1) == 5


def test_they_help_again_where_passes_are_slower_without_them_than_planned():
    helping, plan = Helping(), plan_of()
    n_aided = passes(helping, plan, 11 + ENOUGH, aided=2.0, unaided=3.0)
    assert n_aided == 11
    assert passes(helping, plan, 100, aided=2.0, unaided=3.0) == 100
    # What they lose against what was seen counts now, and more of it must be lost.
    n_more = passes(helping, plan, 200, aided=4.0, unaided=3.0)
    assert 0 < n_more <= BACK * TRY_S + 1


@pytest.mark.parametrize(
    "plan", [plan_of(always=True), plan_of(has_link=False), plan_of(hosted=frozenset())]
)
def test_what_was_asked_for_and_what_crosses_no_link_stays_as_planned(plan):
    helping = Helping()
    n_aided = passes(helping, plan, 50, aided=9.0, unaided=1.0)
    assert n_aided == (50 if plan.hosted(64) else 0)


def test_other_tiles_are_judged_anew():
    helping = Helping()
    assert passes(helping, plan_of(), 50, aided=2.0, unaided=1.0) == 11
    other = plan_of(tiling="others")
    assert passes(helping, other, 50, aided=2.0, unaided=1.0) == 11
