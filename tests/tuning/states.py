"""Adapters of random numbers, as training would leave them."""

import numpy as np

from jlayer.config import read_config
from jlayer.tuning.adapter import AdapterConfig, fresh, targets_of


def drawn(cfg, how, *, seed=0, size=0.2):
    """A state whose A and B are both random."""
    state, draw = fresh(targets_of(cfg, how), how, seed), np.random.default_rng(seed)
    for parts in state.values():
        for part, numbers in parts.items():
            parts[part] = draw.normal(0, size, numbers.shape).astype(np.float32)
    return state


def drawn_for(folder, **how):
    """(the config of the model in a folder, how its adapter is, a random state of that)."""
    cfg, how = read_config(folder), AdapterConfig(**how)
    return cfg, how, drawn(cfg, how)


def assert_equal_states(one, other):
    assert list(one) == list(other)
    for name, parts in one.items():
        for part in ("a", "b"):
            assert parts[part].dtype == other[name][part].dtype == np.float32
            np.testing.assert_array_equal(parts[part], other[name][part])
