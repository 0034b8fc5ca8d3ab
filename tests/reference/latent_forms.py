"""Tiny random models of every family with latent attention, saved by Transformers itself."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One tiny model. `wrong`: changes of whole keys of config.json, each of which describes
    another model with the same tensors, and moves the logits of 40 tokens by more than a thousandth
    of the largest."""

    model_type: str
    config: dict  # keyword arguments of the family's config class
    wrong: tuple[dict, ...] = ()


# No two axes are equal: queries 108, with a latent of 18; entries of 14 and 8; keys and values 102;
# values 42; experts of 16, with a shared one of 32.
SIZES = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "moe_intermediate_size": 16,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two weights of YaRN's factor, which make no 1 together. Short, so that it reaches all waves.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 16,
}
GROWN = {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}}
SCALED, ONE_GROUP = {"rope_parameters": YARN}, {"n_group": 1, "topk_group": 1}
GROUPS = {"n_group": 4, "topk_group": 2}
INDEX = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
BIASED = {"attention_bias": True}
FORMS = {
    "deepseek_v3": Form(
        "deepseek_v3",
        {**SIZES, **GROUPS, **SCALED, **BIASED, "rms_norm_eps": 1e-2},
        (
            {"rope_interleave": False},
            {"rope_parameters": {**YARN, "mscale_all_dim": 0.0}},
            {"rope_parameters": {**YARN, "mscale": 0.0}},
            {"rope_parameters": {**YARN, "factor": 20.0}},
            {"rms_norm_eps": 1e-6},
            ONE_GROUP,
            {"topk_group": 3},
            {"num_experts_per_tok": 4},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 1.0},
            {"hidden_act": "relu"},
        ),
    ),
    "deepseek_v3-direct": Form(
        "deepseek_v3", {**SIZES, **GROUPS, "q_lora_rank": None, "rope_interleave": False}
    ),
    "deepseek_v3-dense": Form("deepseek_v3", {**SIZES, "first_k_dense_replace": 3}),
    "deepseek_v2": Form(
        "deepseek_v2",
        {
            **SIZES,
            **SCALED,
            **BIASED,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 1,
            "routed_scaling_factor": 7.0,
        },
        ({"topk_method": "greedy"}, {"topk_group": 2}, {"routed_scaling_factor": 1.0}),
    ),
    "deepseek_v2-lite": Form(
        "deepseek_v2", {**SIZES, "q_lora_rank": None, "first_k_dense_replace": 0}
    ),
    "glm4_moe_lite": Form(
        "glm4_moe_lite", {**SIZES, **ONE_GROUP}, ({"rope_interleave": False}, {"rope_theta": 100.0})
    ),
    "glm4_moe_lite-types": Form(
        "glm4_moe_lite", {**SIZES, **GROUPS, "mlp_layer_types": ["sparse", "dense", "sparse"]}
    ),
    "mistral4": Form(
        "mistral4",
        {**SIZES, **GROUPS, **GROWN, **BIASED, "first_k_dense_replace": 0},
        (
            {"rope_parameters": {**GROWN["rope_parameters"], "llama_4_scaling_beta": 0.1}},
            {"rope_parameters": {**GROWN["rope_parameters"], "factor": 20.0}},
            {"rope_interleave": False},
            {"topk_group": 3},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 2.0},
        ),
    ),
    "deepseek_v32": Form("deepseek_v32", {**SIZES, **GROUPS, **SCALED, **BIASED, **INDEX}),
    "glm_moe_dsa": Form("glm_moe_dsa", {**SIZES, **ONE_GROUP, **INDEX}),
}
SPREAD = 0.3


def reference_config(name: str, **more):
    """The config of the model called `name`, with other values of some keys."""
    from transformers import CONFIG_MAPPING

    form = FORMS[name]
    # Config classes write into the dictionaries that they are given.
    return CONFIG_MAPPING[form.model_type](**deepcopy({**form.config, **more}))


def save(
    folder: str | os.PathLike, name: str, *, seed: int = 0, dtype: str = "float32"
) -> str | os.PathLike:
    """Saves the model called `name` as safetensors in `folder` and returns the folder. Gains,
    biases and the routers' correction biases are random too."""
    import torch

    config = reference_config(name)
    with torch.random.fork_rng():
        model = _class_of(config.model_type)._from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf, tensor in model.state_dict().items():
            is_gain = "norm" in leaf and leaf.endswith(".weight")
            tensor.normal_(float(is_gain), SPREAD, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _class_of(model_type):
    """Mistral 4 has no class by itself that transformers would choose."""
    import transformers

    if model_type == "mistral4":
        return transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM
    config = transformers.CONFIG_MAPPING[model_type]
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config]


def load(folder: str | os.PathLike, dtype):
    """Transformers' model in a folder."""
    from transformers import AutoConfig

    return _class_of(AutoConfig.from_pretrained(folder).model_type).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def reference_logits(folder: str | os.PathLike, ids, dtype):
    """Transformers' logits [B, T, vocabulary] of ids [B, T], all at once and without a cache."""
    import torch

    with torch.no_grad():
        return load(folder, dtype)(torch.as_tensor(ids), use_cache=False).logits
