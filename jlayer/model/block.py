"""The stages of a decoder layer, and the one block made of them: the only arithmetic that a layer's
weights meet.

A stage takes just the weights it needs, so that a layer can also come in parts.
"""

from __future__ import annotations

from jlayer.config import ModelConfig
from jlayer.model.attention import attention
from jlayer.model.cache import LayerCache, append
from jlayer.model.layers import gated, linear, rms_norm, rotate
from jlayer.model.params import Layer


def block(layer: Layer, hidden, cache: LayerCache, positions, cfg: ModelConfig):
    """One decoder layer: hidden [B, T, D], positions [B, T] int32 -> (hidden [B, T, D], cache with
    these T tokens)."""
    q, k, v = qkv(layer, hidden, positions, cfg)
    attended, cache = attend(q, k, v, cache, positions)
    hidden = project(layer, hidden, attended)
    return mlp_out(layer, hidden, mlp_in(layer, hidden, cfg)), cache


def qkv(layer: Layer, hidden, positions, cfg: ModelConfig):
    """hidden [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]; q and k rotated to their
    positions."""
    x = rms_norm(hidden, layer.input_layernorm, eps=cfg.rms_norm_eps)

    def heads(weight, bias):
        return linear(x, weight, bias).reshape(*x.shape[:2], -1, cfg.head_dim)

    q = heads(layer.q_proj, layer.q_proj_bias)
    k = heads(layer.k_proj, layer.k_proj_bias)
    v = heads(layer.v_proj, layer.v_proj_bias)
    return rotate(q, positions, cfg), rotate(k, positions, cfg), v


def attend(q, k, v, cache: LayerCache, positions):
    """Writes k, v to the cache, then attends over it -> ([B, T, N*H], cache)."""
    cache = append(cache, k, v, positions)
    return attention(q, cache, positions), cache


def project(layer: Layer, hidden, attended):
    """Attention's output [B, T, N*H] mapped to the width and added to hidden [B, T, D]."""
    return hidden + linear(attended, layer.o_proj, layer.o_proj_bias)


def mlp_in(layer: Layer, hidden, cfg: ModelConfig):
    """hidden [B, T, D] -> the MLP's inner activation [B, T, F]."""
    x = rms_norm(hidden, layer.post_attention_layernorm, eps=cfg.rms_norm_eps)
    gate = linear(x, layer.gate_proj, layer.gate_proj_bias)
    up = linear(x, layer.up_proj, layer.up_proj_bias)
    return gated(gate, up, activation=cfg.hidden_act)


def mlp_out(layer: Layer, hidden, inner):
    """The inner activation [B, T, F] mapped back to the width and added to hidden [B, T, D]."""
    return hidden + linear(inner, layer.down_proj, layer.down_proj_bias)
