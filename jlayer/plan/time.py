"""How long a forward pass takes: the slowest of disk, link, arithmetic and the steps themselves,
since each hides the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jlayer.plan.machine import (
    ARRAY_S,
    CPU_DECODED_WEIGHTS,
    DECODED_BYTES,
    DISK_GAP_S,
    GPU_ARITHMETIC,
    LINK_GAP_S,
    PROGRAM_S,
    STEP_S,
    Machine,
)
from jlayer.plan.tiles import Tier, Tile, Tiling


def bytes_seconds(
    machine: Machine, tiling: Tiling, tiers: Sequence[Tier], *, n_chunks: int
) -> float:
    """Seconds that the bytes take: the longest of disk, link and arithmetic."""
    counts = Counter(tiers)
    passing = [Tier.DISK, Tier.HOST]
    n_bytes = dict.fromkeys(Tier, 0)
    for tile, tier in zip(tiling.shapes, tiers, strict=True):
        n_bytes[tier] += tile.n_bytes
    disk_s = n_bytes[Tier.DISK] / machine.disk_speed + counts[Tier.DISK] * DISK_GAP_S
    if machine.platform == "cpu":
        # Nothing is moved: what would be the link is the arithmetic itself, over every weight.
        gaps = len(tiling.shapes) * LINK_GAP_S
        return max(disk_s, _cpu_arithmetic(machine, tiling) + gaps)
    moved = sum(n_bytes[tier] for tier in passing)
    gaps = sum(counts[tier] for tier in passing) * LINK_GAP_S
    arithmetic = n_chunks * sum(_work_bytes(tile) * n for tile, n in tiling.distinct)
    return max(disk_s, moved / machine.bytes_per_s + gaps, arithmetic / GPU_ARITHMETIC)


def steps_seconds(machine: Machine, tiling: Tiling, *, n_chunks: int) -> float:
    """Seconds that Python and the driver take for the steps, whatever the bytes."""
    platform, distinct = machine.platform, tiling.distinct
    n_arrays = sum(tile.n_arrays * n for tile, n in distinct)
    n_programs = sum(_programs(tile) * n for tile, n in distinct) * n_chunks
    return (
        len(tiling.shapes) * STEP_S[platform]
        + n_arrays * ARRAY_S[platform]
        + n_programs * PROGRAM_S[platform]
    )


def plain_seconds(machine: Machine, plain_bytes: int) -> float:
    """About how long a pass takes on a CPU over so many bytes of plain weights, what does not fit
    the host's budget coming from disk."""
    from_disk = max(0, plain_bytes - machine.host_budget + machine.runtime_bytes)
    return max(plain_bytes / machine.bytes_per_s, from_disk / machine.disk_speed)


def _cpu_arithmetic(machine, tiling):
    plain = decoded = 0
    for tile, n in tiling.distinct:
        for part in tile.parts:
            if part.encoding.is_plain:
                plain += n * part.n_bytes
            else:
                decoded += n * part.n_weights
    scales = sum(
        n * part.n_bytes
        for tile, n in tiling.distinct
        for part in tile.parts
        if not part.encoding.is_plain and not part.n_weights
    )
    return (plain + scales) / machine.bytes_per_s + decoded / CPU_DECODED_WEIGHTS


def _work_bytes(tile: Tile) -> int:
    """What a tile is to a GPU's arithmetic: its bytes, of decoded weights DECODED_BYTES each."""
    return sum(
        part.n_bytes
        if part.encoding.is_plain or not part.n_weights
        else DECODED_BYTES * part.n_weights
        for part in tile.parts
    )


def _programs(tile: Tile) -> int:
    """How many programs a chunk goes through at a tile: one over its rows, one where a stage ends,
    and one where a stage makes its own input."""
    if tile.stage is None or tile.stage.finish is None:
        return 1
    return 1 + tile.ends_stage * (1 + (tile.stage.input is not None))
