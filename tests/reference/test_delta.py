"""Qwen3-Next and Qwen3.5 against Transformers: the delta rule, both types of layers, whole models,
and what counts where config.json is silent."""

from copy import deepcopy

import jax
import numpy as np
import pytest

from jlayer.config import model_config
from jlayer.engine.batch import lineage
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families import qwen_next
from jlayer.families.registry import (
    FAMILIES,
    final_leaves,
    head_stage,
    is_dropped,
    is_matrix,
    layer_kinds,
    layer_tensor_name,
    published_tensors,
)
from jlayer.model.cache import Rows, empty_cache
from jlayer.model.delta import delta_rule, unit
from jlayer.model.ops import rope_frequencies
from jlayer.model.stages import block, call, multiply
from jlayer.spec import Role

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next  # noqa: E402

pytestmark = pytest.mark.reference

LEFT_OUT = object()  # the key is not there at all
LINEAR, FULL = "linear_attention", "full_attention"
# No two axes are equal: queries 48 (with gates 96), keys and values 16, 2 key heads of 5 and 6
# value heads of 7: 62 channels, and 104 with their gates.
SIZES = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# The convolution has the MLP's activation.
CONFIGS = {
    "qwen3_5_text": {**SIZES, "rms_norm_eps": 1e-4},
    "qwen3_next": {
        **SIZES,
        "mlp_only_layers": [0, 1, 2, 3],
        "linear_conv_kernel_dim": 3,
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
        "rope_theta": 100.0,
    },
}
MODELS = {
    "qwen3_5_text": (
        modeling_qwen3_5.Qwen3_5DecoderLayer,
        modeling_qwen3_5.Qwen3_5TextRotaryEmbedding,
    ),
    "qwen3_next": (
        modeling_qwen3_next.Qwen3NextDecoderLayer,
        modeling_qwen3_next.Qwen3NextRotaryEmbedding,
    ),
}
TOLERANCE = 1e-5  # of the largest number: sums in another order
TOKENS, POOL = 23, 64
# Of the 23 tokens the last eight are a tree, below the fifteenth and the fork after it.
TREE = (-1, 0, 1, 0, 2, 2, 3, -1)


@pytest.fixture(scope="module", autouse=True)
def known_families():
    with pytest.MonkeyPatch.context() as patch:
        for family in qwen_next.FAMILIES:
            patch.setitem(FAMILIES, family.model_type, family)
        yield


def close(found, expected, scale=TOLERANCE):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=0, atol=scale * np.abs(expected).max()
    )


def reference_config(model_type, **more):
    given = deepcopy({**CONFIGS[model_type], **more})
    config = transformers.CONFIG_MAPPING[model_type](**given)
    config._attn_implementation = "eager"
    return config


def ours(model_type, config):
    return model_config({**config.to_dict(), "model_type": model_type}, where="test")


