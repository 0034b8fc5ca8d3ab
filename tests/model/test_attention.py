"""Attention of panes in two parts, against a dense softmax in float64."""

import inspect
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jlayer import pieces
from jlayer.engine.device import FLASH_DTYPES, has_flash
from jlayer.engine.gpu import gpu_memory
from jlayer.model.attention import attention
from jlayer.model.cache import LayerCache, Rows, View, rows_struct
from jlayer.parts import Attention
from jlayer.pieces import Pieces, attention_pieces
from jlayer.plan.memory import attention_temporary_bytes
from jlayer.plan.shapes import RunShape
from tests.campaigns import covering


def attention_of(n_heads, n_kv_heads, head_dim):
    """Plain attention of these sizes."""
    scale = head_dim**-0.5
    return Attention(n_heads, n_kv_heads, head_dim, rope=None, scale=scale)


CFG = attention_of(6, 2, 8)
# Of each head: some are above all scores, some below.
SINKS = np.array([-1e4, -2.0, 0.0, 1.5, 6.0, 40.0], np.float32)
# Rows in a chunk beyond those of the pane.
PADDING = 3
WINDOW = 5  # of layers with one, and the length of chunks


def random_case(lanes, tokens, capacity, lengths, *, cfg=CFG, dtype="float32", seed=0):
    """(q, k, v, cache, rows): tables of random pool rows, a random tree in each lane; where no
    lane's table says so, the pool holds huge numbers."""
    rng = np.random.default_rng(seed)
    n_pool, n_rows = lanes * capacity + 5, lanes * tokens + PADDING
    table = rng.permutation(n_pool)[: lanes * capacity].reshape(lanes, capacity).astype(np.int32)
    length = np.resize(lengths, lanes).astype(np.int32)
    seen = np.stack([random_tree(rng, tokens) for _ in range(lanes)])

    def normal(*shape):
        return rng.normal(0, 1, shape).astype(np.float32)

    heads, kv = (cfg.n_heads, cfg.head_dim), (cfg.n_kv_heads, cfg.head_dim)
    pool = [normal(n_pool, *kv) for _ in range(2)]
    listed = np.concatenate([table[lane, :n] for lane, n in enumerate(length)])
    for entries in pool:
        entries[np.setdiff1d(np.arange(n_pool), listed)] = 1e4
    q, k, v = 2 * normal(n_rows, *heads), normal(n_rows, *kv), normal(n_rows, *kv)
    q, k, v, *pool = (jnp.asarray(each, dtype) for each in (q, k, v, *pool))
    nothing = np.zeros(n_rows, np.int32)
    rows = Rows(positions=nothing, write=nothing, table=table, length=length, seen=seen)
    return q, k, v, LayerCache(*pool), rows


def random_tree(rng, tokens):
    seen = np.eye(tokens, dtype=bool)
    for row in range(1, tokens):
        parent = rng.integers(-1, row)
        if parent >= 0:
            seen[row] |= seen[parent]
    return seen


