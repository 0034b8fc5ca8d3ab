"""Write a GGUF of random weights at the shape of a config.json, for llama.cpp.

    python benchmarks/gguf_model.py CONFIG.json OUT.gguf --type Q4_0

The types of the tensors are those of llama.cpp's own quantizer: with Q4_0 the head is Q6_K, with
Q8_0 it is Q8_0. Norms are float32. Every layer holds the same random bytes. The tokenizer is a
dummy with a word for each id: `t17` is token 17. Writing needs numpy and the package gguf; the
sizes need neither, since `versus.py` asks for them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

# Weights and bytes of a block, the offset of its float16 scale, and that scale: such that the
# weights have a standard deviation of about 0.01, as those of make_model.py.
BLOCKS = {
    "Q4_0": (32, 18, 0, 0.01 / 4.6),
    "Q8_0": (32, 34, 0, 0.01 / 74),
    "Q6_K": (256, 210, 208, 0.01 / (18.5 * 74)),
}
# The type of the head, where it is not that of the layers.
HEAD_TYPE = {"Q4_0": "Q6_K"}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}  # llama_ftype


def tensors(config: dict, kind: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (type, shape) of every tensor of a Llama."""
    if config["model_type"] != "llama":
        raise SystemExit(f"gguf_model.py knows the tensors of llama, not {config['model_type']!r}")
    width, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    vocab = (config["vocab_size"], width)
    head = HEAD_TYPE.get(kind, kind)
    if width % BLOCKS[head][0]:
        head = "Q8_0"  # as llama.cpp's quantizer does
    tied = config.get("tie_word_embeddings", False)
    found = {"token_embd.weight": (head if tied else kind, vocab)}
    for layer in range(config["num_hidden_layers"]):
        matrices = {
            "attn_q": (q_rows, width),
            "attn_k": (kv_rows, width),
            "attn_v": (kv_rows, width),
            "attn_output": (width, q_rows),
            "ffn_gate": (mlp, width),
            "ffn_up": (mlp, width),
            "ffn_down": (width, mlp),
        }
        at = f"blk.{layer}"
        found |= {f"{at}.{name}.weight": (kind, shape) for name, shape in matrices.items()}
        found |= {f"{at}.{name}.weight": ("F32", (width,)) for name in ("attn_norm", "ffn_norm")}
    found["output_norm.weight"] = ("F32", (width,))
    if not tied:
        found["output.weight"] = (head, vocab)
    return found


def weight_bytes(config: dict, kind: str) -> int:
    """Bytes of weights that a token needs: all but an embedding that is not the head too."""
    total = 0
    for name, (own, shape) in tensors(config, kind).items():
        if name == "token_embd.weight" and not config.get("tie_word_embeddings", False):
            continue
        weights, n_bytes = BLOCKS[own][:2] if own in BLOCKS else (1, 4)
        total += math.prod(shape) // weights * n_bytes
    return total


def drawn(kind: str, shape: tuple[int, ...], rng):
    """A tensor as its bytes [rows, bytes of a row], or a norm of ones."""
    import numpy as np

    if kind == "F32":
        return np.ones(shape, np.float32)
    weights, n_bytes, at, scale = BLOCKS[kind]
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows, columns // weights, n_bytes), dtype=np.uint8)
    blocks[..., at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(config: dict, kind: str, path: Path) -> None:
    """The whole file; under its name only once it is complete."""
    import gguf
    import numpy as np

    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _write_settings(writer, config, kind)
    _write_words(writer, config["vocab_size"])
    rng, held = np.random.default_rng(0), {}
    for name, (own, shape) in tensors(config, kind).items():
        if (own, shape) not in held:  # layers share their bytes, in memory too
            held[own, shape] = drawn(own, shape, rng)
        raw = None if own == "F32" else gguf.GGMLQuantizationType[own]
        writer.add_tensor(name, held[own, shape], raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _write_settings(writer, config, kind):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])


def _write_words(writer, n_tokens):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(n_tokens)])
    writer.add_token_types([1] * n_tokens)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=FILE_TYPES, required=True)
    args = parser.parse_args()
    write(json.loads(args.config.read_text()), args.type, args.out)
    print(args.out, "is written", file=sys.stderr)


if __name__ == "__main__":
    main()
