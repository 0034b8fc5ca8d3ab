"""What fewer bytes gain: how much faster than bfloat16 int8, int4, FP8 or Q4_K are, compared with
the ratio of the bytes, on random layers of a real shape.

    python benchmarks/quantized_sweep.py WORK --shape 70b --layers 14 --device-memory 1536MiB \\
        --host-memory 100GiB --tokens 1,64,512 --kinds int8,int4,fp8:28,q4_k:48
    python benchmarks/quantized_sweep.py WORK --shape 8b --layers 10 --device cpu --disk --tokens 1

`fp8:28`: with so many layers, where bfloat16 of as many would not fit in memory: a pass then takes
about as long, and what it does once weighs as much. What is compared is bytes a second.

Makes the folders in WORK where they are not there yet, and runs `sweep.py` on each, in a fresh
process for each number of tokens (each has a plan of its own), `--rounds` times in turn. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import common
from make_model import SHAPES, make

# How each is made; FP8 and Q4_K as others publish them. All are compared with the plain one.
PLAIN = "bfloat16"
KINDS = {
    PLAIN: {},
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "fp8": {"fp8": True},
    "q4_k": {"encoding": "q4_k"},
}


def sweeps(folder: Path, args) -> dict:
    """What `sweep.py` finds for each number of tokens, in one."""
    runs = [sweep(folder, args, n_tokens) for n_tokens in _sizes(args)]
    found = {**runs[0], "sweeps": [run["sweeps"][0] for run in runs]}
    return found | {"smi_peak_mib": max(run["smi_peak_mib"] for run in runs)}


def sweep(folder: Path, args, n_tokens: int) -> dict:
    """What `sweep.py` finds, from its last line."""
    script = Path(__file__).with_name("sweep.py")
    words = [sys.executable, str(script), str(folder), "--no-raw", "--tokens", str(n_tokens)]
    words += ["--sweeps", str(args.sweeps), "--context", str(max(64, n_tokens))]
    for option in ("device", "device_memory", "host_memory", "host_share"):
        if getattr(args, option):
            words += [f"--{option.replace('_', '-')}", getattr(args, option)]
    words += ["--disk"] * args.disk
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines()[:-1]:
        common.say(f"  {line}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(rounds: list[dict[str, dict]], index: int) -> dict[str, dict]:
    """For each kind, by round: its bytes a second over those of the plain one, and their times."""
    found = {}
    for kind in rounds[0].keys() - {PLAIN}:
        shares, times = [], []
        for one in rounds:
            plain, small = (one[name]["sweeps"][index] for name in (PLAIN, kind))
            times.append(plain["sweep_s"]["median"] / small["sweep_s"]["median"])
            shares.append(times[-1] / (plain["moved_bytes"] / small["moved_bytes"]))
        found[kind] = {
            "tokens": rounds[0][kind]["sweeps"][index]["tokens"],
            "speedup": common.summary(times),
            "share": common.summary(shares),
        }
    return found


def _sizes(args):
    return [int(word) for word in args.tokens.split(",")]


def _layers(args):
    """kind -> how many layers of it."""
    split = (word.partition(":") for word in args.kinds.split(","))
    return {kind: int(n or args.layers) for kind, _, n in split}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share", default="auto", help="0: no core takes part; see sweep.py")
    parser.add_argument("--disk", action="store_true", help="keep nothing: all from disk")
    words = f"of {', '.join(KINDS)}; each may end in :LAYERS"
    parser.add_argument("--kinds", default="int8,int4", help=words)
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    result = {"card": common.card(), "options": {**vars(args), "work": None}}
    layers = {PLAIN: args.layers} | _layers(args)
    folders = {kind: args.work / f"{args.shape}-{n}-{kind}" for kind, n in layers.items()}
    for kind, folder in folders.items():
        if not (folder / "manifest.json").exists():
            common.say(f"making {folder.name}")
            make(folder, args.shape, layers[kind], **KINDS[kind])
    os.sync()
    rounds = []
    for number in range(args.rounds):
        rounds.append({})
        for kind, folder in folders.items():
            common.say(f"round {number + 1}, {kind}")
            rounds[-1][kind] = found = sweeps(folder, args)
            for row in found["sweeps"]:
                row["moved_bytes"] = row["read_bytes"] if args.disk else row["put_bytes"]
    result["rounds"] = rounds
    result["ratios"] = [ratios(rounds, index) for index in range(len(_sizes(args)))]
    for row in result["ratios"]:
        for kind, found in row.items():
            smi = [one[kind]["smi_peak_mib"] for one in rounds]
            common.say(
                f"{found['tokens']:5} tokens, {kind} of {layers[kind]} layers: {PLAIN} of "
                f"{args.layers} takes {found['speedup']['median']:.3f} times as long; "
                f"{found['share']['median']:.3f} of the cut in bytes "
                f"({found['share']['min']:.3f}-{found['share']['max']:.3f})"
                + (f"; {statistics.median(smi)} MiB by nvidia-smi" if any(smi) else "")
            )
    common.last_line(result)


if __name__ == "__main__":
    main()
