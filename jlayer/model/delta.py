"""The gated delta rule (arXiv 2412.06464) and its short convolution, for a pane of lanes.

A lane comes with the state after its last token before the chunk, and with T rows that are a tree:
`seen` says which rows are a row's ancestors. Each row's output is what its own path gives, as if
there were no other. The state that goes out is the one after the rows that are kept.

Row i changes the state S [H, E] of a value head to

    S_i = exp(g_i) S_parent + k_i u_i^T,    u_i = beta_i (v_i - exp(g_i) S_parent^T k_i)

and gives S_i^T q_i. A block of rows does so at once. With G_i the sum of g on the path to row i,
and sums over ancestors j,

    S_i = exp(G_i) S_0 + sum_{j or i} exp(G_i - G_j) k_j u_j^T
    u_i + beta_i sum_j exp(G_i - G_j) (k_i k_j) u_j = beta_i (v_i - exp(G_i) S_0^T k_i)

The second line is a triangular system, since parents come before children.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jlayer.model.cache import Rows, StateCache, read_state, write_state
from jlayer.model.ops import ACTIVATION, normed
from jlayer.parts import Delta
from jlayer.pieces import DELTA_BLOCK, delta_block

# Of the norm of queries and keys: a constant of the reference, no field of config.json.
EPS = 1e-6
# Nothing is left in float32 of what exp(LEAST) multiplies.
LEAST = -100.0
# See `_in_parts`. 512 rows of LEAST are 2^21.6 of these steps; float32 counts up to 2^24.
STEP = 1 / 64

_exact = partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def gated_delta(products, whole: Mapping, cache: StateCache, rows: Rows, *, how: Delta):
    """What a gated DeltaNet's matrices give -> ([R, N*E], the cache with the lanes' new states).

    The stage's function, see `model.stages`. Rows beyond the pane are padding and give zeros.
    """
    assert rows.fresh is None, "a state does not know the nodes of a tree in earlier chunks"
    (b, t), n_rows = rows.kept.shape, next(iter(products.values())).shape[0]
    parts = (each[: b * t].reshape(b, t, *each.shape[1:]) for each in _parts(products, how))
    mixed, z, to_beta, to_g = parts
    dtype = mixed.dtype
    before, state = read_state(cache, rows.source, dtype)
    parents = parents_of(rows.seen, how.kernel - 1)
    tokens = jnp.concatenate([before.swapaxes(1, 2), mixed], axis=1)
    conv = last_inputs(tokens, parents, rows.kept)
    mixed = convolved(tokens, whole["conv1d"][:, 0], parents, activation=how.activation)
    q, k, v = _queries_keys_values(mixed, how)
    # The reference rounds beta to the dtype that is computed in.
    beta = jax.nn.sigmoid(to_beta.astype(jnp.float32)).astype(dtype).astype(jnp.float32)
    g = decay(to_g, whole["A_log"], whole["dt_bias"], has_rates=how.has_rates)
    v, g, beta = (_by_key_head(each, how) for each in (v, g, beta))
    out, state = delta_rule(q, k, v, g, beta, state, rows.seen, rows.kept, is_chain=rows.is_chain)
    out = _by_key_head(out, how, back=True)
    gated = normed(out.astype(dtype), how.norm, whole["norm"]).astype(jnp.float32)
    gated = (gated * jax.nn.silu(z.astype(jnp.float32))).astype(dtype)
    padding = ((0, n_rows - b * t), (0, 0))
    cache = write_state(cache, rows.target, conv, state)
    return jnp.pad(gated.reshape(b * t, -1), padding), cache


def _parts(products, how):
    """What is convolved [R, C]: queries, keys and values; and the gate z [R, N, E], and what beta
    and g are made of, [R, N] each."""
    if how.inputs == "grouped":
        mixed, z = _mixed_by_key_head(products["in_proj_qkvz"], how)
    else:
        mixed, z = products["in_proj_qkv"], products["in_proj_z"]
    z = z.reshape(z.shape[0], how.n_value_heads, how.value_dim)
    if how.inputs == "apart":
        return mixed, z, products["in_proj_b"], products["in_proj_a"]
    rows, ba = z.shape[0], products["in_proj_ba"].reshape(z.shape[0], how.n_key_heads, -1)
    return mixed, z, *(half.reshape(rows, -1) for half in jnp.split(ba, 2, axis=-1))


def _mixed_by_key_head(qkvz, how):
    """Of a matrix whose rows are, for each key head: query, key, values, gates."""
    h, k = how.key_dim, how.n_key_heads
    rows, values = qkvz.shape[0], how.n_value_heads // k * how.value_dim
    *qkv, z = jnp.split(qkvz.reshape(rows, k, -1), [h, 2 * h, 2 * h + values], axis=-1)
    return jnp.concatenate([part.reshape(rows, -1) for part in qkv], axis=-1), z


def _by_key_head(x, how, *, back=False):
    """x [B, T, N, ...] with the value heads of a key head beside each other; or `back`, as they are
    projected."""
    if not how.is_tiled:
        return x
    cut = (how.n_key_heads, -1) if back else (-1, how.n_key_heads)
    return x.reshape(*x.shape[:2], *cut, *x.shape[3:]).swapaxes(2, 3).reshape(x.shape)


def _queries_keys_values(mixed, how):
    """mixed [B, T, C] -> q, k [B, T, K, H] and v [B, T, N, E], float32. Queries and keys have the
    length 1; queries are scaled."""
    b, t, _ = mixed.shape
    keys = how.n_key_heads * how.key_dim
    parts = jnp.split(mixed.astype(jnp.float32), [keys, 2 * keys], axis=-1)
    q, k = (unit(part.reshape(b, t, how.n_key_heads, how.key_dim)) for part in parts[:2])
    v = parts[2].reshape(b, t, how.n_value_heads, how.value_dim)
    return q * how.key_dim**-0.5, k, v


def unit(x):
    """x [..., H] divided by its length."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + EPS)


