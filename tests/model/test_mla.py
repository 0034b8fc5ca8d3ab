"""Latent attention of a pane, held against keys and values that are made of every latent, in
float64; its memory against the plan's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer import pieces
from jlayer.engine.batch import lineage
from jlayer.families.base import latent_cache
from jlayer.model import mla
from jlayer.model.cache import LatentCache, Rows, cache_struct, rows_struct
from jlayer.model.mla import attend_latent, query_latent
from jlayer.model.ops import normed, rotate
from jlayer.parts import Growth, Latent, Norm, Rope
from jlayer.pieces import attention_pieces, expands
from jlayer.plan.memory import latent_temporary_bytes
from jlayer.plan.shapes import Shapes
from tests.campaigns import slow_but

# Entries of 14 and 8 numbers; queries 108, values 42.
HOW = Latent(
    *(6, 14, 10, 8, 7), Rope(100.0, interleaved=True), q_rank=18, scale=0.3, norm=Norm(1e-2)
)
GROWS = replace(HOW, grows=Growth(0.5, 4))
LANES, PADDING, ENTRIES = 3, 3, 16
# Rows of a lane: few go among the latents, for many a key and a value are made of each.
FEW, MANY = 8, 16
POOL = LANES * ENTRIES
LENGTHS = np.array([16, 5, 0], np.int32)
# A chain; a tree, whose last rows are padding; two roots.
PARENTS = ((-1, 0, 1, 2, 3, 4, 5, 6), (-1, 0, 0, 1, 1, 2), (-1, -1, 0, 1, 2))


def numbers(rng, *shape):
    return rng.normal(0, 1, shape).astype(np.float32)


def case(tokens):
    """(products, leaves, the cache, rows), of three lanes whose pool rows are in any order."""
    rng = np.random.default_rng(0)
    n_rows = LANES * tokens + PADDING
    order = rng.permutation(2 * POOL).astype(np.int32)
    table = order[:POOL].reshape(LANES, ENTRIES).copy()
    seen = np.zeros((LANES, tokens, tokens), bool)
    positions, write = np.zeros(n_rows, np.int32), np.full(n_rows, 2 * POOL, np.int32)
    for lane, parents in enumerate(PARENTS):
        depth, sees = lineage(parents)
        first, count = lane * tokens, len(parents)
        seen[lane, :count, :count] = sees
        positions[first : first + count] = LENGTHS[lane] + depth
        write[first : first + count] = order[POOL + first :][:count]
        table[lane, LENGTHS[lane] :] = 2 * POOL
    products = {
        "q_b_proj": numbers(rng, n_rows, 108),
        "kv_a_proj_with_mqa": numbers(rng, n_rows, 22),
    }
    whole = {"kv_a_layernorm": numbers(rng, 14), "kv_b_proj": numbers(rng, 102, 14)}
    cache = LatentCache(numbers(rng, 2 * POOL, 1, 22))
    return products, whole, cache, Rows(positions, write, table, LENGTHS, seen)


@pytest.fixture(scope="module", params=[FEW, MANY])
def given(request):
    return case(request.param)


mixed = jax.jit(attend_latent, static_argnames="how")


def dense(products, whole, cache, rows, how):
    """[B*T, N*value] float64, with a key and a value of every latent; NaN for padding."""
    latent, tokens = products["kv_a_proj_with_mqa"], rows.seen.shape[1]
    normal = normed(latent[:, :14], how.norm, whole["kv_a_layernorm"])
    turned = rotate(latent[:, None, 14:], rows.positions, how.rope)[:, 0]
    own = np.concatenate([normal, turned], axis=1).astype(np.float64)
    q = products["q_b_proj"].reshape(-1, 6, 18)
    turned = rotate(q[:, :, 10:], rows.positions, how.rope)
    q = np.concatenate([q[:, :, :10], turned], axis=2).astype(np.float64)
    kv_b = whole["kv_b_proj"].astype(np.float64).reshape(6, 17, 14)
    found = np.full((LANES * tokens, 42), np.nan)
    for lane, parents in enumerate(PARENTS):
        first = lane * tokens
        old = np.asarray(cache.latent[:, 0], np.float64)[rows.table[lane, : LENGTHS[lane]]]
        for row in range(len(parents)):
            seen = np.flatnonzero(rows.seen[lane, row])
            entries = np.concatenate([old, own[first + seen]])
            made = np.einsum("nkl,sl->snk", kv_b, entries[:, :14])
            shared = np.repeat(entries[:, None, 14:], 6, axis=1)
            keys = np.concatenate([made[:, :, :10], shared], axis=2)
            scores = np.einsum("nh,snh->ns", q[first + row], keys) * how.scale
            if how.grows:
                beta, length = how.grows.beta, how.grows.length
                scores *= 1 + beta * np.log(1 + rows.positions[first + row] // length)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            values = np.einsum("ns,snv->nv", weights, made[:, :, 10:])
            found[first + row] = values.reshape(-1)
    return found


@pytest.mark.parametrize("how", [HOW, GROWS], ids=["plain", "grows"])
def test_it_is_attention_over_keys_and_values_that_are_made(given, how):
    found, cache = mixed(*given, how=how)
    expected = dense(*given, how)
    real = np.isfinite(expected[:, 0])
    most = np.abs(expected[real]).max()
    np.testing.assert_allclose(
        np.asarray(found)[: len(real)][real], expected[real], rtol=0, atol=1e-5 * most
    )
    assert not np.asarray(found)[len(real) :].any()
    # Each row's entry is where it belongs, and no other has changed.
    _, _, before, rows = given
    changed = np.flatnonzero((np.asarray(cache.latent) != before.latent).any(axis=(1, 2)))
    assert sorted(changed) == sorted(rows.write[rows.write < 2 * POOL])


def forms(monkeypatch, given, how=HOW):
    """What both forms give: among the latents, and with keys and values."""
    found = []
    for is_expanded in (False, True):
        monkeypatch.setattr(mla, "expands", lambda *_, of=is_expanded, **__: of)
        found.append(np.asarray(jax.jit(partial(attend_latent, how=how))(*given)[0]))
    return found


@pytest.mark.parametrize("how", slow_but((HOW, GROWS), (GROWS,)), ids=["plain", "grows"])
@pytest.mark.parametrize("most_bytes", slow_but([None, 2_000], (2_000,)))
def test_both_forms_give_the_same_in_one_piece_and_in_many(monkeypatch, given, how, most_bytes):
    if most_bytes:
        monkeypatch.setattr(pieces, "GATHERED_BYTES", most_bytes)
        monkeypatch.setattr(pieces, "SCORE_BYTES", most_bytes)
        tokens = given[3].seen.shape[1]
        cut = attention_pieces(how.of_heads, lanes=LANES, tokens=tokens, capacity=ENTRIES)
        assert cut.committed > 2
        assert cut.fresh > 1
    among, over_heads = forms(monkeypatch, given, how)
    real = given[3].write < 2 * POOL
    np.testing.assert_allclose(
        over_heads[real], among[real], rtol=0, atol=1e-5 * np.abs(among[real]).max()
    )


def test_a_guess_that_is_not_finite_spoils_those_that_see_it_alone(monkeypatch):
    """In either form: the third row of the first lane, a chain, and no row of another lane."""
    products, whole, cache, rows = case(FEW)
    latent = products["kv_a_proj_with_mqa"].copy()
    latent[2] = np.inf
    given = ({**products, "kv_a_proj_with_mqa": latent}, whole, cache, rows)
    for found in forms(monkeypatch, given):
        is_spoilt = ~np.isfinite(found).all(axis=1) & (rows.write < 2 * POOL)
        assert np.flatnonzero(is_spoilt).tolist() == list(range(2, FEW))


def count_flops(how, tokens, *, form, monkeypatch):
    """The operations of a lane of so many rows after 2048 entries, as XLA counts them."""
    monkeypatch.setattr(mla, "expands", lambda *_, **__: form)
    monkeypatch.setattr(pieces, "GATHERED_BYTES", 1 << 40)  # XLA counts a loop once
    monkeypatch.setattr(pieces, "SCORE_BYTES", 1 << 40)
    compiled, _ = compiled_for(how, 1, tokens, 2048, pool=4096, dtype="float32")
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("form", "most"),
    [
        ((512, 128, 64, 128), 157),
        pytest.param((512, 192, 64, 256), 358, marks=pytest.mark.slow),
        pytest.param((256, 64, 64, 128), 128, marks=pytest.mark.slow),
    ],
)
def test_the_form_that_takes_fewer_operations_is_chosen(monkeypatch, form, most):
    """DeepSeek's, GLM's and Mistral's shapes, by what XLA counts far on either side."""
    how = Latent(2, *form, Rope(), q_rank=64)
    assert [expands(how, tokens=tokens) for tokens in (most, most + 1)] == [False, True]
    assert expands(replace(how, n_heads=128), tokens=most + 1)
    for tokens, is_expanded in ((most // 2, False), (2 * most, True)):
        among, over_heads = (
            count_flops(how, tokens, form=of, monkeypatch=monkeypatch) for of in (False, True)
        )
        assert (over_heads < among) == is_expanded


def test_what_a_stage_passes_on_is_what_a_single_stage_has(given):
    """With a latent for queries, what entries are made of goes through the flow."""
    products, whole, cache, rows = given
    x = {"q_a_proj": numbers(np.random.default_rng(1), len(rows.write), 18), **products}
    normal, latent = query_latent(x, {"q_a_layernorm": np.ones(18, np.float32)}, how=HOW)
    np.testing.assert_allclose(np.square(normal).mean(axis=1), 1.0, atol=0.05)
    queries = {"q_b_proj": products["q_b_proj"]}
    found, _ = mixed(queries, whole, cache, rows, latent, how=HOW)
    direct = {"q_proj": products["q_b_proj"], "kv_a_proj_with_mqa": latent}
    expected, _ = mixed(direct, whole, cache, rows, how=HOW)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


BIG = Latent(16, 128, 32, 16, 32, Rope(), q_rank=64)
# The kv_b of DeepSeek V3 is most of what a token takes.
V3 = Latent(128, 512, 128, 64, 128, Rope(), q_rank=1536)


def compiled_for(how, lanes, tokens, capacity, *, pool, dtype):
    """(the compiled program of such a pane, the shapes of its pool)."""
    n_rows = lanes * tokens
    rows = rows_struct(n_rows=n_rows, lanes=lanes, tokens=tokens, capacity=capacity)

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    products = {"q_b_proj": struct(n_rows, how.n_heads * (how.nope_dim + how.rope_dim))}
    heights = how.n_heads * (how.nope_dim + how.value_dim)
    whole = {"kv_a_layernorm": struct(how.rank), "kv_b_proj": struct(heights, how.rank)}
    cache = cache_struct(latent_cache(how), n_rows=pool, dtype=dtype)
    program = jax.jit(
        lambda cache, products, whole, rows, latent: attend_latent(
            products, whole, cache, rows, latent, how=how
        ),
        donate_argnums=0,
    ).lower(cache, products, whole, rows, struct(n_rows, how.entry))
    return program.compile(), cache


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("how", "lanes", "tokens", "capacity"),
    [
        *((BIG, *pane) for pane in ((1, 2, 64), (8, 1, 64), (1, 64, 1024), (4, 16, 1024))),
        *((BIG, *pane) for pane in ((1, 512, 64), (1, 512, 4096), (64, 8, 256))),
        *((V3, *pane) for pane in ((1, 2, 64), (1, 64, 1024), (1, 512, 4096), (1, 2, 16384))),
    ],
)
def test_temporaries_are_within_the_plan_and_the_pool_is_not_copied(
    how, lanes, tokens, capacity, dtype
):
    compiled, copied = [], []
    for pool in (lanes * capacity, 20 * lanes * capacity):
        program, cache = compiled_for(how, lanes, tokens, capacity, pool=pool, dtype=dtype)
        compiled.append(program.memory_analysis().temp_size_in_bytes)
        copied.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)))
    found, with_a_larger_pool = compiled
    shapes = Shapes(lanes, (capacity,), lanes * capacity, lanes * tokens, lanes * tokens)
    # The most that was found, and a little: bfloat16 that XLA:CPU does not make float32 of.
    assert found <= latent_temporary_bytes(how, shapes) < 3 * found
    assert with_a_larger_pool - found < (copied[1] - copied[0]) / 8


def test_an_entry_of_the_cache_is_a_latent_and_the_part_of_a_key_that_is_turned():
    spec = latent_cache(V3)
    assert spec.n_bytes(n_rows=100, item_bytes=2) == 100 * (512 + 64) * 2
    cache = cache_struct(spec, n_rows=100, dtype="bfloat16")
    assert (cache.latent.shape, cache.latent.dtype) == ((100, 1, 576), jnp.uint16)
