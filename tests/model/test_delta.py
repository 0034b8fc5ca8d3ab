"""The gated delta rule of a pane: held against single steps in float64, over trees and chains."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.engine.batch import lineage
from jlayer.families.base import state_cache
from jlayer.model.cache import Rows, cache_struct, empty_cache, read_state, write_state
from jlayer.model.delta import (
    convolved,
    decay,
    delta_rule,
    gated_delta,
    last_inputs,
    parents_of,
)
from jlayer.parts import Delta
from jlayer.pieces import DELTA_BLOCK as BLOCK
from jlayer.pieces import delta_bytes

# No two axes are equal: 2 key heads of 5, 6 value heads of 7, so 62 channels.
HOW = Delta(n_key_heads=2, n_value_heads=6, key_dim=5, value_dim=7, kernel=4)
LANES, SLOTS = 3, 5
# A fork below the first row, another below the third, and one more root.
TREE = (-1, 0, 1, 0, 2, 2, 3, -1)
TOLERANCE = 1e-5  # of the largest number: sums in another order


def close(found, expected, scale=TOLERANCE):
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=0, atol=scale * np.abs(expected).max()
    )


def seen_by(parents):
    return lineage(parents)[1]


def chain(n_tokens):
    return tuple(range(-1, n_tokens - 1))


def random_given(n_tokens, lanes=LANES, seed=0):
    """q, k, v, g, beta and a state, of the sizes of HOW."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(0, 1, (lanes, n_tokens, *shape)).astype(np.float32)

    q, k = (normal(2, 5) for _ in range(2))
    q, k = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (q, k))
    g = -rng.gamma(1.0, 0.7, (lanes, n_tokens, 6)).astype(np.float32)
    beta = rng.uniform(0, 1, (lanes, n_tokens, 6)).astype(np.float32)
    state = rng.normal(0, 1, (lanes, 6, 5, 7)).astype(np.float32)
    return [q, k, normal(6, 7), g, beta], state


def by_single_steps(given, state, parents):
    """(outputs, the state after each row) of one lane, row after row in float64."""
    q, k, v, g, beta = (np.float64(each) for each in given)
    q, k = (np.repeat(each, 3, axis=1) for each in (q, k))
    states, outputs = [], []
    for row, parent in enumerate(parents):
        before = np.float64(state) if parent < 0 else states[parent]
        decayed = before * np.exp(g[row])[:, None, None]
        found = np.einsum("nhe,nh->ne", decayed, k[row])
        update = beta[row][:, None] * (v[row] - found)
        states.append(decayed + k[row][:, :, None] * update[:, None])
        outputs.append(np.einsum("nhe,nh->ne", states[-1], q[row]))
    return np.stack(outputs), states


rule = jax.jit(delta_rule, static_argnames="is_chain")


def run(given, state, parents, kept, *, is_chain=False):
    """The rule over lanes that have the same tree each, as numpy arrays."""
    n_tokens = len(parents)
    seen = np.broadcast_to(seen_by(parents), (len(state), n_tokens, n_tokens))
    kept = np.broadcast_to(np.isin(np.arange(n_tokens), kept), (len(state), n_tokens))
    # Waited for: the caller may change what it gave.
    return jax.tree.map(np.asarray, rule(*given, state, seen, kept, is_chain=is_chain))


def check(given, state, parents, kept, *, is_chain=False):
    out, after = run(given, state, parents, kept, is_chain=is_chain)
    for lane in range(len(state)):
        of_lane = [each[lane] for each in given]
        expected, states = by_single_steps(of_lane, state[lane], parents)
        close(out[lane], expected)
        close(after[lane], states[max(kept)] if kept else state[lane])


@pytest.mark.parametrize("n_tokens", [1, 2, 8, BLOCK])
def test_a_chain_is_one_step_after_another(n_tokens):
    given, state = random_given(n_tokens)
    check(given, state, chain(n_tokens), range(n_tokens))


@pytest.mark.parametrize("n_kept", [0, 3, BLOCK, 2 * BLOCK - 1, 2 * BLOCK])
@pytest.mark.parametrize("is_chain", [False, True])
def test_a_long_chain_is_taken_in_blocks_or_at_once(is_chain, n_kept):
    """After the kept rows there are guesses: the state that is left is the one before them."""
    given, state = random_given(2 * BLOCK, lanes=1)
    check(given, state, chain(2 * BLOCK), range(n_kept), is_chain=is_chain)


