"""How a model streams, as a test says it: how it is cut, what stays where, and when it changes."""

from dataclasses import replace

import pytest

from jlayer.engine import engine
from jlayer.plan import making as plans
from jlayer.plan.experts import ExpertRooms, counts_of
from jlayer.plan.tiles import Tier


def set_tile_bytes(patch, tile_bytes):
    """Models are cut to tiles of this size (None: whole layers), whatever would be best."""
    patch.setattr(plans, "TILE_BYTES", (tile_bytes,))


def set_expert_rooms(patch, *, on_device, in_host, guessed):
    """All but experts stay on the device, as on a GPU; each layer keeps so many experts there and
    in host memory, and so many are put by guess at a time."""

    def make_plan(weights, machine, run, *, held=(), least_pool=None, draft=None, **options):
        shared = {"held": held, "least_pool": least_pool, "draft": draft}
        plan = plans.make_plan(weights, machine, run, **shared, **options)
        tiers = [Tier.DISK if t.expert is not None else Tier.DEVICE for t in plan.tiles]
        n = len(counts_of(weights.cfg))
        rooms = ExpertRooms((on_device,) * n, (in_host,) * n, guessed)
        return placed(replace(plan, experts=rooms), weights, run, tiers, **shared)

    patch.setattr(engine, "make_plan", make_plan)


def placed(plan, weights, run, tiers, **options):
    """A plan with the same tiles in these places, and the sums that follow."""
    return plans.refit(replace(plan, tiers=tuple(tiers)), weights, run, **options)


@pytest.fixture
def cuts(monkeypatch):
    """Call it with a tile size."""
    return lambda tile_bytes: set_tile_bytes(monkeypatch, tile_bytes)


@pytest.fixture
def tiers_in_turn(monkeypatch):
    """Call it with tiers, which tiles then have one after another, whatever would be best."""

    def set_tiers(*tiers: Tier):
        def make_plan(weights, machine, run, *, keeps_layers=True, tilings=None, **options):
            bare = plans.make_plan(
                weights, machine, run, keeps_layers=False, tilings=tilings, **options
            )
            mixed = (tiers[i % len(tiers)] for i in range(len(bare.tiles)))
            options.pop("shares", None)
            return placed(bare, weights, run, mixed, **options)

        monkeypatch.setattr(engine, "make_plan", make_plan)

    return set_tiers


@pytest.fixture
def plans_anew(monkeypatch):
    """Call it, and the next run of an open model is planned from the start: what streams does not
    fit any more."""

    def without_room(*given, **options):
        same = plans.refit(*given, **options)
        return replace(same, device=replace(same.device, budget_bytes=0))

    return lambda: monkeypatch.setattr(engine, "refit", without_room)
