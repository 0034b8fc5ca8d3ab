"""GGUF files of models that Transformers has saved, written with llama.cpp's own package `gguf`:
its writer, its names of tensors, its quantizers. None of the code that reads them is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from tests.gguf_delta import QKV, QKVZ, Z, apart, changed, joined
from tests.gguf_settings import write_settings

# model_type -> (architecture, whose rows of queries and keys are reordered, whose gains have 1
# added), as llama.cpp's converter does it.
_ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "llama": (_ARCH.LLAMA, True, False),
    "mixtral": (_ARCH.LLAMA, True, False),
    "ministral3": (_ARCH.MISTRAL3, True, False),
    "qwen2": (_ARCH.QWEN2, False, False),
    "qwen2_moe": (_ARCH.QWEN2MOE, False, False),
    "qwen3": (_ARCH.QWEN3, False, False),
    "qwen3_moe": (_ARCH.QWEN3MOE, False, False),
    "olmo": (_ARCH.OLMO, True, False),
    "olmo2": (_ARCH.OLMO2, False, False),
    "olmo3": (_ARCH.OLMO2, False, False),
    "olmoe": (_ARCH.OLMOE, False, False),
    "exaone4": (_ARCH.EXAONE4, False, False),
    "smollm3": (_ARCH.SMOLLM3, True, False),
    "arcee": (_ARCH.ARCEE, True, False),
    "seed_oss": (_ARCH.SEED_OSS, False, False),
    "granite": (_ARCH.GRANITE, True, False),
    "granitemoe": (_ARCH.GRANITE_MOE, True, False),
    "glm4": (_ARCH.GLM4, False, False),
    "glm4_moe": (_ARCH.GLM4_MOE, False, False),
    "phi3": (_ARCH.PHI3, False, False),
    "ernie4_5": (_ARCH.ERNIE4_5, False, False),
    "ernie4_5_moe": (_ARCH.ERNIE4_5_MOE, False, False),
    "hunyuan_v1_dense": (_ARCH.HUNYUAN_DENSE, False, False),
    "hunyuan_v1_moe": (_ARCH.HUNYUAN_MOE, False, False),
    "cohere": (_ARCH.COMMAND_R, False, False),
    "cohere2": (_ARCH.COHERE2, False, False),
    "minimax_m2": (_ARCH.MINIMAXM2, False, False),
    "starcoder2": (_ARCH.STARCODER2, False, False),
    "stablelm": (_ARCH.STABLELM, False, False),
    "nemotron": (_ARCH.NEMOTRON, False, True),
    "deepseek_v2": (_ARCH.DEEPSEEK2, False, False),
    "deepseek_v3": (_ARCH.DEEPSEEK2, False, False),
    "qwen3_next": (_ARCH.QWEN3NEXT, False, True),
    "qwen3_5_text": (_ARCH.QWEN35, False, True),
    "qwen3_5_moe_text": (_ARCH.QWEN35MOE, False, True),
    "gemma": (_ARCH.GEMMA, False, True),
    "gemma2": (_ARCH.GEMMA2, False, True),
    "gemma3_text": (_ARCH.GEMMA3, False, True),
}
# Of each expert, or of each head: all are one tensor in a file.
_ONE_OF_MANY = re.compile(r"(.+\.experts|.+(?=\.norms))(?:\.norms)?\.([0-9]+)\.(.+)")
# Both matrices of Granite's experts are published as one, and are two in a file.
_BOTH, _HALVES = "block_sparse_moe.input_linear", ("mlp.experts.gate_proj", "mlp.experts.up_proj")
_LATENT = "kv_b_proj"
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
    older: bool = False,
    split_max_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Writes the model in `folder` as a GGUF, and returns its tensors as they are in it, decoded,
    under their published names.

    `kind`: the type of its matrices; `kinds`: that of some, by a part of their name in the file;
    one whose rows are no multiple of its block becomes F16. `settings(writer, config)`: further
    metadata; `words(writer)`: the tokenizer. `freqs`: divisors of the frequencies.
    `quantize(array, kind)`: who writes blocks; `drawn`: they are random. `routers`: are matrices
    too. `experts_apart`: each has tensors of its own, as in files of 2023. `older`: one
    matrix makes keys and values of a latent, as in files of 2024, or gives all but b and a of a
    gated DeltaNet. `split_max_tensors`: of a part, where it is split.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    arch, is_permuted, adds_one = ARCHITECTURES[config["model_type"]]
    n_layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, n_layers + config.get("num_nextn_predict_layers", 0))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split_max_tensors)
    write_settings(writer, config, older=older)
    if settings is not None:
        settings(writer, config)
    if words is not None:
        words(writer)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
    rng, decoded = np.random.default_rng(0), {}
    tensors = _apart(saved_tensors(folder), None if older else config)
    for name, (published, array) in _stacked(tensors, names, apart=experts_apart).items():
        adds = adds_one and name.endswith("norm.weight") and "ssm_norm" not in name
        array = changed(published[0], array + 1 if adds else array, config)
        if is_permuted and _ROWS.fullmatch(published[0]):
            heads = config[
                "num_attention_heads" if ".q_proj" in published[0] else "num_key_value_heads"
            ]
            array = permuted(array, heads)
        own = next((value for part, value in (kinds or {}).items() if part in name), kind)
        array = _add(writer, name, array, own, quantize, rng if drawn else None, routers)
        if is_permuted and _ROWS.fullmatch(published[0]):
            array = permuted(array, heads, back=True)
        array = changed(published[0], array - 1 if adds else array, config, back=True)
        decoded |= zip(published, array if len(published) > 1 else [array], strict=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _joined(decoded, config)


def permuted(array: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows 2i and 2i + 1 of each head are those that were i and i + H/2."""
    cut = (heads, -1, 2) if back else (heads, 2, -1)
    return array.reshape(*cut, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _apart(tensors, config):
    """Tensors by name, of which those that hold two are two. `config`: where what makes keys and
    values of a latent is two as well, of keys turned around for each head, and what has the gates
    of a gated DeltaNet."""
    found = {}
    for name, array in tensors.items():
        if config is not None and _LATENT in name:
            heads = array.reshape(config["num_attention_heads"], -1, array.shape[-1])
            keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            found[name.replace(_LATENT, "k_b_proj")] = keys.swapaxes(1, 2)
            found[name.replace(_LATENT, "v_b_proj")] = values
        elif config is not None and QKVZ in name:
            parts = zip((QKV, Z), apart(array, config), strict=True)
            found |= {name.replace(QKVZ, part): array for part, array in parts}
        elif _BOTH in name:
            halves = zip(_HALVES, np.split(array, 2, axis=1), strict=True)
            found |= {name.replace(_BOTH, half): part for half, part in halves}
        else:
            found[name] = array
    return found


def _joined(tensors, config):
    """The inverse of `_apart`."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(f"{_HALVES[0]}.weight"):
            names = [name.replace(_HALVES[0], half) for half in _HALVES]
            both = np.concatenate([found.pop(half) for half in names], axis=1)
            found[name.replace(_HALVES[0], _BOTH)] = both
        if f"{QKV}." in name and config["model_type"] == "qwen3_next":
            parts = (found.pop(name), found.pop(name.replace(QKV, Z)))
            found[name.replace(QKV, QKVZ)] = joined(*parts, config)
        if "k_b_proj" in name:
            keys, values = found.pop(name), found.pop(name.replace("k_b_proj", "v_b_proj"))
            both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
            found[name.replace("k_b_proj", _LATENT)] = both.reshape(-1, both.shape[-1])
    return found


def _stacked(tensors, names, *, apart):
    """Name in the file -> (published names, array), with all experts of a layer in one."""
    experts, found = {}, {}
    for name, array in tensors.items():
        if match := _ONE_OF_MANY.fullmatch(name):
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
    published = published.replace(".dt_bias", ".dt_proj.bias")
    found = names.get_name(published, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"gguf has no name for {published}"
    return found


def _add(writer, name, array, kind, quantize, rng, routers):
    """Adds a tensor, a matrix in `kind`, and returns what it decodes to. Vectors and routers stay
    float32, as in files of llama.cpp."""
    is_router = ("ffn_gate_inp" in name and not routers) or "conv1d" in name
    if array.ndim < 2 or is_router or name.endswith((".bias", "_norm.weight")):
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
