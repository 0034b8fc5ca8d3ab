"""Tiny random models whose weights are published in FP8, and what Transformers decodes them to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

# No two axes are equal, and none but 128 itself is a multiple of the grid's 128.
DENSE = {
    "vocab_size": 133,
    "hidden_size": 160,
    "intermediate_size": 300,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 28,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXTURE = {
    **DENSE,
    "moe_intermediate_size": 136,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
LATENT = {
    **{key: value for key, value in DENSE.items() if key != "head_dim"},
    "num_key_value_heads": 6,
    "q_lora_rank": 138,
    "kv_lora_rank": 132,
    "qk_nope_head_dim": 26,
    "qk_rope_head_dim": 8,
    "v_head_dim": 30,
    "moe_intermediate_size": 144,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
MODELS = {"qwen3": DENSE, "qwen3_moe": MIXTURE, "deepseek_v3": LATENT}
GRID = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def compressed(strategy: str) -> dict:
    """A quantization_config as compressed-tensors writes it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


# Name of a form -> (quantization_config, the end of the scales' names, the scales' dtype).
FORMS = {
    "grid": (GRID, "_scale_inv", "float32"),
    "ue8m0 grid": ({**GRID, "scale_fmt": "ue8m0"}, "_scale_inv", "float32"),
    "tensor": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        *("_scale_inv", "bfloat16"),
    ),
    "compressed by channel": (compressed("channel"), "_scale", "bfloat16"),
    "compressed by tensor": (compressed("tensor"), "_scale", "float32"),
    "compressed by block": (
        {**compressed("block"), "config_groups": {}},
        *("_scale", "float32"),
    ),
}
_BLOCK = compressed("block")
_BLOCK["config_groups"]["group_0"]["weights"]["block_structure"] = [128, 128]
FORMS["compressed by block"] = (_BLOCK, "_scale", "float32")


def is_encoded(name: str, shape) -> bool:
    """Whether FP8 models have this tensor in FP8: a Linear of a layer, not a router."""
    is_linear = len(shape) == 2 and name.startswith("model.layers.")
    return is_linear and not name.endswith(("norm.weight", "mlp.gate.weight"))


def encode(weight, form: str):
    """(codes, scales, the weights that they stand for, by Transformers' own function)."""
    import torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    rows, width = weight.shape
    by = form.split()[-1]
    if by in ("grid", "block"):
        blocks = torch.nn.functional.pad(weight, (0, -width % 128, 0, -rows % 128))
        blocks = blocks.reshape(-(-rows // 128), 128, -(-width // 128), 128)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        if form.startswith("ue8m0"):
            scale = scale.log2().ceil().exp2()
    elif by == "channel":
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
    else:
        scale = (weight.abs().amax() / 448).reshape(() if form == "tensor" else 1)
    scale = scale.to(getattr(torch, FORMS[form][2]))
    size = {"channel": [1, width], "tensor": None}.get(by, [128, 128])
    wide = _dequantize_fp8_weight(torch.ones(rows, width), scale, size, torch.float32)
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return codes, scale, _dequantize_fp8_weight(codes, scale, size, torch.float32)


def save(folder: Path, name: str, form: str) -> tuple[Path, Path]:
    """(a published folder in FP8, the same model in Transformers' form with what it stands for)."""
    import torch

    said, end, _ = FORMS[form]

    def tensors_of(weight):
        codes, scale, plain = encode(weight, form)
        found = {".weight": codes, f".weight{end}": scale}
        if said.get("activation_scheme") == "static":
            found[".activation_scale"] = torch.tensor(0.5)
        return found, plain

    return save_encoded(folder, name, said, tensors_of)


def save_encoded(
    folder: Path,
    name: str,
    said: dict,
    tensors_of: Callable[..., tuple[dict, object]],
    *,
    sizes: dict | None = None,
) -> tuple[Path, Path]:
    """The same of any form. `said`: its quantization_config. `tensors_of(weight)`: what is
    published of a matrix, by the ends of names; and the weights that it stands for. `sizes`: other
    sizes of the model."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **MODELS[name] | (sizes or {}))
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    plain, published = Path(folder) / "plain", Path(folder) / "fp8"
    model.save_pretrained(plain)
    tensors, encoded = load_file(plain / "model.safetensors"), {}
    for key, weight in list(tensors.items()):
        if is_encoded(key, weight.shape):
            held, tensors[key] = tensors_of(weight)
            module = key.removesuffix(".weight")
            encoded |= {module + end: tensor for end, tensor in held.items()}
        else:
            encoded[key] = weight
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    published.mkdir()
    save_file(encoded, published / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**raw, "quantization_config": said}))
    return published, plain


def reference_logits(plain: Path, ids):
    """Transformers' logits [B, T, vocabulary], float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False).logits.numpy()
