"""What is done to a published folder to damage it: to its quantization_config, its tensors and
their header, single scales, zeros and texts, and the bytes of its file."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.convert.checkpoints import join, split

SECTION = "quantization_config"
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 32, 48, 64, 127, 128, 4.0, 1.5, -0.5, 1e300),
    *(10**12, -(10**12), 1 << 64, 10**40, "", "x", "4", "fp8", "int8", "gptq", "group", "channel"),
    *([], {}, [0], [128, 128], [128], [[]], ["re:("], ["re:.*"], ["lm_head"], ["model.layers.0"]),
    *({"a": 1}, {"": {}}, {"weights": {}}, {"weights": None}, [None], ["a"] * 50),
)
_ENDS = (
    *("weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_global_scale", "SCB"),
    *("weight_scale_2", "qweight", "qzeros", "scales", "g_idx", "W_q", "scale", "zero", "bias"),
    *(
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "weight_scales",
        "input_scale",
        "weight.q",
    ),
    *("weight.scale", "weight.absmax", "weight.quant_map", "weight_format", "weight.zero", "shape"),
    *(
        "weight.q",
        "weight.nested_absmax",
        "weight.quant_state.bitsandbytes__fp4",
        "weight_activation_scale",
    ),
)
_ITEM = {  # bytes
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64"), 8),
    "F4": 0.5,
}
_FLOATS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_NUMBERS = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, -1e-3, 1e-40, -1e-42, 6e-8),
    *(1e-9, 2e-3, 448.0, 65504.0, 3.3e38, -3.3e38),
)
_BYTES = (0, 1, 127, 128, 254, 255)
_INTS = (0, -1, 1, 2, 4, 7, 127, 0x77777777, -0x80000000, 0x7FFFFFFF)


# Functions of (its config, its tensors, a source of chance, what configs of all kinds say).


def _paths(value, lead=()) -> Iterator[tuple]:
    """The ways to every member of nested objects."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*lead, key)
        yield from _paths(inner, (*lead, key))


def change_config(config, tensors, rng, others):
    said = config[SECTION]
    *lead, last = rng.choice(list(_paths(said)))
    for key in lead:
        said = said[key]
    what = rng.random()
    if what < 0.2:
        del said[last]
    elif what < 0.3:
        said[last] = {last: said[last]}
    elif what < 0.4:
        said[last] = [said[last]]
    elif what < 0.5:
        said[rng.choice(("bits", "group_size", "sym", "format", "a\nb", "desc_act"))] = said[last]
    elif what < 0.6 and type(said[last]) is int:
        said[last] *= rng.choice((2, -1, 3, 1 << 40))
    else:
        said[last] = copy.deepcopy(rng.choice(_VALUES))


def replace_config(config, tensors, rng, others):
    config[SECTION] = copy.deepcopy(rng.choice((*others, *others, *_VALUES)))
    if rng.random() < 0.1:
        del config[SECTION]


def rename_method(config, tensors, rng, others):
    methods = [said["quant_method"] for said in others]
    config[SECTION]["quant_method"] = rng.choice((*methods, *_VALUES))


def _some(tensors, rng) -> str:
    """A tensor of a quantized matrix, mostly; the smaller ones as often as codes."""
    of_layers = [name for name in tensors if "proj" in name]
    return rng.choice(of_layers if rng.random() < 0.95 else list(tensors))


def drop_tensor(config, tensors, rng, others):
    del tensors[_some(tensors, rng)]


def rename_tensor(config, tensors, rng, others):
    name = _some(tensors, rng)
    tensors[_elsewhere(name, rng)] = tensors.pop(name)


def add_tensor(config, tensors, rng, others):
    name = _some(tensors, rng)
    word, shape, data = tensors[name]
    what = rng.random()
    if what < 0.3:
        word, shape, data = "F32", (1,), bytes(4)
    elif what < 0.5:
        word, shape, data = "I64", (2,), bytes(16)
    tensors.setdefault(_elsewhere(name, rng), (word, shape, data))


def _elsewhere(name, rng):
    module = name[: name.index("proj") + 4] if "proj" in name else name.rpartition(".")[0]
    if rng.random() < 0.15:
        module = module.replace("q_proj", "k_proj").replace("layers.0", "layers.1")
    return f"{module}.{rng.choice(_ENDS)}"


def change_dtype(config, tensors, rng, others):
    """Of the same bytes, in as many numbers or in others."""
    name = _some(tensors, rng)
    word, shape, data = tensors[name]
    other = rng.choice([each for each in _ITEM if each != word])
    if _ITEM[other] != _ITEM[word]:
        if not shape or len(data) % max(1, int(_ITEM[other])):
            return
        n = int(shape[-1] * _ITEM[word] / _ITEM[other])
        shape = (*shape[:-1], n)
        data = data[: int(np.prod(shape) * _ITEM[other])]
    tensors[name] = (other, shape, data)


