"""Facts that a config.json may say twice, or in several ways: what counts is what counts in
Transformers, asked here; and where it refuses, we do."""

import itertools
import json
import warnings

import numpy as np
import pytest

from jlayer.config import ITEM_BYTES, model_config, planned_dtype, read_generation_config
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.model.ops import rope_frequencies
from tests.tiny import TINY, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

pytestmark = pytest.mark.reference
REFUSALS = (
    *(TypeError, KeyError, ValueError, ZeroDivisionError, AttributeError),
    StrictDataclassError,
)

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY}
LEFT_OUT = object()  # the key is not there at all
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0]}


def config_of(changes):
    return {key: value for key, value in (BASE | changes).items() if value is not LEFT_OUT}


def reference(raw, folder):
    """The config, and its rotary embedding's frequencies and factor of cos and sin, by
    Transformers; None where it refuses."""
    (folder / "config.json").write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            rotary = LlamaRotaryEmbedding(config)
            return config, rotary.inv_freq.numpy(), rotary.attention_scaling
        except REFUSALS:
            return None


def read(raw):
    """The config as it is read here; a refusal as its message."""
    try:
        return model_config(raw, where="config.json")
    except CheckpointError as error:
        return str(error)


def assert_as_in_the_reference(changes, folder):
    """Both read the same facts, or both refuse. Returns the config that is read here, if any."""
    raw = config_of(changes)
    expected, cfg = reference(raw, folder), read(raw)
    if expected is None:
        assert isinstance(cfg, str), f"{changes}: refused by Transformers alone"
        return None
    assert not isinstance(cfg, str), f"{changes}: refused here alone: {cfg}"
    config, frequencies, factor = expected
    with np.errstate(divide="raise", invalid="raise"):  # numpy would warn the user
        found = rope_frequencies(cfg.attention.rope, cfg.attention.head_dim)
    np.testing.assert_allclose(found, frequencies, rtol=5e-7)  # the last bit of float32
    assert cfg.attention.rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert cfg.attention.n_kv_heads == config.num_key_value_heads
    assert cfg.attention.head_dim == config.head_dim
    assert cfg.norm.eps == config.rms_norm_eps
    assert cfg.tie_word_embeddings == config.tie_word_embeddings
    return cfg


SCALINGS = {
    "none": LEFT_OUT,
    "null": None,
    "empty": {},
    "linear": LINEAR,
    "linear-with-theta": {**LINEAR, "rope_theta": 2e5},
    "rope-type-before-type": {**LINEAR, "rope_type": "default"},
    "llama3": {**LLAMA3, **ORIGINAL},
    "llama3-without-original": LLAMA3,
    "default": {"rope_type": "default"},
    "a-factor-without-a-type": {"factor": 4.0},
    "theta-alone": {"rope_theta": 3e5},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("parameters", SCALINGS)
def test_rope_scaling_beside_rope_parameters(tmp_path, scaling, parameters):
    for theta, original in itertools.product((LEFT_OUT, 7e5), (LEFT_OUT, 32)):
        assert assert_as_in_the_reference(
            {
                "rope_scaling": SCALINGS[scaling],
                "rope_parameters": SCALINGS[parameters],
                "rope_theta": theta,
                "original_max_position_embeddings": original,
            },
            tmp_path,
        )


ROPES = {
    "yarn": {"rope_scaling": {**LINEAR, "type": "yarn", **ORIGINAL}},
    "yarn-without-a-factor": {"rope_scaling": {"type": "yarn", **ORIGINAL}},
    "yarn-of-a-factor-below-one": {"rope_scaling": {"type": "yarn", "factor": 0.5, **ORIGINAL}},
    "yarn-as-deepseek-writes-it": {
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": None}
    },
    "yarn-untruncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn-with-its-own-attention": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn-that-turns-otherwise": {"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2}},
    "longrope": {"rope_scaling": {"type": "longrope", **FACTORS, **ORIGINAL}},
    "longrope-with-a-factor": {"rope_scaling": {"type": "longrope", "factor": 4.0, **FACTORS}},
    "longrope-without-its-factors": {"rope_scaling": {"type": "longrope", "factor": 4.0}},
    "proportional": {"rope_scaling": {"rope_type": "proportional"}},
    "false": {"rope_scaling": False},
    "an-empty-list": {"rope_scaling": []},
    "a-number": {"rope_scaling": 2.0},
    "a-word": {"rope_scaling": "linear"},
    "theta-null": {"rope_theta": None},
    "theta-null-inside": {"rope_theta": 1e5, "rope_scaling": {**LINEAR, "rope_theta": None}},
    "theta-null-outside": {"rope_theta": None, "rope_scaling": {**LINEAR, "rope_theta": 1e5}},
    "theta-in-words": {"rope_theta": "1e4"},
    "theta-an-integer": {"rope_theta": 500000},
    "type-null": {"rope_scaling": {**LINEAR, "rope_type": None}},
    "type-in-capitals": {"rope_scaling": {**LINEAR, "type": "Linear"}},
    "no-factor": {"rope_scaling": {"type": "linear"}},
    "factor-null": {"rope_scaling": {"type": "linear", "factor": None}},
    "factor-in-words": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "factor-an-integer": {"rope_scaling": {"type": "linear", "factor": 2}},
    "factor-below-one": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "llama3-without-low": {"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
    "llama3-low-and-high-alike": {"rope_scaling": {**LLAMA3, **ORIGINAL, "low_freq_factor": 4}},
    "llama3-low-zero": {"rope_scaling": {**LLAMA3, "low_freq_factor": 0}},
    "original-null": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
    "original-a-float": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.0}},
    "original-null-outside": {
        "rope_scaling": {**LLAMA3, **ORIGINAL},
        "original_max_position_embeddings": None,
    },
    "original-from-a-default": {"rope_scaling": LLAMA3, "max_position_embeddings": LEFT_OUT},
    "partial-null": {"partial_rotary_factor": None},
    "partial-null-beside-linear": {"partial_rotary_factor": None, "rope_scaling": LINEAR},
    "partial-null-inside-default": {"rope_scaling": {"partial_rotary_factor": None}},
    "partial-one": {"partial_rotary_factor": 1, "rope_scaling": LINEAR},
    "partial-half-of-default": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(tmp_path, name):
    assert_as_in_the_reference(ROPES[name], tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {**LINEAR, "partial_rotary_factor": None}},
        {"partial_rotary_factor": 0.5, "rope_scaling": LLAMA3},
    ],
)
def test_a_head_that_turns_in_part_with_scaling_is_refused(changes):
    """Transformers fails in its first forward pass."""
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        model_config(config_of(changes), where="config.json")


