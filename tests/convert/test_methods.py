"""What other programs have made of a model is named, in place and by the converter, with what to
do: formats by their files, quantized weights by the config, by a file, or by the tensors alone."""

import json
import shutil

import numpy as np
import pytest

import jlayer
from jlayer.app.cli import main
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.encodings.published import OF_ALL_FAMILIES
from jlayer.errors import CheckpointError
from tests.convert.checkpoints import edit_json, edit_tensors

SINGLE = "model.safetensors"
TAKE = "take the model's"


def refusals(folder, target):
    """The one line of each way to open it."""
    found = []
    for open_it in (Store, lambda source: convert_checkpoint(source, target)):
        with pytest.raises(CheckpointError) as caught:
            open_it(folder)
        found.append(str(caught.value))
        assert "\n" not in found[-1]
        assert len(found[-1]) < 600
        assert not target.exists()
    return found


def assert_refused(folder, target, *words):
    for message in refusals(folder, target):
        assert str(folder) in message
        for word in words:
            assert word in message, message


# Formats


FILES = {
    "mmproj-model-f16.gguf": "GGUF",
    "ggml-model-q4_0.bin": "GGML",
    "adapter_model.safetensors": "adapter",
    "adapter_config.json": "adapter",
    "weights.npz": "MLX",
    "weights.00.npz": "MLX",
    "mlc-chat-config.json": "MLC",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "model.onnx": "ONNX",
    "openvino_model.xml": "OpenVINO",
    "rust_model.ot": "Rust",
    "llama.nemo": "NeMo",
    "qmodel.pt": "hqq",
    "model.llamafile": "llamafile",
}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_another_format(copy_of, tmp_path, name):
    source = copy_of("single")
    (source / SINGLE).unlink()
    (source / name).write_bytes(b"{}")
    assert_refused(source, tmp_path / "target", FILES[name], name, "take the ")


def test_a_file_of_another_format_beside_the_weights_is_no_matter(copy_of, tmp_path):
    source = copy_of("single")
    for name in FILES:
        (source / name).write_bytes(b"{}")
    Store(source)
    assert convert_checkpoint(source, tmp_path / "target").status == "converted"


ADAPTER = "adapter_config.json"


@pytest.mark.parametrize("form", ["published", "layered"])
def test_an_adapter_beside_the_weights_is_told_and_not_applied(copy_of, tmp_path, capsys, form):
    """It was passed over in silence; transformers applies it where peft is installed."""
    folder = copy_of("single")
    if form == "layered":
        convert_checkpoint(folder, tmp_path / "layered")
        folder = tmp_path / "layered"
    (folder / ADAPTER).write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with jlayer.AutoModel.from_pretrained(folder, device="cpu") as model:
        (note,) = model.notes
    assert note.startswith(f"{folder / ADAPTER}: an adapter (LoRA) beside the weights, which")
    if form == "published":
        done = convert_checkpoint(folder, tmp_path / "target")
        assert note in done.notes
        assert main(["convert", str(folder), str(tmp_path / "other")]) == 0
        assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "base"),
    [
        ('{"base_model_name_or_path": "meta-llama/Llama-3-8B"}', "'meta-llama/Llama-3-8B'"),
        ('{"base_model_name_or_path": "a\\nb"}', r"'a\nb'"),
        ('{"base_model_name_or_path": 7}', ""),
        ("no JSON", ""),
    ],
)
def test_a_folder_of_an_adapter_alone_names_its_base(tmp_path, capsys, content, base):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / ADAPTER).write_text(content)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    named = f", base_model_name_or_path {base}" if base else ""
    said = f"an adapter (LoRA) without the model that it is for ({ADAPTER}{named})"
    assert_refused(folder, tmp_path / "target", said, "give it beside its base model")
    for words in (["plan"], ["generate", "-p", "x", "--device", "cpu"]):
        assert main([*words, str(folder)]) == 3
        assert said in capsys.readouterr().err


