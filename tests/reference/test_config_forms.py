"""Published forms of config.json, each with tiny random weights: the logits that Transformers
gives, or a refusal with words that help."""

import json
import warnings

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.config import model_config
from jlayer.errors import UnsupportedModelError
from jlayer.families.registry import published_tensors
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.convert.checkpoints import tensor_of, write_tensors
from tests.reference.config_forms import REFUSED, RUN
from tests.sources import assert_fifty_are_published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.reference.facts import differences  # noqa: E402

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(0, 133, (1, 40))
SIZES = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 10,
    "pad_token_id": 2,
    "bos_token_id": 1,
}
# Positions are few here: what is published for thousands of tokens must show within 40.
CONTEXT = {"original_max_position_embeddings": 32}


def shrunk(config):
    """The config with the keys that it has, at sizes at which it can be run."""
    small = {**config, **{key: SIZES[key] for key in SIZES if config.get(key) is not None}}
    if config.get("num_experts"):
        small |= {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 14}
    if config.get("pad_token_id") == -1:
        small["pad_token_id"] = -1
    if config.get("num_key_value_heads"):
        same = config["num_key_value_heads"] == config["num_attention_heads"]
        small["num_key_value_heads"] = 6 if same else 2
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key):
            held = {name: CONTEXT[name] for name in CONTEXT if name in config[key]}
            small[key] = {**config[key], **held}
    if config.get("model_type", "llama") != "llama" and config.get("sliding_window"):
        small["sliding_window"] = 8  # a llama has none, and runs no further than one that is named
    return small


def save(folder, config):
    """Random float32 weights of the model that the config describes, whose norms are not 1."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in published_tensors(model_config(config, where="here")).items():
        mean = 1.0 if "norm" in name else 0.0
        tensors[name] = tensor_of(rng.normal(mean, 0.2, shape).astype(np.float32))
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def logits_here():
    """A folder of the weights above -> our logits; run once for each different ModelConfig, which
    is all that a run knows of a config."""
    found = {}

    def logits(folder):
        cfg = Store(folder).cfg
        if cfg not in found:
            with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
                found[cfg] = model.logits(IDS)
        return found[cfg]

    return logits


def logits_there(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_fifty_are_published_and_each_says_where():
    assert_fifty_are_published([form.source for form in (*RUN.values(), *REFUSED.values())])


@pytest.mark.slow  # some thirty models to compile, for a second each
@pytest.mark.parametrize("name", RUN)
def test_it_runs_as_in_transformers(tmp_path, logits_here, name):
    save(tmp_path, shrunk(RUN[name].config))
    expected = logits_there(tmp_path)
    found = logits_here(tmp_path)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path, name):
    form = REFUSED[name]
    config = shrunk(form.config)
    with pytest.raises(UnsupportedModelError) as caught:
        model_config(config, where="config.json")
    message = str(caught.value)
    assert form.refused in message
    assert "config.json" in message
    assert "supported" in message
    save(tmp_path, shrunk(RUN["llama-3.2" if config["tie_word_embeddings"] else "llama-2"].config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_refused_there(tmp_path, config) is form.refused_there


def is_refused_there(folder, config):
    """Whether Transformers refuses the config, or weights of a llama under it; of another family,
    whose weights these are not, the config alone is asked for."""
    try:
        if config.get("model_type", "llama") == "llama":
            logits_there(folder)
        else:
            transformers.AutoConfig.from_pretrained(folder)
    except (ImportError, KeyError, ValueError, RuntimeError, TypeError, OSError):
        return True
    return False


@needs_shared_data
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED_DATA.glob("configs/*.json")))
def test_a_real_file_is_read_as_transformers_reads_it_or_refused_by_name(tmp_path, name):
    raw = json.loads((SHARED_DATA / "configs" / name).read_text())
    if ".partial" in name:
        with pytest.raises(UnsupportedModelError, match="model_type is missing"):
            model_config(raw, where=name)
    else:
        assert differences(raw, tmp_path) == []