# Whose config Transformers takes, and we refuse: with words that name the field. (Of layers of
# their own and of shared caches it refuses the model.)
OURS_ALONE = {
    "dynamic": ({"rope_scaling": {**LINEAR, "type": "dynamic"}}, "'dynamic'"),
    "by-layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "kind of layer"),
    "high-below-low": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 5}}, "high_freq_factor"),
    "not-causal": ({"is_causal": False}, "is_causal"),
    "is-causal-null": ({"is_causal": None}, "is_causal"),
    "layers-of-their-own": (
        {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}},
        "per_layer_config",
    ),
    "shared-caches": ({"kv_sharing_modes": ["reuse"] * 3}, "kv_sharing_modes"),
    "an-activation-that-no-family-has": ({"hidden_act": "tanh"}, "hidden_act 'tanh'"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_refused_here_alone_by_name(tmp_path, name):
    changes, words = OURS_ALONE[name]
    assert reference(config_of(changes), tmp_path) is not None
    with pytest.raises(CheckpointError, match=words):
        model_config(config_of(changes), where="config.json")


FIELDS = {
    "swish": {"hidden_act": "swish"},
    "head-dim-null": {"head_dim": None},
    "kv-heads-null": {"num_key_value_heads": None},
    "kv-heads-left-out": {"num_key_value_heads": LEFT_OUT},
    "eps-left-out": {"rms_norm_eps": LEFT_OUT},
    "eps-null": {"rms_norm_eps": None},
    "eps-in-words": {"rms_norm_eps": "1e-5"},
    "context-left-out": {"max_position_embeddings": LEFT_OUT},
    "context-null": {"max_position_embeddings": None},
    "heads-in-words": {"num_attention_heads": "6"},
    "tied-a-number": {"tie_word_embeddings": 1},
    "act-null": {"hidden_act": None},
    "dtype-of-two-names": {"dtype": "float16", "torch_dtype": "bfloat16"},
    "dtype-null": {"dtype": None, "torch_dtype": "bfloat16"},
    "torch-dtype-null": {"torch_dtype": None},
    "half": {"torch_dtype": "half"},
    "architecture-of-older-code": {"architectures": ["LLaMAForCausalLM"]},
    "architecture-in-lower-case": {"architectures": ["llamaforcausallm"]},
    "architecture-of-the-bare-model": {"architectures": ["LlamaModel"]},
    "architecture-of-a-classifier": {"architectures": ["LlamaForSequenceClassification"]},
    "architecture-of-a-trainer": {"architectures": ["FSDPLlamaForCausalLM"]},
    "architecture-of-torch-compile": {"architectures": ["OptimizedModule"]},
    "architecture-nobody-knows": {"architectures": ["FableForCausalLM"]},
    "architecture-as-a-word": {"architectures": "LlamaForCausalLM"},
    "architectures-empty": {"architectures": []},
    "architectures-null": {"architectures": None},
    "architectures-left-out": {"architectures": LEFT_OUT},
    "architectures-two": {"architectures": ["LlamaModel", "LlamaForCausalLM"]},
    "model-type-in-capitals": {"model_type": "LLaMA", "architectures": ["Fable"]},
    "quantization-null": {"quantization_config": None},
    "other-activation-key": {"hidden_activation": "gelu"},
    "causal": {"is_causal": True},
    "layers-that-all-are-alike": {"per_layer_config": {}},
    "unknown-keys": {"n_layer": 7, "head_size": 3, "rotary_emb_base": 5.0},
}


@pytest.mark.parametrize("name", FIELDS)
def test_field(tmp_path, name):
    cfg = assert_as_in_the_reference(FIELDS[name], tmp_path)
    if cfg is not None and cfg.dtype is not None:
        config, *_ = reference(config_of(FIELDS[name]), tmp_path)
        assert f"torch.{cfg.dtype}" == str(config.dtype)


SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("field", SIZES)
def test_a_whole_number_written_as_a_float_is_that_number(tmp_path, field):
    """Transformers of today refuses it; those of before did not, and there is but one meaning."""
    as_float = config_of({field: float(BASE[field])})
    assert model_config(as_float, where="here") == model_config(BASE, where="here")
    assert reference(as_float, tmp_path) is None
    with pytest.raises(CheckpointError, match=field):
        model_config(config_of({field: BASE[field] + 0.5}), where="here")


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "int8", "fp16", "auto"])
def test_a_dtype_of_the_config_that_is_not_ours_matters_to_nobody_who_has_weights(dtype):
    cfg = model_config(config_of({"torch_dtype": dtype}), where="here")
    for known in ITEM_BYTES:
        assert planned_dtype(cfg, known) == known
    with pytest.raises(UnsupportedModelError, match=f"'{dtype}'.*--dtype"):
        planned_dtype(cfg, None)