def recast(config, tensors, rng, others):
    """The same numbers in another dtype of floats."""
    name = _some(tensors, rng)
    word, shape, data = tensors[name]
    if word in _FLOATS:
        other = rng.choice(list(_FLOATS))
        with np.errstate(all="ignore"):
            found = np.frombuffer(data, _FLOATS[word]).astype(_FLOATS[other])
        tensors[name] = (other, shape, found.tobytes())


def change_shape(config, tensors, rng, others):
    name = _some(tensors, rng)
    word, shape, data = tensors[name]
    what = rng.randrange(6)
    if what == 0:
        shape = shape[::-1]
    elif what == 1:
        shape = (*shape, 1)
    elif what == 2:
        shape = (1, *shape)
    elif what == 3:
        shape = (int(np.prod(shape)),)
    elif shape:
        at = rng.randrange(len(shape))
        n = max(0, rng.choice((0, 1, shape[at] - 1, shape[at] // 2, 2 * shape[at], shape[at] + 1)))
        shape = (*shape[:at], n, *shape[at + 1 :])
        n_bytes = int(np.prod(shape) * _ITEM[word])
        data = (data * (n_bytes // max(1, len(data)) + 1))[:n_bytes]
    tensors[name] = (word, shape, data)


def change_numbers(config, tensors, rng, others):
    """Single scales, zeros, places, or the bytes of a text."""
    name = _some(tensors, rng)
    word, shape, data = tensors[name]
    if word == "U8" and "quant_state" in name and rng.random() < 0.7:
        tensors[name] = _changed_text(data, rng)
        return
    raw, size = bytearray(data), max(1, int(_ITEM[word]))
    for _ in range(rng.choice((1, 1, 3))):
        n = len(raw) // size
        if not n:
            return
        at = rng.randrange(n) * size
        with np.errstate(all="ignore"):
            new = (
                np.array(rng.choice(_NUMBERS)).astype(_FLOATS[word]).tobytes()
                if word in _FLOATS
                else struct.pack("<i", rng.choice(_INTS))
                if word == "I32"
                else bytes([rng.choice(_BYTES)])
            )
        raw[at : at + len(new)] = new
    tensors[name] = (word, shape, bytes(raw))


def _changed_text(data, rng):
    try:
        said = json.loads(data)
    except ValueError:  # it was changed before
        return "U8", (len(data),), data[::-1]
    key = rng.choice(list(said))
    if rng.random() < 0.2:
        del said[key]
    else:
        said[key] = rng.choice((*_VALUES, float("nan"), float("inf")))
    raw = json.dumps(said).encode()
    return "U8", (len(raw),), raw


def all_of_a_kind(config, tensors, rng, others):
    """The same number in all tensors with this end."""
    name = _some(tensors, rng)
    word, end = tensors[name][0], name.rpartition(".")[2]
    if word not in _FLOATS:
        return
    number = rng.choice(_NUMBERS)
    for other, (dtype, shape, data) in tensors.items():
        if other.endswith(end) and dtype == word and "proj" in other:
            with np.errstate(all="ignore"):
                filled = np.full(len(data) // int(_ITEM[word]), number).astype(_FLOATS[word])
            tensors[other] = (word, shape, filled.tobytes())


DAMAGES = (
    *(change_config,) * 4,
    *(replace_config, rename_method, drop_tensor, rename_tensor, add_tensor, add_tensor),
    *(change_dtype, change_dtype, recast, recast, change_shape, change_shape, all_of_a_kind),
    *(change_numbers,) * 4,
)


def damage_file(path: Path, rng: random.Random) -> None:
    """Of a header that lies, or bytes that are not there."""
    what = rng.randrange(6)
    raw = path.read_bytes()
    if what == 0:
        path.write_bytes(raw[: rng.randrange(len(raw))])
        return
    if what == 1:
        path.write_bytes(raw + bytes(rng.randrange(1, 100)))
        return
    if what == 2:
        path.write_bytes(struct.pack("<Q", rng.choice((0, 1, 1 << 40, len(raw)))) + raw[8:])
        return
    header, data = split(path)
    entry = header[rng.choice([name for name in header if "proj" in name])]
    if what == 3:
        at = rng.randrange(2)
        entry["data_offsets"][at] += rng.choice((-8, -1, 1, 4, 1 << 40, -(1 << 40)))
    elif what == 4:
        entry["shape"] = rng.choice(([], [-1], [1 << 40, 1 << 40], [0], "x", None, [1.5], [True]))
    else:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(_VALUES)
    join(path, header, data)
