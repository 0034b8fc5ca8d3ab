"""Each component of the model against the reference's own, on random input, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.config import model_config
from jlayer.families.registry import layer_kinds
from jlayer.model import ops, products
from jlayer.model.attention import attention
from jlayer.model.cache import LayerCache, empty_cache, write
from jlayer.model.stages import block
from jlayer.parts import Norm, Rope
from tests.chain import chain
from tests.reference.conftest import STYLES
from tests.tiny import TINY

torch = pytest.importorskip("torch")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
pytestmark = pytest.mark.reference

BATCH, TOKENS = 2, 7
# The styles that differ in what is rotated by.
ROTATIONS = ["llama2", "llama3", "llama3.1", "llama3.2", "linear"]
POSITIONS = np.array([np.arange(3, 3 + TOKENS), np.arange(90, 90 + TOKENS)], np.int32)


def reference_config(style):
    options = {key: value for key, value in style.items() if key != "tied"}
    fixed = {"num_hidden_layers": 1, "attn_implementation": "eager"}
    return llama.LlamaConfig(**{**TINY, **fixed, **options})


def ours(config):
    return model_config({**config.to_dict(), "model_type": "llama"}, where="test")


def close(found, expected, scale=1e-5):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=0, atol=scale * np.abs(expected).max()
    )


def randomise(module):
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (
            parameter.ndim == 1
        )
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [1, 2, products.FEW_COLUMNS, products.FEW_COLUMNS + 1])
def test_a_product_is_the_same_from_either_side(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn((1, columns, 24), generator=generator).to(getattr(torch, dtype))
    weight = torch.randn((40, 24), generator=generator).to(getattr(torch, dtype))
    mine = [jnp.asarray(each.float().numpy()).astype(dtype) for each in (x, weight)]
    found = jax.jit(products.product)(*mine)
    assert found.dtype == jnp.float32
    assert found.shape == (1, columns, 40)
    close(found, x.double() @ weight.double().T, scale=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what the CPU's compiler is given")
def test_the_cpu_multiplies_few_columns_with_the_weight_on_the_left():
    """The compiler would turn it back, and repack the whole weight at every call."""
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1, 2, 24), (40, 24))]
    text = jax.jit(products.product).lower(*shapes).compile().as_text()
    (line,) = [line for line in text.splitlines() if " dot(" in line]
    assert "f32[40,2]" in line


# Of small numbers epsilon is a part that shows.
@pytest.mark.parametrize(("size", "eps"), [(4, 1e-5), (1e-3, 1e-5), (1e-3, 1e-6)])
def test_rms_norm(size, eps):
    norm = randomise(llama.LlamaRMSNorm(24, eps=eps))
    x = torch.randn(BATCH, TOKENS, 24) * size
    close(ops.normed(x.numpy(), Norm(eps), norm.weight.detach().numpy()), norm(x))


def test_rms_norm_scales_after_rounding():
    # In bfloat16 the order of weighting and rounding shows: the reference rounds x_hat first.
    weight = torch.full((64,), 1.37, dtype=torch.bfloat16)
    norm = llama.LlamaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = weight
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = ops.normed(
        *(x.float().numpy().astype("bfloat16"), Norm(1e-5)),
        weight.float().numpy().astype("bfloat16"),
    )
    assert np.array_equal(np.asarray(found).astype(np.float32), norm(x).float().detach().numpy())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rope_frequencies_of_published_shapes_agree_to_the_last_bit(name, head_dim):
    style = {**STYLES[name], "head_dim": head_dim, "max_position_embeddings": 131072}
    if "original_max_position_embeddings" in style["rope_parameters"]:
        style["rope_parameters"] = {
            **style["rope_parameters"],
            "original_max_position_embeddings": 8192,
        }
    config = reference_config(style)
    expected = llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = ops.rope_frequencies(ours(config).attention.rope, head_dim)
    # Equal here; another machine's library may round a power otherwise. More shows at long
    # positions.
    assert np.abs(found.view(np.int32) - expected.view(np.int32)).max() <= 1


def test_llama3_scaling_reaches_all_three_ranges():
    rope = ours(reference_config(STYLES["llama3.1"])).attention.rope
    plain = ops.rope_frequencies(Rope(theta=rope.theta), 10)
    ratio = ops.rope_frequencies(rope, 10) / plain
    assert np.isclose(ratio.max(), 1)
    assert np.isclose(ratio.min(), 1 / rope.factor)
    assert np.any((ratio > 1.01 / rope.factor) & (ratio < 0.99))


@pytest.mark.parametrize("style", ROTATIONS, indirect=True)
def test_rotation(style):
    config = reference_config(style)
    q = torch.randn(BATCH, TOKENS, 6, 10)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.tensor(POSITIONS))
    expected, _ = llama.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    found = ops.rotate(q.flatten(0, 1).numpy(), POSITIONS.reshape(-1), ours(config).attention.rope)
    close(found, expected.transpose(1, 2).flatten(0, 1))


def test_rotation_at_the_far_end_of_a_long_context():
    config = reference_config(STYLES["llama3"])
    positions = np.array([[131071, 100003, 65537]], np.int32)
    q = torch.randn(1, 3, 6, 10)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.tensor(positions))
    expected, _ = llama.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    found = ops.rotate(q[0].numpy(), positions[0], ours(config).attention.rope)
    close(found, expected.transpose(1, 2)[0])


# 6, 2 and 1 heads of keys and values.
@pytest.mark.parametrize("style", ["llama2", "llama3", "one-kv-head"], indirect=True)
@pytest.mark.parametrize("n_before", [0, 4])
def test_attention_over_a_pool_with_more_room_than_tokens(style, n_before):
    """Some of the tokens came before: they are in rows of the pool, the others in this chunk."""
    config = reference_config(style)
    how = ours(config).attention
    q, k, v = (torch.randn(1, TOKENS, n, 10) for n in (6, how.n_kv_heads, how.n_kv_heads))
    room = jnp.full(
        (16, how.n_kv_heads, 10), 1e3, jnp.float32
    )  # what no table lists must not be seen
    pool_rows = np.array([9, 2, 14, 5, 0, 3, 7], np.int32)
    before = chain(TOKENS, capacity=16).replace(write=pool_rows)
    pool = write(LayerCache(k=room, v=room), k[0].numpy(), v[0].numpy(), before)
    rows = chain(TOKENS - n_before, capacity=16)
    table = np.full((1, 16), 1, np.int32)
    table[0, :n_before] = pool_rows[:n_before]
    rows = rows.replace(
        positions=rows.positions + n_before,
        write=pool_rows[n_before:],
        table=table,
        length=np.array([n_before], np.int32),
    )
    repeats = 6 // how.n_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(repeats, 1),
        v.transpose(1, 2).repeat_interleave(repeats, 1),
        is_causal=True,
    )
    own = [each[0, n_before:].numpy() for each in (q, k, v)]
    close(
        jax.jit(attention, static_argnums=5)(*own, pool, rows, how),
        expected.transpose(1, 2).reshape(TOKENS, 60)[n_before:],
    )


def test_block_is_the_reference_decoder_layer(style):
    config = reference_config(style)
    cfg = ours(config)
    layer = randomise(llama.LlamaDecoderLayer(config, 0)).eval()
    x = torch.randn(1, TOKENS, 24)
    positions = torch.arange(TOKENS)[None]
    rotary = llama.LlamaRotaryEmbedding(config)(x, positions)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    expected = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weights = {
        name.removesuffix(".weight")
        .replace(".bias", "_bias")
        .split(".")[-1]: tensor.detach().numpy()
        for name, tensor in layer.named_parameters()
    }
    (kind,) = layer_kinds(cfg)
    assert weights.keys() == {leaf.name for leaf in kind.leaves}
    empty = empty_cache(kind.cache, n_rows=64, dtype="float32")
    # Compiled, as it runs; step by step, JAX would make a program of each operation.
    found, _ = jax.jit(block(kind))(weights, x[0].numpy(), empty, chain(TOKENS))
    close(found, expected[0])


def test_padding_is_never_written_to_the_pool():
    room = jnp.zeros((4, 1, 2), jnp.float32)
    empty = LayerCache(k=room, v=room)
    ones = np.ones((3, 1, 2), np.float32)
    rows = chain(3).replace(write=np.array([4, 4, 2], np.int32))
    filled = write(empty, ones, ones, rows)
    assert np.asarray(filled.k)[:, 0, 0].tolist() == [0, 0, 1, 0]
