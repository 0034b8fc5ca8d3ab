"""Grouped-query attention of a pane of lanes, in two parts.

A row sees all committed entries of its lane, through the lane's table of pool rows, and its
ancestors among the rows of its own chunk, or among all rows of a tree that grows chunk by chunk.
Each part gives a running softmax (maximum, sum, mixed values); parts are merged exactly, by
log-sum-exp. So entries may come in any number of pieces.

The committed part needs no mask but a length. Where `Rows.flash` says that the device has it, this
part is cuDNN's flash attention; elsewhere, and for the chunk's own rows, plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jlayer.model.cache import LayerCache, Rows, View, gathered
from jlayer.model.ops import capped
from jlayer.model.products import exact_for
from jlayer.parts import Attention
from jlayer.pieces import attention_pieces


@struct.dataclass
class Mixed:
    """Attention over some of the entries, all float32: the values mixed by `exp(score - top)`, the
    sum of these weights, and the highest score."""

    values: jax.Array  # [B, K, G, T, H]
    total: jax.Array  # [B, K, G, T]
    top: jax.Array  # [B, K, G, T]


def attention(
    q,
    k,
    v,
    cache: LayerCache,
    rows: Rows,
    how: Attention,
    sinks=None,
    expand: Callable | None = None,
):
    """q [R, N, H] and k, v [R, K, H] of a chunk's rows -> [R, N*H].

    Scores and softmax are float32. Query head n reads key/value head n // G. Rows beyond the pane
    are padding and give zeros. `sinks` [N]: of each head one more score, of an entry without a
    value. `expand`: what k, v and the cache have is what keys and values are made of, and this
    makes them of a piece: [B, S, ...] -> (keys [B, S, K, H], values [B, S, K, E]); then N*E numbers
    are given.
    """
    view = rows.view(how.window)
    (b, s), t = view.table.shape, rows.seen.shape[1]
    # What nobody sees has the weight 0, and 0 times a value that is not finite is none either: one
    # lane's overflow would spoil others. So padding is zeros, here and in `gathered`.
    real = (view.write < cache.k.shape[0])[:, None, None]
    k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
    pieces = attention_pieces(how, lanes=b, tokens=t, capacity=s, flash=rows.flash)

    def pane(of_rows):
        return of_rows[: b * t].reshape(b // pieces.lanes, pieces.lanes, t, *of_rows.shape[1:])

    def lanes(given):
        return given.reshape(b // pieces.lanes, pieces.lanes, *given.shape[1:])

    def attend(group):
        return _attend(*group, cache=cache, pieces=pieces, how=how, sinks=sinks, expand=expand)

    if rows.fresh is None:
        own = (pane(k), pane(v))
    else:
        own = tuple(lanes(gathered(entry, rows.fresh, q.dtype)) for entry in (cache.k, cache.v))
    positions, seen = pane(rows.positions), lanes(rows.seen)
    # Where the lanes' entries begin, as the rows see it: a position less that of the first entry.
    places = positions
    if isinstance(view, View):
        places = positions - lanes(view.first)[..., None]
    reach = reach_of(positions, how)
    if reach is not None:
        of_own = positions if rows.fresh is None else lanes(rows.fresh_positions)
        seen = seen & (positions[..., :, None] - of_own[..., None, :] < reach[..., None])
    given = (pane(q), *own, lanes(view.table), lanes(view.length), seen, places, reach)
    if pieces.lanes == b:
        mixed = attend(jax.tree.map(lambda of_all: of_all[0], given))
    else:
        # On the way back a group is computed again: the scores of all are never kept.
        mixed = jax.lax.map(jax.checkpoint(attend), given)
    mixed = mixed.reshape(b * t, -1)
    return jnp.pad(mixed, ((0, q.shape[0] - b * t), (0, 0)))


def reach_of(positions, how: Attention):
    """How many tokens the rows at positions [...] see, itself among them: int32 [...]; None: all
    before them. Those of its own chunk that a row sees begin where the chunk does."""
    if how.window is None:
        return None
    if how.in_chunks:
        return positions % how.window + 1
    return jnp.full_like(positions, how.window)


def _attend(q, k, v, table, length, seen, places, reach, *, cache, pieces, how, sinks, expand):
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, how.n_kv_heads, n // how.n_kv_heads, h).transpose(0, 2, 3, 1, 4)

    def fresh(state, piece):
        k, v, seen = piece
        if expand:
            k, v = expand(k)
        # As for padding: a guess without numbers would spoil others beside it. It spoils those
        # that see it.
        finite = jnp.isfinite(v)
        more = attend_to(grouped, k, jnp.where(finite, v, 0), seen, how)
        spoilt = (seen & ~finite.all(axis=(2, 3))[:, None]).any(axis=2)[:, None, None, :, None]
        return merge(state, more.replace(values=jnp.where(spoilt, jnp.nan, more.values))), None

    def committed(state, piece):
        table, first = piece
        k, v = (gathered(entry, table, q.dtype) for entry in (cache.k, cache.v))
        if expand:
            k, v = expand(k)
        if pieces.splits:
            more = flash_attend_to(grouped, k, v, length - first, splits=pieces.splits, how=how)
        else:
            entries = first + jnp.arange(table.shape[1], dtype=jnp.int32)
            seen = (entries[None] < length[:, None])[:, None]
            if reach is not None:
                seen = seen & (places[:, :, None] - entries[None, None] < reach[:, :, None])
            more = attend_to(grouped, k, v, seen, how)
        return merge(state, more), None

    of_chunk = (_cut(k, pieces.fresh), _cut(v, pieces.fresh), _cut(seen, pieces.fresh, axis=2))
    width = jax.eval_shape(expand, k)[1].shape[-1] if expand else h
    start = nothing(grouped, width) if sinks is None else only_sinks(grouped, sinks)
    state = _over(fresh, start, of_chunk, pieces.fresh)
    if table.shape[1]:
        step = table.shape[1] // pieces.committed
        firsts = jnp.arange(pieces.committed, dtype=jnp.int32) * step
        state = _over(committed, state, (_cut(table, pieces.committed), firsts), pieces.committed)
    mixed = state.values / state.total[..., None]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, -1).astype(q.dtype)


def _cut(entries, n_pieces, axis=1):
    """[B, entries, ...] -> [pieces, B, entries of a piece, ...], cut along `axis`."""
    shape = entries.shape
    cut = entries.reshape(*shape[:axis], n_pieces, shape[axis] // n_pieces, *shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _over(step, state, pieces, n_pieces):
    if n_pieces == 1:
        return step(state, jax.tree.map(lambda of_all: of_all[0], pieces))[0]
    return jax.lax.scan(jax.checkpoint(step), state, pieces)[0]


def nothing(grouped, width: int) -> Mixed:
    """Attention of grouped queries [B, K, G, T, H] over no entries, whose values have `width`
    numbers."""
    shape = grouped.shape[:-1]
    lowest = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
    return Mixed(jnp.zeros((*shape, width), jnp.float32), jnp.zeros(shape, jnp.float32), lowest)


def only_sinks(grouped, sinks) -> Mixed:
    """Attention of grouped queries [B, K, G, T, H] over the sinks [N] alone, whose values are 0."""
    shape = grouped.shape[:-1]
    top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *shape[1:3], 1), shape)
    return Mixed(jnp.zeros(grouped.shape, jnp.float32), jnp.ones(shape, jnp.float32), top)


def attend_to(grouped, k, v, seen, how: Attention) -> Mixed:
    """Attention of queries [B, K, G, T, H] over entries k, v [B, S, K, H]; `seen` [B, T or 1, S]
    tells which of them a query sees."""
    scores = jnp.einsum(
        "bkgth,bskh->bkgts",
        grouped,
        k,
        precision=exact_for(grouped.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = capped(scores * how.scale, how.cap)
    seen = seen[:, None, None]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    top = scores.max(axis=-1)
    # Where a query sees nothing, its scores equal the maximum.
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    values = jnp.einsum(
        "bkgts,bskh->bkgth",
        weights.astype(grouped.dtype),
        v,
        precision=exact_for(grouped.dtype),
        preferred_element_type=jnp.float32,
    )
    return Mixed(values, weights.sum(axis=-1), top)


def flash_attend_to(grouped, k, v, length, *, splits: int, how: Attention) -> Mixed:
    """Attention of queries [B, K, G, T, H] over the first `length` [B] entries of k, v
    [B, S, K, H], by cuDNN; all of 16 bits. A length may also be negative, or more than S.

    A key/value head's G queries of a token are rows beside each other: they see the same entries,
    and few rows would leave cuDNN's blocks half empty. The `splits` parts of the entries come as
    lanes of their own, so that few lanes fill the card as well.
    """
    # Not `jax.nn.dot_product_attention`: it rounds the log-sum-exp to the 16 bits of the values,
    # which puts the weights of the parts off by percents.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    b, kv_heads, g, t, h = grouped.shape
    size = k.shape[1] // splits
    firsts = jnp.arange(splits, dtype=jnp.int32) * size
    length = jnp.clip(length[:, None] - firsts[None], 0, size)  # [B, splits]
    queries = grouped.transpose(0, 2, 3, 1, 4).reshape(b, g * t, kv_heads, h)
    mixed, log_sum = dot_product_attention(
        jnp.repeat(queries, splits, axis=0),
        *(entries.reshape(b * splits, size, kv_heads, h) for entries in (k, v)),
        q_seqlen=jnp.full((b * splits,), g * t, jnp.int32),
        # What cuDNN gives for no entries is not said.
        kv_seqlen=jnp.maximum(length, 1).reshape(-1),
        scale=how.scale,
        mask_type=MaskType.PADDING,
        return_residual=True,
    )
    mixed = mixed.reshape(b, splits, g, t, kv_heads, h).transpose(0, 1, 4, 2, 3, 5)
    log_sum = log_sum.reshape(b, splits, kv_heads, g, t)
    some = (length > 0)[..., None, None, None]
    log_sum = jnp.where(some, log_sum, jnp.finfo(jnp.float32).min)
    top = log_sum.max(axis=1)
    weights = jnp.where(some, jnp.exp(log_sum - top[:, None]), 0.0)
    values = (mixed.astype(jnp.float32) * weights[..., None]).sum(axis=1)
    return Mixed(values, weights.sum(axis=1), top)


def merge(one: Mixed, other: Mixed) -> Mixed:
    """Attention over the entries of both, as over all at once."""
    top = jnp.maximum(one.top, other.top)
    first, second = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Mixed(
        one.values * first[..., None] + other.values * second[..., None],
        one.total * first + other.total * second,
        top,
    )
