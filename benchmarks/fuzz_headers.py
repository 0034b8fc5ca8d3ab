"""Damaged headers, indexes and configs by the million, against the strict doors.

    python benchmarks/fuzz_headers.py --count 1000000 [--seed 0]

Each input is made from its number alone, so that each can be made again. It must be accepted or
refused with one of our own errors, in one line, within one second of processor time and 256 MB, and
without waiting for anything. Some inputs are as large as the limits allow. The last line is one
JSON object; code 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jlayer.checkpoint.layout import encode_header
from jlayer.checkpoint.safetensors import parse_header, read_header
from jlayer.config import model_config
from jlayer.convert.sources.open import open_source
from jlayer.errors import JlayerError
from jlayer.strict import parse_json_object
from tests.convert.checkpoints import TINY, random_checkpoint

LIMIT_S = 1.0  # of the processor: how long a busy machine lets it wait says nothing of the doors
STUCK_S = 10.0
LIMIT_BYTES = 256 << 20
LARGE_EVERY = 20_000
_DTYPES = ("float32", "float16", "bfloat16")
_VALUES = (
    *("0", "-1", "1", "7", "1.5", "1e999", "-0.0", "true", "false", "null", "NaN", "-Infinity"),
    *(str(1 << 31), str(1 << 62), str(1 << 63), str(1 << 64), str(10**12), "9" * 400, "9" * 5000),
    *('""', '"x"', '"F32"', '"F64"', '"../x"', '"a\\u0000b"', '"\\ud800"', '"\\u001b[2J"'),
    *("[]", "{}", "[0]", "[0,0]", "[4,0]", "[-4,4]", "[[]]", "[1,2,3,4,5,6,7,8,9]", "[1e3]"),
    *('{"a":{}}', "[" * 70 + "]" * 70, '{"a":' * 80 + "1" + "}" * 80, "[" * 2000, "}" * 50),
)
_BYTES = (b"", b" ", b"\n", b"\x00", b"\xff", b"\xc3\x28", b'"', b"\\", b"{", b"}", b"[", b"]")
_PIECES = (*_BYTES, b",", b":", b"\xef\xbb\xbf", b"\\u0000", b"-", b"e", b".", b"\xed\xa0\x80")


def make_header(rng: random.Random) -> tuple[bytes, int]:
    """A sound header without its length, and the bytes of its file."""
    names = ["model.embed_tokens.weight", "lm_head.weight", *(f"t.{n}" for n in range(6))]
    shapes = {
        name: tuple(rng.randrange(9) for _ in range(rng.randrange(4)))
        for name in rng.sample(names, rng.randrange(len(names)))
    }
    raw, entries = encode_header(shapes, {name: rng.choice(_DTYPES) for name in shapes})
    text = raw[8:].rstrip()
    if rng.random() < 0.3:
        text = json.dumps(json.loads(text)).encode()
    return text, 8 + len(text) + sum(entry.n_bytes for entry in entries.values())


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes, each of bytes or of a value."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        raw = rng.choice(_DAMAGES)(raw, rng)
    return raw


def _flip(raw, rng):
    at = rng.randrange(8 * len(raw)) if raw else 0
    return raw[: at // 8] + bytes([raw[at // 8] ^ 1 << at % 8]) + raw[at // 8 + 1 :] if raw else raw


def _insert(raw, rng):
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + rng.choice(_PIECES) * rng.choice((1, 1, 1, 2, 100)) + raw[at:]


def _cut(raw, rng):
    start, end = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    return rng.choice((raw[:start], raw[end:], raw[:start] + raw[end:], raw[start:end]))


def _double(raw, rng):
    start, end = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    return raw[:end] + raw[start:end] * rng.choice((1, 1, 2, 20)) + raw[end:]


def _replace_value(raw, rng):
    """Something after a colon, a comma or a bracket becomes another value."""
    places = [n for n, byte in enumerate(raw) if byte in b":,["]
    if not places:
        return raw
    at = rng.choice(places) + 1
    end = at
    while end < len(raw) and raw[end] not in b",]}":
        end += 1
    return raw[:at] + rng.choice(_VALUES).encode() + raw[end:]


_DAMAGES = (_flip, _insert, _cut, _double, _replace_value, _replace_value)


def _numbered(template: str, count: int) -> bytes:
    """An object of so many members, built without a list of them."""
    raw = bytearray(b"{")
    for n in range(count):
        raw += (template % n).encode() + b","
    raw[-1:] = b"}"
    return bytes(raw)


_ENTRY = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_MB = 1 << 20
# As much as the limits allow, and more, of whatever costs most.
LARGE = (
    lambda: _numbered(_ENTRY, 200_000),
    lambda: _numbered(_ENTRY, 200_001),
    lambda: _numbered('"model.layers.%d.mlp.experts.0.gate_proj.weight"' + _ENTRY[4:], 200_000),
    lambda: _numbered('"%x":1', 1_099_000),
    lambda: _numbered('"%x":{}', 640_000),
    lambda: b'{"a":[' + b"999," * (8 * _MB) + b"1]}",
    lambda: b'{"a":[' + b"999," * 2_199_000 + b"1]}",
    lambda: b'{"a":[' + b"1e1," * 2_199_000 + b"1]}",
    lambda: b"{" + b'"a":{},' * 640_000 + b'"b":1}',
    lambda: b'{"a":[' + b"[]," * 640_000 + b"1]}",
    lambda: b'{"a":[' + b"[]," * (10 * _MB) + b"1]}",
    lambda: b'{"a":"' + b"{" * (32 * _MB) + b'"}',
    lambda: b'{"a":"' + b"\\u00e9" * (5 * _MB) + b'"}',
    lambda: b'{"a":"' + b'\\"' * (16 * _MB) + b'"}',
    lambda: b'{"a":"' + b"\\\\" * (16 * _MB) + b'"}',
    lambda: b'{"a":' + b'"[",' * (8 * _MB) + b"}",
    lambda: b"{" + b"[" * (32 * _MB),
    lambda: b"{" + b"[}" * (16 * _MB),
    lambda: b"{" + b"[]" * 600_000,
    lambda: b"{" + (b"[" * 65 + b"]" * 65) * 9_990,
    lambda: b'{"a":' * (6 * _MB),
    lambda: b"{" + b'"' * (32 * _MB),
    lambda: b"{" + b"\\" * (32 * _MB),
    lambda: b"{" + b" " * (32 * _MB) + b"}",
    lambda: b'{"a":1' + b"0" * (32 * _MB) + b"}",
    lambda: b'{"a":0.' + b"1" * (32 * _MB) + b"}",
    lambda: b'{"' + b"x" * (32 * _MB) + b'":1}',
    lambda: b'{"' + "é".encode() * (16 * _MB) + b'":{"dtype":"F32"}}',
)


class Doors:
    """The readers under test, and a folder for those that read files."""

    def __init__(self, folder: Path):
        self.source = random_checkpoint(folder / "source", n_shards=2)
        self.index = self.source / "model.safetensors.index.json"
        self.config = self.source / "config.json"
        self.shard = self.source / "model-00001-of-00002.safetensors"
        self.whole = {path: path.read_bytes() for path in (self.index, self.config, self.shard)}
        self.texts = [json.dumps(TINY | change).encode() for change in _CONFIGS]

    def header(self, rng) -> None:
        raw, file_bytes = make_header(rng)
        if rng.random() < 0.02:
            parse_header(raw, file_bytes=file_bytes, where="sound")
        parse_header(damage(raw, rng), file_bytes=file_bytes, where="x")

    def config_text(self, rng) -> None:
        raw = damage(rng.choice(self.texts), rng)
        model_config(parse_json_object(raw, what="x"), where="x")

    def file(self, rng) -> None:
        """With the header's length before it, which may lie."""
        raw, _ = make_header(rng)
        length = rng.choice((len(raw), len(raw), rng.randrange(1 << 16), 1 << rng.randrange(64)))
        content = struct.pack("<Q", length) + damage(raw, rng) + bytes(rng.randrange(64))
        path = self.source / "any"
        path.write_bytes(damage(content, rng) if rng.random() < 0.3 else content)
        read_header(path)

    def folder(self, rng) -> None:
        """A whole source of which one file is damaged."""
        path = rng.choice((self.index, self.index, self.config, self.shard))
        path.write_bytes(damage(self.whole[path], rng))
        try:
            open_source(str(self.source)).tensors.close()
        finally:
            path.write_bytes(self.whole[path])


