"""What is called at a tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A compiled program at a tile.

    Its arguments are a dict of what it reads and a dict of what it reuses the memory of (the cache,
    or nothing). It reads the values `reads` of a chunk, "weights" if it `uses_weights`, and the
    leaves `whole` and `next_whole`, of the tile's layer and of the one whose stage is next. It
    returns a dict of the values that it gives. `ends_stage`: whether the stage's `finish` is in it.
    """

    program: Callable
    reads: tuple[str, ...]
    uses_weights: bool = True
    whole: tuple[str, ...] = ()
    next_whole: tuple[str, ...] = ()
    uses_cache: bool = False
    ends_stage: bool = False
