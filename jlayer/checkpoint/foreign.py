"""What a folder or a file holds instead of weights that can be read here: its name, and what to do.

Known by the names of files and tensors and by first bytes alone. Says no more than they show.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping

from jlayer.config import quantized_by
from jlayer.encodings.published import OF_ALL_FAMILIES
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.gguf.parts import is_gguf
from jlayer.strict import close, open_regular, read_json_object

_ADAPTER = re.compile(r"adapter_(model\.(safetensors|bin)|config\.json)")
_ADAPTER_CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
_USE = (
    "give it beside its base model (jlayer generate BASE --adapter ADAPTER), or merge it into that "
    "(jlayer convert BASE TARGET --merge ADAPTER)"
)
_TAKE = "take the model's checkpoint of safetensors files"
_ITS_FILE = "take the model's own file, which ends in .gguf"
_ITS_FOLDER = "name the folder that it lies in"
# Files, by pattern of their names -> what they are, and what to do. In this order.
_FILES = (
    (r".+\.gguf", "a GGUF model", _ITS_FILE),
    (r"ggml-.+\.bin|.+\.ggml|ggjt.+", "a GGML model", _TAKE),
    (r"weights(\.\d+)?\.npz", "MLX weights", _TAKE),
    (r"mlc-chat-config\.json|params_shard_\d+\.bin", "an MLC model", _TAKE),
    (r"tf_model.*\.h5", "TensorFlow weights", _TAKE),
    (r"flax_model.*\.msgpack", "Flax weights", _TAKE),
    (r".+\.onnx(_data)?|model\.onnx.*", "an ONNX model", _TAKE),
    (r"openvino_model\.(xml|bin)", "an OpenVINO model", _TAKE),
    (r"rust_model\.ot", "Rust weights", _TAKE),
    (r".+\.nemo", "a NeMo archive", _TAKE),
    (r".+\.(tflite|task|litertlm)", "a LiteRT model", _TAKE),
    (r".+\.llamafile", "a llamafile", _TAKE),
    (r"qmodel\.pt", "a model quantized by hqq", _TAKE),
    (r"rank\d+\.engine", "a TensorRT engine", _TAKE),
)
# Files, by how they begin.
_BEGINNINGS = (
    (b"GGUF", "a GGUF model", _ITS_FILE),
    (b"lmgg", "a GGML model", _TAKE),
    (b"tjgg", "a GGML model", _TAKE),
    (b"fmgg", "a GGML model", _TAKE),
    (b"PK\x03\x04", "an archive (a pickle of torch?)", _ITS_FOLDER),
    (b"\x80", "a pickle", _ITS_FOLDER),
    (b"{", "a JSON file", _ITS_FOLDER),
    (b"\x1f\x8b", "a compressed archive", "unpack it, and name the folder"),
)
# Tensors, by the ends of their names -> who writes such, in this order: the first that is there.
_TENSORS = (
    (".g_idx", "gptq"),
    (".qweight", "gptq or awq"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".biases", "MLX"),
    (".codebooks", "aqlm"),
    (".q_weight", "exl2"),
    (".trellis", "exl3"),
    (".Qidxs", "quip"),
    (".W_q", "hqq"),
    (".qscale_act", "fbgemm"),
    ("_blocks", "mxfp4"),
    (".weight.q", "jlayer"),
)
# Dtypes of matrices, where no name tells.
_DTYPES = (("float8", "fp8"), ("uint32", "MLX"), ("int8", "int8"), ("uint8", "4 bits"))


def refuse_file(path: str, *, but_json: bool = False) -> None:
    """Raises CheckpointError where `path` is a file, not a folder, and says what kind of file;
    `but_json`: unless it may be JSON."""
    if not os.path.isfile(path):
        return
    fd = open_regular(path)
    try:
        start = os.read(fd, 16)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        close(fd)
    if but_json and start.lstrip()[:1] in (b"", b"{"):
        return
    named = _kind_of_file(os.path.basename(path))
    begun = [(what, to_do) for magic, what, to_do in _BEGINNINGS if start.startswith(magic)]
    if start[8:9] == b"{":
        begun.insert(0, ("a safetensors file", _ITS_FOLDER))
    unknown = ("a file, and no such folder", "name the folder of a checkpoint")
    what, to_do = (*begun, *named, unknown)[0]
    if is_gguf(path):  # whoever takes such a file does not ask here
        to_do = "convert it first (jlayer convert)"
    raise CheckpointError(f"{path}: found {what}, expected a folder; {to_do}")


def adapter_notes(folder: str, names: Iterable[str]) -> list[str]:
    """A note where an adapter lies beside the weights of a folder that holds `names`: transformers
    applies it where peft is installed."""
    found = sorted(name for name in names if _ADAPTER.fullmatch(name))
    if not found:
        return []
    return [
        f"{os.path.join(folder, found[0])}: an adapter (LoRA) beside the weights, which is not "
        f"applied; to apply it, {_USE}"
    ]


def refuse_adapter(folder: str, names: Iterable[str]) -> None:
    """Raises UnsupportedModelError where a folder has an adapter, and no config or weights of a
    model that is read here."""
    found = sorted(name for name in names if _ADAPTER.fullmatch(name))
    if found:
        raise UnsupportedModelError(
            f"{folder}: an adapter (LoRA) without the model that it is for ({found[0]}"
            f"{_base_of(folder, found)}), which is not supported; take the model's own folder, and "
            f"{_USE}"
        )


def _base_of(folder, found):
    """What an adapter's config names as its base model, as far as it can be read."""
    if _ADAPTER_CONFIG not in found:
        return ""
    with contextlib.suppress(CheckpointError, StorageError):
        base = read_json_object(os.path.join(folder, _ADAPTER_CONFIG)).get(_BASE)
        if isinstance(base, str) and base:
            return f", {_BASE} {base[:200]!a}"
    return ""


