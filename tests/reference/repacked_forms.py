"""Tiny random models whose weights are published in the forms that are repacked, each written here
word by word from the formula of its format, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.reference import fp8_forms

# No two axes are equal; EETQ wants inputs in runs of 64, and 192 is half a group more than one.
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "head_dim": 48,
}
DENSE = fp8_forms.DENSE | _SIZES
MIXTURE = fp8_forms.MIXTURE | _SIZES | {"moe_intermediate_size": 64}
MODELS = {"llama": DENSE, "qwen3": DENSE, "qwen3_moe": MIXTURE}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # half byte i of a word is of output 8c + AWQ_ORDER[i]


def _gptq(version, bits, group, *, sym=True, desc_act=False):
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": desc_act,
    }


def _hqq(bits, group):
    weights = {"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True}
    weights |= {"optimize": True, "round_zero": bits == 4, "view_as_float": False}
    settings = {"weight_quant_params": weights, "scale_quant_params": None}
    return {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}


def _packed(bits, group, **more):
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group} | more
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


_AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}


def _auto_round(form, bits, group, *, sym=True, **more):
    return {
        "quant_method": "auto-round",
        "packing_format": form,
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "data_type": "int",
        "autoround_version": "0.16.1",
        **more,
    }


FORMS = {
    "gptq": _gptq("gptq", 4, 32),
    "gptq asymmetric": _gptq("gptq", 4, 64, sym=False),
    "gptq sorted": _gptq("gptq", 4, 32, desc_act=True),
    "gptq sorted asymmetric": _gptq("gptq_v2", 4, 128, sym=False, desc_act=True),
    "gptq of 8 bits": _gptq("gptq_v2", 8, 128, sym=False),
    "gptq of 8 bits sorted": _gptq("gptq", 8, 64, desc_act=True),
    "gptq by row": _gptq("gptq_v2", 4, -1, sym=False),
    "gptq of 2 bits": _gptq("gptq", 2, 32),
    "gptq of 2 bits asymmetric": _gptq("gptq", 2, 64, sym=False, desc_act=True),
    "gptq of 3 bits": _gptq("gptq", 3, 32, desc_act=True),
    "gptq of 3 bits asymmetric": _gptq("gptq", 3, 64, sym=False),
    "gptq of 3 bits by row": _gptq("gptq_v2", 3, -1, sym=False),
    "awq": {**_AWQ, "group_size": 64},
    "awq gemv": {**_AWQ, "version": "GEMV", "group_size": 64},
    "awq gemv of small groups": {**_AWQ, "version": "gemv", "group_size": 32},
    "auto-round": _auto_round("auto_round", 3, 32, sym=False),
    "auto-round in gptq": _auto_round(
        "auto_round:auto_gptq", 4, 64, extra_config={"lm_head": {"bits": 16}}
    ),
    "auto-round in awq": _auto_round("auto_round:auto_awq", 4, 32, sym=False),
    "hqq": _hqq(4, 64),
    "hqq of 8 bits": _hqq(8, 32),
    "eetq": {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]},
    "packed": _packed(4, 32, symmetric=False),
    "packed by row": _packed(4, -1, symmetric=False),
    "packed of 8 bits": _packed(8, 64, symmetric=False),
    "packed sorted": _packed(4, 32, symmetric=True, actorder="group"),
}


def is_encoded(name: str, shape) -> bool:
    """Whether such models have this tensor encoded: a Linear of a layer, not a router."""
    is_linear = len(shape) == 2 and name.startswith("model.layers.")
    return is_linear and not name.endswith(("norm.weight", "mlp.gate.weight"))


def encode(weight: np.ndarray, form: str, *, seed: int = 0) -> tuple[dict, np.ndarray]:
    """(end of a name -> tensor, the weights float32 [out, in] that they stand for by the format's
    formula), of a matrix float32 [out, in]."""
    said, rng = FORMS[form], np.random.default_rng(seed)
    (out, width), method = weight.shape, said["quant_method"]
    if method == "eetq":
        return _eetq(weight)
    bits, group, is_symmetric, is_sorted = _settings(said, width)
    n_groups, top = -(-width // group), (1 << bits) - 1
    of_input = np.arange(width) // group
    if is_sorted:
        of_input = of_input[rng.permutation(width)]
    said = as_first_named(said)
    method = said["quant_method"]
    codes = np.empty((out, width), np.int64)
    scales, zeros = np.empty((out, n_groups), np.float16), np.empty((out, n_groups))
    for number in range(n_groups):
        some = weight[:, of_input == number]
        low, high = some.min(1), some.max(1)
        if is_symmetric:
            low, high = -np.abs(some).max(1), np.abs(some).max(1)
        scales[:, number] = (high - low) / top
        zero = -low / scales[:, number].astype(np.float32)
        zeros[:, number] = (top + 1) // 2 if is_symmetric else np.clip(np.round(zero), 1, top)
        if method == "hqq":
            zeros[:, number] = zero.astype(np.float16)
        found = np.round(some / scales[:, [number]].astype(np.float32)) + zeros[:, [number]]
        codes[:, of_input == number] = np.clip(np.round(found), 0, top)
    spread = zeros.astype(np.float32)[:, of_input], scales.astype(np.float32)[:, of_input]
    meant = (codes.astype(np.float32) - spread[0]) * spread[1]
    written = {"gptq": _write_gptq, "awq": _write_awq, "hqq": _write_hqq}.get(method, _write_packed)
    return written(said, codes, scales, zeros, of_input, bits), meant


def as_first_named(said: dict) -> dict:
    """What AutoRound's names stand for."""
    form = said.get("packing_format")
    if form == "auto_round:auto_awq":
        return {**_AWQ, "group_size": said["group_size"]}
    if form is None:
        return said
    version = "gptq" if form == "auto_round:auto_gptq" else "gptq_v2"
    return _gptq(version, said["bits"], said["group_size"], sym=said["sym"]) | {"has_places": False}


