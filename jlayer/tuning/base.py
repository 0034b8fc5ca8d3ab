"""The frozen model that is tuned: opened, cut into tiles, and streamed in the order of a step."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.engine import device as choosing
from jlayer.engine import residents
from jlayer.engine.alike import machine_of_all
from jlayer.engine.programs import Programs
from jlayer.engine.report import anonymous_bytes, available_bytes
from jlayer.families.registry import layer_kinds, layer_tensor_name
from jlayer.plan.cutting import cut
from jlayer.plan.machine import DEFAULT_DISK
from jlayer.plan.tiles import Tier, Weights
from jlayer.run_config import RunConfig
from jlayer.streaming.cached import page_cache_use
from jlayer.streaming.direct import disk_speed
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.streaming.watch import Totals, Watch
from jlayer.tuning.step import Stepper, Trained
from jlayer.tuning.visits import streamed, tiers_of, visits_of

TILE_BYTES = 64 << 20


class Base:
    """A model whose weights stay as they are. `scales`: published name of a matrix -> by what its
    adapter's product is multiplied."""

    def __init__(
        self,
        folder: str | os.PathLike,
        run: RunConfig,
        scales: Mapping[str, float],
        *,
        dropout: float = 0.0,
        watch: Watch | None = None,
        tile_bytes: int = TILE_BYTES,
    ):
        self.watch, self.totals = watch or Watch(), Totals()
        self.store = Store(folder, follow_links=run.follow_links)
        self.cfg = self.store.cfg
        self.dtype = run.dtype or self.store.float_dtype
        self.weights = Weights(self.cfg, self.store.form_of, self.dtype)
        host_budget = run.host_memory or available_bytes() * 4 // 5
        self.devices, budget, context_bytes = choosing.choose(
            run.device,
            run.device_memory,
            pinned_bytes=min(host_budget, self.store.weight_bytes),
            host_memory=host_budget,
        )
        self.machine = machine_of_all(
            self.devices,
            device_budget=budget,
            host_budget=host_budget,
            context_bytes=context_bytes,
            baseline_bytes=anonymous_bytes(),
            disk_speed=disk_speed(self.store.files) or DEFAULT_DISK,
            link_speed=choosing.link_speed(self.devices),
            cores=len(os.sched_getaffinity(0)),
        )
        self.programs = Programs(self.cfg, dtype=self.dtype, devices=self.devices, watch=self.watch)
        tiling = cut(self.weights, tile_bytes, platform=self.devices.platform)
        self.trained = trained_of(self.cfg, scales)
        leaves = {layer: frozenset(of) for layer, of in self.trained.items()}
        self.visits = visits_of(tiling.tiles, leaves)
        self.tiles, repeats = streamed(self.visits)
        room = host_budget // 2
        tiers = tiers_of(self.tiles, repeats, room, tiling.slack)
        self.embedding = Embedding(self.store, self.weights)
        checks = Checks(self.store.expected())
        self.residents = residents.load(self.store, self.weights, checks, self.devices)
        self.stepper = Stepper(
            self.programs,
            self.embedding,
            self.residents,
            self.visits,
            self.trained,
            dropout=dropout,
        )
        ahead = min(self.machine.kind.ahead, len(self.tiles))
        from_disk = sum(
            t.n_bytes for t, tier in zip(self.tiles, tiers, strict=True) if tier is Tier.DISK
        )
        self.executor = Executor(
            self.store,
            self.tiles,
            tiers,
            ring=ahead + 2,
            ahead=ahead,
            devices=self.devices,
            totals=self.totals,
            watch=self.watch,
            checks=checks,
            page_cache=page_cache_use(True, kept_bytes=from_disk, free_bytes=available_bytes()),
            repeats=repeats,
        )

    def close(self) -> None:
        """Ends the readers' threads and closes the files."""
        self.executor.close()
        self.embedding.close()


def trained_of(cfg, scales: Mapping[str, float]) -> Trained:
    """The adapters of each layer that has some, by leaf."""
    found = {}
    for layer, kind in enumerate(layer_kinds(cfg)):
        names = {leaf.name: layer_tensor_name(cfg, leaf, layer) for leaf in kind.leaves}
        own = {leaf: (name, scales[name]) for leaf, name in names.items() if name in scales}
        if own:
            found[layer] = own
    return found
