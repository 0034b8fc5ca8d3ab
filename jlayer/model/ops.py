"""The small parts of a decoder: norm, linear map, rotary embedding, gated MLP activation.

Weights may have another dtype than the activations. They are cast when used, which equals loading
them in that dtype: so a float32 run of bfloat16 weights is exact.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.model.products import product
from jlayer.parts import Clamped, Growth, Logits, Norm, Rope, Scale

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def normed(x, norm: Norm, weight=None, bias=None):
    """The norm of x [..., D] over its last axis, computed in float32.

    `weight`, `bias`: [D], or with more axes, the last ones of x. Each form rounds in the same order
    as the reference.
    """
    x32 = x.astype(jnp.float32)
    if norm.kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    if weight is None:
        return x32.astype(x.dtype)
    if norm.rounds_first:
        return _last(weight.astype(x.dtype), x) * x32.astype(x.dtype)
    gain = weight.astype(jnp.float32)
    y = _last(1 + gain if norm.plus_one else gain, x) * x32
    if bias is not None:
        y = y + _last(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def linear(x, weight, bias=None, more=None, factor=None):
    """x [..., in] -> [..., out] in x's dtype, rounded once after the bias. `more`: float32
    [..., out], what is added to the product. `factor`: float32 [out], what the sum is then
    multiplied by."""
    return exact_linear(x, weight, bias, more, factor).astype(x.dtype)


def exact_linear(x, weight, bias=None, more=None, factor=None):
    """The same as it is summed, float32."""
    y = product(x, weight)
    if more is not None:
        y = y + more
    if factor is not None:
        y = y * _last(factor, y)
    return y if bias is None else y + _last(bias.astype(jnp.float32), y)


def _last(vector, like):
    """Reshapes an array to the last axes of one with like's rank: rank promotion is an error."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def rope_frequencies(rope: Rope, head_dim: int, *, is_long: bool = False) -> np.ndarray:
    """Angular frequencies, float32 [rotated / 2], with the type's scaling applied; those of
    `proportional` are [H/2], 0 for what is not turned. `is_long`: of a text longer than longrope's
    original length.

    The power is computed in float64 from the float32 exponent, the rest in float32. So does torch;
    at long positions a difference in the last bit shows. The scalings are those of transformers'
    modeling_rope_utils, where their papers are named.
    """
    f32 = np.float32
    size = head_dim if rope.type == "proportional" else int(head_dim * rope.partial)
    exponents = np.arange(0, size, 2, dtype=f32) / f32(size)
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(f32)
    if rope.type == "longrope":
        factors = rope.long_factor if is_long else rope.short_factor
        return f32(1) / (np.array(factors, f32) * powers)
    frequencies = f32(1) / powers
    if rope.type == "proportional":
        turned = int(rope.partial * head_dim // 2)
        frequencies[turned:] = 0
    if rope.type in ("linear", "proportional"):
        return frequencies / f32(rope.factor)
    if rope.type == "llama3":
        return _llama3_frequencies(frequencies, rope)
    if rope.type == "yarn":
        return _yarn_frequencies(powers, rope, size)
    return frequencies


def _yarn_frequencies(powers, rope, size):
    """Keeps waves that turn more than `beta_fast` times within the original length, stretches those
    that turn less than `beta_slow` times, and blends those between."""

    def dimension(n_turns):
        turns = rope.original_max_position_embeddings / (n_turns * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    f32 = np.float32
    ramp = np.clip((np.arange(size // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
    kept, stretched = f32(1) / powers, f32(1) / (f32(rope.factor) * powers)
    return (stretched * ramp + kept * (1 - ramp)).astype(f32)


def _llama3_frequencies(frequencies, rope):
    """Stretches long waves by `factor`, keeps short ones, and blends those between."""
    f32 = np.float32
    original = f32(rope.original_max_position_embeddings)
    wavelengths = f32(2 * math.pi) / frequencies
    longest, shortest = original / f32(rope.low_freq_factor), original / f32(rope.high_freq_factor)
    stretched = np.where(wavelengths > longest, frequencies / f32(rope.factor), frequencies)
    if rope.low_freq_factor == rope.high_freq_factor:
        return stretched.astype(f32)  # no wave is between
    blend = (original / wavelengths - f32(rope.low_freq_factor)) / f32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (f32(1) - blend) * stretched / f32(rope.factor) + blend * stretched
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return np.where(between, blended, stretched).astype(np.float32)


def rotate(x, positions, rope: Rope, is_long=None):
    """Rotary embedding of x [R, heads, H] at positions [R], computed in float32; what lies beyond
    the part that is turned stays. `is_long`: bool [R], where the type has other frequencies for
    long texts.
    """
    head_dim = x.shape[-1]
    turned = rope_frequencies(rope, head_dim)[None]
    if is_long is not None:
        longer = rope_frequencies(rope, head_dim, is_long=True)[None]
        turned = jnp.where(is_long[:, None], longer, turned)
    angles = positions.astype(jnp.float32)[:, None] * turned  # [R, turned / 2]
    factor = np.float32(rope.attention_factor)
    cos, sin = (factor * each(angles)[:, None] for each in (jnp.cos, jnp.sin))
    size = 2 * angles.shape[1]
    x32 = x[..., :size].astype(jnp.float32)
    if rope.interleaved:
        left, right = x32[..., 0::2], x32[..., 1::2]
    else:
        left, right = jnp.split(x32, 2, axis=-1)
    parts = [left * cos - right * sin, right * cos + left * sin]
    if rope.interleaved:
        rotated = jnp.stack(parts, axis=-1).reshape(x32.shape)
    else:
        rotated = jnp.concatenate(parts, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if size == head_dim else jnp.concatenate([rotated, x[..., size:]], axis=-1)


def grown(q, positions, how: Growth):
    """Queries q [R, heads, H] at positions [R], as they grow with these; computed in float32."""
    turns = jnp.floor((positions + how.after).astype(jnp.float32) / how.length)
    factor = 1 + how.beta * jnp.log(1 + turns)
    return (q.astype(jnp.float32) * factor[:, None, None]).astype(q.dtype)


def gated(gate, up, *, activation: str):
    """The inner activation of the MLP: act(gate) * up, each [..., F]."""
    return ACTIVATION[activation](gate) * up


def clamped(gate, up, how: Clamped):
    """The clamped SwiGLU of gate and up, each [..., F]."""
    gate, up = jnp.minimum(gate, how.limit), jnp.clip(up, -how.limit, how.limit)
    return (up + 1) * (gate * jax.nn.sigmoid(gate * how.alpha))


def capped(scores, cap: float | None, tanh=jnp.tanh):
    """cap * tanh(scores / cap): soft capping (arXiv 2408.00118). None: as they are."""
    return scores if cap is None else cap * tanh(scores / cap)


def final_logits(products, how: Logits, tanh=jnp.tanh):
    """The logits [..., V] from the head's products, float32. `tanh`: of jax or of numpy."""
    return capped(products if how.scale == 1.0 else products * how.scale, how.cap, tanh)


def scaled(x, scale: Scale):
    """x times a factor, in x's dtype."""
    if scale.value == 1.0:
        return x
    value = jnp.asarray(scale.value, x.dtype) if scale.is_rounded else np.float32(scale.value)
    return (x.astype(jnp.float32) * value.astype(jnp.float32)).astype(x.dtype)