def randomise(module):
    """Random weights; those that multiply what is normed are about what they are at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.normal_(1.0 if "linear_attn.norm" in name else 0.0, 0.3, generator=generator)
    return module.eval()


# The rule alone.


@pytest.mark.parametrize("n_tokens", [1, 7, 128])
@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_the_rule_is_both_forms_of_the_reference(name, n_tokens):
    generator = torch.Generator().manual_seed(n_tokens)

    def normal(*shape):
        return torch.randn(2, n_tokens, *shape, generator=generator)

    q, k, v, g, beta = normal(2, 5), normal(2, 5), normal(6, 7), normal(6), normal(6)
    g, beta = -3 * g.square(), beta.sigmoid()
    state = torch.randn(2, 6, 5, 7, generator=generator)
    expected, after = getattr(modeling_qwen3_next, name)(
        *(q, k, v),
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    seen = np.broadcast_to(np.tri(n_tokens, dtype=bool), (2, n_tokens, n_tokens))
    for is_chain in (False, True):
        found = jax.jit(delta_rule, static_argnames="is_chain")(
            unit(q.numpy()) * np.float32(5**-0.5),
            unit(k.numpy()),
            *(each.numpy() for each in (v, g, beta, state)),
            seen,
            np.ones((2, n_tokens), bool),
            is_chain=is_chain,
        )
        close(found[0], expected)
        close(found[1], after)


# A layer.


@pytest.fixture(
    scope="module", params=[(name, kind) for name in CONFIGS for kind in (LINEAR, FULL)]
)
def layer(request):
    """(our compiled block and its weights, an empty cache, the reference's function of [T, D])."""
    model_type, name = request.param
    config = reference_config(model_type)
    number = config.layer_types.index(name)
    layer_class, rotary_class = MODELS[model_type]
    theirs = randomise(layer_class(config, number))
    rotary = rotary_class(config)

    def reference(x):
        x = torch.tensor(x)[None]
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        with torch.no_grad():
            return theirs(
                x,
                position_embeddings=rotary(x, positions),
                attention_mask=None if name == LINEAR else mask,
                position_ids=positions,
            )[0]

    kind = layer_kinds(ours(model_type, config))[number]
    assert kind.name == name
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert state.keys() == {leaf.published for leaf in kind.leaves}
    weights = {leaf.name: state[leaf.published] for leaf in kind.leaves}
    compiled = jax.jit(block(kind))
    cache = empty_cache(kind.cache, n_rows=POOL, dtype="float32")
    return (lambda *given: compiled(weights, *given)), cache, reference


@pytest.fixture(scope="module")
def hidden():
    return np.random.default_rng(0).normal(0, 1, (TOKENS, 24)).astype(np.float32)


def rows_after(before, parents, kept=None):
    """`Rows` of one lane with `before` committed tokens, and then these; its state is in slot 5,
    and goes there again. All are kept but where it is said."""
    n_tokens = len(parents)
    depth, seen = lineage(parents)
    table = np.full((1, POOL), POOL, np.int32)
    table[0, :before] = np.arange(before)
    kept = range(n_tokens) if kept is None else kept
    return Rows(
        positions=before + depth,
        write=np.arange(before, before + n_tokens, dtype=np.int32),
        table=table,
        length=np.array([before], np.int32),
        seen=seen[None],
        source=np.array([5 if before else POOL], np.int32),
        target=np.array([5], np.int32),
        kept=np.isin(np.arange(n_tokens), kept)[None],
    )


def chain(n_tokens):
    return tuple(range(-1, n_tokens - 1))


def test_a_block_is_the_reference_decoder_layer(layer, hidden):
    ours, cache, reference = layer
    found, _ = ours(hidden, cache, rows_after(0, chain(TOKENS)))
    close(found, reference(hidden))


@pytest.mark.slow
def test_a_block_goes_on_from_what_is_cached(layer, hidden):
    ours, cache, reference = layer
    found, first = [], 0
    for length in (15, 3, 1, 3, 1):
        rows = rows_after(first, chain(length))
        out, cache = ours(hidden[first : first + length], cache, rows)
        found.append(out)
        first += length
    close(np.concatenate(found), reference(hidden))


@pytest.mark.slow
def test_a_branch_of_a_tree_is_a_text_of_its_own(layer, hidden):
    """Guesses after some tokens; then the next tokens, where none of the guesses has been."""
    ours, cache, reference = layer
    before = TOKENS - len(TREE)
    _, cache = ours(hidden[:before], cache, rows_after(0, chain(before)))
    found, cache = ours(hidden[before:], cache, rows_after(before, TREE, kept=(0, 1)))
    seen = lineage(TREE)[1]
    for leaf in (4, 5, 6, 7):
        path = np.flatnonzero(seen[leaf])
        text = np.concatenate([hidden[:before], hidden[before + path]])
        close(found[path], reference(text)[before:])
    text = np.concatenate([hidden[: before + 2], hidden[:3]])
    found, _ = ours(hidden[:3], cache, rows_after(before + 2, chain(3)))
    close(found, reference(text)[before + 2 :])


# A whole model.


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_the_fold_of_its_layers(model_type, tied):
    config = reference_config(model_type, tie_word_embeddings=tied)
    model = randomise(transformers.AutoModelForCausalLM.from_config(config))
    cfg, ids = ours(model_type, config), np.arange(3, 3 + TOKENS)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = published_tensors(cfg)
    assert {n: state[n].shape for n in state if not is_dropped(cfg, n)} == expected
    hidden = state["model.embed_tokens.weight"][ids]
    for number, kind in enumerate(layer_kinds(cfg)):
        weights = {leaf.name: state[layer_tensor_name(cfg, leaf, number)] for leaf in kind.leaves}
        cache = empty_cache(kind.cache, n_rows=POOL, dtype="float32")
        hidden, _ = jax.jit(block(kind))(weights, hidden, cache, rows_after(0, chain(TOKENS)))
    stage = head_stage(cfg)
    last = {leaf.name: state[leaf.published] for leaf in final_leaves(cfg)}
    last["embed_tokens"] = state["model.embed_tokens.weight"]
    (x,) = call(stage.input, {"hidden": hidden}, last).values()
    (logits,) = multiply(stage, x, last).values()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None], use_cache=False).logits[0]
    # A last bit of each embedding moves the reference's own logits by as much as 4e-5: short keys
    # are divided by their length.
    close(logits, expected, 1e-4)


