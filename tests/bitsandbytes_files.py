"""Folders as Transformers saves what bitsandbytes has quantized, written here with random codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jlayer.encodings.tables import NF4
from tests.convert.checkpoints import (
    Tensor,
    edit_json,
    edit_tensors,
    random_checkpoint,
    tensor_of,
)

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
EIGHT_BITS = {**FOUR_BITS, "load_in_4bit": False, "load_in_8bit": True}


def four_bits(
    shape: tuple[int, int], rng: np.random.Generator, *, nested: bool, size: int = 64
) -> dict[str, Tensor]:
    """What is saved of one matrix, by the ends of names."""
    n_blocks = shape[0] * shape[1] // size
    said = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    numbers = {".quant_map": np.array(NF4, np.float32)}
    absmax = ("F32", (n_blocks,), rng.uniform(0.01, 0.1, n_blocks).astype(np.float32).tobytes())
    if nested:
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        absmax = ("U8", (n_blocks,), rng.bytes(n_blocks))
        numbers[".nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
        scales = rng.uniform(0.01, 0.05, -(-n_blocks // 256))
        numbers[".nested_absmax"] = scales.astype(np.float32)
    raw = json.dumps(said).encode()
    return {
        "": ("U8", (shape[0] * shape[1] // 2, 1), rng.bytes(shape[0] * shape[1] // 2)),
        ".absmax": absmax,
        **{end: tensor_of(array) for end, array in numbers.items()},
        ".quant_state.bitsandbytes__nf4": ("U8", (len(raw),), raw),
    }


def eight_bits(shape: tuple[int, int], rng: np.random.Generator) -> dict[str, Tensor]:
    """The same of 8 bits, by the ends of the names of modules."""
    return {
        ".weight": ("I8", shape, rng.bytes(shape[0] * shape[1])),
        ".SCB": tensor_of(rng.uniform(0.01, 0.1, shape[0]).astype(np.float32)),
        ".weight_format": ("U8", (), b"\0"),
    }


def save(folder: Path, *, nested: bool = True, is_8bit: bool = False, **config) -> Path:
    """A random Llama of which the matrices of the layers are quantized."""
    random_checkpoint(folder, n_shards=1, **{**SIZES, **config})
    rng = np.random.default_rng(1)

    def quantized(tensors):
        for name, (_, shape, _) in list(tensors.items()):
            if ".layers." in name and len(shape) == 2:
                del tensors[name]
                if is_8bit:
                    module, parts = name.removesuffix(".weight"), eight_bits(shape, rng)
                    tensors |= {module + end: tensor for end, tensor in parts.items()}
                else:
                    parts = four_bits(shape, rng, nested=nested)
                    tensors |= {name + end: tensor for end, tensor in parts.items()}

    (shard,) = folder.glob("*.safetensors")
    edit_tensors(shard, quantized)
    shard.rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()  # no tokenizer, but a name
    said = EIGHT_BITS if is_8bit else {**FOUR_BITS, "bnb_4bit_use_double_quant": nested}
    edit_json(folder / "config.json", quantization_config=said)
    return folder


def edit_state(tensors: dict[str, Tensor], matrix: str, **changes) -> None:
    """Changes what the text of a matrix says; None takes a key away."""
    name = f"{matrix}.quant_state.bitsandbytes__nf4"
    said = json.loads(tensors[name][2]) | changes
    raw = json.dumps({key: value for key, value in said.items() if value is not None}).encode()
    tensors[name] = ("U8", (len(raw),), raw)
