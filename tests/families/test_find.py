"""What is told of a config whose model is not known: what it may be, and one line."""

import json
import re

import pytest

from jlayer import catalogue
from jlayer.config import model_config
from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.holders import HOLDERS
from jlayer.families.registry import FAMILIES
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.tiny import TINY

LLAMA = {"model_type": "llama", **TINY}
QWEN3 = {
    **LLAMA,
    "attention_bias": False,
    "max_window_layers": 28,
    "sliding_window": None,
    "use_sliding_window": False,
}


def message(**changes):
    with pytest.raises(UnsupportedModelError) as caught:
        model_config({**LLAMA, **changes}, where="config.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_nearest_name_is_offered():
    found = message(model_type="qwen4", vision_towers=2)
    assert "model_type 'qwen4' is not supported; did you mean 'qwen" in found
    assert "did you mean" not in message(model_type="zebra", vision_towers=2)


def test_all_that_is_supported_is_listed_by_type():
    found = message(model_type="zebra", vision_towers=2)
    assert found.endswith(f"supported: {', '.join(sorted({*FAMILIES, *HOLDERS}))}")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_config_with_the_keys_of_a_known_model_says_whose(model_type):
    keys = {"llama": LLAMA, "qwen3": QWEN3}[model_type]
    more = {"architectures": ["FableForCausalLM"], "auto_map": {}, "attention_dropout": 0.0}
    found = message(**keys | {"model_type": "fable"} | more)
    assert "architecture FableForCausalLM (model_type 'fable') is not supported" in found
    assert f"its keys are those of {model_type}: set model_type to that if" in found


def test_a_key_that_nobody_reads_is_no_likeness():
    assert "its keys are" not in message(model_type="fable", memory_tokens=4)
    assert "its keys are" in message(model_type="fable", memory_tokens=None)  # it says nothing


def test_a_value_that_nobody_takes_is_no_likeness():
    assert "its keys are" not in message(model_type="fable", hidden_act="fable")


# Of those that ship by name. (A Gemma has the keys of a llama.)
KNOWN = [name for name in catalogue.names("models") if "gemma" not in name]


@pytest.mark.parametrize("name", KNOWN)
def test_the_known_models_are_found_by_their_keys(name):
    raw = json.loads(catalogue.model_json(name))
    with pytest.raises(UnsupportedModelError) as caught:
        model_config({**raw, "architectures": None, "model_type": "fable"}, where="config.json")
    found = re.search("its keys are those of (.*): set", str(caught.value))[1]
    assert raw["model_type"] in found.split(" or ")


EXPERTS = {
    "deepseek_v4": {"n_routed_experts": 256},
    "dbrx": {},  # by its name alone
    "kimi_k3": {"text_config": {"num_local_experts": 16}},
    "of_their_own": {"num_experts": 4, "expert_depth": 2},
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_of_another_form_are_named(model_type):
    found = message(model_type=model_type, **EXPERTS[model_type])
    assert "it has experts (" in found
    assert "of a form that no family here has" in found
    for key, value in EXPERTS[model_type].items():
        assert isinstance(value, dict) or f"{key} is {value}" in found or key == "expert_depth"


def test_a_model_with_the_keys_of_one_with_experts_says_whose():
    keys = {"head_dim": 16, "num_experts": 16, "moe_intermediate_size": 40, "norm_topk_prob": True}
    found = message(**{**QWEN3, **keys, "model_type": "of_their_own"})
    assert "its keys are those of qwen3_moe: set model_type to that" in found


@pytest.mark.parametrize("name", ["FSDPQwen3MoeForCausalLM", "Qwen3MoEForCausalLM"])
def test_other_names_of_the_architecture_of_a_model_with_experts(name):
    raw = {**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 40, "architectures": [name]}
    assert model_config(raw, where="config.json").experts
    with pytest.raises(UnsupportedModelError, match="remove the wrong one"):
        model_config({**raw, "architectures": ["FSDPQwen3ForCausalLM"]}, where="config.json")


def test_a_number_of_experts_that_is_none_is_nothing():
    assert "experts" not in message(model_type="fable", num_experts=0, num_local_experts=None)


@pytest.mark.parametrize(
    "architecture",
    [
        "MistralForCausalLM",
        "Qwen2MoeForCausalLM",
        "LlamaMoEForCausalLM",
        "FalconForCausalLM",
        "Gemma3ForConditionalGeneration",
    ],
)
def test_the_architecture_of_another_model_is_a_contradiction(architecture):
    found = message(architectures=[architecture])
    assert f"architecture {architecture} is not supported, but model_type is 'llama'" in found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_a_family_is_known_by_its_architecture_alone(family):
    """What is wrong with the config is told then, not that its model is not known."""
    raw = {"architectures": [family.architecture], "num_attention_heads": 0}
    with pytest.raises(CheckpointError) as caught:
        model_config(raw, where="config.json")
    assert "architecture" not in str(caught.value)
    assert "model_type" not in str(caught.value)


@needs_shared_data
@pytest.mark.parametrize("name", ["mixtral-8x7b-v0.1", "qwen3-235b-a22b-thinking-2507"])
def test_real_models_with_experts_are_read(name):
    raw = json.loads((SHARED_DATA / "configs" / f"{name}.json").read_text())
    cfg = model_config(raw, where=name)
    assert cfg.experts.router.n_experts == {"mixtral": 8, "qwen3_moe": 128}[cfg.model_type]
    with pytest.raises(UnsupportedModelError, match=r"it has experts \(.* is [0-9]+\)"):
        model_config({**raw, "architectures": None, "model_type": "fable_moe"}, where=name)
