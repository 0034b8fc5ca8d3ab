"""Which experts the rows of a forward pass have chosen, and which the next layer may choose.

The router of the next layer is applied to what the router of this layer looks at: one program more,
whose result comes to the host together with this layer's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.engine.deciding import decided
from jlayer.engine.picking import in_order, likeliest, routed
from jlayer.engine.programs import Programs
from jlayer.engine.residents import Residents
from jlayer.model.stages import call
from jlayer.plan.tiles import Tile
from jlayer.spec import resident_dtype
from jlayer.streaming.landing import Landings
from jlayer.streaming.steps import Decision


class Chooser:
    """Brings decisions of routers to the host."""

    def __init__(self, programs: Programs, residents: Residents):
        self._programs, self._residents = programs, residents
        self._known: dict[tuple, Callable] = {}  # (what routes, rows) -> its program
        self._landings = Landings(programs.devices)

    def compile(self, tiles: Sequence[Tile], n_rows: int) -> None:
        """Compiles the programs that guess for a chunk of so many rows."""
        for kind in dict.fromkeys(tile.kind for tile in tiles if tile.expert is not None):
            self._program(kind, n_rows)

    def decide(self, passing: Sequence, following: Tile | None) -> Decision:
        """The experts that some row uses, those of most rows first; all wait here for the router.
        `following`: the first tile of the next layer's experts, if they are to be guessed."""
        found = [self._routing(chunk, following) for chunk in passing]

        def looked_at():
            each, weights = [], 0.0
            for number, (chunk, routings) in enumerate(zip(passing, found, strict=True)):
                routings = self._landings.fetch(number, routings)
                real, n_rows = chunk.part.real, chunk.part.size.rows
                routing, *guess = routings.reshape(-1, n_rows, routings.shape[-1])
                each.append(routed(routing, real))
                weights = weights + sum(one[real].sum(axis=0) for one in guess)
            guessed = likeliest(weights) if following is not None else ()
            return each, guessed

        counts, guessed = decided("experts", looked_at)
        for chunk, of_chunk in zip(passing, counts, strict=True):
            chunk.n_routed = np.asarray(of_chunk)
        return Decision(in_order(np.sum(counts, axis=0)), guessed)

    def close(self) -> None:
        """Releases the memory that decisions come to."""
        self._landings.close()

    def _routing(self, chunk, following):
        """On the device: the routing of a chunk [R, E], or that and what is guessed after it
        [2, R, E]."""
        if following is None:
            return chunk.flow["routing"]
        kind, leaves = following.kind, self._residents.of(following.layer)
        given = {name: chunk.flow[name] for name in ("routing", *kind.route.reads)}
        given["whole"] = {name: leaves[name] for name in kind.route.whole}
        return self._program(kind, chunk.part.size.rows)(given)

    def _program(self, kind, n_rows):
        """The program ({routing of a layer, what its router looks at, leaves of the router of a
        next layer of this kind}) -> both routings, float32 [2, R, E]. None while it is compiled."""
        key = kind.route, n_rows
        if key not in self._known:
            program = self._compiled(kind, n_rows)
            if program is None:
                return None
            self._known[key] = program
        return self._known[key]

    def _compiled(self, kind, n_rows):
        cfg, dtype, route = self._programs.cfg, self._programs.dtype, kind.route

        def function(given):
            guess = call(route, given, given["whole"])
            return jnp.stack([given["routing"], guess["routing"]])

        leaves = {name: kind.leaf(name) for name in route.whole}
        looked_at = jax.ShapeDtypeStruct((n_rows, cfg.hidden_size), dtype)
        given: dict = dict.fromkeys(route.reads, looked_at)
        given["routing"] = jax.ShapeDtypeStruct((n_rows, kind.n_experts), "float32")
        given["whole"] = {
            name: jax.ShapeDtypeStruct(leaf.shape(cfg), resident_dtype(leaf, dtype))
            for name, leaf in leaves.items()
        }
        return self._programs.get(f"guess experts {n_rows}", (route,), function, (given,))