def decay(a, a_log, dt_bias, *, has_rates: bool = False):
    """g [..., N] float32, the logarithm of what is left of the state: -exp(A_log) softplus(a +
    dt_bias). `a` [..., N], the others [N]. `has_rates`: `a_log` is -exp(A_log) already."""
    a, a_log, dt_bias = (each.astype(jnp.float32) for each in (a, a_log, dt_bias))
    shape = (1,) * (a.ndim - 1) + a_log.shape
    rates = a_log if has_rates else -jnp.exp(a_log)
    return rates.reshape(shape) * jax.nn.softplus(a + dt_bias.reshape(shape))


# The convolution. A lane's tokens are its last W-1 before the chunk, oldest first, then its T rows.


def parents_of(seen, n_before: int):
    """The parent of each of a lane's tokens by its place among them, int32 [B, n_before + T].

    `seen` [B, T, T]. A row's parent is the last of its ancestors; without any, the last token
    before the chunk. The first token of all has no parent: its own place stands there.
    """
    b, t, _ = seen.shape
    numbers = jnp.arange(t, dtype=jnp.int32)
    is_above = seen & (numbers[None, None, :] < numbers[None, :, None])
    last = jnp.where(is_above, numbers[None, None, :], -1).max(axis=2)
    before = jnp.maximum(jnp.arange(n_before, dtype=jnp.int32) - 1, 0)
    before = jnp.broadcast_to(before[None], (b, n_before))
    return jnp.concatenate([before, n_before + last], axis=1)


def convolved(tokens, weight, parents, *, activation: str):
    """The convolution of each row with its ancestors, and the activation after it -> [B, T, C].

    tokens [B, W-1 + T, C], weight [C, W], the last tap of which is the row's own.
    """
    taps = weight.astype(jnp.float32).T[:, None, None]
    places = jnp.arange(len(taps) - 1, tokens.shape[1], dtype=jnp.int32)[None]
    places = jnp.broadcast_to(places, (tokens.shape[0], places.shape[1]))
    total = 0.0
    for tap in reversed(taps):
        found = jnp.take_along_axis(tokens, places[:, :, None], axis=1)
        total += found.astype(jnp.float32) * tap
        places = jnp.take_along_axis(parents, places, axis=1)
    # Rounded before the activation and after it, as the reference is.
    total = total.astype(tokens.dtype).astype(jnp.float32)
    return ACTIVATION[activation](total).astype(tokens.dtype)


def last_inputs(tokens, parents, kept):
    """What the next chunk's convolution continues: the last W-1 tokens up to the last row that is
    `kept` [B, T] -> [B, C, W-1]."""
    n_before = tokens.shape[1] - kept.shape[1]
    numbers = jnp.arange(kept.shape[1], dtype=jnp.int32)
    place = n_before + jnp.where(kept, numbers[None], -1).max(axis=1, keepdims=True)
    found = []
    for _ in range(n_before):
        found.append(jnp.take_along_axis(tokens, place[:, :, None], axis=1)[:, 0])
        place = jnp.take_along_axis(parents, place, axis=1)
    return jnp.stack(found[::-1], axis=-1)


# The delta rule, all in float32. A key head's value heads are beside each other: [B, K, G, ...].