def refuse_other_forms(folder: str, names: Iterable[str]) -> None:
    """Raises UnsupportedModelError where a folder, which lacks every form of weights that is read
    here, has another."""
    names = sorted(names)
    refuse_adapter(folder, names)
    for name in names:
        for what, to_do in _kind_of_file(name):
            raise UnsupportedModelError(
                f"{folder}: {what} ({name}), which is not supported; {to_do}"
            )


def refuse_quantized_tensors(
    folder: str, names: Iterable[str], matrices: Mapping[str, str]
) -> None:
    """Raises UnsupportedModelError where tensors that do not make a model are what a quantizer
    writes. `matrices`: those of two dimensions, with their dtypes."""
    names = sorted(names)
    for end, method in _TENSORS:
        for name in names:
            if name.endswith(end):
                raise UnsupportedModelError(f"{folder}: tensor {name!a}: {_told_of(method)}")
    for start, method in _DTYPES:
        for name, dtype in matrices.items():
            if dtype.startswith(start) and name.endswith(".weight"):
                raise UnsupportedModelError(
                    f"{folder}: tensor {name!a} is {dtype}: {_told_of(method)}"
                )


def _told_of(method):
    """What to tell of tensors of a method; those that are read need a config that says so."""
    if method not in OF_ALL_FAMILIES:
        return quantized_by(method)
    return (
        f"weights quantized by {method}, in another form than config.json says; put back the "
        "config.json that was published with them, with its quantization_config"
    )


def kinds_of(names: Iterable[str]) -> list[str]:
    """What the files with these names are, where they are a model's in another form, or an
    adapter."""
    kinds = [what for name in sorted(names) for what, _ in _kind_of_file(name)]
    return kinds + ["an adapter (LoRA)" for name in names if _ADAPTER.fullmatch(name)]


def _kind_of_file(name):
    return [(what, to_do) for pattern, what, to_do in _FILES if re.fullmatch(pattern, name)]