def gradients_by_single_steps(given, state, weights, n_kept):
    """Of the weighted outputs and state by q, k, v, g, beta and the state, row after row by torch
    in float64."""
    torch = pytest.importorskip("torch")
    given = [torch.tensor(np.float64(each), requires_grad=True) for each in (*given, state)]
    *rows, running = given
    q, k = (each.repeat_interleave(3, dim=2) for each in rows[:2])
    v, g, beta = rows[2:]
    total = 0.0
    for row in range(v.shape[1]):
        decayed = running * g[:, row].exp()[..., None, None]
        found = torch.einsum("bnhe,bnh->bne", decayed, k[:, row])
        update = beta[:, row, :, None] * (v[:, row] - found)
        running = decayed + k[:, row, :, :, None] * update[:, :, None]
        out = torch.einsum("bnhe,bnh->bne", running, q[:, row])
        total = total + (out * torch.tensor(np.float64(weights[0][:, row]))).sum()
        if row + 1 == n_kept:
            total = total + (running * torch.tensor(np.float64(weights[1]))).sum()
    total.backward()
    return [each.grad.numpy() for each in given]


def test_the_way_back_through_blocks_is_that_through_single_steps():
    """Blocks hand each other the gradient of their state."""
    n_tokens = 2 * BLOCK
    given, state = random_given(n_tokens, lanes=2)
    rng, n_kept = np.random.default_rng(1), n_tokens - 5
    weights = [rng.normal(0, 1, shape).astype(np.float32)
               for shape in (given[2].shape, state.shape)]  # fmt: skip
    seen = np.broadcast_to(np.tri(n_tokens, dtype=bool), (2, n_tokens, n_tokens))
    kept = np.broadcast_to(np.arange(n_tokens) < n_kept, (2, n_tokens))

    def loss(given, state):
        found = delta_rule(*given, state, seen, kept, is_chain=True)
        return sum((one * weight).sum() for one, weight in zip(found, weights, strict=True))

    *of_rows, of_state = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(given, state))
    expected = gradients_by_single_steps(given, state, weights, n_kept)
    for found, there in zip((*of_rows, of_state), expected, strict=True):
        close(found, there)


@pytest.mark.parametrize("kept", [(), (0,), (0, 3), (0, 1, 2, 5), (7,)])
def test_a_tree_is_each_of_its_rows_after_its_ancestors(kept):
    given, state = random_given(len(TREE))
    check(given, state, TREE, kept)


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_of_any_form(seed):
    rng = np.random.default_rng(seed)
    parents = tuple(int(rng.integers(-1, row)) for row in range(32))
    given, state = random_given(32, lanes=1, seed=seed)
    check(given, state, parents, ())


def test_a_weak_decay_after_strong_ones_is_not_lost_in_their_sum():
    given, state = random_given(BLOCK, lanes=1)
    given[3] = np.full_like(given[3], -1e-3)
    given[3][:, :32] = -40.7
    check(given, state, chain(BLOCK), range(BLOCK))
    given[3][:, 8:32] = -np.inf  # nothing at all is left
    check(given, state, chain(BLOCK), range(BLOCK))


def test_rows_of_one_lane_never_reach_another():
    given, state = random_given(8)
    parents, kept = chain(8), range(8)
    clean, after = run(given, state, parents, kept)
    for n in range(5):
        spoilt = [each.copy() for each in given]
        spoilt[n][1, 3] = np.nan if n % 2 else np.inf
        found, found_after = run(spoilt, state, parents, kept)
        for lane in (0, 2):
            np.testing.assert_array_equal(found[lane], clean[lane])
            np.testing.assert_array_equal(found_after[lane], after[lane])
        close(found[1, :3], clean[1, :3])
        assert np.isnan(found[1, 3:]).all()
        assert np.isnan(found_after[1]).all()
    broken = state.copy()
    broken[1] = np.nan
    found, found_after = run(given, broken, parents, kept)
    for lane in (0, 2):
        np.testing.assert_array_equal(found[lane], clean[lane])
        np.testing.assert_array_equal(found_after[lane], after[lane])
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize("is_chain", [False, True])
def test_a_spoilt_guess_spoils_those_that_see_it(is_chain):
    if is_chain:
        parents, guess = chain(2 * BLOCK), BLOCK + 5
        sees = range(guess, 2 * BLOCK)
    else:
        parents, guess, sees = TREE, 3, (3, 6)
    given, state = random_given(len(parents), lanes=1)
    kept = range(3)
    clean, after = run(given, state, parents, kept, is_chain=is_chain)
    given[2][:, guess] = np.nan
    found, found_after = run(given, state, parents, kept, is_chain=is_chain)
    is_nan = np.isnan(np.asarray(found[0])).all(axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(is_nan), sees)
    close(found[0, ~is_nan], clean[0, ~is_nan])
    close(found_after, after)


