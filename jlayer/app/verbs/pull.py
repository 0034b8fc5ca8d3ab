"""Fetch a model from the hub into its cache: what a run needs of it, and no more.

Says before how much is to come, and refuses what the disk has no room for. Prints the folder. What
is in the cache already is not fetched again, so a pull that was stopped goes on with the same
command. A pull is a download: --offline is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import time

from jlayer.app import options
from jlayer.app.ending import Interrupted, code_of, word_of
from jlayer.app.streams import conversion_progress, draws, tell
from jlayer.checkpoint.hub import is_id, pull
from jlayer.convert.progress import Progress
from jlayer.errors import UsageError
from jlayer.interrupts import STOPS, released
from jlayer.sizes import human

EVERY_S = 30.0  # between two lines where no bar can be drawn
# What people copy from a browser, or add with the Tab key.
_LINK = re.compile(r"https?://[^/]+/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a hub id: owner/name[:FILE][@revision]")
    options.add_offline(parser)  # as elsewhere, to be refused in our words


def run(args: argparse.Namespace) -> dict:
    _check(args)
    progress = conversion_progress() if args.quiet or draws() else Lines()
    try:
        with released():
            found = pull(args.id, note=tell, progress=progress)
    except STOPS as stop:
        progress.close()
        line = (
            f"{args.id}: {word_of(stop)}; the files that are whole stay; the same command goes on"
        )
        tell(line)
        result = {"error": line, "exit_code": code_of(stop), "finish_reason": "interrupted"}
        raise Interrupted(stop, result) from None
    finally:
        progress.close()
    tell(f"{args.id}: {found.n_files} files, {human(found.n_bytes)}, at {found.revision}")
    if not args.json:
        print(found.folder)
    return {
        "id": args.id,
        "folder": found.folder,
        "revision": found.revision,
        "files": found.n_files,
        "bytes": found.n_bytes,
    }


class Lines(Progress):
    """Where no bar can be drawn: a line now and then."""

    def __init__(self):
        self._total = self._done = 0
        self._told = time.monotonic()

    def start(self, total_bytes: int) -> None:
        self._total = total_bytes

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        if time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            tell(f"{human(self._done)} of {human(self._total)} fetched")


def _check(args):
    """Raises UsageError for what no pull can do."""
    ref = args.id
    if args.offline:
        raise UsageError(
            "--offline: a pull is a download; leave the option out, or see what is there with "
            "jlayer list"
        )
    if os.path.lexists(ref):
        raise UsageError(
            f"{ref}: found here, where a run takes it in the place of the hub's model; "
            "pull from another folder, or give a hub id"
        )
    meant = "/".join(_LINK.sub("", ref).strip("/").split("/")[:2])
    if not is_id(ref) and is_id(meant):
        raise UsageError(f"{ref}: no hub id; did you mean {meant}?")