def delta_rule(q, k, v, g, beta, state, seen, kept, *, is_chain: bool = False):
    """q, k [B, T, K, H], v [B, T, N, E], g and beta [B, T, N], state [B, N, H, E], seen [B, T, T],
    kept [B, T] -> (outputs [B, T, N, E], the state after the rows that are kept).

    A row whose numbers are not finite gives NaN for itself and those that see it, and for the state
    if it is kept, but for no other row. `is_chain`: `seen` is the lower triangle.
    """
    (b, t, n_key_heads, _), (n, e) = k.shape, v.shape[2:]
    given = [q, k, v, jnp.maximum(g, LEAST), beta]
    # A weight of 0 times what is not finite would be NaN, in rows that do not see it too.
    finite = [jnp.isfinite(each).reshape(b, t, -1).all(axis=2) for each in given]
    is_spoilt = ~jnp.stack(finite).all(axis=0)
    q, k, v, g, beta = (
        jnp.where(is_spoilt.reshape(b, t, *[1] * (each.ndim - 2)), 0.0, each) for each in given
    )
    v = v.reshape(b, t, n_key_heads, -1, e).transpose(0, 2, 3, 1, 4)
    g, beta = (x.reshape(b, t, n_key_heads, -1).transpose(0, 2, 3, 1) for x in (g, beta))
    grouped = state.reshape(b, n_key_heads, -1, *state.shape[2:])
    if t == 1:
        out, after = _step(q, k, v, g, beta, grouped, kept)
    elif delta_block(t, is_chain=is_chain) < t:
        out, after = _chain(q, k, v, g, beta, grouped, kept)
    else:
        out, state_after = _block(q, k, v, g, beta, grouped, seen)
        after = state_after(kept)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, e)
    sees_spoilt = (seen & is_spoilt[:, None, :]).any(axis=2)
    is_lost = (kept & is_spoilt).any(axis=1)
    after = after.reshape(state.shape)
    return (
        jnp.where(sees_spoilt[:, :, None, None], jnp.nan, out),
        jnp.where(is_lost[:, None, None, None], jnp.nan, after),
    )


def _step(q, k, v, g, beta, state, kept):
    """A single row of each lane -> (outputs [B, K, G, 1, E], the state [B, K, G, H, E])."""
    decayed = state * jnp.exp(g)[..., None]
    found = _exact("bkghe,btkh->bkgte", decayed, k)
    update = beta[..., None] * (v - found)
    after = decayed + k[:, 0, :, None, :, None] * update
    out = _exact("bkghe,btkh->bkgte", after, q)
    return out, jnp.where(kept[:, :, None, None, None], after, state)


def _chain(q, k, v, g, beta, state, kept):
    """A long chain, block after block. Rows that are not kept have outputs too, so a state goes on
    with all rows, and another stops at the last that is kept."""
    size = DELTA_BLOCK
    seen = jnp.tri(size, dtype=bool)[None]
    seen = jnp.broadcast_to(seen, (k.shape[0], size, size))

    def blocks(x, axis):
        cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(cut, axis, 0)

    def step(states, given):
        (running, saved), (*given, kept) = states, given
        out, state_after = _block(*given, running, seen)
        saved = jnp.where(kept.any(axis=1)[:, None, None, None, None], state_after(kept), saved)
        return (state_after(jnp.ones_like(kept)), saved), out

    given = (*(blocks(x, 1) for x in (q, k)), *(blocks(x, 3) for x in (v, g, beta)))
    (_, saved), out = jax.lax.scan(step, (state, state), (*given, blocks(kept, 1)))
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(v.shape), saved


def _block(q, k, v, g, beta, state, seen):
    """All rows at once -> (outputs [B, K, G, T, E], a function: some rows [B, T], which are a path
    from the first on -> the state [B, K, G, H, E] after them)."""
    parts = _in_parts(g)
    sums = _exact("bts,pbkgs->pbkgt", seen.astype(jnp.float32), parts)
    left = jnp.exp(sums.sum(axis=0))[..., None]
    weights = _between(sums, sums, seen)
    right = beta[..., None] * (v - left * _exact("bkghe,btkh->bkgte", state, k))
    # Its diagonal counts as ones, and what is above it is never read.
    system = _exact("btkh,bskh->bkts", k, k)[:, :, None] * weights * beta[..., None]
    updates = jax.lax.linalg.triangular_solve(
        system, right, left_side=True, lower=True, unit_diagonal=True
    )
    scores = _exact("btkh,bskh->bkts", q, k)[:, :, None] * weights
    out = left * _exact("bkghe,btkh->bkgte", state, q)
    out = out + _exact("bkgts,bkgse->bkgte", scores, updates)

    def state_after(path):
        path = path[:, None]
        ends = _exact("bts,pbkgs->pbkgt", path.astype(jnp.float32), parts)
        weights = _between(ends, sums, path)[..., 0, :, None]
        left = jnp.exp(ends.sum(axis=0))[..., None]
        return left * state + _exact("bskh,bkgse->bkghe", k, weights * updates)

    return out, state_after


def _in_parts(g):
    """g as a sum of two, [2, ...]: multiples of STEP, whose sums are exact, and small rests.

    What is left between two rows is a difference of sums over their paths. A sum of strong decays
    has no digits left for a weak one that follows: 32 of -40 put a later one off by a 10,000th.
    """
    coarse = jnp.round(g / STEP) * STEP
    return jnp.stack([coarse, g - coarse])


def _between(sums, of_ancestors, seen):
    """What is left in rows [B, T] of what their ancestors [B, S] wrote -> [B, K, G, T, S]; 0 where
    a row does not see the other. From sums of g, in parts: [2, B, K, G, T] and [2, B, K, G, S]."""
    parts = zip(sums, of_ancestors, strict=True)
    between = sum(of_row[..., None] - of_other[..., None, :] for of_row, of_other in parts)
    # Masked before the exponential, which is infinite between rows of other branches.
    return jnp.exp(jnp.where(seen[:, None, None], between, -jnp.inf))
