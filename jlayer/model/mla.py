"""Multi-head latent attention (arXiv 2405.04434) of a pane of lanes.

The cache has for each token one latent, of which the matrix kv_b makes the keys and values of all
heads, and the part of the key that is turned, the same for all heads. Here nothing makes them: with
W the rows of kv_b for the keys of a head, q (W c) = (W^T q) c; with V those for its values, a sum
of weights w times (V c) is V times the sum of w c. So a query is brought into the space of the
latents, what it mixes is brought out of it, and between them all heads attend to one key, which is
the value too.

Where a chunk has more rows than a head has numbers, to make keys and values of every latent is less
arithmetic: two cores of a CPU, 32 heads of DeepSeek V3 and 4096 entries take 10 ms so at 2 rows and
424 with keys and values, 304 and 691 at 64 rows, but 3271 and 1150 at 512. That is little beside
the weights of a layer, which a pass streams for all its rows; and keys and values are 57 times as
large as the latents, and would be made anew for every chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jlayer.families.latent import KV_A, KV_B, KV_NORM, Q_A, Q_B, Q_NORM, Q
from jlayer.model.attention import attention
from jlayer.model.cache import LatentCache, LayerCache, Rows, write_latent
from jlayer.model.ops import grown, normed, rotate
from jlayer.model.products import exact_for
from jlayer.parts import Latent


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
    n_rows = len(q)
    entries = _entries(latent, whole[KV_NORM], rows, how)
    keys, values = _by_head(whole[KV_B].astype(q.dtype), how)
    queries = _queries(q.reshape(n_rows, how.n_heads, -1), keys, rows, how)
    # Written first, as in `stages`: so the cache's memory is reused.
    cache = write_latent(cache, entries, rows)
    both = LayerCache(cache.latent, cache.latent)
    mixed = attention(queries, entries, entries, both, rows, how.among_latents)
    # The part of the key that is turned was mixed as well: to leave it out of the entries first
    # would copy them, and is an eighth of them.
    mixed = mixed.reshape(n_rows, how.n_heads, how.entry)[:, :, : how.rank]
    return _product("rnl,nvl->rnv", mixed, values).reshape(n_rows, -1), cache


def _entries(latent, weight, rows, how):
    """What entries are made of [R, L] -> the entries [R, 1, L]."""
    latent = latent[:, None]
    normal = normed(latent[..., : how.rank], how.norm, weight)
    turned = rotate(latent[..., how.rank :], rows.positions, how.rope, rows.is_long)
    return jnp.concatenate([normal, turned], axis=-1)


def _by_head(kv_b, how):
    """kv_b [N*(nope + value), rank] -> its rows for keys [N, nope, rank] and values
    [N, value, rank]."""
    by_head = kv_b.reshape(how.n_heads, how.nope_dim + how.value_dim, how.rank)
    return by_head[:, : how.nope_dim], by_head[:, how.nope_dim :]


def _queries(q, keys, rows, how):
    """q [R, N, nope + rope] -> queries among the latents [R, N, L]."""
    # Heads first: XLA's CPU has no such product of bfloat16 with the rows first.
    by_head = q[:, :, : how.nope_dim].swapaxes(0, 1)
    among = _product("nrh,nhl->rnl", by_head, keys)
    turned = rotate(q[:, :, how.nope_dim :], rows.positions, how.rope, rows.is_long)
    queries = jnp.concatenate([among, turned], axis=-1)
    if how.grows:
        queries = grown(queries, rows.positions, how.grows)
    return queries


def _product(how, one, other):
    found = jnp.einsum(
        how, one, other, precision=exact_for(one.dtype), preferred_element_type=jnp.float32
    )
    return found.astype(one.dtype)
