"""Whole sweeps of one model under one memory budget: bytes a second compared with the raw link and
the raw disk, and memory by nvidia-smi.

    python benchmarks/sweep.py FOLDER --device-memory 1536MiB --tokens 64,1 [--disk] [--sweeps 5]

The ceiling is printed before anything is measured; the last line is one JSON object. Run it in a
fresh process for each budget, since an allocator's limit is set once.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time

import common

TURN = "turn"


def weight_files(folder: str) -> list[str]:
    """The files of the layers; of a published folder, all that hold weights. Ends the program where
    there are none."""
    for pattern in ("layer-*.safetensors", "*.safetensors"):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
        if paths:
            return paths
    raise SystemExit(f"sweep.py: {folder}: no *.safetensors there; name a folder with weights")


def in_use(model) -> int | None:
    """Bytes that the device's allocator holds now, where it tells."""
    return (model.engine.devices.first.memory_stats() or {}).get("bytes_in_use")


def in_turn() -> None:
    """Waits for its turn: `cards.py`, which runs others between, says it by a line."""
    common.say(TURN)
    sys.stdin.readline()


def measure(model, n_tokens: int, n_sweeps: int, context: int, before=lambda: None) -> dict:
    """Seconds of sweeps of `n_tokens`, after a first one that compiles and fills what stays.
    `before`: called before each."""
    began = time.perf_counter()
    from jlayer.plan.shapes import RunShape

    forward = model.engine.start(RunShape(1, n_tokens, context, sweeps=n_sweeps))
    forward.compile(n_tokens)
    ids = [(7 * i) % model.config.vocab_size for i in range(n_tokens)]
    forward.sweep([ids], [0])
    first_s = time.perf_counter() - began
    seconds, put = [], model.engine.totals.put_bytes
    read, stall = model.engine.totals.read_bytes, model.engine.totals.stall_s
    for _ in range(n_sweeps):
        before()
        began = time.perf_counter()
        forward.sweep([ids], [0])
        seconds.append(time.perf_counter() - began)
    put = (model.engine.totals.put_bytes - put) / n_sweeps
    forward.close()
    found = common.summary(seconds)
    return {
        "tokens": n_tokens,
        "first_s": first_s,
        "sweep_s": found,
        "seconds": seconds,
        "put_bytes": put,
        "read_bytes": (model.engine.totals.read_bytes - read) / n_sweeps,
        "put_bytes_per_s": put / found["median"],
        "stall_s": (model.engine.totals.stall_s - stall) / n_sweeps,
        "predicted_s": model.plan.sweep_seconds,
        "plan_device_peak": model.plan.device_peak_bytes,
        "tile_bytes": model.plan.tile_bytes,
        "n_tiles": model.plan.n_tiles,
        "chunk": model.plan.chunk,
        "tiers": model.plan.as_dict()["tiers"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--host-share", default="auto")
    parser.add_argument("--tokens", default="64,1")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--disk", action="store_true", help="keep nothing: all from disk")
    parser.add_argument("--in-turn", action="store_true", help="wait for a line before each sweep")
    parser.add_argument("--no-raw", action="store_true", help="do not measure link and disk")
    args = parser.parse_args()
    files = weight_files(args.folder)
    result = {"card": common.card(), "options": vars(args)}
    if not args.no_raw:
        result["raw_disk"] = common.raw_disk_speed(files)
        common.say(f"raw disk (O_DIRECT)  {result['raw_disk'] / 1e9:6.2f} GB/s")
        if args.device != "cpu":
            result["raw_link"] = common.summary(common.raw_link_speed())
            common.say(f"raw link             {result['raw_link']['median'] / 1e9:6.2f} GB/s")

    with common.GpuWatch() as watch, common.AnonymousWatch() as anonymous:
        from jlayer import AutoModel
        from jlayer.engine.report import anonymous_bytes

        model = AutoModel.from_pretrained(
            args.folder,
            device=args.device,
            device_memory=args.device_memory,
            host_memory=args.host_memory,
            devices=args.devices,
            host_share=args.host_share,
            keeps_layers=not args.disk,
        )
        result["sweeps"] = []
        for n_tokens in map(int, args.tokens.split(",")):
            context = max(args.context, n_tokens)
            found = measure(
                model, n_tokens, args.sweeps, context, *([in_turn] if args.in_turn else ())
            )
            result["sweeps"].append(found)
            share = found["put_bytes_per_s"] / result.get("raw_link", {"median": 1e9})["median"]
            common.say(
                f"{n_tokens:5} tokens  {found['sweep_s']['median']:8.3f} s a sweep "
                f"({found['sweep_s']['min']:.3f}-{found['sweep_s']['max']:.3f}), predicted "
                f"{found['predicted_s']:.3f}; {found['put_bytes_per_s'] / 1e9:6.2f} GB/s put "
                f"({share:.3f} of the link); {found['read_bytes'] / 1e9:.2f} GB read; "
                f"waited {found['stall_s']:.2f} s; tiers {found['tiers']}; "
                f"{found['n_tiles']} tiles of {found['tile_bytes'] >> 20} MiB"
            )
            result["sweeps"][-1]["in_use"] = in_use(model)
            result["sweeps"][-1]["anonymous_bytes"] = anonymous_bytes()
            result["sweeps"][-1]["plan_host_peak"] = model.plan.host_peak_bytes
            model.engine.host_peak_bytes = max(model.engine.host_peak_bytes, anonymous_bytes())
        result["memory"] = model.engine.memory()
        model.close()
    if args.disk and not args.no_raw:
        result["raw_disk_after"] = common.raw_disk_speed(files)
        common.say(f"raw disk afterwards  {result['raw_disk_after'] / 1e9:6.2f} GB/s")
    result["anonymous_peak_bytes"] = anonymous.peak_bytes
    common.say(f"anonymous peak       {anonymous.peak_bytes / 2**20:6.0f} MiB, seen from outside")
    result["smi_peak_mib"], result["smi_before_mib"] = watch.peak, watch.before
    common.say(f"nvidia-smi peak {watch.peak} MiB (before: {watch.before}); {result['memory']}")
    common.last_line(result)


if __name__ == "__main__":
    main()
