"""How many experts each layer keeps on the device and in host memory, and what moves of them.

Each layer has its own slots: see `streaming.experts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jlayer.families.registry import layer_kinds
from jlayer.parts import Router
from jlayer.plan.need import Need
from jlayer.plan.tiles import Tile
from jlayer.plan.tiling import Tiling
from jlayer.spec import ModelConfig


@dataclass(frozen=True)
class ExpertRooms:
    """Of each layer that has experts, in order, how many of them are kept on the device and in host
    memory. () where no layer has some. `guessed`: how many experts are put by guess for a layer;
    those of two layers are on the device at a time."""

    on_device: tuple[int, ...] = ()
    in_host: tuple[int, ...] = ()
    guessed: int = 0


NO_EXPERTS = ExpertRooms()


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes of one expert of a layer: of its tiles, on the device, and in its room in host
    memory."""

    tiles: int
    device: int
    host: int


@lru_cache(maxsize=64)
def counts_of(cfg: ModelConfig) -> tuple[int, ...]:
    """Of each layer that has experts, in order, how many."""
    return tuple(kind.n_experts for kind in layer_kinds(cfg) if kind.n_experts)


def no_rooms(cfg: ModelConfig) -> ExpertRooms:
    """No expert is kept."""
    none = (0,) * len(counts_of(cfg))
    return ExpertRooms(none, none)


def sizes_of(tiling: Tiling) -> tuple[ExpertBytes, ...]:
    """Of each layer that has experts, in order, the bytes of one; of a layer all have the same."""
    return tuple(
        ExpertBytes(
            sum(tile.n_bytes for tile in tiles),
            sum(tile.device_bytes for tile in tiles),
            sum(tile.room_bytes for tile in tiles) + len(tiles) * tiling.slack,
        )
        for tiles in tiling.experts
    )


def rooms(counts: Sequence[int], sizes: Sequence[int], room: int) -> tuple[int, ...]:
    """How many experts each layer keeps within `room` bytes, as even as can be. `counts`: how many
    it has; `sizes`: bytes of one."""
    kept, most = [0] * len(counts), max(counts, default=0)
    low, high = 0, most  # the most that all layers can keep, each of those that it has
    while low < high:
        middle = (low + high + 1) // 2
        needed = sum(min(middle, n) * size for n, size in zip(counts, sizes, strict=True))
        low, high = (middle, high) if needed <= room else (low, middle - 1)
    kept = [min(low, n) for n in counts]
    room -= sum(n * size for n, size in zip(kept, sizes, strict=True))
    for layer, (n, size) in enumerate(zip(counts, sizes, strict=True)):
        if kept[layer] < n and size <= room:
            kept[layer] += 1
            room -= size
    return tuple(kept)


def rooms_need(tiling: Tiling, found: ExpertRooms) -> Need:
    """The memory of the experts that are kept, and of those that are put by guess."""
    sizes = sizes_of(tiling)
    kept = sum(n * size.device for n, size in zip(found.on_device, sizes, strict=True))
    return Need(
        "resident",
        device=kept + 2 * found.guessed * max((size.device for size in sizes), default=0),
        host=sum(n * size.host for n, size in zip(found.in_host, sizes, strict=True)),
    )


def distinct(router: Router, n_rows: int) -> float:
    """How many experts of a layer so many tokens use, if each chooses by itself and all experts are
    equally liked: E (1 - (1 - k/E)^T)."""
    n = router.n_experts
    return n * (1 - (1 - router.n_chosen / n) ** max(1, n_rows))


# The bytes of experts that one call multiplies, and the most experts. A call takes 0.1 to 0.2 ms of
# Python and the driver, as long as 5 to 10 MB take to cross a fast link; but the first expert of a
# call waits for the last, so the link is ahead by as much.
AT_ONCE_BYTES, MOST_AT_ONCE = 64 << 20, 8


