"""Safetensors files taken apart and put together by hand, to make what no library would write."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from jlayer.checkpoint.layout import MANIFEST, SEAL, encode_header, seal
from jlayer.config import model_config
from jlayer.families.registry import published_tensors
from tests import tiny

# Some of what is carried along by the form of its name.
CARRIED = (
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer.4.0.0.json", "spiece.model"),
    *("preprocessor_config.json", "tekken.json", "vocab.txt", "qwen.tiktoken"),
)
Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors' word for the dtype, shape, data
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def split(path: Path) -> tuple[dict, bytes]:
    """A file's header and its data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict | bytes, data: bytes) -> None:
    """Writes a file from a header, which may be anything, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file: dtype, shape, bytes."""
    found = {}
    header, data = split(path)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(tensors_of(path))
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors one after the other, in the order given."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        span = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        at += len(data)
    join(path, header, b"".join(data for _, _, data in tensors.values()))


def edit_tensors(path: Path, edit) -> None:
    """Takes a file's tensors through `edit`, which changes the dict it is given."""
    tensors = tensors_of(path)
    edit(tensors)
    write_tensors(path, tensors)


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None deletes one."""
    found = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    path.write_text(json.dumps(found))


def numbers(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers, to be changed; `tensor_of` puts them back."""
    dtype, shape, data = tensor
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape).copy()


def tensor_of(array: np.ndarray) -> Tensor:
    word = next(word for word, dtype in NUMPY.items() if array.dtype == np.dtype(dtype))
    return word, array.shape, array.tobytes()


def edit_manifest(folder: Path, change) -> None:
    """Takes the manifest through `change`, and seals it again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[SEAL]
    change(manifest)
    (folder / MANIFEST).write_bytes(seal(manifest))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of the folders in it, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def assert_logits_of_transformers(folder: Path, published: str | Path) -> None:
    """A converted folder gives the logits of Transformers on what it was made from: exactly in
    Transformers itself, to float32's rounding here."""
    import torch
    from transformers import AutoModelForCausalLM

    import jlayer

    reference = AutoModelForCausalLM.from_pretrained(published)
    ids = np.random.default_rng(0).integers(0, reference.config.vocab_size, (1, 30))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits
        again = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits
    assert torch.equal(again, expected)
    with jlayer.AutoModel.from_pretrained(folder, device="cpu") as model:
        found = model.logits(ids)
    scale = np.abs(expected.numpy()).max()
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * scale)


TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **tiny.TINY}
_PIECE = 16 << 20


def random_checkpoint(folder: Path, *, n_shards: int = 3, seed: int = 0, **config) -> Path:
    """A published checkpoint of random bfloat16 weights, in as many shards of whole tensors.

    Needs no torch, and streams: it may be of any size. `config` goes over TINY.
    """
    folder.mkdir(parents=True)
    config = {**TINY, "torch_dtype": "bfloat16", **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    shapes = published_tensors(model_config(config, where="here"))
    names, rng, weight_map = list(shapes), np.random.default_rng(seed), {}
    for n in range(n_shards):
        shard = f"model-{n + 1:05d}-of-{n_shards:05d}.safetensors"
        held = names[n * len(names) // n_shards : (n + 1) * len(names) // n_shards]
        header, entries = encode_header(
            {name: shapes[name] for name in held}, dict.fromkeys(held, "bfloat16")
        )
        with open(folder / shard, "wb") as file:
            file.write(header)
            left = sum(entry.n_bytes for entry in entries.values())
            while left:
                bits = rng.integers(0, 1 << 16, min(left, _PIECE) // 2, dtype=np.uint16)
                left -= file.write((bits & 0xBFFF).tobytes())  # no exponent of infinity or NaN
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
