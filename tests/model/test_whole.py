"""Models in one program: choosing the largest, and which models have layers alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlayer.families.registry import FAMILIES
from jlayer.model.whole import BLOCK, largest, one_kind
from tests import made_up

COUNT = 3


def check_largest(values, count):
    found, ids = map(np.asarray, jax.jit(largest, static_argnums=1)(jnp.asarray(values), count))
    expected, _ = jax.lax.top_k(values, count)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.take_along_axis(values, ids, axis=1), expected)
    assert all(len(np.unique(row)) == count for row in ids)


@given(st.integers(0, 1 << 30), st.sampled_from([0, 3, 1000]))
@example(1, 1)
@settings(max_examples=30, derandomize=True)
def test_the_largest_of_many_are_those_of_top_k(seed, n_values):
    """Ties too; the last block is not full, and holds less than the padding would."""
    rng = np.random.default_rng(seed)
    values = rng.normal(-50, 9, (4, 2 * COUNT * BLOCK - 37)).astype(np.float32)
    if n_values:
        values = np.float32(rng.integers(-n_values, 0, values.shape))
    check_largest(values, COUNT)


@pytest.mark.parametrize("width", [5, BLOCK, 2 * BLOCK + 1, (2 * COUNT - 1) * BLOCK + 1])
def test_the_largest_of_any_number(width):
    """All in one block, or in the last, of little more than one."""
    rng = np.random.default_rng(width)
    values = rng.normal(0, 1, (2, width)).astype(np.float32)
    values[1, -COUNT:] = 9, 8, 7
    check_largest(values, COUNT)


def test_the_largest_may_lie_in_one_block_and_be_very_small():
    values = np.full((1, 2 * COUNT * BLOCK), np.finfo(np.float32).min, np.float32)
    values[0, 2 * BLOCK : 2 * BLOCK + COUNT] = -1e30
    check_largest(values, COUNT)
    check_largest(np.full((1, 2 * COUNT * BLOCK), -np.inf, np.float32)[:, :5], COUNT)


def test_layers_of_one_kind_only(monkeypatch):
    monkeypatch.setitem(FAMILIES, made_up.NAME, made_up.FAMILY)
    monkeypatch.setitem(FAMILIES, made_up.SUB_NORM_FAMILY.model_type, made_up.SUB_NORM_FAMILY)
    assert one_kind(made_up.config()) is None
    assert one_kind(made_up.config(num_hidden_layers=1)).name == "gateless"
    assert one_kind(made_up.config(model_type="sub_norm")).name == "sub_norm"
