"""What published forms of config.json have in common: the keys of a family, and a row's type."""

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


L1 = {  # the first Llama, as transformers 4.28 to 4.30 saved it
    **LLAMA,
    **L7B,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


def shape(hidden, intermediate, layers, heads, kv_heads=None):
    """The keys of a size; without kv_heads in files that are older than these."""
    found = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return found if kv_heads is None else {**found, "num_key_value_heads": kv_heads}


OF_13B = shape(5120, 13824, 40, 40, 40)
OF_34B = shape(8192, 22016, 48, 64, 8)
OF_70B = shape(8192, 28672, 80, 64, 8)


@dataclass(frozen=True)
class Form:
    """One form. `source`: see `tests.sources`. `refused`: a word of our refusal, or None where it
    runs; `refused_there`: Transformers refuses it, too."""

    source: str
    config: dict = field(hash=False)
    refused: str | None = None
    refused_there: bool = False


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}
