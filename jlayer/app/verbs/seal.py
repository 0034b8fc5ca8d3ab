"""Take side files of a converted folder that were changed, added or removed into its manifest.

Side files are what lies beside the weights: config.json, generation_config.json, the tokenizer's
files, templates, licences. The weights stay sealed: a config.json that describes others is refused.
Stopped at any moment, it leaves the old manifest or the new one.
"""

from __future__ import annotations

import argparse
import dataclasses

from jlayer.app.streams import conversion_progress
from jlayer.interrupts import released


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a layered checkpoint")


def run(args: argparse.Namespace) -> dict:
    """Seals, and returns what was taken in; raises the errors of jlayer.errors."""
    from jlayer.app.refusals import refused_in_folder
    from jlayer.convert.target.seal import seal_folder

    progress = conversion_progress()
    try:
        with released():
            done = seal_folder(args.folder, progress=progress)
        notes = refused_in_folder(args.folder)
        for note in notes:
            progress.note(note)
    finally:
        progress.close()
    if not args.json:
        print(f"{done.folder}: {_line(done)}")
    return dataclasses.asdict(dataclasses.replace(done, notes=(*done.notes, *notes)))


def _line(done):
    if done.status == "unchanged":
        return "nothing has changed beside its weights; the manifest stays as it was"
    kinds = {
        "changed": done.changed,
        "added": done.added,
        "removed": done.removed,
        "made again": done.restored,
    }
    return "sealed; " + "; ".join(
        f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names
    )
