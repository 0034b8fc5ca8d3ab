"""GGUF files of tiny models give Transformers' logits with the weights that the files hold."""

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint, seal_folder, verify_folder
from jlayer.convert.export import export_checkpoint
from jlayer.errors import UnsupportedModelError
from jlayer.families.registry import published_tensors
from jlayer.gguf.reader import read_head
from tests.campaigns import slow_but
from tests.gguf.forms import FIRST, MODELS, logits_with, save
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
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def agree(folder, path, decoded, *, ids=IDS, tolerance=1e-5):
    expected = logits_with(folder, decoded, ids)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        found = model.logits([ids])[0]
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", slow_but(MODELS, FIRST))
def test_a_file_gives_the_logits_of_transformers(name, tmp_path):
    folder = save(name, tmp_path / "model")
    freqs = None
    if "llama3" in name:
        from transformers import AutoConfig

        freqs = rope_factors(AutoConfig.from_pretrained(folder))
    decoded = write(folder, tmp_path / "m.gguf", settings=scaling, freqs=freqs)
    agree(folder, tmp_path / "m.gguf", decoded)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    ("form", "matrix"), [("deepseek_v3", "attn_kv_b"), ("qwen3_next", "ssm_in")]
)
def test_what_older_files_have_in_one_matrix(form, matrix, kind, tmp_path):
    """Keys and values of a latent, as in files of 2024; all inputs of a gated DeltaNet, as in the
    first files of Qwen3-Next."""
    folder = save(form, tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind=kind, older=True)
    assert f"blk.0.{matrix}.weight" in read_head(tmp_path / "m.gguf").tensors
    agree(folder, tmp_path / "m.gguf", decoded)


def test_a_gated_delta_net_in_blocks(tmp_path):
    folder = save("qwen3_5", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind="Q8_0")
    assert read_head(tmp_path / "m.gguf").tensors["blk.0.ssm_out.weight"].type == "q8_0"
    agree(folder, tmp_path / "m.gguf", decoded)


def test_keys_and_values_in_blocks_of_a_long_text(tmp_path):
    """Which has keys of its own for each head: see `pieces.expands`."""
    folder = save("deepseek_v3, wide", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind="Q8_0")
    tensors = read_head(tmp_path / "m.gguf").tensors
    assert {tensors[f"blk.0.attn_{name}_b.weight"].type for name in "kv"} == {"q8_0"}
    agree(folder, tmp_path / "m.gguf", decoded, ids=[17 * n % 131 for n in range(200)])


def test_experts_one_by_one(tmp_path):
    folder = save("mixtral", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind="Q8_0", experts_apart=True)
    assert "blk.0.ffn_gate.3.weight" in read_head(tmp_path / "m.gguf").tensors
    agree(folder, tmp_path / "m.gguf", decoded)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_numbers_of_16_bits(kind, tmp_path):
    folder = save("qwen3", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind=kind)
    agree(folder, tmp_path / "m.gguf", decoded)


@pytest.mark.parametrize(
    "name", slow_but(["llama, tied, biases", "qwen3_moe", "gemma2"], ("qwen3_moe",))
)
def test_blocks_of_llama_cpps_quantizer(name, tmp_path):
    folder = save(name, tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind="Q8_0")
    agree(folder, tmp_path / "m.gguf", decoded)


# Each matrix of a layer in another encoding, as files mix them.
MIXES = {
    "k": {
        "attn_q": "Q2_K",
        "attn_k": "Q3_K",
        "attn_v": "Q6_K",
        "attn_output": "Q5_K",
        "ffn_gate": "Q4_K",
        "ffn_up": "IQ4_XS",
        "ffn_down": "Q6_K",
        "token_embd": "Q4_K",
        "output.": "Q6_K",
    },
    "32": {
        "attn_q": "Q4_0",
        "attn_k": "Q4_1",
        "attn_v": "Q5_0",
        "attn_output": "Q5_1",
        "ffn_gate": "IQ4_NL",
        "ffn_up": "Q8_0",
        "ffn_down": "F16",
        "output.": "BF16",
    },
}


@pytest.mark.parametrize("mix", MIXES)
def test_random_blocks_of_all_types(mix, tmp_path):
    folder = save("wide", tmp_path / "model")
    path = tmp_path / "m.gguf"
    decoded = write(folder, path, kind="Q4_0", kinds=MIXES[mix], drawn=True)
    agree(folder, path, decoded)


def test_a_converted_file_gives_the_same_numbers(tmp_path):
    folder = save("wide", tmp_path / "model")
    path, target = tmp_path / "m.gguf", tmp_path / "layered"
    decoded = write(folder, path, kinds={**MIXES["k"], "token_embd": "Q8_0"}, drawn=True)
    done = convert_checkpoint(path, target)
    assert done.source_bytes == sum(t.n_bytes for t in read_head(path).tensors.values())
    assert verify_folder(target).findings == ()
    agree(folder, target, decoded)
    own = Store(path)
    layered = Store(target)
    for name in published_tensors(own.cfg):
        assert own.form_of(name) == layered.form_of(name)
    assert seal_folder(target).status == "unchanged"


@pytest.mark.parametrize("name", slow_but(("deepseek_v3, wide", "qwen3_5"), ("qwen3_5",)))
def test_a_converted_file_that_is_not_exported_gives_the_same_numbers(name, tmp_path):
    folder = save(name, tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", kind="Q8_0")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "layered")
    agree(folder, tmp_path / "layered", decoded)
    with pytest.raises(UnsupportedModelError, match="cannot be exported to GGUF; supported: "):
        export_checkpoint(tmp_path / "layered", tmp_path / "back.gguf", format="gguf")


def test_transformers_refuses_a_converted_file(tmp_path):
    """Its rows are in another order: it would give other numbers."""
    from transformers import AutoModelForCausalLM

    write(save("llama", tmp_path / "model"), tmp_path / "m.gguf")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "layered")
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "layered")
    with pytest.raises(UnsupportedModelError, match="converted from a GGUF file"):
        export_checkpoint(tmp_path / "layered", tmp_path / "back", format="huggingface")


def test_a_split_file(tmp_path):
    folder = save("llama", tmp_path / "model")
    decoded = write(folder, tmp_path / "m.gguf", split_max_tensors=10)
    agree(folder, tmp_path / "m-00001-of-00003.gguf", decoded)
