"""The time of a forward pass: the slowest of disk, link, arithmetic and steps, since they
overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jlayer.plan.machine import (
    CPU_DECODED_WEIGHTS,
    DECODED_BYTES,
    DISK_GAP_S,
    GPU_ARITHMETIC,
    LINK_GAP_S,
    Machine,
)
from jlayer.plan.tiles import Tier, Tile, Tiling


def bytes_seconds(
    machine: Machine,
    tiling: Tiling,
    tiers: Sequence[Tier],
    *,
    n_chunks: int,
    cache_bytes: int = 0,
) -> float:
    """Seconds for the bytes: the slowest of disk, link and arithmetic. `cache_bytes`: of pools that
    cross the link too."""
    counts = Counter(tiers)
    passing = [Tier.DISK, Tier.HOST]
    n_bytes = dict.fromkeys(Tier, 0)
    for size, tier in zip(tiling.sizes, tiers, strict=True):
        n_bytes[tier] += size
    disk_s = n_bytes[Tier.DISK] / machine.disk_speed + counts[Tier.DISK] * DISK_GAP_S
    if not machine.kind.has_link:
        # Nothing crosses a link. Every weight is multiplied in memory instead.
        gaps = len(tiling.shapes) * LINK_GAP_S
        return max(disk_s, _cpu_arithmetic(machine, tiling) + gaps)
    moved = sum(n_bytes[tier] for tier in passing) + cache_bytes
    gaps = sum(counts[tier] for tier in passing) * LINK_GAP_S
    arithmetic = n_chunks * sum(_work_bytes(tile) * n for tile, n in tiling.distinct)
    return max(disk_s, moved / machine.bytes_per_s + gaps, arithmetic / GPU_ARITHMETIC)


def steps_seconds(machine: Machine, tiling: Tiling, *, n_chunks: int) -> float:
    """Seconds of Python and the driver for the steps, independent of the bytes."""
    kind, distinct = machine.kind, tiling.distinct
    n_arrays = sum(tile.n_arrays * n for tile, n in distinct)
    n_programs = sum(_programs(tile) * n for tile, n in distinct) * n_chunks
    return len(tiling.shapes) * kind.step_s + n_arrays * kind.array_s + n_programs * kind.program_s


def plain_seconds(machine: Machine, plain_bytes: int) -> float:
    """About the seconds of a forward pass on a CPU over plain weights; what exceeds the host budget
    is read from disk."""
    from_disk = max(0, plain_bytes - machine.host_budget + machine.runtime_bytes)
    return max(plain_bytes / machine.bytes_per_s, from_disk / machine.disk_speed)


def _cpu_arithmetic(machine, tiling):
    """Seconds to multiply all weights in memory: plain ones and scales at the speed of their bytes,
    decoded ones each by itself."""
    n_bytes = n_decoded = 0
    for tile, n in tiling.distinct:
        for part in tile.parts:
            if part.encoding.is_plain or not part.n_weights:
                n_bytes += n * part.n_bytes
            else:
                n_decoded += n * part.n_weights
    return n_bytes / machine.bytes_per_s + n_decoded / CPU_DECODED_WEIGHTS


def _work_bytes(tile: Tile) -> int:
    """The bytes of a tile for GPU_ARITHMETIC: a weight that is decoded counts DECODED_BYTES."""
    return sum(
        part.n_bytes
        if part.encoding.is_plain or not part.n_weights
        else DECODED_BYTES * part.n_weights
        for part in tile.parts
    )


def _programs(tile: Tile) -> int:
    """Programs per chunk at a tile: one for its rows; at the end of a stage, one for `finish` and
    one if the stage computes its own input."""
    if tile.stage is None or tile.stage.finish is None:
        return 1
    return 1 + tile.ends_stage * (1 + (tile.stage.input is not None))
