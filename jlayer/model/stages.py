"""The stages of a decoder layer, and the one block made of them: the only arithmetic that a layer's
weights meet.

Between the stages stand plain products of a matrix with one input, so that a layer can come whole,
or as ranges of rows whose products are joined: the arithmetic is the same.
"""

from __future__ import annotations

import jax.numpy as jnp

from jlayer.config import ModelConfig
from jlayer.model.attention import attention
from jlayer.model.cache import LayerCache, append
from jlayer.model.ops import gated, linear, rms_norm, rotate
from jlayer.model.params import Layer


def block(layer: Layer, hidden, cache: LayerCache, positions, cfg: ModelConfig):
    """One decoder layer: hidden [B, T, D], positions [B, T] int32 -> (hidden [B, T, D], cache with
    these T tokens)."""
    x = rms_norm(hidden, layer.input_layernorm, eps=cfg.rms_norm_eps)
    q = linear(x, layer.q_proj, layer.q_proj_bias)
    k = linear(x, layer.k_proj, layer.k_proj_bias)
    v = linear(x, layer.v_proj, layer.v_proj_bias)
    attended, cache = attend(q, k, v, cache, positions, cfg)
    projected = linear(attended, layer.o_proj, layer.o_proj_bias)
    hidden, x = project(hidden, projected, layer.post_attention_layernorm, cfg)
    inner = mlp_in(
        x, layer.gate_proj, layer.up_proj, layer.gate_proj_bias, layer.up_proj_bias, cfg=cfg
    )
    return hidden + linear(inner, layer.down_proj, layer.down_proj_bias), cache


def attend(q, k, v, cache: LayerCache, positions, cfg: ModelConfig):
    """q [B, T, N*H], k and v [B, T, K*H] as projected -> ([B, T, N*H], the cache with k and v).

    q and k are rotated to their positions; k and v are written before they are attended to.
    """

    def heads(projected):
        return projected.reshape(*projected.shape[:2], -1, cfg.head_dim)

    q, k = rotate(heads(q), positions, cfg), rotate(heads(k), positions, cfg)
    cache = append(cache, k, heads(v), positions)
    return attention(q, cache, positions), cache


def project(hidden, projected, norm, cfg: ModelConfig):
    """Attention's output [B, T, D] added to hidden [B, T, D] -> (hidden, the MLP's input)."""
    hidden = hidden + projected
    return hidden, rms_norm(hidden, norm, eps=cfg.rms_norm_eps)


def mlp_in(x, gate, up, gate_bias=None, up_bias=None, *, cfg: ModelConfig):
    """x [B, T, D] with the same rows of gate and up [f, D] -> the MLP's inner activation [B, T,
    f]."""
    return gated(linear(x, gate, gate_bias), linear(x, up, up_bias), activation=cfg.hidden_act)


def join(parts):
    """Products of row ranges, each [B, T, rows], side by side."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
