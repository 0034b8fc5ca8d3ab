"""Remove a model from the hub's cache, or one revision of it: owner/name@revision.

Shows what goes and how much room that makes, and asks. Nothing outside the cache is removed, and
nothing that another revision or model uses. A removal that was cut off leaves a model that `jlayer
list` shows as incomplete; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys

from jlayer.app import options
from jlayer.app.shelf import SHORT
from jlayer.app.streams import is_terminal, tell
from jlayer.app.table import printable
from jlayer.checkpoint.cache import cache_folder
from jlayer.checkpoint.removal import Removal, check_unused, find_removal, remove
from jlayer.errors import UsageError
from jlayer.interrupts import check, released
from jlayer.sizes import human


def add_arguments(parser: argparse.ArgumentParser) -> None:
    line = "a hub id, owner/name[@revision], or a model's folder in the hub's cache"
    parser.add_argument("id", metavar="ID", help=line)
    options.add_yes(parser)


def run(args: argparse.Namespace) -> dict:
    removal = find_removal(cache_folder(), args.id)
    check_unused(removal)
    for line in described(removal):
        tell(line)
    if not args.yes:
        _ask(removal)
    check()  # the last chance to stop
    remove(removal)
    if not args.json:
        print(f"{removal.name}: removed, {human(removal.freed_bytes)} freed")
    return {
        "id": removal.name,
        "folder": removal.repository.folder,
        "revisions": [one.commit for one in removal.revisions],
        "whole": removal.whole,
        "freed_bytes": removal.freed_bytes,
        "kept_bytes": removal.kept_bytes,
    }


def described(removal: Removal) -> list[str]:
    """What is to be removed, a line for each revision, and what stays."""
    lines = [
        f"{removal.name}: revision {one.commit[:SHORT]}"
        + (f" ({', '.join(one.refs)})" if one.refs else "")
        for one in removal.revisions
    ]
    lines = lines or [f"{removal.name}: what is left of it, without a revision"]
    if removal.kept_bytes:
        kept = human(removal.kept_bytes)
        lines.append(f"{removal.name}: {kept} of it stay, which others use as well")
    return [printable(line) for line in lines]


def _ask(removal):
    """Raises UsageError unless a person says yes."""
    if not is_terminal(sys.stdin):
        raise UsageError(
            f"{removal.name}: nobody to ask (no terminal on stdin); add --yes to remove it"
        )
    what = f"remove {printable(removal.name)} for good, {human(removal.freed_bytes)}?"
    print(f"jlayer: {what} [y/N] ", end="", file=sys.stderr, flush=True)
    with released():
        answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError(f"{removal.name}: not confirmed; nothing was changed")