def dense(q, k, v, cache, rows, cfg=CFG, sinks=None, sees=None):
    """Attention in float64, each row and head by itself -> [B*T, N*H]. `sinks`: a score of each
    head whose value is 0. `sees`: whether a token at one position sees one at another that is
    before it; None: it does."""
    q, k, v, of_k, of_v = (
        np.asarray(each.astype(jnp.float32), np.float64) for each in (q, k, v, cache.k, cache.v)
    )
    lanes, tokens, _ = rows.seen.shape
    group = cfg.n_heads // cfg.n_kv_heads
    out = np.zeros((lanes * tokens, cfg.n_heads, cfg.head_dim))
    for lane, row in np.ndindex(lanes, tokens):
        entries = rows.table[lane, : rows.length[lane]]
        own = lane * tokens + np.flatnonzero(rows.seen[lane, row])
        if sees:
            first = rows.windows[WINDOW].first[lane]
            position = rows.positions[lane * tokens + row]
            entries = entries[sees(position, first + np.arange(len(entries)))]
            own = own[sees(position, rows.positions[own])]
        keys, values = (
            np.concatenate([pool[entries], new[own]]) for pool, new in ((of_k, k), (of_v, v))
        )
        for head in range(cfg.n_heads):
            mine = lane * tokens + row, head
            scores = keys[:, head // group] @ q[mine] / np.sqrt(cfg.head_dim)
            if sinks is not None:
                scores = np.append(scores, sinks[head])
            weights = np.exp(scores - scores.max())
            shares = weights / weights.sum()
            out[mine] = shares[: len(values)] @ values[:, head // group]
    return out.reshape(lanes * tokens, -1)


def attended(given, cfg=CFG, sinks=None, **changed):
    *arrays, rows = given

    @jax.jit  # a function of its own: JAX would find what it traced under other bounds
    def program(q, k, v, cache, rows, sinks):
        return attention(q, k, v, cache, rows, cfg, sinks).astype(jnp.float32)

    return np.asarray(program(*arrays, rows.replace(**changed), sinks))


def pieces_of(given):
    (lanes, capacity), tokens = given[-1].table.shape, given[-1].seen.shape[-1]
    return attention_pieces(CFG, lanes=lanes, tokens=tokens, capacity=capacity)


CASES = {
    "nothing committed": (2, 4, 16, [0]),
    "one row for each lane": (4, 1, 16, [0, 16, 5, 1]),
    "trees": (4, 8, 16, [0, 16, 5, 1]),
    "one lane": (1, 16, 32, [19]),
}
# The bounds that force pieces of these shapes: on the scores, and on what is gathered.
BOUNDS = {
    "whole": (64 << 20, 64 << 20),
    "pieces": (4 << 10, 4 << 10),
    "small pieces": (256, 512),
}


@pytest.fixture
def bounds(request, monkeypatch):
    values = BOUNDS[request.param]
    for name, n_bytes in zip(("SCORE_BYTES", "GATHERED_BYTES"), values, strict=True):
        monkeypatch.setattr(pieces, name, n_bytes)


def cases(quick, *axes):
    """Parametrizes by a case, its bounds and more. In "trees" a lane has no entries, one has a
    whole table, and rows have parents of all kinds; a lane of one token is what most passes
    have."""
    names = ("case", "bounds", *(name for name, _ in axes))
    rows = covering(quick, CASES, BOUNDS, *(values for _, values in axes))
    return pytest.mark.parametrize(names, rows, indirect=["bounds"])


@cases(
    [
        ("trees", "small pieces"),
        ("one lane", "whole"),
        ("one row for each lane", "small pieces"),
        ("nothing committed", "pieces"),
    ]
)
def test_plain_equals_the_dense_softmax(case, bounds):
    given = random_case(*CASES[case])
    expected = dense(*given)
    found = attended(given)
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-6)
    assert not found[len(expected) :].any()


@cases(
    [
        ("trees", "whole"),
        ("one lane", "small pieces"),
        ("one row for each lane", "whole"),
        ("nothing committed", "pieces"),
    ]
)
def test_a_sink_takes_part_once_however_the_entries_are_cut(case, bounds):
    given = random_case(*CASES[case])
    expected = dense(*given, sinks=SINKS)
    found = attended(given, sinks=jnp.asarray(SINKS))
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-6)
    assert not found[len(expected) :].any()


# What a token at position p sees of those at positions j before it.
LIMITS = {
    "window": lambda p, j: p - j < WINDOW,
    "chunks": lambda p, j: j // WINDOW == p // WINDOW,
}


@cases(
    [
        *(("trees", "small pieces", limit) for limit in LIMITS),
        ("one lane", "whole", "window"),
        ("one row for each lane", "small pieces", "chunks"),
        ("nothing committed", "pieces", "window"),
    ],
    ("limit", LIMITS),
)
def test_a_token_sees_its_window_or_its_chunk(case, limit, bounds):
    """Whatever the position at which a lane's table begins."""
    *arrays, rows = random_case(*CASES[case])
    lanes = len(rows.length)
    first = np.arange(lanes, dtype=np.int32) * 3
    depths = rows.seen.sum(axis=2) - 1
    positions = ((first + rows.length)[:, None] + depths).reshape(-1)
    positions = np.pad(positions, (0, PADDING)).astype(np.int32)
    view = View(rows.write, rows.table, rows.length, first)
    given = (*arrays, rows.replace(positions=positions, windows={WINDOW: view}))
    how = replace(CFG, window=WINDOW, in_chunks=limit == "chunks")
    expected = dense(*given, sees=LIMITS[limit])
    found = attended(given, how)
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-6)
    if rows.length.any():  # what is not seen matters
        assert np.abs(dense(*given) - expected).max() > 0.1