# The convolution.


def test_parents_go_on_into_the_tokens_before_the_chunk():
    found = parents_of(jnp.asarray(seen_by(TREE))[None], 3)
    # Three tokens before the chunk, then its rows: a root's parent is the third of them.
    assert np.asarray(found)[0].tolist() == [0, 0, 1, *(3 + parent for parent in TREE)]


def test_a_row_is_convolved_with_its_ancestors():
    rng = np.random.default_rng(0)
    tokens = rng.normal(0, 1, (1, 3 + len(TREE), 9)).astype(np.float32)
    weight = rng.normal(0, 1, (9, 4)).astype(np.float32)
    parents = parents_of(jnp.asarray(seen_by(TREE))[None], 3)
    found = jax.jit(convolved, static_argnames="activation")(
        tokens, weight, parents, activation="relu"
    )
    paths = {0: (0, 1, 2, 3), 4: (3, 4, 5, 7), 6: (2, 3, 6, 9), 7: (0, 1, 2, 10)}
    for row, places in paths.items():
        expected = sum(weight[:, tap] * tokens[0, place] for tap, place in enumerate(places))
        close(found[0, row], np.maximum(expected, 0), 1e-6)


@pytest.mark.parametrize(
    ("kept", "places"),
    [((), (0, 1, 2)), ((0,), (1, 2, 3)), ((0, 3), (2, 3, 6)), ((0, 1, 2, 5), (4, 5, 8))],
)
def test_the_convolution_goes_on_after_what_is_kept(kept, places):
    tokens = np.arange(3 + len(TREE), dtype=np.float32)[None, :, None] * np.ones(9, np.float32)
    parents = parents_of(jnp.asarray(seen_by(TREE))[None], 3)
    is_kept = np.isin(np.arange(len(TREE)), kept)[None]
    found = np.asarray(last_inputs(tokens, parents, is_kept))
    assert found.shape == (1, 9, 3)
    assert found[0, 4].tolist() == list(places)


def test_decay():
    a = jnp.asarray([[0.0, 1.0], [-2.0, 3.0]], jnp.bfloat16)
    found = decay(a, jnp.asarray([0.5, -1.0]), jnp.asarray([1.0, 0.25]))
    sums = np.array([[1, 1.25], [-1, 3.25]])
    close(found, -np.exp([0.5, -1.0]) * np.log1p(np.exp(sums)), 1e-6)
    assert found.dtype == jnp.float32


# The whole mixer, with its cache.


def random_products(n_rows, how, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    heads, values = how.n_value_heads, how.n_value_heads * how.value_dim
    sizes = {"in_proj_qkv": how.channels, "in_proj_z": values}
    sizes |= {"in_proj_b": heads, "in_proj_a": heads}
    return {name: rng.normal(0, 1, (n_rows, n)).astype(dtype) for name, n in sizes.items()}


def random_whole(how, dtype="float32", seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"conv1d": (how.channels, 1, how.kernel), "norm": (how.value_dim,)}
    shapes |= {"dt_bias": (how.n_value_heads,), "A_log": (how.n_value_heads,)}
    return {name: rng.normal(0.5, 0.4, shape).astype(dtype) for name, shape in shapes.items()}


def random_cache(how, dtype="float32"):
    struct = cache_struct(state_cache(how), n_rows=SLOTS, dtype=dtype)
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.integers(0, 9, leaf.shape).astype(leaf.dtype)
            if leaf.dtype == jnp.uint16
            else rng.normal(0, 1, leaf.shape).astype(leaf.dtype)
        ),
        struct,
    )


