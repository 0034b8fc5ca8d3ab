"""The time of a forward pass: the slowest of disk, link, arithmetic and steps, since they
overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jlayer.plan.experts import NONE_MOVED, Moved, at_once
from jlayer.plan.hosting import EXCHANGE_S, count_stages, seconds_on_host
from jlayer.plan.machine import (
    CPU_DECODED_WEIGHTS,
    DECODED_BYTES,
    DISK_GAP_S,
    GPU_ARITHMETIC,
    LINK_GAP_S,
    Machine,
)
from jlayer.plan.tiles import Tier, Tile
from jlayer.plan.tiling import Tiling


def bytes_seconds(
    machine: Machine,
    tiling: Tiling,
    tiers: Sequence[Tier],
    *,
    n_chunks: int,
    cache_bytes: int = 0,
    hosted: frozenset[int] = frozenset(),
    rows: int = 1,
    experts: Moved = NONE_MOVED,
) -> float:
    """Seconds for the bytes: the slowest of disk, link, arithmetic and the host's cores.
    `cache_bytes`: of pools that cross the link too. `hosted`: the tiles that the cores multiply, by
    `rows` columns. `experts`: what is used and moved of them."""
    counts, n_bytes, passing = Counter(), dict.fromkeys(Tier, 0), [Tier.DISK, Tier.HOST]
    for index in tiling.certain:
        counts[tiers[index]] += 1
        n_bytes[tiers[index]] += tiling.sizes[index]
    n_reads = counts[Tier.DISK] + experts.disk_tiles
    disk_bytes = n_bytes[Tier.DISK] + experts.disk_bytes
    disk_s = disk_bytes / machine.disk_speed + n_reads * DISK_GAP_S
    if not machine.kind.has_link:
        # Nothing crosses a link. Every weight is multiplied in memory instead.
        gaps = (len(tiling.certain) + experts.used_tiles) * LINK_GAP_S
        host_s = _host_seconds(machine, tiling, hosted, rows)
        return max(disk_s, _cpu_arithmetic(machine, tiling, hosted, experts) + host_s + gaps)
    of_host = sum(tiling.sizes[index] for index in hosted)
    moved = sum(n_bytes[tier] for tier in passing) - of_host + cache_bytes + experts.put_bytes
    n_moved = sum(counts[tier] for tier in passing) - len(hosted) + experts.put_tiles
    gaps = n_moved * LINK_GAP_S
    used = experts.share_of(tiling)
    arithmetic = n_chunks * sum(
        _work_bytes(tile) * n * (1 if tile.expert is None else used) for tile, n in tiling.distinct
    )
    speed = machine.bytes_per_s
    if hosted and machine.host is not None:
        speed = machine.host.link or speed
    host_s = _host_seconds(machine, tiling, hosted, rows)
    arithmetic_s = arithmetic / machine.n_devices / GPU_ARITHMETIC
    return max(disk_s, moved / speed + gaps, host_s, arithmetic_s)


def steps_seconds(
    machine: Machine,
    tiling: Tiling,
    *,
    n_chunks: int,
    hosted: frozenset[int] = frozenset(),
    experts: Moved = NONE_MOVED,
) -> float:
    """Seconds of Python and the driver for the steps, independent of the bytes. `hosted`: the tiles
    that the cores multiply. `experts`: what is used of them."""
    kind, used = machine.kind, experts.share_of(tiling)
    n_arrays = sum(
        tile.n_arrays * n * (1 if tile.expert is None else used) for tile, n in tiling.distinct
    )
    n_arrays -= sum(tiling.shapes[index].n_arrays for index in hosted)
    n_of_experts = len(tiling.shapes) - len(tiling.certain)
    n_calls = experts.used_tiles / max((at_once(tile) for tile, *_ in tiling.experts), default=1)
    n_programs = (count_programs(tiling, hosted) - n_of_experts + n_calls) * n_chunks
    n_steps = len(tiling.certain) + n_calls
    return n_steps * kind.step_s + n_arrays * kind.array_s + n_programs * kind.program_s


def count_programs(tiling: Tiling, hosted: frozenset[int] = frozenset()) -> int:
    """The programs that are called for a chunk in a forward pass, if the head reads some of its
    rows: one that embeds, and one at each tile that the device multiplies. Where the host's cores
    multiply some, there is one to end each stage, or for the input of the head."""
    return 1 + len(tiling.shapes) - len(hosted) + count_stages(tiling, sorted(hosted))


def plain_seconds(machine: Machine, plain_bytes: int) -> float:
    """About the seconds of a forward pass on a CPU over plain weights; what exceeds the host budget
    is read from disk."""
    from_disk = max(0, plain_bytes - machine.host_budget + machine.runtime_bytes)
    return max(plain_bytes / machine.bytes_per_s, from_disk / machine.disk_speed)


def _host_seconds(machine, tiling, hosted, rows):
    """Seconds of the host's cores for these tiles, exchanges included; unknown speeds count
    nothing."""
    if not hosted or machine.host is None:
        return 0.0
    exchange_s = EXCHANGE_S if machine.kind.has_link else 0.0
    n_stages = count_stages(tiling, sorted(hosted))
    return seconds_on_host(machine.host, tiling, sorted(hosted), rows) + n_stages * exchange_s


def _cpu_arithmetic(machine, tiling, hosted, experts):
    """Seconds to multiply the weights in memory that XLA multiplies: plain ones and scales at the
    speed of their bytes, decoded ones each by itself."""
    n_bytes = n_decoded = 0
    # All tiles that are set apart for the host are `hosted`, or none of them.
    for tile, n in tiling.distinct:
        if hosted and tile.for_host:
            continue
        n = n if tile.expert is None else n * experts.share_of(tiling)
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
