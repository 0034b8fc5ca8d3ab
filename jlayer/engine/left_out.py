"""Chunks that pass over some layers, beside others that do not: one forward pass shows what a model
is worth without this layer or that.

A layer's first input is made at the end of the layer before it. Where that one was passed over it
is made anew, from the hidden states. A layer's weights come for whoever uses them, also for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlayer.engine.batch import Part
from jlayer.engine.choosing import Chooser
from jlayer.engine.chunk import Chunk
from jlayer.engine.programs import Programs
from jlayer.engine.residents import Residents
from jlayer.plan.tiles import Tile
from jlayer.streaming.steps import Decision


def some_pass_over(parts: Sequence[Part]) -> bool:
    """Whether some chunks of a pass go past some layers. The host's cores do not help then: they
    multiply the rows of all chunks together."""
    return any(part.without for part in parts)


class LeftOut:
    """Which chunks a tile is for."""

    def __init__(self, programs: Programs, residents: Residents):
        self._programs, self._residents = programs, residents

    def compile(self, tiles: Sequence[Tile], parts: Sequence[Part]) -> None:
        """Compiles what makes the first input of a layer for these chunks."""
        for tile in tiles:
            if _begins_layer(tile):
                for part in parts:
                    if tile.layer - 1 in part.without:
                        self._programs.enter(tile, part.size)

    def at(self, tile: Tile, passing: Sequence[Chunk]) -> Sequence[Chunk]:
        """The chunks that go through a tile, with its layer's input where it is the first."""
        if tile.kind is None:
            return passing
        found = [chunk for chunk in passing if tile.layer not in chunk.part.without]
        if _begins_layer(tile):
            for chunk in found:
                if tile.layer - 1 in chunk.part.without:
                    self._enter(tile, chunk)
        return found

    def decide(
        self, chooser: Chooser, passing: Sequence[Chunk], tile: Tile, following: Tile | None
    ) -> Decision:
        """See `Chooser.decide`; where a layer's experts are for nobody, the first of them comes."""
        found = self.at(tile, passing)
        return chooser.decide(found, following) if found else Decision((0,))

    def _enter(self, tile, chunk):
        call = self._programs.enter(tile, chunk.part.size)
        leaves = self._residents.of(tile.layer)
        given = {name: chunk.flow[name] for name in call.reads}
        if call.whole:
            given["whole"] = {name: leaves[name] for name in call.whole}
        results, _ = call.program(given, {})
        chunk.flow |= results


def _begins_layer(tile):
    """Whether the input of a layer's first stage is made before this tile."""
    if tile.kind is None or tile.stage is None:
        return False
    return tile.begins_stage and tile.stage == tile.kind.stages[0] and tile.stage.input is not None
