"""Write a converted folder back as published: Hugging Face shards, Orbax, or a GGUF file.

TARGET is a new folder, or a new file for GGUF, which is there once the export is complete. An
export that was stopped leaves an unfinished folder beside it; the same command continues from there
(Hugging Face shards) or starts again (Orbax, GGUF).
"""

from __future__ import annotations

import argparse
import dataclasses

from jlayer.app.streams import conversion_progress, tell
from jlayer.interrupts import released
from jlayer.sizes import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a layered checkpoint")
    parser.add_argument("target", metavar="TARGET", help="a new folder, or a new X.gguf")
    parser.add_argument(
        "--format",
        choices=("huggingface", "orbax", "gguf"),
        required=True,
        help="the form to write",
    )
    parser.add_argument(
        "--type",
        choices=("f16", "bf16", "q8_0"),
        help="of a GGUF's matrices (default: as they are stored)",
    )


def run(args: argparse.Namespace) -> dict:
    """Exports, and returns what was done; raises the errors of jlayer.errors."""
    from jlayer.convert.export import export_checkpoint

    progress = conversion_progress()
    try:
        with released():
            done = export_checkpoint(
                args.folder, args.target, format=args.format, type=args.type, progress=progress
            )
    finally:
        progress.close()
    if not args.json:
        print(
            f"{done.target}: holds {args.folder} as {args.format}, "
            f"{counted(done.n_tensors, 'tensor')}, {done.target_bytes:,} bytes"
        )
    tell(f"wrote {done.target_bytes:,} bytes in {done.elapsed_s:.2f} s")
    return dataclasses.asdict(done)
