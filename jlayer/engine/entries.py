"""Cache entries between the pools and arrays on the host: those that some lanes list, and those of
the first tokens of one text.

Layer by layer, in parts of some bytes: what is saved or loaded is never whole in host memory beside
the pools. Entries are as they lie in the pools, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from jlayer.engine.caches import Caches
from jlayer.engine.draft import DraftModel
from jlayer.engine.pool import Pool, Table, Window
from jlayer.engine.states import Part
from jlayer.families.base import CacheSpec

PART_BYTES = 64 << 20  # about so many bytes are read from the pools, or placed there, at a time
LAYER, DRAFT = "layer-{:05d}", "draft-{:05d}"
NONE = np.zeros(0, np.int32)


Where = Callable[[CacheSpec], np.ndarray]  # the rows or slots in a layer's pool, by its cache


@dataclass(frozen=True)
class Listed:
    """The entries that some tables list. `rows`: their pool rows, each once. `places`: for each
    table, where its tokens' entries are among these. `slots`: of the tables' states, where layers
    have some."""

    pool: Pool
    rows: np.ndarray
    places: tuple[np.ndarray, ...]
    slots: tuple[int, ...] = ()

    def of(self, number: int) -> Listed:
        """What one of the tables lists."""
        return Listed(self.pool, self.rows, (self.places[number],), self.slots[number:][:1])

    def seen(self, window: Window) -> np.ndarray:
        """Those that layers with a window have, as places: what the next tokens see."""
        ends = [place[max(0, len(place) - window.n_behind) :] for place in self.places]
        return np.unique(np.concatenate([NONE, *ends]))

    def where(self, spec: CacheSpec) -> np.ndarray:
        """The rows or slots in a pool with this cache, in the order of the arrays."""
        if spec.kind == "state":
            return np.array(self.slots, np.int32)
        window = window_of(self.pool, spec)
        return self.rows if window is None else window.places[self.rows[self.seen(window)]]


def window_of(pool: Pool, spec: CacheSpec) -> Window | None:
    """The one of layers with this cache; None: they see all."""
    return next((one for one in pool.windows if one.size == spec.window), None)


def listed(pool: Pool, tables: Sequence[Table]) -> Listed:
    """The entries of tables that can go on."""
    rows = np.unique(np.concatenate([NONE, *(table.rows for table in tables)]))
    places = tuple(np.searchsorted(rows, table.rows).astype(np.int32) for table in tables)
    slots = tuple(table.source for table in tables) if pool.has_state else ()
    return Listed(pool, rows, places, slots)


def in_order(pool: Pool, table: Table) -> Listed:
    """The entries of one table, in the order of its tokens."""
    slots = (table.source,) if pool.has_state else ()
    return Listed(pool, table.rows.copy(), (np.arange(len(table), dtype=np.int32),), slots)


@contextmanager
def placing(
    pool: Pool, tables: Sequence[Table], places: Sequence[np.ndarray], given: np.ndarray = NONE
) -> Iterator[Listed]:
    """Yields pool rows for entries that are to be placed inside, one for each that several tables
    list; after it the tables, which are empty before, list them and have the states. `places`: as
    in `Listed`, all there are. `given`: pool rows behind the new ones, with entries that other
    tables have; not where some layers have a window. With an error nothing is taken."""
    assert not (len(given) and pool.windows), "a window has no place for what was seen long before"
    n_rows = 1 + max((int(place.max()) for place in places if len(place)), default=-1)
    slots = tuple(table.target for table in tables) if pool.has_state else ()
    taken = pool.take(n_rows - len(given), n_seen=0)
    new = Listed(pool, np.concatenate([taken, given]), tuple(places), slots)
    try:
        for window in pool.windows:
            window.take(new.rows[new.seen(window)])
        yield new
        for table, place in zip(tables, places, strict=True):
            rows = new.rows[place]
            pool.share(rows)
            table.commit(rows)
    finally:
        pool.release(taken)


def grows(spec: CacheSpec) -> bool:
    """Whether a layer keeps an entry for every token, for good."""
    return spec.kind == "rows" and spec.window is None


def growing(rows: np.ndarray) -> Where:
    """Entries in these pool rows, of the layers that keep all."""
    return lambda spec: rows if grows(spec) else NONE


def ending(entries: Listed) -> Where:
    """What the other layers have: of what tables list the end, and the states."""
    return lambda spec: NONE if grows(spec) else entries.where(spec)


def n_bytes(caches: Caches, where: Where) -> int:
    """Of all arrays that `parts` gives."""
    sizes = [caches.entry_bytes(layer) for layer in range(len(caches.specs))]
    return sum(size * len(where(spec)) for size, spec in zip(sizes, caches.specs, strict=True))


def parts(caches: Caches, where: Where) -> Iterator[Part]:
    """Entries as arrays by layer and name, some layers at a time."""
    layers = enumerate(caches.specs)
    yield from _grouped(LAYER, (caches.entries(layer, where(spec)) for layer, spec in layers))


def kept_layers(caches: Caches, where: Where) -> set[int]:
    """The layers of which `parts` gives something."""
    return {layer for layer, spec in enumerate(caches.specs) if len(where(spec))}


def place(caches: Caches, part: Part, where: Where) -> set[int]:
    """Writes what of a part is of layers into the pools; -> which layers these are. Raises
    ValueError or LookupError where the arrays are not those of such a layer."""
    found = _layers_of(part, LAYER)
    for layer, arrays in found.items():
        own = where(caches.specs[layer])
        expected = caches.struct(layer, len(own))
        if {name: (one.shape, one.dtype) for name, one in arrays.items()} != expected:
            raise ValueError(f"layer {layer}: entries of another shape or dtype")
        caches.place(layer, own, arrays)
    return set(found)


def draft_parts(draft: DraftModel, rows: np.ndarray) -> Iterator[Part]:
    """A draft model's own entries in these pool rows, which it knows all."""
    yield from _grouped(DRAFT, (draft.entries(layer, rows) for layer in range(draft.n_layers)))


def place_draft(draft: DraftModel, part: Part, rows: np.ndarray) -> None:
    """The other way."""
    for layer, arrays in _layers_of(part, DRAFT).items():
        draft.place(layer, rows, arrays)


def _grouped(name, of_layers) -> Iterator[Part]:
    part, size = {}, 0
    for layer, arrays in enumerate(of_layers):
        part |= {f"{name.format(layer)}.{own}": array for own, array in arrays.items()}
        size += sum(array.nbytes for array in arrays.values())
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _layers_of(part: Part, name: str) -> dict[int, Mapping[str, np.ndarray]]:
    """Layer -> its arrays in a part."""
    found: dict[int, dict[str, np.ndarray]] = {}
    prefix = name.partition("{")[0]
    for own, array in part.items():
        layer, _, leaf = own.removeprefix(prefix).partition(".")
        if own.startswith(prefix):
            found.setdefault(int(layer), {})[leaf] = array
    return found