def rows_of(trees, *, source, target, kept, n_rows=None, is_chain=False):
    """`Rows` of lanes with these trees; what attention alone needs is left out."""
    n_tokens = len(trees[0])
    seen = np.stack([seen_by(tree) for tree in trees])
    return Rows(
        positions=np.zeros(n_rows or len(trees) * n_tokens, np.int32),
        write=None,
        table=None,
        length=None,
        seen=seen,
        source=np.array(source, np.int32),
        target=np.array(target, np.int32),
        kept=np.stack([np.isin(np.arange(n_tokens), some) for some in kept]),
        is_chain=is_chain,
    )


mixed = jax.jit(gated_delta, static_argnames="how")


def take(products, rows):
    return {name: product[np.asarray(rows)] for name, product in products.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [2, 7])
def test_a_tree_is_each_of_its_branches(kernel):
    how = replace(HOW, kernel=kernel)
    products, whole, cache = random_products(8, how), random_whole(how), random_cache(how)
    rows = rows_of([TREE], source=[3], target=[1], kept=[(0, 1)])
    found, after = mixed(products, whole, cache, rows, how=how)
    for leaf in (4, 5, 6, 7):
        path = np.flatnonzero(seen_by(TREE)[leaf])
        padded = np.pad(path, (0, 4 - len(path)))  # so all are one program
        branch = rows_of([chain(4)], source=[3], target=[1], kept=[(0, 1)])
        expected, expected_after = mixed(take(products, padded), whole, cache, branch, how=how)
        close(found[path], expected[: len(path)])
        if leaf < 6:  # both rows that are kept are on its way
            jax.tree.map(close, after, expected_after)


@pytest.mark.slow
def test_pieces_are_the_whole():
    """From one slot to another and back, as a prompt in chunks, and next tokens after it."""
    n_tokens, lengths = 2 * BLOCK + 8, (3, 1, 2 * BLOCK, 1, 3)
    products, whole, cache = random_products(n_tokens, HOW), random_whole(HOW), random_cache(HOW)
    at_once = rows_of([chain(n_tokens)], source=[2], target=[0], kept=[range(n_tokens)])
    expected, expected_cache = mixed(products, whole, cache, at_once, how=HOW)
    found, first, source = [], 0, 2
    for number, length in enumerate(lengths):
        target = (0, 4)[number % 2]
        rows = rows_of(
            [chain(length)],
            source=[source],
            target=[target],
            kept=[range(length)],
            is_chain=True,
        )
        piece = take(products, range(first, first + length))
        out, cache = mixed(piece, whole, cache, rows, how=HOW)
        found.append(out)
        first, source = first + length, target
    close(np.concatenate(found), expected)
    for mine, theirs in zip(
        read_state(cache, np.array([source]), jnp.float32),
        read_state(expected_cache, np.array([0]), jnp.float32),
        strict=True,
    ):
        close(mine, theirs)


@pytest.mark.slow
def test_padding_changes_nothing():
    """Rows after a lane's own, lanes after the pane's own, and rows beyond the pane; whatever they
    hold."""
    products, whole, cache = random_products(5, HOW), random_whole(HOW), random_cache(HOW)
    alone = rows_of([chain(5)], source=[SLOTS], target=[1], kept=[range(5)])
    expected, after = mixed(products, whole, cache, alone, how=HOW)
    padded = {
        name: np.concatenate([product, np.full((27, product.shape[1]), np.nan, np.float32)])
        for name, product in products.items()
    }
    rows = rows_of(
        [chain(8)] * 2, source=[SLOTS] * 2, target=[1, SLOTS], kept=[range(5), ()], n_rows=32
    )
    found, found_after = mixed(padded, whole, cache, rows, how=HOW)
    assert found.shape == (32, 42)
    close(found[:5], expected)
    assert not np.asarray(found[16:]).any()
    jax.tree.map(close, found_after, after)
    for slot in (0, 2, 3, 4):
        np.testing.assert_array_equal(found_after.state[slot], cache.state[slot])
        np.testing.assert_array_equal(found_after.conv[slot], cache.conv[slot])