def test_a_layer_in_bfloat16_rounds_where_the_reference_rounds():
    """Not by a digit more or less: the same bits."""
    config = reference_config("qwen3_5_text")
    theirs = randomise(MODELS["qwen3_5_text"][0](config, 0)).to(torch.bfloat16)
    x = torch.randn(1, TOKENS, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        expected = theirs.linear_attn(theirs.input_layernorm(x))[0] + x[0]
    kind = layer_kinds(ours("qwen3_5_text", config))[0]
    state = {k: t.float().numpy().astype("bfloat16") for k, t in theirs.state_dict().items()}
    weights = {leaf.name: state[leaf.published] for leaf in kind.leaves}

    def mixed(weights, hidden, cache, rows):
        flow = {"hidden": hidden, "cache": cache, "rows": rows}
        for stage in kind.stages[:2]:
            if stage.input:
                flow |= call(stage.input, flow, weights)
            flow |= call(stage.finish, flow, weights, multiply(stage, flow.pop("x"), weights))
        return flow["hidden"]

    cache = empty_cache(kind.cache, n_rows=POOL, dtype="bfloat16")
    rounded = x[0].float().numpy().astype("bfloat16")
    # Else XLA leaves out what is rounded and made float32 again.
    exact = jax.jit(mixed, compiler_options={"xla_allow_excess_precision": False})
    found = exact(weights, rounded, cache, rows_after(0, chain(TOKENS)))
    found, expected = np.float32(found), expected.float().numpy()
    assert (found == expected).mean() > 0.99  # all of them, where both have the same library
    close(found, expected, 2**-7)


# config.json.

BARE = {
    "model_type": "qwen3_5_text",
    "vocab_size": 133,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
}
BARE_NEXT = {**BARE, "model_type": "qwen3_next", "num_experts": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GIVEN = {
    "qwen3_5_text": BARE,
    "qwen3_next": BARE_NEXT,
    "interval": {**BARE, "full_attention_interval": 3},
    "types": {**BARE, "layer_types": [FULL] + [LINEAR] * 8, "full_attention_interval": 3},
    "full": {**BARE, "layer_types": [FULL] * 9},
    "mrope": {
        **BARE,
        "head_dim": 128,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "yarn": {**BARE, "rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_scaling": YARN},
    "sizes": {
        **BARE,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 10,
        "linear_conv_kernel_dim": 2,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "sparse-step": {**BARE_NEXT, "num_experts": 8, "decoder_sparse_step": 10},
    "mlp-only": {**BARE_NEXT, "num_experts": 8, "mlp_only_layers": list(range(9))},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_config_is_read_as_transformers_reads_it(name):
    raw = GIVEN[name]
    cfg = model_config(raw, where="config.json")
    config = transformers.CONFIG_MAPPING[raw["model_type"]](**deepcopy(raw))
    kinds = layer_kinds(cfg)
    assert [kind.name for kind in kinds] == config.layer_types
    how = cfg.attention
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (how.n_heads, how.n_kv_heads, how.head_dim) == sizes
    assert how.scale == config.head_dim**-0.5
    assert cfg.norm.eps == config.rms_norm_eps
    assert cfg.max_position_embeddings == config.max_position_embeddings
    assert cfg.tie_word_embeddings == config.tie_word_embeddings
    assert (cfg.qkv_bias, cfg.out_bias) == (config.attention_bias,) * 2
    assert cfg.mlp.activation == config.hidden_act
    rotary = MODELS[raw["model_type"]][1](config)
    found = rope_frequencies(how.rope, how.head_dim)
    np.testing.assert_allclose(found, rotary.inv_freq.numpy(), rtol=5e-7)
    assert how.rope.attention_factor == pytest.approx(rotary.attention_scaling)
    if LINEAR not in config.layer_types:
        assert cfg.delta is None
        return
    delta = cfg.delta
    heads = (config.linear_num_key_heads, config.linear_num_value_heads)
    assert (delta.n_key_heads, delta.n_value_heads) == heads
    dims = (config.linear_key_head_dim, config.linear_value_head_dim)
    assert (delta.key_dim, delta.value_dim) == dims
    assert delta.kernel == config.linear_conv_kernel_dim
    assert delta.activation == config.hidden_act
    assert delta.norm.eps == config.rms_norm_eps
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {n: shapes[n] for n in shapes if not is_dropped(cfg, n)} == published_tensors(cfg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, "num_experts_per_tok is 10, expected at most num_experts 8"),
        ({"num_experts": 8, "mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"layer_types": [LINEAR] * 9}, "supported: at least one"),
        ({"layer_types": [LINEAR] * 8 + ["sliding_attention"]}, "layer_types"),
        ({"layer_types": [FULL] * 8}, "has 8 entries"),
        ({"linear_num_value_heads": 24}, "not a multiple of linear_num_key_heads 16"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1, supported: 2 and more"),
        ({"linear_key_head_dim": 1 << 20}, "linear_key_head_dim is 1048576"),
    ],
)
def test_it_is_refused_by_name(changes, words):
    raw = {key: value for key, value in (BARE_NEXT | changes).items() if value is not LEFT_OUT}
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        model_config(raw, where="config.json")
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_is_streamed_and_what_is_not(model_type):
    """Taps of the convolution are published with three axes: no matrix, and hashed by channel."""
    cfg = ours(model_type, reference_config(model_type))
    kind = layer_kinds(cfg)[0]
    kept = {leaf.name: leaf.shape(cfg) for leaf in kind.leaves if leaf.role is Role.NORM}
    taps = (62, 1, cfg.delta.kernel)
    norms = {"input_layernorm": (24,), "post_attention_layernorm": (24,), "norm": (7,)}
    assert kept == {**norms, "conv1d": taps, "dt_bias": (6,), "A_log": (6,)}
    for leaf in kind.leaves:
        assert is_matrix(leaf.published, leaf.shape(cfg)) == (leaf.role is Role.MATRIX)
    assert is_dropped(cfg, "mtp.layers.0.self_attn.q_proj.weight")
    assert not is_dropped(cfg, "model.layers.0.linear_attn.A_log")
