"""Several cards beside one: seconds of a forward pass over one, over two, ..., and what the links
bring, in turns.

    python benchmarks/cards.py FOLDER --devices 1,2 --device-memory 1536MiB --tokens 1,64,512
    python benchmarks/cards.py FOLDER --devices 1,2 --host-share auto

Each number of cards and of tokens is run by `sweep.py` in a fresh process, `--rounds` times in
turn. Without a core of the host beside them (`--host-share 0`, as it is here unless told), the
links do all the work, and n cards are n links. Memory is that of the fullest card by nvidia-smi.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import common


def sweep(args, n_devices: int, n_tokens: int) -> dict:
    """What `sweep.py` finds, from its last line."""
    script = Path(__file__).with_name("sweep.py")
    words = [sys.executable, str(script), args.folder, "--no-raw", "--tokens", str(n_tokens)]
    words += ["--sweeps", str(args.sweeps), "--devices", str(n_devices)]
    words += ["--host-share", args.host_share, "--context", str(max(64, n_tokens))]
    for option in ("device", "device_memory", "host_memory"):
        if getattr(args, option):
            words += [f"--{option.replace('_', '-')}", getattr(args, option)]
    faults = os.environ | {"PYTHONFAULTHANDLER": "1"}  # a crash says where
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, env=faults)
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            common.say(f"  {line}")
    done.check_returncode()
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found["sweeps"][0], "devices": n_devices, "smi_peak_mib": found["smi_peak_mib"]}


def gained(rows: list[dict]) -> list[dict]:
    """Of the rows of one round: how many times as fast as the first number of cards each is, over
    the same tokens, and the bytes that all links bring a second."""
    first = {row["tokens"]: row for row in reversed(rows)}
    return [
        {
            "devices": row["devices"],
            "tokens": row["tokens"],
            "times_as_fast": first[row["tokens"]]["sweep_s"]["median"] / row["sweep_s"]["median"],
            "bytes_per_s": row["put_bytes_per_s"],
        }
        for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--devices", default="1,2", help="numbers of cards, the smallest first")
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share", default="0")
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    numbers, sizes = ([int(n) for n in words.split(",")] for words in (args.devices, args.tokens))
    result = {"card": common.card(), "options": {**vars(args), "folder": None}, "rounds": []}
    for number in range(args.rounds):
        common.say(f"round {number + 1}")
        rows = [sweep(args, n, n_tokens) for n_tokens in sizes for n in numbers]
        result["rounds"].append(rows)
    rounds = [gained(rows) for rows in result["rounds"]]
    result["gained"] = []
    for of_all in zip(*rounds, strict=True):
        of_all = list(of_all)
        times = common.summary([row["times_as_fast"] for row in of_all])
        speeds = common.summary([row["bytes_per_s"] for row in of_all])
        result["gained"].append({**of_all[0], "times_as_fast": times, "bytes_per_s": speeds})
        common.say(
            f"{of_all[0]['tokens']:5} tokens, {of_all[0]['devices']} cards: "
            f"{times['median']:.3f} times as fast as {numbers[0]} ({times['min']:.3f}-"
            f"{times['max']:.3f}); {speeds['median'] / 1e9:.1f} GB/s"
        )
    result["smi_peak_mib"] = max(row["smi_peak_mib"] for rows in result["rounds"] for row in rows)
    common.last_line(result)


if __name__ == "__main__":
    main()
