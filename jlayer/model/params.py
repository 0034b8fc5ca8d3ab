"""The parameter trees, derived from the table of leaves: arrays are leaves, absent biases are
None. A matrix may be `quant.Quantized` as well."""

from __future__ import annotations

import jax
from flax import struct

from jlayer.families.llama import layer_leaves
from jlayer.spec import Leaf


@struct.dataclass
class Layer:
    """The weights of one decoder layer, in published layout: a projection is [out, in]."""

    input_layernorm: jax.Array  # [D]
    q_proj: jax.Array  # [N*H, D]
    k_proj: jax.Array  # [K*H, D]
    v_proj: jax.Array  # [K*H, D]
    o_proj: jax.Array  # [D, N*H]
    post_attention_layernorm: jax.Array  # [D]
    gate_proj: jax.Array  # [F, D]
    up_proj: jax.Array  # [F, D]
    down_proj: jax.Array  # [D, F]
    q_proj_bias: jax.Array | None = None  # [N*H]
    k_proj_bias: jax.Array | None = None  # [K*H]
    v_proj_bias: jax.Array | None = None  # [K*H]
    o_proj_bias: jax.Array | None = None  # [D]
    gate_proj_bias: jax.Array | None = None  # [F]
    up_proj_bias: jax.Array | None = None  # [F]
    down_proj_bias: jax.Array | None = None  # [D]


def leaf_struct(leaf: Leaf, cfg, dtype: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, to compile from before any weight is there."""
    return jax.ShapeDtypeStruct(leaf.shape(cfg), dtype)


def layer_struct(cfg, dtypes: dict[str, str]) -> Layer:
    """A Layer of shapes alone; `dtypes` names each leaf's dtype on disk."""
    return Layer(
        **{leaf.name: leaf_struct(leaf, cfg, dtypes[leaf.name]) for leaf in layer_leaves(cfg)}
    )
