"""The small parts of a decoder: norm, linear map, rotary embedding, gated MLP activation, head.

Weights may be of another dtype than the activations: they are cast to it where they are used, as
loading in that dtype would, so a run in float32 of bfloat16 weights is exact.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.model.products import product
from jlayer.spec import ModelConfig, Rope

ACTIVATION = {"silu": jax.nn.silu}


def rms_norm(x, weight, *, eps: float):
    """x [..., D] over its root mean square, in float32; `weight * cast(x_hat)` is the reference's
    order of rounding."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return _last(weight.astype(x.dtype), x) * (x32 * scale).astype(x.dtype)


def linear(x, weight, bias=None):
    """x [..., in] -> [..., out] in x's dtype, rounded once after the bias."""
    y = product(x, weight)
    if bias is not None:
        y = y + _last(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def _last(vector, like):
    """A vector as the last axis of an array of like's rank: rank promotion is never left to
    chance."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies, float32 [H/2], with the type's scaling applied.

    The power is taken in float64 of the float32 exponent and the rest in float32: that is what
    torch computes, and the last bit shows at long positions. llama3: the scaling published with
    Llama 3.1 (as in transformers' modeling_rope_utils).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if rope.type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.type == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies, rope):
    """Long waves are stretched by `factor`, short ones kept, and those between blended."""
    f32 = np.float32
    original = f32(rope.original_max_position_embeddings)
    wavelengths = f32(2 * math.pi) / frequencies
    longest, shortest = original / f32(rope.low_freq_factor), original / f32(rope.high_freq_factor)
    stretched = np.where(wavelengths > longest, frequencies / f32(rope.factor), frequencies)
    blend = (original / wavelengths - f32(rope.low_freq_factor)) / f32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (f32(1) - blend) * stretched / f32(rope.factor) + blend * stretched
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return np.where(between, blended, stretched).astype(np.float32)


def rotate(x, positions, cfg: ModelConfig):
    """Rotary embedding of x [B, T, heads, H] at positions [B, T], halves paired (i, i + H/2),
    computed in float32."""
    frequencies = rope_frequencies(cfg.rope, cfg.head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]  # [B, T, H/2]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


def gated(gate, up, *, activation: str):
    """The MLP's inner activation, act(gate) * up, each [..., F]."""
    return ACTIVATION[activation](gate) * up