STARTS = {
    "model.gguf": (b"GGUF\3\0\0\0", "cut off", "fetch it again"),
    "no-ending": (b"GGUF\3\0\0\0", "a GGUF model", "ends in .gguf"),
    "ggml-model.bin": (b"tjgg\3\0\0\0", "a GGML model", TAKE),
    "model.onnx": (b"\x08\x08\x12\x07pytorch", "an ONNX model", TAKE),
    "pytorch_model.bin": (b"PK\x03\x04" + bytes(20), "a pickle of torch", "the folder"),
    "config.json": (b'{"model_type": "llama"}', "a JSON file", "the folder"),
    "model.safetensors": (b"\x80\0\0\0\0\0\0\0{}", "a safetensors file", "the folder"),
    "model.tar.gz": (b"\x1f\x8b\x08", "archive", "unpack"),
    "readme": (b"hello", "no such folder", "a checkpoint"),
    "nothing": (b"", "no such folder", "a checkpoint"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_file_in_the_place_of_a_folder(tmp_path, name):
    start, *words = STARTS[name]
    (tmp_path / name).write_bytes(start)
    assert_refused(tmp_path / name, tmp_path / "target", *words)


@pytest.mark.parametrize("verb", ["generate", "convert", "plan", "bench", "verify"])
def test_every_verb_opens_a_gguf_file(tmp_path, capsys, verb):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    rest = {"generate": ["--prompt-ids", "1"], "convert": [str(tmp_path / "target")]}.get(verb, [])
    assert main([verb, str(tmp_path / "model.gguf"), *rest]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "general.architecture is missing" in line


def test_a_plan_of_a_config_under_any_name(copy_of, capsys):
    source = copy_of("single")
    (source / "config.json").rename(source / "config.txt")
    assert main(["plan", str(source / "config.txt"), "--device", "cpu"]) == 0


# Methods, by the config


CONFIGS = {
    "gptq without a name": {"quantization_config": {"bits": 4, "desc_act": True}},
    "awq without a name": {"quantization_config": {"zero_point": True, "w_bit": 4}},
    "bitsandbytes without a name": {"quantization_config": {"load_in_8bit": False}},
    "compressed-tensors in its older place": {
        "compression_config": {"quant_method": "compressed-tensors", "config_groups": {}}
    },
    "fp8 without a name": {"quantization_config": {"activation_scheme": "static"}},
    "fbgemm_fp8": {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    "MLX": {"quantization": {"bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
    "MLX with a mode": {"quantization_config": {"mode": "affine", "group_size": 64, "bits": 4}},
    **{
        method: {"quantization_config": {"quant_method": method}}
        for method in ("aqlm", "bitnet", "exl2", "higgs", "mxfp4", "quanto")
    },
    **{
        method: {"quantization_config": {"quant_method": method}}
        for method in ("quark", "spqr", "torchao", "vptq", "intel/inc")
    },
}


@pytest.mark.parametrize("label", CONFIGS)
def test_a_method_that_the_config_names(copy_of, tmp_path, label):
    source = copy_of("single")
    edit_json(source / "config.json", **CONFIGS[label])
    (field,) = [key for key in CONFIGS[label] if key.endswith("_config")]
    words = (f"quantized by {label.split()[0]} ", TAKE, f"remove {field} from config.json")
    assert_refused(source, tmp_path / "target", "config.json", *words)
    # The advice for weights that are not quantized at all can be followed.
    edit_json(source / "config.json", **dict.fromkeys(CONFIGS[label]))
    Store(source)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_method_that_a_file_names(copy_of, tmp_path, name):
    source = copy_of("single")
    (source / name).write_text("{}")
    method = {"quantize_config.json": "gptq", "quant_config.json": "awq"}[name]
    assert_refused(source, tmp_path / "target", name, f"quantized by {method} ", TAKE)


# Methods, by the tensors alone: what each writes for one matrix of 24 columns and 60 rows.


def zeros(dtype, *shape):
    width = {"I32": 4, "U32": 4, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}.get(dtype, 1)
    return dtype, shape, bytes(width * int(np.prod(shape)))


WRITTEN = {
    "gptq": {
        ".qweight": zeros("I32", 3, 60),
        ".qzeros": zeros("I32", 1, 8),
        ".scales": zeros("F16", 1, 60),
        ".g_idx": zeros("I32", 24),
    },
    "gptq or awq": {
        ".qweight": zeros("I32", 24, 8),
        ".qzeros": zeros("I32", 1, 8),
        ".scales": zeros("F16", 1, 60),
    },
    "bitsandbytes": {
        ".weight": zeros("U8", 720, 1),
        ".weight.absmax": zeros("F32", 23),
        ".weight.quant_map": zeros("F32", 16),
        ".weight.quant_state.bitsandbytes__nf4": zeros("U8", 80),
    },
    "bitsandbytes 8 bits": {".weight": zeros("I8", 60, 24), ".SCB": zeros("F32", 60)},
    "compressed-tensors": {
        ".weight_packed": zeros("I32", 60, 3),
        ".weight_scale": zeros("BF16", 60, 1),
        ".weight_shape": zeros("I64", 2),
    },
    "fp8": {".weight": zeros("F8_E4M3", 60, 24), ".weight_scale": zeros("BF16", 60, 1)},
    "fp8 in blocks": {".weight": zeros("F8_E4M3", 60, 24), ".weight_scale_inv": zeros("F32", 1, 1)},
    "MLX": {
        ".weight": zeros("U32", 60, 3),
        ".scales": zeros("BF16", 60, 1),
        ".biases": zeros("BF16", 60, 1),
    },
    "MLX mxfp4": {".weight": zeros("U32", 60, 3), ".scales": zeros("U8", 60, 1)},
    "aqlm": {".codes": zeros("I8", 60, 3, 1), ".codebooks": zeros("F16", 1, 256, 1, 8)},
    "exl2": {".q_weight": zeros("I32", 3, 60), ".q_scale": zeros("I32", 1, 8)},
    "hqq": {".W_q": zeros("U8", 30, 24), ".scale": zeros("F16", 60, 1)},
    "int8": {".weight": zeros("I8", 60, 24), ".weight_scale": zeros("F32", 60, 1)},
}


@pytest.mark.parametrize("label", WRITTEN)
def test_a_method_that_the_tensors_alone_show(copy_of, tmp_path, label):
    source = copy_of("single")

    def quantize(tensors):
        for layer in range(3):
            module = f"model.layers.{layer}.self_attn.q_proj"
            del tensors[f"{module}.weight"]
            tensors.update({module + end: tensor for end, tensor in WRITTEN[label].items()})

    edit_tensors(source / SINGLE, quantize)
    method = label if label == "gptq or awq" else label.split()[0]
    # Of a method that is read it is the config that is wrong.
    advice = TAKE if method not in OF_ALL_FAMILIES else "put back the config.json"
    words = (f"quantized by {method}", "model.layers.0.self_attn.q_proj", advice)
    assert_refused(source, tmp_path / "target", *words)


def test_a_folder_that_was_quantized_here_and_lost_its_manifest(copy_of, tmp_path):
    convert_checkpoint(copy_of("single"), tmp_path / "layered", quantize="int8")
    source = tmp_path / "moved"
    shutil.copytree(tmp_path / "layered", source)
    (source / "manifest.json").unlink()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantized by jlayer "):
        convert_checkpoint(source, tmp_path / "target")
