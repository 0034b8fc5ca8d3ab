"""What a server tells of itself: where the layers are, who rides, how fast, in how much memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Protocol

from jlayer.api import Model
from jlayer.plan.tiles import Tier
from jlayer.serving.progress import Passes


class Counts(Protocol):
    """What the desk has counted."""

    n_requests: int
    n_cancelled: int

    @property
    def is_alive(self) -> bool: ...


@dataclass(frozen=True)
class Status:
    """`tiers`: of each layer where most of it lies. `memory`: bytes held and promised, by side."""

    model: str
    context: int
    n_layers: int
    tiers: list[str]
    pass_: int
    layer: int
    seconds_a_pass: float | None
    riders: int
    queued: int
    queued_batch: int
    tokens_per_s: float
    tokens_total: int
    passes_total: int
    requests_total: int
    cancelled_total: int
    phase: str | None
    memory: dict
    is_alive: bool
    uptime_s: float

    def as_dict(self) -> dict:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def status_of(
    model: Model, passes: Passes, *, queued: tuple[int, int], desk: Counts, since: float
) -> Status:
    memory, plan = model.engine.memory(), model.plan
    seconds = passes.seconds
    return Status(
        model=model.folder,
        context=model.context_limit,
        n_layers=passes.n_layers,
        tiers=layer_tiers(plan),
        pass_=passes.number + 1,
        layer=passes.layer,
        seconds_a_pass=None if seconds is None else round(seconds, 4),
        riders=passes.riders,
        queued=queued[0],
        queued_batch=queued[1],
        tokens_per_s=round(passes.tokens_per_s, 3),
        tokens_total=passes.tokens_total,
        passes_total=passes.number,
        requests_total=desk.n_requests,
        cancelled_total=desk.n_cancelled,
        phase=passes.phase,
        memory={
            side: {
                "held": memory[f"{side}_peak_bytes"],
                "promised": memory[f"{side}_budget_bytes"],
            }
            for side in ("device", "host")
        },
        is_alive=desk.is_alive,
        uptime_s=round(time.monotonic() - since, 1),
    )


def layer_tiers(plan) -> list[str]:
    """Where most bytes of each layer lie."""
    n_bytes: dict[int, dict[Tier, int]] = {}
    for tile, tier in zip(plan.tiles, plan.tiers, strict=True):
        if tile.layer is not None and tile.kind is not None:
            of_layer = n_bytes.setdefault(tile.layer, {})
            of_layer[tier] = of_layer.get(tier, 0) + tile.n_bytes
    return [max(of, key=of.get).value for _, of in sorted(n_bytes.items())]
