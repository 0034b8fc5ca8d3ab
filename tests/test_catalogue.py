"""What ships by name: every config parses, every preset is made of known options."""

import json

import pytest

from jlayer import catalogue
from jlayer.app.cli import main
from jlayer.config import model_config
from jlayer.errors import UsageError
from jlayer.run_config import RunConfig
from jlayer.strict import parse_json_object
from tests.conftest import REPOSITORY, SHARED_DATA, needs_shared_data


@pytest.mark.parametrize("name", catalogue.names("models"))
def test_known_models_are_plain_llama_configs(name):
    found = model_config(parse_json_object(catalogue.model_json(name), what=name), where=name)
    assert found.model_type == "llama"
    size = {"7b": 4096, "8b": 4096, "70b": 8192, "405b": 16384, "1b": 2048, "3b": 3072}
    assert found.hidden_size == next(v for key, v in size.items() if f"-{key}" in f"-{name}")


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


@needs_shared_data
def test_published_files_are_verbatim():
    for ours, published in (
        ("lzlv-70b", "llama-2-70b-derivative-lzlv"),
        ("reflection-llama-3.1-70b", "llama-3-70b-derivative-reflection"),
    ):
        path = SHARED_DATA / "configs" / f"{published}.json"
        assert catalogue.model_json(ours) == path.read_bytes()


def test_plan_of_a_bare_shape_says_what_it_assumed(tmp_path, capsys):
    raw = json.loads(catalogue.model_json("llama-3.1-405b"))
    for name in ("model_type", "architectures", "rope_scaling", "torch_dtype"):
        del raw[name]
    (tmp_path / "shape.json").write_text(json.dumps(raw))
    assert main(["plan", str(tmp_path / "shape.json"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "model_type is missing; assumed to be llama" in captured.err
    assert json.loads(captured.out)["tiers"]["disk_layers"] > 100
