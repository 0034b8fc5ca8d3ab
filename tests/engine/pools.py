"""Pools of caches in numpy, for tests of blocks that are kept of them."""

import numpy as np

from jlayer.engine.entries import NONE, grows
from jlayer.engine.kept_blocks import Wanted, opened, place_blocks
from jlayer.families.base import CacheArray, CacheSpec

KEY = (CacheArray("k", (2, 3)), CacheArray("v", (2, 3)))
STATE = (CacheArray("conv", (2,)), CacheArray("state", (3, 2), "float32"))
N_ROWS = 12


class Pools:
    """Pools of layers that see all, have a window and have a state, in numpy: what `Caches` has."""

    specs = (CacheSpec("rows", KEY), CacheSpec("rows", KEY, window=3), CacheSpec("state", STATE))

    def __init__(self, dtype="float16", seed=None):
        self.dtype = dtype
        self.layers = [
            {name: np.zeros(*how) for name, how in self.struct(layer, N_ROWS).items()}
            for layer in range(len(self.specs))
        ]
        if seed is not None:
            bits = np.random.default_rng(seed)
            for leaf in (leaf for pool in self.layers for leaf in pool.values()):
                leaf.view(np.uint8)[:] = bits.integers(0, 256, leaf.view(np.uint8).shape)

    def entry_bytes(self, layer):
        return sum(leaf.nbytes // N_ROWS for leaf in self.layers[layer].values())

    def struct(self, layer, n_entries):
        return {
            array.name: ((n_entries, *array.shape), np.dtype(array.dtype or self.dtype))
            for array in self.specs[layer].arrays
        }

    def entries(self, layer, where):
        return {name: leaf[where] for name, leaf in self.layers[layer].items()}

    def place(self, layer, where, entries):
        for name, array in entries.items():
            self.layers[layer][name][where] = array

    def bits(self):
        return [leaf.tobytes() for pool in self.layers for leaf in pool.values()]


def growing(*rows):
    return lambda spec: np.array(rows, np.int32) if grows(spec) else NONE


def ending(slot, *rows):
    places = {"state": [slot], "rows": rows}
    return lambda spec: NONE if grows(spec) else np.array(places[spec.kind], np.int32)


def everything(spec):
    return np.array([2] if spec.kind == "state" else [5, 0, 7, 1], np.int32)


def read(path, pools=None, where=everything):
    """The pools with what a block has."""
    pools = Pools() if pools is None else pools
    with opened([path]) as blocks:
        place_blocks(pools, [Wanted(block, [(where, 0)]) for block in blocks])
        facts = [block.facts for block in blocks]
    return facts, pools.bits()
