"""Tiny random models that bitsandbytes itself has quantized, by Transformers; its own weights."""

from __future__ import annotations

import functools
from pathlib import Path

DENSE = {
    "vocab_size": 133,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXTURE = {
    **DENSE,
    "moe_intermediate_size": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
LATENT = {
    **{key: value for key, value in DENSE.items() if key != "head_dim"},
    "num_key_value_heads": 6,
    "q_lora_rank": 192,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
WINDOWS = {**DENSE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    **dict.fromkeys(("llama", "qwen3"), DENSE),
    "phi3": {key: value for key, value in DENSE.items() if key != "head_dim"},
    "gemma3_text": {**WINDOWS, "tie_word_embeddings": True, "query_pre_attn_scalar": 64},
    "qwen3_moe": MIXTURE,
    "deepseek_v3": LATENT,
}
NESTED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Name of a form -> the settings of bitsandbytes.
FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": NESTED,
    "nested fp4": {**NESTED, "bnb_4bit_quant_type": "fp4"},
    "nested in bfloat16": {**NESTED, "bnb_4bit_quant_storage": "bfloat16"},
    "in float32": {**NESTED, "bnb_4bit_quant_storage": "float32"},
    "head too": {**NESTED, "llm_int8_skip_modules": ["embed_tokens"]},
    "some left": {**NESTED, "llm_int8_skip_modules": ["lm_head", "v_proj", "layers.1.mlp"]},
    "int8": {"load_in_8bit": True},
}


@functools.cache
def _plain(home: Path, name: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(home / f"{name}-plain")
    return home / f"{name}-plain"


def save(home: Path, name: str, form: str, *, dtype: str = "float32") -> Path:
    """A folder that Transformers saved, of a model that it had bitsandbytes quantize."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        _plain(home, name),
        quantization_config=BitsAndBytesConfig(**FORMS[form]),
        dtype=getattr(torch, dtype),
        device_map="cpu",
    )
    folder = home / f"{name}-{form.replace(' ', '-')}-{dtype}"
    model.save_pretrained(folder)
    return folder


def reference_logits(folder: Path, ids):
    """Transformers' logits [B, T, vocabulary], float32. As it trains, bitsandbytes dequantizes and
    multiplies; else it rounds inputs as well, to 8 bits, or to bfloat16 on some processors."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
        experts_implementation="eager",
    ).train()
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False).logits.numpy()


def dequantized(folder: Path) -> dict:
    """The matrices of a folder that are encoded, by bitsandbytes' own functions; in the dtype that
    it gives them."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
    from safetensors.torch import load_file

    tensors, found = load_file(folder / "model.safetensors"), {}
    for name in tensors:
        if name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = int8_vectorwise_dequant(tensors[weight], tensors[name])
        elif ".quant_state." in name:
            weight = name.partition(".quant_state.")[0]
            of = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{weight}.")}
            state = QuantState.from_dict(of, torch.device("cpu"))
            found[weight] = dequantize_4bit(tensors[weight], state)
    return found
