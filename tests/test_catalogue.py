"""What ships by name: every config parses, every preset is made of known options."""

import json
import math

import pytest

from jlayer import catalogue
from jlayer.app.cli import main
from jlayer.config import model_config
from jlayer.errors import UsageError
from jlayer.families.registry import published_tensors
from jlayer.run_config import RunConfig
from jlayer.strict import parse_json_object
from tests.campaigns import slow_but
from tests.conftest import REPOSITORY, SHARED_DATA, needs_shared_data

# Billions of parameters, as their makers publish them; of a multimodal model those of its text.
PARAMETERS = {
    "chinese-llama-3-8b-instruct": 8.03,
    "deepseek-v3": 671.03,
    "gemma-2b": 2.51,
    "gemma-3-27b": 27.01,
    "gemma-3-4b": 3.88,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
    "llama-2-7b-hf": 6.74,
    "llama-3.1-405b": 405.85,
    "llama-3.1-70b-instruct": 70.55,
    "llama-3.1-8b-instruct": 8.03,
    "llama-3.2-1b-instruct": 1.24,
    "llama-3.2-3b-instruct": 3.21,
    "llama-4-maverick-17b-128e-instruct": 400.71,
    "llama-4-scout-17b-16e": 107.77,
    "lzlv-70b": 68.98,
    "mistral-7b-instruct-v0.3": 7.25,
    "mixtral-8x7b-v0.1": 46.70,
    "olmo3-7b": 7.30,
    "phi-4": 14.66,
    "qwen2-1.5b-instruct": 1.54,
    "qwen2.5-32b-instruct": 32.76,
    "qwen2.5-72b-instruct": 72.71,
    "qwen2.5-7b-instruct": 7.62,
    "qwen3-30b-a3b-thinking-2507": 30.53,
    "qwen3-32b": 32.76,
    "qwen3-8b": 8.19,
    "reflection-llama-3.1-70b": 70.55,
}


# Of each family the largest; of Llama the second: a plan of 405 billion parameters takes seconds.
LARGEST = (
    *(
        "gemma-3-27b",
        "gpt-oss-120b",
        "llama-3.1-70b-instruct",
        "mixtral-8x7b-v0.1",
        "olmo3-7b",
        "phi-4",
    ),
    *("qwen2.5-72b-instruct", "qwen3-30b-a3b-thinking-2507", "qwen3-32b"),
)


def config_of(name):
    return model_config(parse_json_object(catalogue.model_json(name), what=name), where=name)


def test_known_models_have_as_many_parameters_as_is_published():
    assert set(PARAMETERS) == set(catalogue.names("models"))
    for name, billions in PARAMETERS.items():
        tensors = published_tensors(config_of(name)).values()
        assert sum(map(math.prod, tensors)) / 1e9 == pytest.approx(billions, abs=0.006), name


@pytest.mark.parametrize("name", slow_but(PARAMETERS, LARGEST))
def test_every_known_model_can_be_planned_and_streams_through_4_gib(name, capsys):
    assert main(["plan", name, "--device-memory", "4GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["device"]["peak_bytes"] <= 4 << 30


@pytest.mark.parametrize("name", catalogue.names("runs"))
def test_presets_are_options_of_a_run(name):
    assert RunConfig.from_options(**catalogue.preset(name)).device_memory > 0


def test_names_are_those_of_the_folder():
    for kind, ending in (("models", "json"), ("runs", "toml")):
        paths = (REPOSITORY / "configs" / kind).glob(f"*.{ending}")
        assert catalogue.names(kind) == tuple(sorted(path.stem for path in paths))


def test_unknown_names_offer_the_closest(capsys):
    with pytest.raises(UsageError, match="did you mean 'gpu-4gb'"):
        catalogue.preset("gpu-4g")
    assert main(["plan", "llama-3.1-80b-instruct"]) == 2
    assert "did you mean 'llama-3.1-8" in capsys.readouterr().err


def test_plan_takes_a_name(capsys):
    assert main(["plan", "llama-3.2-1b-instruct"]) == 0
    assert "fits" in capsys.readouterr().out


# Ours -> the name of the published file, where that is another.
VERBATIM = {
    "chinese-llama-3-8b-instruct": "llama-3-8b-derivative-chinese-instruct",
    "lzlv-70b": "llama-2-70b-derivative-lzlv",
    "reflection-llama-3.1-70b": "llama-3-70b-derivative-reflection",
    **{
        name: name
        for name in PARAMETERS
        if name.startswith(("gemma", "mistral", "olmo", "phi", "qwen"))
        if name != "qwen2.5-72b-instruct"
    },
}


@needs_shared_data
def test_published_files_are_verbatim():
    for ours, published in VERBATIM.items():
        path = SHARED_DATA / "configs" / f"{published}.json"
        assert catalogue.model_json(ours) == path.read_bytes(), ours


@needs_shared_data
def test_every_dense_unquantized_config_is_one_of_these():
    """So each can be planned from its file alone."""
    known, met = [json.loads(catalogue.model_json(name)) for name in PARAMETERS], 0
    for path in sorted(SHARED_DATA.glob("configs/*.json")):
        raw = json.loads(path.read_text())
        dense = not any("experts" in key for key in raw) and "quantization_config" not in raw
        if dense and ".partial" not in path.name:
            assert raw in known, path.name
            met += 1
    assert met >= 19


@needs_shared_data
def test_a_file_is_planned_as_the_model_of_its_name(capsys):
    found = []
    for ref in (SHARED_DATA / "configs" / "gemma-3-4b.json", "gemma-3-4b"):
        assert main(["plan", str(ref), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_plan_of_a_bare_shape_says_what_it_assumed(tmp_path, capsys):
    raw = json.loads(catalogue.model_json("llama-3.1-70b-instruct"))
    for name in ("model_type", "architectures", "rope_scaling", "torch_dtype"):
        del raw[name]
    (tmp_path / "shape.json").write_text(json.dumps(raw))
    assert main(["plan", str(tmp_path / "shape.json"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "model_type is missing; assumed to be llama" in captured.err
    assert json.loads(captured.out)["tiers"]["disk_layers"] > 60
