"""Forms in which config.json is published, and where: the keys that a reader of it meets, without
those that no model depends on. Sizes are those of the source; the tests shrink them.

From memory of public files where no commit is given; `data` is the folder of shared test data,
whose README has repository and commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
L7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-05,
}
L2 = {
    **LLAMA,
    **L7B,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
L3 = {
    **L2,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_type": "llama3",
    "original_max_position_embeddings": 8192,
}
L31 = {
    **L3,
    "max_position_embeddings": 131072,
    "rope_scaling": SCALING,
    "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
}
L32 = {
    **L31,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "head_dim": 64,
    "rope_scaling": {**SCALING, "factor": 32.0},
    "tie_word_embeddings": True,
}
GENERATION = {  # what transformers 4.2x to 4.3x wrote beside the model's own keys
    "max_length": 20,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "pruned_heads": {},
    "torchscript": False,
    "tie_encoder_decoder": False,
    "is_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "bad_words_ids": None,
    "task_specific_params": None,
    "chunk_size_feed_forward": 0,
}


@dataclass(frozen=True)
class Form:
    """One published form. `refused`: a word of our refusal, or None where it runs;
    `refused_there`: Transformers refuses it, too."""

    source: str
    config: dict = field(hash=False)
    refused: str | None = None
    refused_there: bool = False


def _without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def _quantized(source, word, method, **more):
    config = {**L31, "quantization_config": {"quant_method": method, **more}}
    return Form(source, config, refused=word, refused_there=True)


def _other(source, model_type, architecture, **more):
    """A family that runs in Transformers and not here yet: refused by its name."""
    config = {**L2, "model_type": model_type, "architectures": [architecture], **more}
    return Form(source, config, refused=architecture)


# Those that run.
RUN = {
    "llama-1-first-conversion": Form(
        "decapoda-research/llama-7b-hf",
        {
            **LLAMA,
            **L7B,
            "architectures": ["LLaMAForCausalLM"],
            "rms_norm_eps": 1e-06,
            "max_sequence_length": 2048,
            "pad_token_id": -1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float16",
            "initializer_range": 0.02,
        },
    ),
    "llama-1": Form(
        "huggyllama/llama-7b",
        {**_without(L2, "num_key_value_heads", "pretraining_tp"), "pad_token_id": 0},
    ),
    "llama-2": Form("data: configs/llama-2-7b-hf.json", L2),
    "llama-2-gqa": Form(
        "data: configs/llama-2-70b-derivative-lzlv.json",
        {**L2, "num_attention_heads": 64, "num_key_value_heads": 8, "rope_theta": 10000.0},
    ),
    "code-llama": Form(
        "codellama/CodeLlama-7b-hf",
        {**L2, "rope_theta": 1000000, "max_position_embeddings": 16384, "vocab_size": 32016},
    ),
    "linear-scaling": Form(
        "lmsys/vicuna-7b-v1.5-16k", {**L2, "rope_scaling": {"factor": 4.0, "type": "linear"}}
    ),
    "linear-scaling-with-theta": Form(
        "deepseek-ai/deepseek-coder-6.7b-instruct",
        {**L2, "rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    ),
    "linear-scaling-under-both-names": Form(
        "re-saved by transformers 4.43 to 4.55, which wrote rope_type beside type",
        {**L2, "rope_scaling": {"factor": 8.0, "rope_type": "linear", "type": "linear"}},
    ),
    "code-of-its-own-that-is-not-needed": Form(
        "data: configs/llama-3-8b-derivative-chinese-instruct.json",
        {**L3, "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
    ),
    "flash-attention-code": Form(
        "togethercomputer/LLaMA-2-7B-32K",
        {
            **L2,
            "max_position_embeddings": 32768,
            "max_length": 4096,
            "rope_scaling": {"factor": 8.0, "type": "linear"},
            "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
        },
    ),
    "llama-3": Form("meta-llama/Meta-Llama-3-8B", L3),
    "llama-3-float32": Form(
        "data: configs/llama-3-70b-derivative-reflection.json",
        {**L3, "torch_dtype": "float32", "vocab_size": 128262, "eos_token_id": 128009},
    ),
    "llama-3-long": Form(
        "gradientai/Llama-3-8B-Instruct-262k",
        {**L3, "rope_theta": 283461213.0, "max_position_embeddings": 262144},
    ),
    "llama-3.1": Form("data: configs/llama-3.1-8b-instruct.json", L31),
    "llama-3.1-70b": Form(
        "data: configs/llama-3.1-70b-instruct.json",
        {**L31, "num_attention_heads": 64, "hidden_size": 8192},
    ),
    "llama-3.2": Form("data: configs/llama-3.2-1b-instruct.json", L32),
    "llama-3.2-3b": Form(
        "data: configs/llama-3.2-3b-instruct.json",
        {**L32, "num_attention_heads": 24, "head_dim": 128},
    ),
    "distilled-into-llama": Form(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        {**L31, "rope_scaling": {**SCALING, "type": "llama3"}, "eos_token_id": 128001},
    ),
    "pruned-llama": Form(
        "nvidia/Llama-3.1-Minitron-4B-Width-Base", {**L31, "head_dim": 128, "hidden_size": 3072}
    ),
    "dtype-of-transformers-4.56": Form(
        "data: configs/llama-2-13b-derivative-bnb4bit.json, without its quantization",
        {
            **_without(L2, "torch_dtype"),
            "dtype": "float16",
            "head_dim": 128,
            "max_sequence_length": 2048,
            "pad_token_id": 0,
            "rope_theta": 10000.0,
        },
    ),
    "transformers-5": Form(
        "what transformers 5 saves",
        {
            **_without(L31, "torch_dtype", "rope_scaling", "rope_theta"),
            "dtype": "bfloat16",
            "head_dim": 128,
            "pad_token_id": None,
            "rope_parameters": {**SCALING, "rope_theta": 500000.0},
        },
    ),
    "transformers-5-default-rope": Form(
        "what transformers 5 saves",
        {
            **_without(L2, "torch_dtype", "rope_scaling"),
            "dtype": "float32",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    ),
    "both-generations-of-rope": Form(
        "a file of transformers 5 to which rope_scaling was added by hand, as guides to longer "
        "contexts say",
        {
            **_without(L2, "rope_scaling"),
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ),
    "tiny-llama": Form(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        {**L2, "hidden_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    ),
    "small-lm": Form(
        "HuggingFaceTB/SmolLM-135M",
        {
            **L2,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "vocab_size": 49152,
        },
    ),
    "small-lm-2": Form(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        {
            **L2,
            "rope_theta": 130000,
            "tie_word_embeddings": True,
            "pad_token_id": 2,
            "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "small-lm-2-nanotron": Form(
        "HuggingFaceTB/SmolLM2-135M",
        {
            **L2,
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
        },
    ),
    "all-biases": Form(
        "ibm-granite/granite-3b-code-base-2k",
        {
            **L2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 10000,
        },
    ),
    "attention-bias": Form(
        "abacusai/Smaug-72B-v0.1 and other Qwen in llama's form",
        {**L2, "attention_bias": True, "rope_theta": 1000000},
    ),
    "yi": Form(
        "01-ai/Yi-6B",
        {**L2, "num_key_value_heads": 4, "rope_theta": 5000000.0, "pad_token_id": 0},
    ),
    "falcon-3": Form(
        "tiiuae/Falcon3-7B-Base",
        {
            **L2,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "rope_theta": 1000042,
            "activation": "swiglu",
            "mlp_bias": False,
            "rms_norm_eps": 1e-06,
        },
    ),
    "open-llama": Form(
        "openlm-research/open_llama_3b",
        {**_without(L2, "num_key_value_heads"), "rms_norm_eps": 1e-06, "hidden_size": 3200},
    ),
    "keys-of-generation": Form(
        "old dumps of every key, such as data: configs/mistral-7b-instruct-v0.3.json",
        {**L2, **GENERATION},
    ),
    "window-null": Form(
        "Mistral in llama's form, saved with the keys that it had", {**L2, "sliding_window": None}
    ),
    "window-beyond-the-context": Form(
        "Mistral in llama's form, saved with the keys that it had",
        {**L2, "sliding_window": 4096, "max_position_embeddings": 4096},
    ),
    "layers-by-name": Form(
        "Qwen and others in llama's form, saved by transformers 4.54 and later",
        {**L2, "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
    ),
    "classifier-with-a-head": Form(
        "a reward model that was saved from a causal one",
        {**L31, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    ),
    "fsdp-wrapper": Form(
        "saved from within a trainer's wrapper", {**L3, "architectures": ["FSDPLlamaForCausalLM"]}
    ),
    "unsloth": Form(
        "unsloth/Llama-3.2-1B-Instruct",
        {**L32, "unsloth_fixed": True, "pad_token_id": 128004, "unsloth_version": "2024.12"},
    ),
    "double-as-dtype": Form("saved from a run in float64", {**L2, "torch_dtype": "float64"}),
    "llama3-without-original": Form(
        "edited by hand after guides to rope_scaling",
        {**L3, "rope_scaling": _without(SCALING, "original_max_position_embeddings")},
    ),
}
# Those that are refused by words that name what it is.
REFUSED = {
    "yarn": Form(
        "NousResearch/Yarn-Llama-2-7b-128k",
        {
            **L2,
            "rope_scaling": {
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
                "finetuned": True,
            },
        },
        refused="'yarn'",
    ),
    "dynamic": Form(
        "InternLM2's scaling, kept by its copies in llama's form",
        {**L2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        refused="'dynamic'",
    ),
    "clex": Form(
        "DAMO-NLP-SG/CLEX-7B-16K",
        {**L2, "rope_scaling": {"type": "clex", "max_factor": 16, "param_factor": 1}},
        refused="'clex'",
        refused_there=True,
    ),
    "relu": Form(
        "SparseLLM/ReluLLaMA-7B", {**L2, "hidden_act": "relu"}, refused="hidden_act 'relu'"
    ),
    "gptq": _quantized("TheBloke/Llama-2-7B-Chat-GPTQ", "gptq", "gptq", bits=4, group_size=128),
    "awq": _quantized(
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        *("awq", "awq"),
        bits=4,
        group_size=128,
        version="gemm",
        zero_point=True,
    ),
    "bitsandbytes": _quantized(
        "data: configs/llama-2-13b-derivative-bnb4bit.json",
        *("bitsandbytes", "bitsandbytes"),
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
    ),
    "compressed-tensors": _quantized(
        "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        *("compressed-tensors", "compressed-tensors"),
        format="pack-quantized",
        config_groups={},
    ),
    "hqq": _quantized("mobiuslabsgmbh/Llama-3.1-8b-instruct_4bitgs64_hqq", "hqq", "hqq"),
    "aqlm": _quantized("ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf", "aqlm", "aqlm"),
    "mlx": Form(
        "mlx-community/Llama-3.2-1B-Instruct-4bit",
        {
            **L32,
            "quantization": {"group_size": 64, "bits": 4},
            "quantization_config": {"group_size": 64, "bits": 4},
        },
        refused="MLX",
        refused_there=True,
    ),
    "mistral": _other(
        "data: configs/mistral-7b-instruct-v0.3.json", "mistral", "MistralForCausalLM"
    ),
    "mixtral": _other("data: configs/mixtral-8x7b-v0.1.json", "mixtral", "MixtralForCausalLM"),
    "qwen2": _other("data: configs/qwen2.5-7b-instruct.json", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": _other("data: configs/qwen3-8b.json", "qwen3", "Qwen3ForCausalLM"),
    "qwen3-moe": _other(
        "data: configs/qwen3-30b-a3b-base.json", "qwen3_moe", "Qwen3MoeForCausalLM"
    ),
    "gemma": _other("data: configs/gemma-2b.json", "gemma", "GemmaForCausalLM"),
    "phi-4": _other("data: configs/phi-4.json", "phi3", "Phi3ForCausalLM"),
    "olmo-3": _other("data: configs/olmo3-7b.json", "olmo3", "Olmo3ForCausalLM"),
    "llama-4": _other(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4", "Llama4ForConditionalGeneration"
    ),
    "vision-llama": _other(
        "meta-llama/Llama-3.2-11B-Vision", "mllama", "MllamaForConditionalGeneration"
    ),
    "nothing-but-sizes": Form(
        "data: configs/llama-3.1-405b.partial.json",
        _without(L31, "model_type", "architectures"),
        refused="model_type is missing",
        refused_there=True,
    ),
}
