"""A tiny published folder of every quantized form, of random codes, and what each stands for: by
the formula of the format alone, from the config and the tensors as they lie in the file, so that it
can be asked of a folder that was damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from jlayer.checkpoint.encoded import published_piece
from jlayer.config import model_config
from jlayer.encodings.published import FORMS
from jlayer.encodings.registry import split_piece
from jlayer.encodings.tables import E2M1, NF4
from jlayer.families.registry import published_tensors
from tests import bitsandbytes_files
from tests.convert.checkpoints import Tensor, tensors_of, write_tensors
from tests.encoded import compressed_tensors, random_pieces
from tests.reference import fp8_forms, gpt_oss_forms, repacked_forms

SINGLE, CONFIG = "model.safetensors", "config.json"
WORDS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
_WORD_OF = {np.dtype(dtype): word for word, dtype in WORDS.items()}
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT_OSS = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def _modelopt(algorithm, **weights):
    group = {"weights": {"type": "float", **weights}}
    return {"quant_method": "modelopt", "quant_algo": algorithm, "config_groups": {"g": group}}


_INT = {"type": "int", "strategy": "group"}
_FLOAT = {"type": "float", "num_bits": 4}
# Kind -> (quantization_config, encoding): those that run as they are published, but for those of
# bitsandbytes and of gpt-oss.
IN_PLACE: dict[str, tuple[dict, str]] = {
    "fp8": (fp8_forms.GRID, "fp8_128x128"),
    "fp8 by tensor": (fp8_forms.FORMS["tensor"][0], "fp8_tensor_bfloat16"),
    "float by channel": (fp8_forms.compressed("channel"), "fp8_row_bfloat16"),
    "float by block": (fp8_forms.FORMS["compressed by block"][0], "fp8_128x128"),
    "int": (
        compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
        "int8_row_bfloat16",
    ),
    "symmetric": (
        compressed_tensors("pack-quantized", num_bits=4, group_size=32, **_INT),
        "packed4_g32_bfloat16",
    ),
    "symmetric of 8 bits": (
        compressed_tensors("pack-quantized", num_bits=8, group_size=64, **_INT),
        "packed8_g64_bfloat16",
    ),
    "mxfp4": (compressed_tensors("mxfp4-pack-quantized", group_size=32, **_FLOAT), "mxfp4"),
    "nvfp4": (compressed_tensors("nvfp4-pack-quantized", group_size=16, **_FLOAT), "nvfp4"),
    "modelopt fp8": (_modelopt("FP8"), "fp8_tensor"),
    "modelopt nvfp4": (_modelopt("NVFP4", group_size=16), "nvfp4_modelopt"),
}
BITSANDBYTES = {
    "nf4": {"nested": False},
    "nf4 nested": {"nested": True},
    "int8 of bitsandbytes": {"nested": False, "is_8bit": True},
}
KINDS = (*IN_PLACE, *BITSANDBYTES, "gpt-oss", *repacked_forms.FORMS)


def write(folder: Path, kind: str) -> None:
    """Writes the folder of a kind."""
    folder.mkdir()
    if kind == "gpt-oss":
        gpt_oss_forms.write(folder, *gpt_oss_forms.drawn(**_GPT_OSS))
        return
    if kind in BITSANDBYTES:
        sizes = {**SIZES, "torch_dtype": "float32"}
        folder.rmdir()
        bitsandbytes_files.save(folder, **BITSANDBYTES[kind], **sizes)
        (folder / "generation_config.json").unlink()
        return
    said, encode = _in_place(kind) if kind in IN_PLACE else _repacked(kind)
    rng, tensors = np.random.default_rng(0), {}
    cfg = model_config(SIZES, where="here")
    for name, shape in published_tensors(cfg).items():
        if len(shape) == 2 and ".layers." in name:
            tensors |= {own: _tensor(array) for own, array in encode(name, shape).items()}
        else:
            tensors[name] = _tensor(rng.normal(1, 0.1, shape).astype(np.float32))
    write_tensors(folder / SINGLE, tensors)
    (folder / CONFIG).write_text(json.dumps({**SIZES, "quantization_config": said}))


def _tensor(array) -> Tensor:
    return _WORD_OF[array.dtype], array.shape, array.tobytes()


def _in_place(kind):
    said, encoding = IN_PLACE[kind]
    form = FORMS[said["quant_method"]]

    def encode(name, shape):
        found = {}
        for piece, array in random_pieces(encoding, *shape).items():
            own, dtype, axes = published_piece(encoding, form, name, piece, shape)
            found[own] = array.view(np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(axes)
        return found

    return said, encode


def _repacked(kind):
    def encode(name, shape):
        weight = np.random.default_rng(1).normal(0, 0.05, shape).astype(np.float32)
        module = name.removesuffix("weight")
        return {module + end: a for end, a in repacked_forms.encode(weight, kind)[0].items()}

    return repacked_forms.FORMS[kind], encode


# What a folder stands for.


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file whose dtypes numpy knows."""
    return {
        name: np.frombuffer(data, WORDS[word]).reshape(shape)
        for name, (word, shape, data) in tensors_of(path).items()
        if word in WORDS
    }


