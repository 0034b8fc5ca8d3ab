"""Read a converted folder whole and check every byte of it against its manifest.

Lists everything that is missing, cut off, changed or not in the manifest; then the exit code is 3.
Files beside the weights that were changed are told apart from damage: `jlayer seal` takes them in.
A GGUF file has no checksums: its structure alone is checked.
"""

from __future__ import annotations

import argparse
import dataclasses

from jlayer.app.streams import conversion_progress
from jlayer.errors import CheckpointError
from jlayer.interrupts import released
from jlayer.sizes import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a layered checkpoint, or a GGUF file")


def run(args: argparse.Namespace) -> dict:
    """Checks, and returns the result; raises CheckpointError with all findings."""
    from jlayer.convert import verify_folder

    progress = conversion_progress()
    try:
        with released():
            verdict = verify_folder(args.folder, progress=progress)
    finally:
        progress.close()
    if verdict.findings:
        count = counted(len(verdict.findings), "finding")
        raise CheckpointError(
            f"{verdict.folder}: {count}: {'; '.join(verdict.findings)}; {verdict.advice}"
        )
    if not args.json:
        checked = "every checksum correct"
        if not verdict.has_checksums:
            checked = "its structure is right (GGUF has no checksums: its weights were not read)"
        print(
            f"{verdict.folder}: whole, {counted(verdict.n_layers, 'layer')} in "
            f"{counted(verdict.n_files, 'file')}, {verdict.folder_bytes:,} bytes, {checked}"
        )
    return dataclasses.asdict(verdict)
