"""Reads damaged heads of GGUF files: each must be read, or refused in one line.

A head with every type of value and of tensor is changed at random places: bytes, numbers of 32 and
64 bits at the ends of their ranges, cuts, repeated and exchanged parts. Prints the slowest head and
the most memory that one took, and exits with 1 at the first that fails in another way.

    python benchmarks/fuzz_gguf.py --count 1000000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jlayer.config import model_config
from jlayer.errors import CheckpointError
from jlayer.gguf.config import config_of
from jlayer.gguf.parts import open_head
from jlayer.gguf.tokenizer import generation_config, tokenizer_files

_EDGES = (0, 1, 2, 7, 8, 9, 31, 33, 255, 1 << 16, 1 << 21, 1 << 31, (1 << 32) - 1)
_WIDE = (*_EDGES, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)


def head_of(path: Path) -> bytes:
    """A small whole file, written by the package `gguf`."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv([1])
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([chr(97 + n) for n in range(26)] + ["<|im_end|>"])
    writer.add_token_types([1] * 26 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(26)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    matrix = np.zeros((27, 32), np.float32)
    for number, kind in enumerate(("F32", "F16", "BF16", "Q8_0", "Q4_0")):
        name = "token_embd.weight" if number == 0 else f"blk.0.{kind}.weight"
        type_of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(matrix, type_of), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to three changes, most of them in the head."""
    raw = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, min(len(raw), 1800) or 1))
        change = int(rng.integers(0, 6))
        if change == 0:
            raw[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif change == 1:
            raw[at : at + 4] = int(rng.choice(_EDGES)).to_bytes(4, "little")
        elif change == 2:
            raw[at : at + 8] = _WIDE[int(rng.integers(len(_WIDE)))].to_bytes(8, "little")
        elif change == 3:
            del raw[at:]
        elif change == 4:
            n_bytes = int(rng.integers(1, 200))
            raw[at:at] = raw[at : at + n_bytes]
        else:
            other = int(rng.integers(0, min(len(raw), 1800) or 1))
            raw[at : at + 16], raw[other : other + 16] = raw[other : other + 16], raw[at : at + 16]
    return bytes(raw)


def judge(path: Path) -> str:
    """ "read" or "refused". Raises AssertionError where it is refused in more than a line."""
    try:
        head = open_head(path)
        generation_config(head)
        tokenizer_files(head)
        model_config(config_of(head), where=str(path))
    except CheckpointError as error:
        line = str(error)
    else:
        return "read"
    assert "\n" not in line, line
    assert len(line) < 1000, line
    return "refused"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kinds = np.random.default_rng(args.seed), {"read": 0, "refused": 0}
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        whole, path = head_of(Path(folder) / "whole.gguf"), Path(folder) / "m.gguf"
        for number in range(args.count):
            path.write_bytes(damaged(whole, rng))
            measured = number % 10 == 0  # tracing slows everything down
            if measured:
                tracemalloc.start()
            began = time.perf_counter()
            try:
                kinds[judge(path)] += 1
            except Exception as error:
                print(f"number {number}: {error!r}", file=sys.stderr)
                return 1
            if measured:
                largest = max(largest, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            else:
                slowest = max(slowest, time.perf_counter() - began)
    print(json.dumps({"count": args.count, **kinds, "slowest_s": slowest, "most_bytes": largest}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