_CONFIGS = (
    {},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    {"tie_word_embeddings": True, "torch_dtype": "float16", "attention_bias": True},
)


class Tally:
    """What became of the inputs, and which was the slowest."""

    def __init__(self):
        self.outcomes: Counter = Counter()
        self.problems: list[str] = []
        self.worst_s, self.worst = 0.0, ""
        self.large: dict[int, dict] = {}

    def run(self, what: str, work, *arguments) -> None:
        started, processor = time.perf_counter(), time.process_time()
        try:
            work(*arguments)
            outcome = "accepted"
        except JlayerError as error:
            outcome = type(error).__name__
            if len(str(error)) > 100_000 or not str(error).replace("\n", " ").isprintable():
                self.problems.append(f"{what}: says {str(error)[:200]!a}")
        except Exception as error:
            outcome = "uncaught"
            self.problems.append(f"{what}: {type(error).__name__}: {str(error)[:200]!a}")
        took_s, waited_s = time.process_time() - processor, time.perf_counter() - started
        self.outcomes[outcome] += 1
        if took_s > self.worst_s:
            self.worst_s, self.worst = took_s, what
        if took_s > LIMIT_S or waited_s > STUCK_S:
            self.problems.append(
                f"{what}: took {took_s:.2f} s of the processor, {waited_s:.2f} in all"
            )

    def run_large(self, number: int) -> None:
        """In a process of its own, so that its memory can be told."""
        command = [sys.executable, __file__, "--large", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.problems.append(f"large {number}: {done.stderr.strip()[-300:]}")
            return
        found = json.loads(done.stdout)
        self.large[number] = found
        self.outcomes.update(found["outcomes"])
        self.problems += [f"{number}: {line}" for line in found["problems"]]
        if found["peak_bytes"] > LIMIT_BYTES:
            self.problems.append(f"large {number}: {found['peak_bytes']:,} bytes")


def fuzz(count: int, *, seed: int = 0, large: bool = True) -> dict:
    """Throws `count` inputs at the doors; returns figures, `problems` among them."""
    tally, rng = Tally(), random.Random()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=_memory()) as home:
        doors = Doors(Path(home))
        kinds = [doors.header] * 60 + [doors.config_text] * 25 + [doors.file] * 14 + [doors.folder]
        for n in range(count):
            rng.seed(seed * (1 << 40) + n)
            door = rng.choice(kinds)
            tally.run(f"{door.__name__} {seed}:{n}", door, rng)
            if large and n % LARGE_EVERY == 0:
                tally.run_large(n // LARGE_EVERY % len(LARGE))
    return {
        "count": count,
        "outcomes": dict(tally.outcomes),
        **_cost(tally),
        "worst": tally.worst,
        "large": tally.large,
        "took_s": round(time.perf_counter() - started, 1),
        "problems": tally.problems,
    }


def throw_large(number: int) -> dict:
    """One of the large inputs, in this process: what became of it, seconds and peak memory."""
    raw, tally = LARGE[number](), Tally()
    tally.run("large", lambda: parse_header(raw, file_bytes=8 + len(raw), where="x"))
    return {"outcomes": tally.outcomes, "problems": tally.problems, **_cost(tally)}


def _cost(tally):
    # Not ru_maxrss, which a child inherits from the process that started it.
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return {"worst_s": round(tally.worst_s, 3), "peak_bytes": peak}


def _memory() -> str | None:
    """A file system in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=int, metavar="N", help="only this one of the large inputs")
    args = parser.parse_args()
    if args.large is not None:
        print(json.dumps(throw_large(args.large)))
        return 0
    found = fuzz(args.count, seed=args.seed)
    for line in found["problems"][:20]:
        print(line, file=sys.stderr)
    print(json.dumps(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