def test_a_lane_without_kept_rows_keeps_its_state():
    products, whole, cache = random_products(8, HOW), random_whole(HOW), random_cache(HOW)
    for trees in ([TREE], [chain(1)] * 8):
        lanes = len(trees)
        rows = rows_of(
            trees, source=[3] * lanes, target=[4, *[SLOTS] * (lanes - 1)], kept=[()] * lanes
        )
        _, after = mixed(products, whole, cache, rows, how=HOW)
        np.testing.assert_array_equal(after.state[4], cache.state[3])
        np.testing.assert_array_equal(after.conv[4], cache.conv[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lanes", "n_tokens", "is_chain"),
    [(1, 1, False), (4, 1, False), (1, 8, False), (2, 64, False), (1, 128, True), (1, 128, False)],
)
def test_temporaries_are_within_their_sum_and_the_pool_is_not_copied(lanes, n_tokens, is_chain):
    how = Delta(n_key_heads=2, n_value_heads=6, key_dim=40, value_dim=64, kernel=4)
    tree = np.broadcast_to(np.tri(n_tokens, dtype=bool), (lanes, n_tokens, n_tokens))
    rows = rows_of([chain(1)], source=[0] * lanes, target=[0] * lanes, kept=[()])
    rows = rows.replace(seen=tree, kept=tree[:, -1], is_chain=is_chain)
    given = (random_products(lanes * n_tokens, how), random_whole(how))
    cache = cache_struct(state_cache(how), n_rows=500, dtype="float32")
    program = jax.jit(
        lambda cache, products, whole, rows: gated_delta(products, whole, cache, rows, how=how),
        donate_argnums=0,
    )
    compiled = program.lower(cache, *given, rows).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    expected = delta_bytes(how, lanes=lanes, tokens=n_tokens, is_chain=is_chain)
    assert found <= expected < 3 * found
    assert expected < sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_slots(dtype):
    """Beyond the pool there are zeros, and what is written there is dropped."""
    struct = cache_struct(state_cache(HOW), n_rows=SLOTS, dtype=dtype)
    assert struct.conv.shape == (SLOTS, 62, 3)
    assert (struct.state.shape, struct.state.dtype) == ((SLOTS, 6, 5, 7), jnp.float32)
    spec = state_cache(HOW)
    conv_bytes = 62 * 3 * (2 if dtype == "bfloat16" else 4)
    n_bytes = spec.n_bytes(n_rows=SLOTS, item_bytes=2 if dtype == "bfloat16" else 4)
    assert n_bytes == SLOTS * (conv_bytes + 4 * 6 * 5 * 7)
    assert n_bytes == sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(struct))
    rng = np.random.default_rng(0)
    conv = jnp.asarray(rng.normal(0, 1, (LANES, 62, 3)), dtype)
    state = jnp.asarray(rng.normal(0, 1, (LANES, 6, 5, 7)), jnp.float32)
    empty = empty_cache(spec, n_rows=SLOTS, dtype=dtype)
    cache = jax.jit(write_state)(empty, np.array([4, SLOTS, 0]), conv, state)
    found = jax.jit(read_state, static_argnums=2)(cache, np.array([0, SLOTS, 4, 2]), dtype)
    for mine, theirs in zip(found, (conv, state), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine[0], theirs[2])
        np.testing.assert_array_equal(mine[2], theirs[0])
        assert not np.asarray(mine[1], np.float32).any()
        assert not np.asarray(mine[3], np.float32).any()


@pytest.mark.slow
def test_the_state_stays_float32_where_the_rest_is_bfloat16():
    products, whole = random_products(4, HOW, "bfloat16"), random_whole(HOW, "bfloat16")
    cache = empty_cache(state_cache(HOW), n_rows=SLOTS, dtype="bfloat16")
    rows = rows_of([chain(4)], source=[SLOTS], target=[1], kept=[range(4)])
    found, after = mixed(products, whole, cache, rows, how=HOW)
    assert (found.dtype, after.state.dtype) == (jnp.bfloat16, jnp.float32)
    wide = [{name: np.float32(each) for name, each in some.items()} for some in (products, whole)]
    cache = empty_cache(state_cache(HOW), n_rows=SLOTS, dtype="float32")
    expected, _ = mixed(*wide, cache, rows, how=HOW)
    close(np.float32(found), expected, 0.03)  # a few roundings of 2^-9
    conv, _ = read_state(after, np.array([1]), jnp.bfloat16)
    np.testing.assert_array_equal(conv[0].T, products["in_proj_qkv"][1:])
