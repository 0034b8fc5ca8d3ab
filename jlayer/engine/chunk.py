"""Some rows on their way through the tiles, and what is called for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jlayer.engine.batch import Part
from jlayer.engine.calls import Call
from jlayer.engine.picking import picked_length, picked_lengths
from jlayer.families.base import Stage
from jlayer.families.experts import OF_EXPERTS
from jlayer.families.latent import OF_LATENT
from jlayer.plan.tiles import Tile


@dataclass(frozen=True)
class BoundCall:
    """A call at a tile, with the leaves that it reads at every chunk."""

    call: Call
    leaves: dict[str, dict[str, jax.Array]]


@dataclass
class Chunk:
    """Some rows between two tiles.

    `flow`: the values that stages pass on (hidden [R, D], rows, a stage's input x), those of the
    current stage (`products`, by name, as lists of the parts of row ranges; `hosted`), and which
    rows the head reads (`wanted`). `row_of`: [R], which row of what the host multiplied is whose.
    `calls`: by the id of a tile; there are none where nothing is to be done. Those of an expert are
    also by (id, the number of rows that are picked). `n_routed`: of the present layer, how many
    rows chose each expert; None: not known.
    """

    part: Part
    flow: dict
    row_of: jax.Array
    calls: dict[int | tuple[int, int], tuple[BoundCall, ...]]
    n_routed: np.ndarray | None = None

    def calls_at(self, tile: Tile) -> tuple[BoundCall, ...]:
        """What is done with it at a tile: nothing at an expert that no row chose."""
        if tile.expert is None or self.n_routed is None:
            return self.calls[id(tile)]
        if not self.n_routed[tile.expert]:
            return ()
        lengths = picked_lengths(tile.kind.router, self.part.size.rows)
        length = picked_length(lengths, self.n_routed[tile.expert])
        return self.calls[(id(tile), length) if length else id(tile)]

    def together(self, tiles: Sequence[Tile]) -> tuple[BoundCall, list[int]] | None:
        """What is done with it at the tiles of several experts, and the places of those that some
        row chose; None where no row chose any."""
        counts = self.n_routed
        chosen = [
            place for place, tile in enumerate(tiles) if counts is None or counts[tile.expert]
        ]
        if not chosen:
            return None
        first, length = tiles[chosen[0]], 0
        if counts is not None:
            lengths = picked_lengths(first.kind.router, self.part.size.rows)
            length = picked_length(lengths, max(counts[tiles[place].expert] for place in chosen))
        (bound,) = self.calls[(id(first), length) if length else id(first)]
        return bound, chosen

    @property
    def n_bytes(self) -> int:
        """Bytes of the chunk on the device now, but for what was put when the pass began."""
        flow = self.flow
        held = sum(flow[name].nbytes for name in HELD if name in flow)
        products = flow.get("products", {}).values()
        return held + sum(part.nbytes for parts in products for part in parts)


# What a chunk has no more when a stage has ended, unless its end gives it anew.
OF_STAGE = ("x", "products", "hosted")
HELD = ("hidden", "x", *OF_LATENT, *OF_EXPERTS)


def inputs_of(passing: Sequence[Chunk], stage: Stage | None) -> tuple[list, list, list]:
    """The input of a stage, its rows that are not padding, and the adapters of these, of each
    chunk. That of the head (None) is of the wanted rows alone."""
    if stage is not None:
        real = [chunk.part.real for chunk in passing]
        adapters = [chunk.part.adapters[chunk.part.real] for chunk in passing]
        return [chunk.flow[stage.source] for chunk in passing], real, adapters
    chunks = [chunk for chunk in passing if chunk.part.n_wanted]
    wanted = [np.arange(len(chunk.part.wanted)) for chunk in chunks]
    adapters = [chunk.part.adapters[chunk.part.wanted] for chunk in chunks]
    return [chunk.flow.pop("x") for chunk in chunks], wanted, adapters


def final_hidden(chunk: Chunk, bound: BoundCall, put: Callable) -> np.ndarray:
    """Those that are wanted, after the last layer and the head's norm: float32 [W, D]. `bound`:
    what gives them on the device, where `put` puts arrays."""
    wanted = chunk.part.hidden
    rows = put(np.resize(wanted, chunk.part.n_hidden))
    given = bound.leaves | {"hidden": chunk.flow["hidden"], "wanted": rows}
    results, _ = bound.call.program(given, {})
    return np.asarray(results["x"])[: len(wanted)].astype(np.float32)


def is_finite(chunk: Chunk) -> bool:
    """Whether the hidden states of real rows are finite; padding may hold anything."""
    hidden = np.asarray(chunk.flow["hidden"])[chunk.part.real]
    return bool(np.isfinite(hidden.astype(np.float32)).all())


def tables_bytes(passing: Sequence[Chunk]) -> int:
    """Bytes of what attention knows of all rows; chunks share some of it."""
    leaves = {id(leaf): leaf for chunk in passing for leaf in jax.tree.leaves(chunk.flow["rows"])}
    return sum(leaf.nbytes for leaf in leaves.values())
