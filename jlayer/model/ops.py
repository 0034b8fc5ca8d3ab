"""The small parts of a decoder: norm, linear map, rotary embedding, gated MLP activation.

Weights may have another dtype than the activations. They are cast when used, which equals loading
them in that dtype: so a float32 run of bfloat16 weights is exact.
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
    """RMS norm of x [..., D], computed in float32.

    `weight * cast(x_hat)` rounds in the same order as the reference.
    """
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
    """Reshapes a vector to the last axis of an array with like's rank: rank promotion is an
    error."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies, float32 [H/2], with the type's scaling applied.

    The power is computed in float64 from the float32 exponent, the rest in float32. So does torch;
    at long positions a difference in the last bit shows. llama3: the scaling published with Llama
    3.1 (as in transformers' modeling_rope_utils).
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
    """Stretches long waves by `factor`, keeps short ones, and blends those between."""
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
    """Rotary embedding of x [R, heads, H] at positions [R], computed in float32.

    Element i is paired with i + H/2.
    """
    frequencies = rope_frequencies(cfg.rope, cfg.head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]  # [R, H/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


def gated(gate, up, *, activation: str):
    """The inner activation of the MLP: act(gate) * up, each [..., F]."""
    return ACTIVATION[activation](gate) * up
