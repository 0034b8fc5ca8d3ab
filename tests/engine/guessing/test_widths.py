"""How many guesses ride where more tokens use more experts: as many as give the most tokens a
second, if a forward pass takes as long as the plan says."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from jlayer.engine import pace, widths
from jlayer.engine.pace import filled_share, predicted_seconds
from jlayer.engine.widths import Widths, shares
from jlayer.plan.experts import distinct
from jlayer.plan.shapes import CHUNK_ROWS
from tests.plan.models import SMALL_8B, machine, plan_of
from tests.plan.test_experts import GIB, mixture

SIZES = [rows for rows in CHUNK_ROWS if rows <= 64]


@pytest.fixture(scope="module")
def plan():
    """A mixture few of whose experts stay on the device."""
    on = machine(device_budget=GIB + GIB // 2, host_budget=64 * GIB, link_speed=10e9)
    return plan_of(mixture(), on=on, nodes=63, context=300)


@pytest.fixture
def by_the_plan(monkeypatch):
    """Widths whose seconds are those of the plan."""
    monkeypatch.setattr(
        *(widths, "predicted_seconds"),
        lambda plan, programs, most_rows: {rows: plan.narrow_seconds(rows) for rows in SIZES},
    )

    def of(plan):
        found = Widths(programs=None)
        found.prepare(plan)
        return found

    return of


def seat_of(chances, most=63):
    """A lane with a token to compute, whose guesses are right with these chances."""
    options = SimpleNamespace(draft_tokens=None)
    lane = SimpleNamespace(options=options, n_left=10**9)
    rider = SimpleNamespace(lane=lane, first=0, end=1, after=0)
    tree = SimpleNamespace(most=most, scores=np.log(chances), expected=1 + sum(chances))
    return SimpleNamespace(lane=lane, rider=rider, tree=tree)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9, 0.99])
def test_the_width_weighs_the_tokens_against_the_experts_that_they_use(plan, by_the_plan, chance):
    chances = [chance**depth for depth in range(1, 64)]
    seat = seat_of(chances)

    def rate(share):
        return (1 + sum(chances[:share])) / plan.narrow_seconds(1 + share)

    found = by_the_plan(plan).best([seat], [seat.rider], plan, 0.0)
    assert found == max(sorted(shares(63)), key=rate)
    assert (found == 0) == (chance < 0.7)  # two tokens take 1.7 times as long as one


def test_a_dense_model_has_more_guesses_for_the_same_chances(by_the_plan):
    dense = plan_of(SMALL_8B, on=machine(device_budget=3 * GIB), nodes=63, context=300)
    seat = seat_of([0.3**depth for depth in range(1, 64)])
    assert by_the_plan(dense).best([seat], [seat.rider], dense, 0.0) > 3
    assert filled_share(dense, 1, 2) == 1.0


def test_a_pass_with_padding_is_noted_as_what_a_full_one_would_have_taken(plan, by_the_plan):
    found, seat = by_the_plan(plan), seat_of([0.5])
    found.best([seat], [seat.rider], plan, 0.0)
    for _ in range(2):  # the first one may have compiled programs
        found.saw(2, 1, plan, 3 * plan.narrow_seconds(1))
    assert found.least_seconds([seat]) == pytest.approx(3 * plan.narrow_seconds(2))


def test_of_experts_only_those_that_are_used_are_multiplied(plan, monkeypatch):
    """Where the arithmetic takes longer than the bytes."""
    monkeypatch.setattr(pace, "tile_seconds", lambda programs, tile, sizes: dict.fromkeys(sizes, 9))
    found = predicted_seconds(plan, None, most_rows=64)
    router, tiles = plan.cfg.experts.router, plan.tiles
    largest = max(sum(part.n_weights for part in tile.parts) for tile in tiles)
    weights = {True: 0, False: 0}
    for tile in tiles:
        weights[tile.expert is not None] += sum(part.n_weights for part in tile.parts)
    for rows in SIZES:
        used = weights[False] + weights[True] * distinct(router, rows) / router.n_experts
        assert found[rows] == pytest.approx(9 * used / largest)
    assert found[64] > 3 * found[2]
    assert math.isclose(distinct(router, 1), router.n_chosen)
