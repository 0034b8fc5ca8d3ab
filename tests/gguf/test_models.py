"""GGUF files of tiny models give Transformers' logits with the weights that the files hold."""

import numpy as np
import pytest

from jlayer import AutoModel
from tests.gguf.forms import FORMS, logits_with, save
from tests.gguf_files import write

pytestmark = pytest.mark.reference
IDS = [3, 77, 0, 130, 5, 21, 21, 90, 64, 12, 118]


def rope_factors(config):
    """The divisors of Llama 3.1's frequencies, as llama.cpp's converter writes them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return (plain / scaled).numpy()


def scaling(writer, config):
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def agree(folder, path, decoded, *, tolerance=1e-5):
    expected = logits_with(folder, decoded, IDS)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        found = model.logits([IDS])[0]
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", FORMS)
def test_a_file_gives_the_logits_of_transformers(name, tmp_path):
    folder = save(name, tmp_path / "model")
    freqs = None
    if "llama3" in name:
        from transformers import AutoConfig

        freqs = rope_factors(AutoConfig.from_pretrained(folder))
    decoded = write(folder, tmp_path / "m.gguf", settings=scaling, freqs=freqs)
    agree(folder, tmp_path / "m.gguf", decoded)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_numbers_of_16_bits(kind, tmp_path):
    folder = save("qwen3", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind=kind)
    agree(folder, tmp_path / "m.gguf", decoded)


def test_a_split_file(tmp_path):
    folder = save("llama", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", split_max_tensors=10)
    agree(folder, tmp_path / "m-00001-of-00003.gguf", decoded)