WINDOWS = {
    "sliding": ({"sliding_window": 8}, 8),
    "chunks": ({"attention_chunk_size": 16}, 16),
    "a-flag-that-llama-does-not-read": ({"sliding_window": 8, "use_sliding_window": False}, 8),
    "layers": ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, 8),
    "one-layer": (
        {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        8,
    ),
    "no-layer": ({"sliding_window": 8, "layer_types": ["full_attention"] * 3}, 512),
    "null": ({"sliding_window": None}, 512),
    "beyond-the-context": ({"sliding_window": 4096}, 512),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_window(tmp_path, name):
    """A llama runs as far as its result in Transformers does not depend on how a prompt was cut."""
    changes, limit = WINDOWS[name]
    cfg = model_config(config_of(changes), where="here")
    assert cfg.max_position_embeddings == limit
    (tmp_path / "config.json").write_text(json.dumps(config_of(changes)))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.initializer_range = 0.5
    model = transformers.LlamaForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cut_changes_at(model, 40) == (None if limit > 40 else limit)


def cut_changes_at(model, n):
    """The first position whose logits differ if each token is given alone; None where none does."""
    ids = torch.arange(n)[None] % 133
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
        cache, steps = None, []
        for token in ids[0]:
            out = model(token.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
    differs = (whole - torch.stack(steps)).abs().amax(-1) > 1e-4 * whole.abs().max()
    return int(differs.nonzero()[0]) if differs.any() else None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "8"}, "sliding_window is '8'"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is missing"),
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_a_window_that_cannot_be_meant_is_refused(changes, word):
    with pytest.raises(CheckpointError, match=word):
        model_config(config_of(changes), where="here")


EOS = {"left-out": {}, "null": {"eos_token_id": None}, "one": {"eos_token_id": 7}}
EOS["several"] = {"eos_token_id": [5, 6]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("weights")) / "model.safetensors"


@pytest.mark.parametrize("in_config", EOS)
@pytest.mark.parametrize("in_generation_config", [None, *EOS])
def test_the_token_that_ends_a_text(tmp_path, weights, in_config, in_generation_config):
    """generation_config.json counts alone where there is one, even if it names none."""
    (tmp_path / "model.safetensors").hardlink_to(weights)
    (tmp_path / "config.json").write_text(json.dumps(BASE | EOS[in_config]))
    if in_generation_config is not None:
        own = json.dumps(EOS[in_generation_config])
        (tmp_path / "generation_config.json").write_text(own)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert read_generation_config(tmp_path).get("eos_token_id") == expected.eos_token_id
