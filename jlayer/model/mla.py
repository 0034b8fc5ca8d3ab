"""Multi-head latent attention (arXiv 2405.04434) of a pane of lanes.

The cache has for each token one latent, of which the matrix kv_b makes the keys and values of all
heads, and the part of the key that is turned, the same for all heads.

For few rows nothing makes them: with W the rows of kv_b for the keys of a head, q (W c) = (W^T q)
c; with V those for its values, a sum of weights w times (V c) is V times the sum of w c. So a query
is brought into the space of the latents, what it mixes is brought out of it, and between them all
heads attend to one key, which is the value too.

For many rows a key and a value are made of each latent, which is less arithmetic then
(`pieces.expands`): of some entries at a time, since they are 57 times as large as the latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jlayer.families.latent import K_B, KV_A, KV_B, KV_NORM, Q_A, Q_B, Q_NORM, V_B, Q
from jlayer.model.attention import attention
from jlayer.model.cache import LatentCache, LayerCache, Rows, write_latent
from jlayer.model.ops import grown, normed, rotate
from jlayer.model.products import exact_for
from jlayer.parts import Latent
from jlayer.pieces import expands


def query_latent(products, whole: Mapping, *, how: Latent):
    """-> (the normed latent that queries are made of [R, q_rank], what entries are made of
    [R, L])."""
    return normed(products[Q_A], how.norm, whole[Q_NORM]), products[KV_A]


def attend_latent(
    products, whole: Mapping, cache: LatentCache, rows: Rows, latent=None, *, how: Latent
):
    """Projected queries [R, N*(nope + rope)] -> ([R, N*value], the cache with these rows' entries).

    `latent` [R, L]: what entries are made of; None: it is among the products. The stage's function,
    see `model.stages`.
    """
    (q,) = (products[name] for name in (Q, Q_B) if name in products)
    latent = products[KV_A] if latent is None else latent
    queries = q.reshape(len(q), how.n_heads, -1)
    entries = _entries(latent, whole[KV_NORM], rows, how)
    # Written first, as in `stages`: so the cache's memory is reused.
    cache = write_latent(cache, entries, rows)
    if expands(how, tokens=rows.seen.shape[1]):
        kv_b = _joined(whole, how, q.dtype)
        return _over_heads(queries, kv_b, entries, cache, rows, how), cache
    by_head = _by_head(whole, how, q.dtype)
    return _among_latents(queries, by_head, entries, cache, rows, how), cache


def _among_latents(q, by_head, entries, cache, rows, how):
    """Queries [R, N, nope + rope] -> [R, N*value], in the space of the latents."""
    keys, values = by_head
    plain, turned = _turned(q, rows, how)
    # Heads first: XLA's CPU has no such product of bfloat16 with the rows first.
    among = _product("nrh,nhl->rnl", plain.swapaxes(0, 1), keys)
    queries = _grown(jnp.concatenate([among, turned], axis=-1), rows, how)
    both = LayerCache(cache.latent, cache.latent)
    mixed = attention(queries, entries, entries, both, rows, how.among_latents)
    # The part of the key that is turned was mixed as well: to leave it out of the entries first
    # would copy them, and is an eighth of them.
    mixed = mixed.reshape(len(q), how.n_heads, how.entry)[:, :, : how.rank]
    return _product("rnl,nvl->rnv", mixed, values).reshape(len(q), -1)


def _over_heads(q, kv_b, entries, cache, rows, how):
    """The same, with a key and a value of each head, made of the entries."""

    def expand(entries):
        made = _product("bsl,ml->bsm", entries[:, :, 0, : how.rank], kv_b)
        made = made.reshape(*made.shape[:2], how.n_heads, -1)
        shared = jnp.broadcast_to(entries[..., how.rank :], (*made.shape[:3], how.rope_dim))
        keys = jnp.concatenate([made[..., : how.nope_dim], shared], axis=-1)
        return keys, made[..., how.nope_dim :]

    queries = _grown(jnp.concatenate(_turned(q, rows, how), axis=-1), rows, how)
    both = LayerCache(cache.latent, cache.latent)
    return attention(queries, entries, entries, both, rows, how.of_heads, expand=expand)


def _entries(latent, weight, rows, how):
    """What entries are made of [R, L] -> the entries [R, 1, L]."""
    latent = latent[:, None]
    normal = normed(latent[..., : how.rank], how.norm, weight)
    turned = rotate(latent[..., how.rank :], rows.positions, how.rope, rows.is_long)
    return jnp.concatenate([normal, turned], axis=-1)


def _by_head(whole, how, dtype):
    """What makes keys [N, nope, rank] and values [N, value, rank]. Where they are apart, as
    [N*rank, nope] and [N*value, rank]."""
    if how.is_apart:
        keys, values = (whole[name].astype(dtype) for name in (K_B, V_B))
        keys = keys.reshape(how.n_heads, how.rank, how.nope_dim).swapaxes(1, 2)
        return keys, values.reshape(how.n_heads, how.value_dim, how.rank)
    both = whole[KV_B].astype(dtype)
    by_head = both.reshape(how.n_heads, how.nope_dim + how.value_dim, how.rank)
    return by_head[:, : how.nope_dim], by_head[:, how.nope_dim :]


def _joined(whole, how, dtype):
    """The same as one matrix [N*(nope + value), rank]."""
    if how.is_apart:
        return jnp.concatenate(_by_head(whole, how, dtype), axis=1).reshape(-1, how.rank)
    return whole[KV_B].astype(dtype)


def _turned(q, rows, how):
    """q [R, N, nope + rope] -> (what is not turned of it, what is, turned)."""
    turned = rotate(q[:, :, how.nope_dim :], rows.positions, how.rope, rows.is_long)
    return q[:, :, : how.nope_dim], turned


def _grown(queries, rows, how):
    """Queries [R, N, ...], multiplied as their positions have it."""
    return grown(queries, rows.positions, how.grows) if how.grows else queries


def _product(how, one, other):
    found = jnp.einsum(
        how, one, other, precision=exact_for(one.dtype), preferred_element_type=jnp.float32
    )
    return found.astype(one.dtype)
