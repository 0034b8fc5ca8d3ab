"""benchmarks/make_model.py writes the same weights by layers and as they are published."""

import json
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from tests.conftest import REPOSITORY

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_hold_the_same_weights(tmp_path, tied):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    found = []
    for name, more in (("layered", []), ("published", ["--published"])):
        words = [tmp_path / name, "--shape", config, "--layers", "2", *more]
        script = [sys.executable, "benchmarks/make_model.py"]
        subprocess.run([*script, *map(str, words)], cwd=REPOSITORY, check=True)
        files = (tmp_path / name).glob("*.safetensors")
        arrays = {key: one for path in files for key, one in load_file(path).items()}
        found.append({key: (one.shape, one.tobytes()) for key, one in arrays.items()})
    assert found[0] == found[1]
    assert len(found[0]) == 2 + 9 * 2 + (not tied)
