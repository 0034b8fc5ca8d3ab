"""Write a converted folder back as published: Hugging Face shards, or an Orbax checkpoint.

TARGET is a new folder. Nothing of it is there until all of it is: an export that was stopped leaves
a folder beside it whose name says so, and the same command goes on with what is finished there
(Hugging Face shards) or begins anew (Orbax).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

HELP = "write a converted folder back as published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a layered checkpoint")
    parser.add_argument("target", metavar="TARGET", help="a new folder")
    parser.add_argument(
        "--format", choices=("huggingface", "orbax"), required=True, help="what to write"
    )


def run(args: argparse.Namespace) -> dict:
    """Exports, and returns what was done; raises the errors of jlayer.errors."""
    from convert.export import export_checkpoint
    from convert.progress import StderrProgress

    progress = StderrProgress()
    try:
        done = export_checkpoint(args.folder, args.target, format=args.format, progress=progress)
    finally:
        progress.close()
    print(
        f"jlayer: wrote {done.n_tensors} tensors to {done.target}, {done.target_bytes:,} bytes in "
        f"{done.elapsed_s:.2f} s",
        file=sys.stderr,
    )
    return dataclasses.asdict(done)
