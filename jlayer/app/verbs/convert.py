"""Turn a published checkpoint into one file a layer, checked and with its checksums.

SOURCE is a folder with config.json and safetensors, single or sharded; TARGET is a new folder, or
one that holds an earlier conversion. Nothing but the weights' place changes, unless --dtype is
given: the result is still a checkpoint that transformers loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jlayer.spec import ITEM_BYTES

HELP = "turn a published checkpoint into one file a layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of the published checkpoint")
    parser.add_argument("target", metavar="TARGET", help="folder for the layered checkpoint")
    parser.add_argument(
        "--dtype",
        choices=tuple(ITEM_BYTES),
        help="cast all weights, to nearest (default: each keeps its own)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another model in TARGET, or make it anew"
    )
    parser.add_argument(
        "--allow-extra", action="store_true", help="leave out tensors that the model has no use for"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep weights that are NaN or infinite"
    )


def run(args: argparse.Namespace) -> dict:
    """Converts, and returns what was done; raises the errors of jlayer.errors."""
    from convert import convert_checkpoint
    from convert.progress import StderrProgress

    progress = StderrProgress()
    try:
        done = convert_checkpoint(
            args.source,
            args.target,
            dtype=args.dtype,
            overwrite=args.overwrite,
            allow_extra=args.allow_extra,
            allow_nonfinite=args.allow_nonfinite,
            progress=progress,
        )
    finally:
        progress.close()
    rate = done.source_bytes / max(done.elapsed_s, 1e-9) / 1e6
    print(
        f"jlayer: read {done.source_bytes:,} bytes of weights in {done.elapsed_s:.1f} s "
        f"({rate:,.0f} MB/s)",
        file=sys.stderr,
    )
    if not args.json:
        print(_line(done))
    return dataclasses.asdict(done)


def _line(done):
    dtypes = ", ".join(f"{n} tensors in {dtype}" for dtype, n in done.dtypes.items())
    verb = "already holds all of" if done.status == "unchanged" else "holds"
    return (
        f"{done.target}: {verb} {done.source}, {done.n_layers} layers in {done.n_files} files, "
        f"{done.target_bytes:,} bytes, {dtypes}"
    )