def meant(said: dict, held: dict[str, np.ndarray], name: str, shape) -> np.ndarray | None:
    """The float32 weights [out, in] of a matrix, by its published name, of a folder whose
    quantization_config is `said`; None: no formula is known here for the tensors that it has.

    `held`: the tensors of its file.
    """
    module = name.removesuffix("weight")
    form = _form_of(said) if isinstance(said, dict) else None
    own = {}
    for key, array in held.items():
        base, piece = split_piece(key)
        if piece and base == name and form:  # as a converted folder has it
            key = form.name_of(name, piece)
        if key.startswith(module):
            own.setdefault(key.removeprefix(module), array)
    with np.errstate(all="ignore"):  # damaged scales
        for needed, formula in _FORMULAS:
            if needed <= own.keys():
                return formula(said, own, shape)
    return None


def _form_of(said):
    """The names of a folder's tensors; AutoRound's are those of GPTQ or AWQ."""
    method = said.get("quant_method")
    if method == "auto-round":
        is_awq = said.get("packing_format") in ("auto_round:auto_awq", "auto_round:awq")
        method = "awq" if is_awq else "gptq"
    return FORMS.get(method)


def _plain(said, own, shape):
    return own["weight"].astype(np.float32)


def _wide(scale, shape):
    """Scales as they are of all weights: one for all, for a row, for a group, or for a square."""
    scale = scale.astype(np.float32)
    if scale.size == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        return scale[:, None]
    if scale.shape[0] != shape[0]:
        scale = np.repeat(scale, 128, axis=0)[: shape[0]]
        return np.repeat(scale, 128, axis=1)[:, : shape[1]]
    group = next(n for n in (16, 32, 64, 128, shape[1]) if -(-shape[1] // n) == scale.shape[1])
    return np.repeat(scale, group, axis=1)[:, : shape[1]]


def _scaled(end):
    def formula(said, own, shape):
        if own["weight"].dtype == np.uint8:
            return _nvfp4_modelopt(said, own, shape)
        return own["weight"].astype(np.float32) * _wide(own[end], shape)

    return formula


def _halves(packed):
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def _e8m0(scale):
    found = np.ldexp(np.float32(1), scale.astype(np.int32) - 127).astype(np.float32)
    return np.where(scale == 255, np.float32(np.nan), found)


_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_LEVELS = np.array(E2M1, np.float32)


def _nvfp4_modelopt(said, own, shape):
    scale = own["weight_scale"].astype(np.float32) * own["weight_scale_2"].reshape(())
    return _LEVELS[_halves(own["weight"])] * _wide(scale, shape)


def _packed(said, own, shape):
    words = own["weight_packed"]
    if words.dtype in (np.int8, _FLOAT8):  # numbers under the name of words
        return words.astype(np.float32) * _wide(own["weight_scale"], shape)
    if "weight_global_scale" in own:
        words = words.view(np.uint8)
        scale = own["weight_scale"].astype(np.float32) / own["weight_global_scale"].reshape(())
        return _LEVELS[_halves(words)] * _wide(scale, shape)
    if own["weight_scale"].dtype == np.uint8:
        return _LEVELS[_halves(words.view(np.uint8))] * _wide(_e8m0(own["weight_scale"]), shape)
    words = words.view(np.int32)
    bits = 8 if words.shape[1] == shape[1] // 4 else 4
    codes = _apart(words.T, bits)[: shape[1]].T.astype(np.float32)
    scale, zeros = own["weight_scale"], np.float32(1 << bits - 1)
    places = np.arange(shape[1]) // (-(-shape[1] // scale.shape[1]))
    if "weight_g_idx" in own:
        places = own["weight_g_idx"]
    if "weight_zero_point" in own:
        zeros = _apart(own["weight_zero_point"], bits)[: shape[0]].astype(np.float32)[:, places]
    return (codes - zeros) * scale.astype(np.float32)[:, places]


def _apart(words, bits):
    """Codes one below the other in a stream of bits, the lowest first: words [n, m] ->
    [n * 32 / bits, m]."""
    stream = words.view(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1
    of_codes = stream.reshape(-1, bits, words.shape[1])
    return (of_codes << np.arange(bits, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32)


def _gptq(said, own, shape):
    """GPTQ, or AWQ; AutoRound has other names for them."""
    scale = own["scales"].astype(np.float32)
    form = said.get("packing_format") if said["quant_method"] == "auto-round" else None
    if said["quant_method"] == "awq" or form in ("auto_round:auto_awq", "auto_round:awq"):
        codes, zeros, scale = _awq(said, own, scale, shape)
        places = np.arange(shape[1]) // said["group_size"]
        return (codes.astype(np.float32) - zeros.astype(np.float32)[:, places]) * scale[:, places]
    bits, stored, scale = said["bits"], own["qzeros"].view(np.uint32), scale.T
    is_less = (said.get("checkpoint_format") or said.get("format") or "gptq") == "gptq"
    if form is not None:
        is_less = form != "auto_round"
    if is_less and bits != 3:
        stored = stored + np.uint32(sum(1 << at for at in range(0, 32, bits)))
    codes, zeros = _apart(own["qweight"], bits).T, _apart(stored.T, bits)[: shape[0]]
    if is_less and bits == 3:  # codes that words share
        zeros = zeros + 1 & 7
    size = said["group_size"] if said["group_size"] > 0 else shape[1]
    places = own.get("g_idx", np.arange(shape[1]) // size)
    return (codes.astype(np.float32) - zeros.astype(np.float32)[:, places]) * scale[:, places]


def _awq(said, own, scale, shape):
    """(codes [out, in], zeros and scales [out, groups]), of the kernel whose words are of inputs or
    the one whose words are of outputs."""
    ends = ("qweight", "qzeros")
    version = said.get("version") or said.get("format") or "gemm"
    if said["quant_method"] == "awq" and version.lower() == "gemv":
        return *(_apart(own[end].T, 4).T for end in ends), scale
    order = np.argsort(repacked_forms.AWQ_ORDER)
    return *(
        _apart(own[end].T, 4).reshape(-1, 8, own[end].shape[0])[:, order].reshape(shape[0], -1)
        for end in ends
    ), scale.T


def _hqq(said, own, shape):
    codes = own["W_q"]
    if codes.size != shape[0] * shape[1]:
        codes = np.concatenate([codes >> 4, codes & 15])
    zero, scale = (own[end].astype(np.float32) for end in ("zero", "scale"))
    return ((codes.astype(np.float32) - zero) * scale).reshape(shape)


def _eetq(said, own, shape):
    numbers = (own["weight"].view(np.uint8) ^ np.uint8(128)).view(np.int8).reshape(-1)
    codes = np.empty(numbers.size, np.float32)
    codes[_places_of_eetq(shape)] = numbers
    return codes.reshape(shape) * own["weight_scales"].astype(np.float32)[:, None]


@cache
def _places_of_eetq(shape):
    """Where in [out, in] each number was."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return repacked_forms.in_places_of_eetq(places).reshape(-1)


def _scb(said, own, shape):
    scaled = own["weight"].astype(np.float32) * own["SCB"].reshape(-1, 1)
    return scaled * np.float32(7.874015718698502e-3)


def _nf4(said, own, shape):
    state = json.loads(own["weight.quant_state.bitsandbytes__nf4"].tobytes())
    scale = own["weight.absmax"]
    if scale.dtype == np.uint8:
        scale = own["weight.nested_quant_map"].reshape(-1)[scale.reshape(-1)]
        scale = scale * np.repeat(own["weight.nested_absmax"].reshape(-1), 256)[: len(scale)]
        scale = scale + np.float32(state["nested_offset"])
    bytes_ = np.frombuffer(own["weight"].tobytes(), np.uint8)
    codes = np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1, state["blocksize"])
    return (np.array(NF4, np.float32)[codes] * scale.reshape(-1, 1)).reshape(shape)


_Formula = Callable[[dict, dict, tuple], np.ndarray | None]
# What a matrix has -> how it is decoded; the first that it has all of.
_FORMULAS: tuple[tuple[set[str], _Formula], ...] = (
    ({"weight.quant_state.bitsandbytes__nf4"}, _nf4),
    ({"weight", "SCB"}, _scb),
    ({"weight", "weight_scales"}, _eetq),
    ({"weight", "weight_scale_inv"}, _scaled("weight_scale_inv")),
    ({"weight", "weight_scale"}, _scaled("weight_scale")),
    ({"weight_packed", "weight_scale"}, _packed),
    ({"qweight", "qzeros", "scales"}, _gptq),
    ({"W_q", "scale", "zero"}, _hqq),
    ({"weight"}, _plain),
)


def meant_by_experts(held: dict[str, np.ndarray], stem: str, expert: int) -> np.ndarray:
    """The weights float32 [out, in] of an expert of gpt-oss: of `stem`_blocks and `stem`_scales."""
    blocks, scales = held[f"{stem}_blocks"][expert], held[f"{stem}_scales"][expert]
    levels = _LEVELS[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*scales.shape, 32)
    with np.errstate(all="ignore"):  # damaged scales
        return (levels * _e8m0(scales)[..., None]).reshape(len(scales), -1)
