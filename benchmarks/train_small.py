"""Trains small models of other families than Llama on stories, on one GPU: about a minute each.

    python benchmarks/train_small.py TEXTS CHECKPOINT OUT [--only qwen3-1m,gemma3-1m]

TEXTS: a folder of *.txt.gz, whose texts end with <|endoftext|>. CHECKPOINT: a folder with the
tokenizer that they share. Each model lands in OUT/NAME as Hugging Face publishes them, in bfloat16.
The tests run those that are committed (tests/checkpoints): greedy tokens as in Transformers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np

CONTEXT, BATCH, WARM_STEPS, HELD_OUT = 512, 64, 100, 40_000
END_OF_TEXT = "<|endoftext|>"
COMMON = {
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SLIDING, FULL = "sliding_attention", "full_attention"
# Name -> (model type, what differs from COMMON, steps, the highest learning rate).
MODELS = {
    "qwen3-1m": ("qwen3", {"num_hidden_layers": 3}, 2500, 4e-3),
    "gemma3-1m": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 64,
            "layer_types": [SLIDING, SLIDING, FULL],
            "query_pre_attn_scalar": 32,
        },
        2500,
        4e-3,
    ),
}


def tokens(texts: Path, encode) -> np.ndarray:
    """All texts, each between the tokens that begin and end one."""
    found = []
    for path in sorted(texts.glob("*.txt.gz")):
        with gzip.open(path, "rt") as file:
            texts_of_file = file.read().split(END_OF_TEXT)
        for text in texts_of_file:
            if text.strip():
                found += [0, *encode(text.strip() + "\n"), 1]
    return np.array(found, np.int64)


def rate(step: int, steps: int, most: float) -> float:
    """Warm-up, then a half cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARM_STEPS)
    return most * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def train(name: str, data):
    """A trained model, and its mean loss of the last hundred steps."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, more, steps, most = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**COMMON, **more)).cuda()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=most, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator, losses, began = torch.Generator().manual_seed(0), [], time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, most)
        firsts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        ids = torch.stack([data[first : first + CONTEXT + 1] for first in firsts.tolist()])
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        flat = logits.float().reshape(-1, logits.size(-1))
        loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 500 == 0:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {time.time() - began:.0f} s")
    return model.to(torch.bfloat16).eval(), float(torch.stack(losses[-100:]).mean())


def main():
    import torch
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(MODELS))
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoint)

    def encode(text):
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    data = torch.tensor(tokens(args.texts, encode)[HELD_OUT:]).cuda()
    for name in args.only.split(","):
        model, loss = train(name, data)
        model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=1)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        report = {"name": name, "steps": MODELS[name][2], "loss": round(loss, 3)}
        (args.out / name / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report))


if __name__ == "__main__":
    main()