def test_bounds_force_every_kind_of_piece(monkeypatch):
    given = random_case(*CASES["trees"])
    assert pieces_of(given) == Pieces(4, 1, 1)
    monkeypatch.setattr(pieces, "SCORE_BYTES", 4 << 10)
    monkeypatch.setattr(pieces, "GATHERED_BYTES", 4 << 10)
    assert pieces_of(given) == Pieces(1, 1, 1)
    monkeypatch.setattr(pieces, "SCORE_BYTES", 256)
    monkeypatch.setattr(pieces, "GATHERED_BYTES", 512)
    assert pieces_of(given) == Pieces(1, 16, 8)


def test_a_tree_equals_its_branches_one_by_one():
    parents = (-1, 0, 0, 1, 1, 2, -1, 6)
    seen = np.eye(len(parents), dtype=bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            seen[row] |= seen[parent]
    q, k, v, cache, rows = random_case(1, len(parents), 16, [9])
    tree = attended((q, k, v, cache, rows.replace(seen=seen[None])))
    leaves = set(range(len(parents))) - set(parents)
    assert len(leaves) == 4
    for leaf in leaves:
        branch = np.flatnonzero(seen[leaf])
        chain = np.tri(len(branch), dtype=bool)[None]
        own = rows.replace(seen=chain, write=rows.write[branch])
        alone = attended((q[branch], k[branch], v[branch], cache, own))
        np.testing.assert_allclose(tree[branch], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hurt", ["keys", "values"])
def test_what_nobody_sees_may_be_no_number(hurt):
    """A weight of 0 times NaN is NaN: the overflow of one lane was that of all."""
    q, k, v, cache, rows = random_case(4, 8, 16, [0, 15, 5, 1])
    rows = rows.replace(seen=np.tile(np.tri(8, dtype=bool), (4, 1, 1)))
    n_pool, padding = len(cache.k), np.arange(len(q)) % 8 > 4
    beyond = np.arange(16)[None] >= rows.length[:, None]
    rows = rows.replace(
        write=np.where(padding, n_pool, rows.write), table=np.where(beyond, n_pool, rows.table)
    )
    want = attended((q, k, v, cache, rows))[:32][~padding[:32]]
    listed = np.isin(np.arange(n_pool), rows.table[~beyond])[:, None, None]
    entry = {"keys": "k", "values": "v"}[hurt]
    cache = cache.replace(**{entry: jnp.where(listed, getattr(cache, entry), jnp.nan)})
    given = {"keys": k, "values": v}
    given[hurt] = jnp.where(padding[:, None, None], jnp.nan, given[hurt])
    found = attended((q, given["keys"], given["values"], cache, rows))[:32][~padding[:32]]
    np.testing.assert_array_equal(found, want)


def test_bfloat16_is_near_the_rounding_of_its_result():
    given = random_case(4, 8, 64, [0, 64, 33, 1], dtype="bfloat16")
    expected = dense(*given)
    rounded = np.asarray(jnp.asarray(expected, jnp.bfloat16).astype(jnp.float32))
    found = attended(given)[: len(expected)]
    error, least = (np.sqrt(np.square(each - expected).mean()) for each in (found, rounded))
    assert error <= 1.3 * least


def stand_in(query, key, value, *, q_seqlen, kv_seqlen, scale, mask_type, return_residual):
    """What cuDNN's function gives, without rounding. For no entries it gives NaN."""
    assert return_residual
    assert mask_type is cudnn.MaskType.PADDING
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(each, group, axis=2) for each in (key, value))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    seen = jnp.arange(key.shape[1])[None] < kv_seqlen[:, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest")
    return mixed, jax.nn.logsumexp(scores, axis=-1)


def test_the_stand_in_takes_what_the_function_of_jax_takes():
    theirs = inspect.signature(cudnn.dot_product_attention).parameters
    assert set(inspect.signature(stand_in).parameters) <= set(theirs)


@cases(
    [
        *(("trees", "small pieces", parts) for parts in (1, 16)),
        ("one lane", "whole", 16),
        ("one row for each lane", "small pieces", 16),
        ("nothing committed", "pieces", 16),
    ],
    ("blocks", (1, 16)),
)
def test_flash_is_folded_split_and_merged_exactly(case, blocks, bounds, monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", stand_in)
    monkeypatch.setattr(pieces, "FLASH_BLOCKS", blocks)
    monkeypatch.setattr(pieces, "FLASH_ROWS", 2)
    given = random_case(*CASES[case])
    expected = dense(*given)
    found = attended(given, flash=True)
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-6)
    expected = dense(*given, sinks=SINKS)
    found = attended(given, flash=True, sinks=jnp.asarray(SINKS))
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-6)


def test_flash_is_for_several_rows_and_splits_the_entries_of_few_lanes():
    llama = attention_of(64, 8, 128)

    def pieces(lanes, tokens, capacity):
        return attention_pieces(llama, lanes=lanes, tokens=tokens, capacity=capacity, flash=True)

    assert pieces(64, 1, 1024) == Pieces(16, 1, 1)
    assert pieces(64, 8, 1024) == Pieces(16, 1, 1, splits=1)
    assert pieces(1, 512, 8192) == Pieces(1, 1, 1, splits=1)
    assert pieces(1, 64, 8192) == Pieces(1, 1, 1, splits=4)
    assert pieces(1, 64, 131072) == Pieces(1, 8, 1, splits=4)
    assert pieces(1, 8, 64) == Pieces(1, 1, 1, splits=1)


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_program_for_a_gpu_calls_cudnn_where_there_are_several_rows(tokens, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    *arrays, rows = random_case(2, tokens, 256, [100], dtype="bfloat16")
    traced = jax.jit(attention, static_argnums=5).trace(*arrays, rows.replace(flash=True), CFG)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == (tokens > 1)


HEADS = {"64 of 128": (64, 8, 128), "32 of 64": (32, 8, 64), "14 of 64": (14, 2, 64)}


@pytest.fixture(params=HEADS.values(), ids=HEADS)
def on_the_card(request):
    """A model's configuration, whose heads the card's flash attention takes."""
    if gpu_memory() is None:
        pytest.skip("no NVIDIA GPU on this machine")
    if os.environ["JAX_PLATFORMS"] == "cpu":
        pytest.skip("JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda")
    n_heads, n_kv_heads, head_dim = request.param
    if not has_flash(jax.devices()[0], head_dim=head_dim, dtype="bfloat16"):
        pytest.skip("this card has no flash attention, or JAX found no cuDNN that has it")
    return attention_of(n_heads, n_kv_heads, head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLASH_DTYPES)
def test_flash_on_the_card_equals_plain_within_rounding(on_the_card, dtype):
    for shape in ((4, 8, 512, [0, 1, 300, 512]), (1, 64, 1024, [1000]), (2, 2, 128, [0])):
        given = random_case(*shape, cfg=on_the_card, dtype=dtype)
        expected = dense(*given, cfg=on_the_card)
        plain, flash = (
            attended(given, on_the_card, flash=flash)[: len(expected)] for flash in (False, True)
        )
        ours, theirs = (np.sqrt(np.square(each - expected).mean()) for each in (flash, plain))
        print(f"{shape}: root mean square to float64 {ours:.2e}, plain {theirs:.2e}")
        assert 0 < ours <= 1.5 * theirs
        # The committed part is rounded once more than the result.
        most = np.abs(flash - plain).max() / np.abs(expected).max()
        assert most <= 2 * 2.0 ** (-8 if dtype == "bfloat16" else -11)


@pytest.mark.gpu
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_temporaries_on_the_card_stay_within_the_plan(on_the_card, flash):
    cfg = on_the_card
    for lanes, tokens, capacity in ((1, 512, 4096), (1, 64, 65536), (1, 8, 8192), (64, 8, 1024)):
        rows = rows_struct(
            n_rows=lanes * tokens, lanes=lanes, tokens=tokens, capacity=capacity
        ).replace(flash=flash)
        q, kv, pool = (
            jax.ShapeDtypeStruct((n, heads, cfg.head_dim), "bfloat16")
            for n, heads in (
                (lanes * tokens, cfg.n_heads),
                (lanes * tokens, cfg.n_kv_heads),
                (lanes * capacity, cfg.n_kv_heads),
            )
        )
        program = jax.jit(attention, static_argnums=5)
        compiled = program.lower(q, kv, kv, LayerCache(pool, pool), rows, cfg).compile()
        shapes = RunShape(batch=lanes, longest=tokens, context=capacity).shapes()
        found = compiled.memory_analysis().temp_size_in_bytes
        assert found <= attention_temporary_bytes(cfg, shapes, platform="gpu")