def _settings(said, width):
    """(bits, inputs of a group, whether zeros are in the middle, whether inputs are sorted)"""
    if said["quant_method"] == "hqq":
        weights = said["quant_config"]["weight_quant_params"]
        return weights["nbits"], weights["group_size"], False, False
    if said["quant_method"] == "compressed-tensors":
        weights = said["config_groups"]["group_0"]["weights"]
        sorted_ = weights.get("actorder") == "group"
        return weights["num_bits"], weights["group_size"] or width, weights["symmetric"], sorted_
    group = width if said["group_size"] == -1 else said["group_size"]
    return said["bits"], group, said.get("sym", False), said.get("desc_act", False)


def _words(codes, bits):
    """Codes [n, m] of which those that lie one below the other share words, the first lowest."""
    if bits == 3:
        return _words_of_three(codes)
    per = 32 // bits
    found = np.zeros((-(-len(codes) // per), codes.shape[1]), np.uint32)
    for at, row in enumerate(codes):
        found[at // per] |= row.astype(np.uint32) << np.uint32(bits * (at % per))
    return found.view(np.int32)


def _words_of_three(codes):
    """As the first GPTQ packed 3 bits, step by step: ten codes, two bits of the next one; the third
    bit, ten codes, one bit; two bits, ten codes."""
    found = np.zeros((len(codes) // 32 * 3, codes.shape[1]), np.uint32)
    codes = codes.astype(np.uint32) & np.uint32(7)
    at = row = 0
    while row < len(found):
        for place in range(10):
            found[row] |= codes[at + place] << np.uint32(3 * place)
        found[row] |= codes[at + 10] << np.uint32(30)
        found[row + 1] |= codes[at + 10] >> np.uint32(2)
        for place in range(10):
            found[row + 1] |= codes[at + 11 + place] << np.uint32(3 * place + 1)
        found[row + 1] |= codes[at + 21] << np.uint32(31)
        found[row + 2] |= codes[at + 21] >> np.uint32(1)
        for place in range(10):
            found[row + 2] |= codes[at + 22 + place] << np.uint32(3 * place + 2)
        at, row = at + 32, row + 3
    return found.view(np.int32)


def _write_gptq(said, codes, scales, zeros, of_input, bits):
    less = 1 if said["checkpoint_format"] == "gptq" else 0
    places = {"g_idx": of_input.astype(np.int32)} if said.get("has_places", True) else {}
    return places | {
        "qweight": _words(codes.T, bits),
        "qzeros": np.ascontiguousarray(_words(zeros - less, bits).T),
        "scales": np.ascontiguousarray(scales.T),
    }


def _write_awq(said, codes, scales, zeros, of_input, bits):
    def words(rows):
        found = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
        for at, place in enumerate(AWQ_ORDER):
            found |= rows[:, place::8].astype(np.uint32) << np.uint32(4 * at)
        return found.view(np.int32)

    if said["version"].lower() == "gemv":
        return _write_gemv(said["group_size"], codes, scales, zeros)
    scales = np.ascontiguousarray(scales.T)
    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales}


def _write_gemv(group, codes, scales, zeros):
    """Rows of words, each of eight neighbours. Of zeros there are so many words that a group of 128
    and more has any number of them, one of 64 an even one, one of 32 a multiple of four; scales are
    padded in the same way."""
    unit = max(1, 128 // group)
    width = -(-zeros.shape[1] // (8 * unit)) * 8 * unit
    more = ((0, 0), (0, width - zeros.shape[1]))
    return {
        "qweight": np.ascontiguousarray(_words(codes.T, 4).T),
        "qzeros": np.ascontiguousarray(_words(np.pad(zeros, more).T, 4).T),
        "scales": np.pad(scales, more),
    }


def _write_hqq(said, codes, scales, zeros, of_input, bits):
    groups = codes.reshape(scales.size, -1).astype(np.uint8)
    half = len(groups) // 2
    found = {
        "W_q": groups if bits == 8 else groups[:half] << 4 | groups[half:],
        "scale": scales.reshape(-1, 1),
        "zero": zeros.astype(np.float16).reshape(-1, 1),
        "shape": np.array(codes.shape, np.int64),
        "packing": np.frombuffer(f"{bits}bit_u8".encode(), np.uint8),
    }
    numbers = {"nbits": bits, "group_size": groups.shape[1], "axis": 1}
    return found | {name: np.array(number, np.int32) for name, number in numbers.items()}


def _write_packed(said, codes, scales, zeros, of_input, bits):
    weights = said["config_groups"]["group_0"]["weights"]
    found = {
        "weight_packed": np.ascontiguousarray(_words(codes.T, bits).T),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not weights["symmetric"]:
        found["weight_zero_point"] = _words(zeros, bits)
    if weights.get("actorder") == "group":
        found["weight_g_idx"] = of_input.astype(np.int32)
    return found


def _eetq(weight):
    scales = (np.abs(weight).max(1) / 127).astype(np.float16)
    codes = np.clip(np.round(weight / scales[:, None].astype(np.float32)), -127, 127)
    numbers = in_places_of_eetq(codes.astype(np.int8)).view(np.uint8) + np.uint8(128)
    meant = codes.astype(np.float32) * scales[:, None].astype(np.float32)
    return {"weight": numbers.view(np.int8), "weight_scales": scales}, meant


def in_places_of_eetq(codes: np.ndarray) -> np.ndarray:
    """Items [out, in] -> [in, out], where EETQ's kernels have them, step by step as its
    `cutlass_preprocessors.cc` puts them there."""
    out, width = codes.shape
    rows = codes.T  # as it is quantized
    permuted = np.empty_like(rows)
    for row in range(width):
        tile = row % 16
        permuted[row] = rows[row - tile + 8 * (tile % 4 // 2) + tile % 2 + 2 * (tile // 4)]
    columns, words = permuted.T.reshape(out, width // 4, 4), width // 4
    flat = np.empty((out * words, 4), codes.dtype)
    for column in range(out):
        for word in range(words):
            base = word // 16 * 16
            at = 2 * base + 16 * (column % 2) + word % 16
            flat[column // 2 * words * 2 + at] = columns[column, word]
    return flat[:, [0, 2, 1, 3]].reshape(width, out)


def save(folder: Path, name: str, form: str) -> tuple[Path, Path]:
    """(a published folder in a form, the same model in Transformers' form with what it stands
    for)."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    published, plain = folder / "published", folder / "plain"
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3 if weight.ndim == 1 else 0.05)
    model.save_pretrained(plain)
    model.save_pretrained(published)
    stored, meant = {}, {}
    for number, (tensor, weight) in enumerate(load_file(plain / "model.safetensors").items()):
        meant[tensor] = weight
        if not is_encoded(tensor, weight.shape):
            stored[tensor] = weight
            continue
        pieces, meant[tensor] = encode(weight, form, seed=number)
        module = tensor.removesuffix("weight")
        stored |= {module + end: piece for end, piece in pieces.items()}
    for where, tensors in ((published, stored), (plain, meant)):
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    path = published / "config.json"
    raw = json.loads(path.read_text()) | {"quantization_config": FORMS[form]}
    path.write_text(json.dumps(raw))
    return published, plain
