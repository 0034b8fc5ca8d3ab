"""GGUF files of models that Transformers has saved, written with llama.cpp's own package `gguf`:
its writer, its names of tensors, its quantizers. None of the code that reads them is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

# model_type -> (architecture, whose rows of queries and keys are reordered, whose gains have 1
# added), as llama.cpp's converter does it.
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True, False),
    "mixtral": (gguf.MODEL_ARCH.LLAMA, True, False),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False, False),
    "qwen3_moe": (gguf.MODEL_ARCH.QWEN3MOE, False, False),
    "gemma": (gguf.MODEL_ARCH.GEMMA, False, True),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, False, True),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, False, True),
    "glm4_moe": (gguf.MODEL_ARCH.GLM4_MOE, False, False),
}
_EXPERT = re.compile(r"(.+\.experts)\.([0-9]+)\.(.+)")
_ROWS = re.compile(r".*\.(q|k)_proj\.(weight|bias)")


def saved_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder of safetensors, as float32."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    return found


def write(
    folder: str | Path,
    path: str | Path,
    *,
    kind: str = "F32",
    kinds: dict[str, str] | None = None,
    settings=None,
    words=None,
    freqs: np.ndarray | None = None,
    quantize=gguf.quantize,
    drawn: bool = False,
    routers: bool = False,
    experts_apart: bool = False,
    split_max_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the model in `folder` as a GGUF, and returns its tensors as they are in it, decoded,
    under their published names.

    `kind`: the type of its matrices; `kinds`: that of some, by a part of their name in the file;
    one whose rows are no multiple of its block becomes F16. `settings(writer, config)`: further
    metadata; `words(writer)`: the tokenizer. `freqs`: divisors of the frequencies.
    `quantize(array, kind)`: who writes blocks; `drawn`: they are random. `routers`: are matrices
    too. `experts_apart`: each has tensors of its own, as in files of 2023. `split_max_tensors`: of
    a part, where it is split.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    arch, is_permuted, adds_one = ARCHITECTURES[config["model_type"]]
    n_layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, n_layers + config.get("num_nextn_predict_layers", 0))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split_max_tensors)
    _write_settings(writer, config)
    if settings is not None:
        settings(writer, config)
    if words is not None:
        words(writer)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
    rng, decoded = np.random.default_rng(0), {}
    for name, (published, array) in _stacked(
        saved_tensors(folder), names, apart=experts_apart
    ).items():
        if adds_one and name.endswith("norm.weight"):
            array = array + 1
        if is_permuted and _ROWS.fullmatch(published[0]):
            heads = config[
                "num_attention_heads" if ".q_proj" in published[0] else "num_key_value_heads"
            ]
            array = permuted(array, heads)
        own = next((value for part, value in (kinds or {}).items() if part in name), kind)
        array = _add(writer, name, array, own, quantize, rng if drawn else None, routers)
        if is_permuted and _ROWS.fullmatch(published[0]):
            array = permuted(array, heads, back=True)
        if adds_one and name.endswith("norm.weight"):
            array = array - 1
        decoded |= zip(published, array if len(published) > 1 else [array], strict=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def permuted(array: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows 2i and 2i + 1 of each head are those that were i and i + H/2."""
    cut = (heads, -1, 2) if back else (heads, 2, -1)
    return array.reshape(*cut, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _stacked(tensors, names, *, apart):
    """Name in the file -> (published names, array), with all experts of a layer in one."""
    experts, found = {}, {}
    for name, array in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = (name, array)
        else:
            found[_name(names, name)] = ((name,), array)
    for name, each in experts.items():
        if apart:
            own = _name(names, name)
            found |= {
                own.replace("_exps", f".{number}"): ((published,), array)
                for number, (published, array) in each.items()
            }
            continue
        ordered = [each[number] for number in sorted(each)]
        arrays = np.stack([array for _, array in ordered])
        found[_name(names, name)] = (tuple(published for published, _ in ordered), arrays)
    return found


def _name(names, published):
    if published.endswith("e_score_correction_bias"):
        published = published.replace("_bias", ".bias")
    found = names.get_name(published, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"gguf has no name for {published}"
    return found


def _add(writer, name, array, kind, quantize, rng, routers):
    """Adds a tensor, a matrix in `kind`, and returns what it decodes to. Vectors and routers stay
    float32, as in files of llama.cpp."""
    if array.ndim < 2 or ("ffn_gate_inp" in name and not routers):
        kind = "F32"
    type_of = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[type_of]
    if array.shape[-1] % block:
        type_of, block = gguf.GGMLQuantizationType.F16, 1
    if rng is not None and block > 1:
        raw = blocks(kind, (*array.shape[:-1], array.shape[-1] // block), rng)
    else:
        raw = quantize(np.ascontiguousarray(array), type_of)
    writer.add_tensor(name, raw, raw_dtype=type_of)
    return gguf.dequantize(raw, type_of).reshape(array.shape).astype(np.float32)


# Where the float16 scales of a block lie, and the largest number that one is multiplied by.
_SCALES = {
    "Q4_0": ((0,), 8),
    "Q4_1": ((0, 2), 15),
    "Q5_0": ((0,), 16),
    "Q5_1": ((0, 2), 31),
    "Q8_0": ((0,), 128),
    "Q2_K": ((80, 82), 45),
    "Q3_K": ((108,), 128),
    "Q4_K": ((0, 2), 945),
    "Q5_K": ((0, 2), 1953),
    "Q6_K": ((208,), 4096),
    "IQ4_NL": ((0,), 127),
    "IQ4_XS": ((0,), 4064),
}


def blocks(kind: str, shape: tuple[int, ...], rng, *, largest: float = 0.2) -> np.ndarray:
    """Random blocks whose scales are sane: uint8 [..., bytes of a row]. `largest`: about what the
    largest weight is."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (*shape, n_bytes), dtype=np.uint8)
    places, factor = _SCALES[kind]
    for at in places:
        scales = (largest / factor * rng.uniform(0.5, 1, shape)).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def _write_settings(writer, config):
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] in ("llama", "mixtral"):
        writer.add_rope_dimension_count(head_dim)
    n_experts = config.get("num_local_experts", config.get("num_experts"))
    if n_experts:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config["model_type"] == "glm4_moe":
        writer.add_rope_dimension_count(head_dim // 2)
        writer.add_expert_count(config["n_routed_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["model_type"].startswith(("gemma2", "gemma3")):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
