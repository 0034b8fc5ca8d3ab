"""Turn a published checkpoint into one file a layer, checked and with its checksums.

SOURCE is a folder with config.json and safetensors, single or sharded, with PyTorch's or Meta's
pickles, or with an Orbax checkpoint; or a hub id. TARGET is a new folder, or one with an earlier
conversion. Without --dtype and --quantize the weights are copied as they are. The result is a
checkpoint that transformers loads, unless --quantize is given.

A conversion that was stopped continues when the same command is run again. With --delete-source
each weight file of SOURCE is removed once everything made of it is on disk and its checksum was
read back; so are the links and blobs of a hub cache, unless another revision uses them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from jlayer.app import options
from jlayer.app.inputs import folder_of
from jlayer.app.streams import is_terminal
from jlayer.checkpoint.hub import Weights, cached_folder, is_hub_id
from jlayer.checkpoint.layout import EMBED_FILE
from jlayer.errors import UsageError
from jlayer.interrupts import released
from jlayer.spec import ITEM_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of the published checkpoint, or a hub id: owner/name[:FILE][@revision]",
    )
    parser.add_argument("target", metavar="TARGET", help="folder for the layered checkpoint")
    parser.add_argument(
        "--dtype",
        choices=tuple(ITEM_BYTES),
        help="cast all weights, rounded to nearest (default: keep each weight's own dtype)",
    )
    options.add_quantize(parser)
    parser.add_argument(
        "--delete-source",
        action="store_true",
        help="remove each weight file of SOURCE once it is converted; asks first",
    )
    options.add_yes(parser)
    options.add_overwrite(parser)
    parser.add_argument(
        "--allow-extra", action="store_true", help="leave out tensors that the model does not use"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep weights that are NaN or infinite"
    )
    parser.add_argument(
        "--rows",
        metavar="I/N",
        help="keep only the rows that host I (from 0) of N reads, which run the model together",
    )
    parser.add_argument(
        "--merge",
        metavar="ADAPTER",
        help="merge a low-rank adapter into the weights: a folder as PEFT saves it (LoRA, DoRA)",
    )
    options.add_follow_links(parser)
    options.add_offline(parser)


def _source(args):
    """The folder of SOURCE. A conversion that continues with --delete-source uses what is left in
    the hub's cache: what it removed there is not downloaded again."""
    if not is_hub_id(args.source):
        return args.source
    cached = cached_folder(args.source) if args.delete_source else None
    if cached and os.path.exists(os.path.join(args.target, EMBED_FILE)):
        return cached
    return folder_of(args.source, weights=Weights.CONVERT, offline=args.offline)


def run(args: argparse.Namespace) -> dict:
    """Converts, and returns what was done; raises the errors of jlayer.errors."""
    from jlayer.app.converted import converted, line_of

    rows = _rows(args.rows)
    if args.delete_source and not args.yes:
        _ask(args)
    done = converted(
        _source(args),
        args.target,
        dtype=args.dtype,
        quantize=args.quantize,
        overwrite=args.overwrite,
        delete_source=args.delete_source,
        allow_extra=args.allow_extra,
        allow_nonfinite=args.allow_nonfinite,
        follow_links=args.follow_links,
        rows=rows,
        merge=args.merge,
    )
    if not args.json:
        print(line_of(done))
    return dataclasses.asdict(done)


def _rows(words):
    """(host, hosts) of --rows. Raises UsageError."""
    if words is None:
        return None
    number, slash, n = words.partition("/")
    if not (slash and all(part.isascii() and part.isdigit() for part in (number, n))):
        raise UsageError(f"--rows: found {words!a}, expected I/N, such as 0/2: host I of N, from 0")
    return int(number), int(n)


def _ask(args):
    """Raises UsageError unless a person says yes."""
    if not is_terminal(sys.stdin):
        raise UsageError(
            "--delete-source: nobody to ask (no terminal on stdin); add --yes to remove the weight "
            f"files of {args.source} as they are converted"
        )
    form = args.quantize or args.dtype
    kind = f" to {form}, which is all that will remain" if form else ""
    print(
        f"jlayer: remove the weight files of {args.source} for good, each once it is converted"
        f"{kind}? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    with released():
        answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("--delete-source: not confirmed; nothing was changed")