def at_once(tile: Tile) -> int:
    """How many experts are multiplied by one call, by a tile of one; of those that are several
    tiles, one."""
    if not tile.is_whole_expert:
        return 1
    few = -(-AT_ONCE_BYTES // max(1, tile.n_bytes))
    return min(few, MOST_AT_ONCE, tile.kind.router.n_chosen)


def is_stacked(tile: Tile, platform: str) -> bool:
    """Whether the experts of a call are copied to one array and multiplied by one product: on a
    GPU, where a kernel takes longer to launch than 9 MB to copy. Those that are decoded are so one
    at a time, for the sake of memory."""
    is_plain = all(part.encoding.is_plain for part in tile.parts)
    return platform == "gpu" and is_plain and at_once(tile) > 1


def stacked_bytes(tiling: Tiling, platform: str, *, n_rows: int, hidden: int) -> int:
    """Bytes of the copies of several experts that a program makes, and of what each gives to
    `n_rows` rows of `hidden` numbers, before and after their weights."""
    return max(
        (
            at_once(tile) * (tile.n_bytes + 2 * 4 * n_rows * hidden)
            for tile, _ in tiling.distinct
            if tile.expert is not None and is_stacked(tile, platform)
        ),
        default=0,
    )


def passing(tiles: Iterable[Tile], ahead: int) -> int:
    """The most tiles of experts that are on the device at a time besides those that stay there, at
    least `ahead`: those of one call, and as many that are on their way meanwhile. `tiles`: at least
    one of each shape."""
    return max((max(ahead, 2 * at_once(tile)) for tile in tiles), default=0)


# So many bytes of experts are put by guess for a layer, and so many experts: what a fast link
# brings while the experts of the layer before run, and its own attention and router, about 1.5 ms.
# An expert of more than MOST_GUESSED_BYTES is not guessed: a wrong one would take several times as
# long as there is to hide.
GUESSED_BYTES, GUESSED_EXPERTS, MOST_GUESSED_BYTES = 80 << 20, 8, 128 << 20


def guess_rooms(router: Router, size: int, room: int) -> int:
    """How many experts of `size` bytes are put by guess for a layer, those of two layers within
    `room` bytes."""
    if size > MOST_GUESSED_BYTES:
        return 0
    most = min(router.n_chosen, GUESSED_EXPERTS)
    return min(most, max(1, GUESSED_BYTES // size), room // (2 * size))


@dataclass(frozen=True)
class Moved:
    """Bytes of experts that a forward pass moves, and how many of their tiles: from disk, and to
    the device; and the tiles that run."""

    disk_bytes: float = 0.0
    disk_tiles: float = 0.0
    put_bytes: float = 0.0
    put_tiles: float = 0.0
    used_bytes: float = 0.0
    used_tiles: float = 0.0

    def share_of(self, tiling: Tiling) -> float:
        """The share of all experts that are used."""
        n_tiles = len(tiling.shapes) - len(tiling.certain)
        return self.used_tiles / n_tiles if n_tiles else 0.0


NONE_MOVED = Moved()


def moved(cfg: ModelConfig, tiling: Tiling, found: ExpertRooms, n_rows: int) -> Moved:
    """What a forward pass of so many rows is expected to move. What is kept is taken to be asked
    for no more often than what is not: a model that likes some experts moves less."""
    if cfg.experts is None:
        return NONE_MOVED
    router, sums = cfg.experts.router, [0.0] * 6
    used = distinct(router, n_rows)
    layers = zip(tiling.experts, found.on_device, found.in_host, strict=True)
    for tiles, on_device, in_host in layers:
        put = used * (1 - on_device / router.n_experts)
        read = put * (1 - in_host / router.n_experts)
        n_bytes = sum(tile.n_bytes for tile in tiles)
        amounts = [n * each for n in (read, put, used) for each in (n_bytes, len(tiles))]
        sums = [total + more for total, more in zip(sums, amounts, strict=True)]
    return Moved(*sums)
