"""A layer as the fold of its kind's stages: one function for all layers of a kind, whatever the
family."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.families.registry import FAMILIES, layer_kinds
from jlayer.model.attention import attention
from jlayer.model.cache import empty_cache, write
from jlayer.model.ops import gated, linear, normed, rotate
from jlayer.model.stages import block, join
from tests import made_up
from tests.chain import chain

TOKENS, CAPACITY = 5, 8
ROWS = chain(TOKENS, capacity=CAPACITY)


@pytest.fixture(scope="module")
def cfg():
    """The configuration of the made-up family, with every bias."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, made_up.NAME, made_up.FAMILY)
        yield made_up.config(attention_bias=True, mlp_bias=True)


def random_layer(kind, cfg, seed=0):
    rng = np.random.default_rng(seed)
    return {
        leaf.name: jnp.asarray(rng.normal(0, 0.3, leaf.shape(cfg)), jnp.float32)
        for leaf in kind.leaves
    }


def random_hidden(cfg):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(0, 1, (TOKENS, cfg.hidden_size)), jnp.float32)


def empty(kind):
    return empty_cache(kind.cache, n_rows=CAPACITY, dtype="float32")


def attend_by_hand(layer, x, cache, cfg):
    def projected(name):
        y = linear(x, layer[name], layer[f"{name}_bias"])
        return y.reshape(TOKENS, -1, cfg.attention.head_dim)

    rope = cfg.attention.rope
    q, k = (rotate(projected(name), ROWS.positions, rope) for name in ("q_proj", "k_proj"))
    v = projected("v_proj")
    cache = write(cache, k, v, ROWS)
    x = attention(q, k, v, cache, ROWS, cfg.attention)
    return linear(x, layer["o_proj"], layer["o_proj_bias"]), cache


def gateless_by_hand(layer, hidden, cache, cfg):
    x = normed(hidden, cfg.norm, layer["input_layernorm"])
    attended, cache = attend_by_hand(layer, x, cache, cfg)
    hidden = hidden + attended
    x = normed(hidden, cfg.norm, layer["post_attention_layernorm"])
    x = linear(x, layer["up_proj"], layer["up_proj_bias"])
    return hidden + linear(x, layer["down_proj"], layer["down_proj_bias"]), cache


def mlp_first_by_hand(layer, hidden, cache, cfg):
    x = normed(hidden, cfg.norm, layer["input_layernorm"])
    gate, up = (linear(x, layer[n], layer[f"{n}_bias"]) for n in ("gate_proj", "up_proj"))
    x = gated(gate, up, activation="silu")
    hidden = hidden + linear(x, layer["down_proj"], layer["down_proj_bias"])
    x = normed(hidden, cfg.norm, layer["post_attention_layernorm"])
    attended, cache = attend_by_hand(layer, x, cache, cfg)
    return hidden + attended, cache


@pytest.mark.parametrize(
    ("number", "by_hand"), [(0, gateless_by_hand), (1, mlp_first_by_hand)], ids=["0", "1"]
)
def test_block_does_what_the_table_of_stages_says(cfg, number, by_hand):
    kind = layer_kinds(cfg)[number]
    layer, hidden = random_layer(kind, cfg), random_hidden(cfg)
    found = jax.jit(block(kind))(layer, hidden, empty(kind), ROWS)
    expected = jax.jit(by_hand, static_argnums=3)(layer, hidden, empty(kind), cfg)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("n_layers", [3, 80])
def test_block_compiled_once_for_a_kind_serves_any_number_of_layers(cfg, n_layers):
    cfg = replace(cfg, num_hidden_layers=n_layers)
    traces, compiled = Counter(), {}
    for kind in layer_kinds(cfg):

        def counting(*given, of=kind):
            traces[of.name] += 1
            return block(of)(*given)

        compiled.setdefault(kind, jax.jit(counting))
    hidden, layers = random_hidden(cfg), {}
    for number, kind in enumerate(layer_kinds(cfg)):
        layer = layers.setdefault(kind, random_layer(kind, cfg, seed=number))
        hidden, _ = compiled[kind](layer, hidden, empty(kind), ROWS)
        hidden /= jnp.abs(hidden).max()  # 80 random layers would overflow
    assert np.isfinite(hidden).all()
    assert traces == {"gateless": 1, "mlp_first": 1, "decoder": 1}


def test_layers_of_a_kind_share_one_function(cfg):
    shallow, deep = (layer_kinds(replace(cfg, num_hidden_layers=n)) for n in (3, 80))
    assert len(deep) == 80
    assert set(deep) == set(shallow)
    assert {block(kind) for kind in deep} == {block(kind) for kind in shallow}
    assert len({block(kind) for kind in deep}) == 3


def test_products_of_row_ranges_are_joined_in_order():
    parts = [jnp.full((2, n), float(n)) for n in (3, 1, 2)]
    assert join(parts)[0].tolist() == [3, 3, 3, 1, 2, 2]
    assert join(parts[:1]) is parts[0]
    assert join(parts[0]) is parts[0]
