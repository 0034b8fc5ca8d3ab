"""Turn a published checkpoint into one file a layer, checked and with its checksums.

SOURCE is a folder with config.json and safetensors, single or sharded, with PyTorch's or Meta's
pickles, or with what Orbax saved; or a hub id. TARGET is a new folder, or one that holds an earlier
conversion. Without --dtype and --quantize only the place of the weights changes. The result is a
checkpoint that transformers loads, unless --quantize is given.

A conversion that was stopped, in whatever way, goes on where it was when the same command is run
again. With --delete-source each weight file of SOURCE is removed once all that is made of it is on
disk and was read again by its hash; the links and blobs of a hub cache likewise, unless another
revision uses them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from jlayer.app.cli import INTERRUPTED, TERMINATED, Interrupted, Terminated
from jlayer.checkpoint.hub import Weights, cached_folder, is_hub_id, local_folder
from jlayer.checkpoint.layout import EMBED_FILE
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import UsageError
from jlayer.spec import ITEM_BYTES

HELP = "turn a published checkpoint into one file a layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of the published checkpoint, or a hub id: owner/name[@revision]",
    )
    parser.add_argument("target", metavar="TARGET", help="folder for the layered checkpoint")
    parser.add_argument(
        "--dtype",
        choices=tuple(ITEM_BYTES),
        help="cast all weights, to nearest (default: each keeps its own)",
    )
    parser.add_argument(
        "--quantize",
        choices=tuple(SCHEMES),
        help="keep matrices in 8 or about 4 bits a weight (see the README for what it costs)",
    )
    parser.add_argument(
        "--delete-source",
        action="store_true",
        help="remove SOURCE's weight files, each as soon as nothing needs it; asks first",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before --delete-source")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another model in TARGET, or make it anew"
    )
    parser.add_argument(
        "--allow-extra", action="store_true", help="leave out tensors that the model has no use for"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep weights that are NaN or infinite"
    )
    parser.add_argument("--offline", action="store_true", help="take nothing from the network")


def _source(args):
    """The folder of SOURCE. What --delete-source has removed from the hub's cache is not fetched
    again: the target, once begun, goes on with what is left."""
    if not is_hub_id(args.source):
        return args.source
    cached = cached_folder(args.source) if args.delete_source else None
    if cached and os.path.exists(os.path.join(args.target, EMBED_FILE)):
        return cached
    return local_folder(args.source, weights=Weights.CONVERT, offline=args.offline)


def run(args: argparse.Namespace) -> dict:
    """Converts, and returns what was done; raises the errors of jlayer.errors."""
    from convert import RESUME
    from convert.progress import StderrProgress

    if args.delete_source and not args.yes:
        _ask(args)
    source = _source(args)
    progress = StderrProgress()
    try:
        from convert import convert_checkpoint  # takes a while, in which it may be interrupted

        done = convert_checkpoint(
            source,
            args.target,
            dtype=args.dtype,
            quantize=args.quantize,
            overwrite=args.overwrite,
            delete_source=args.delete_source,
            allow_extra=args.allow_extra,
            allow_nonfinite=args.allow_nonfinite,
            progress=progress,
        )
    except (KeyboardInterrupt, Terminated) as stop:
        progress.close()
        word, code = (
            ("terminated", TERMINATED)
            if isinstance(stop, Terminated)
            else ("interrupted", INTERRUPTED)
        )
        line = f"{args.target}: {word}; what is finished stays; {RESUME}"
        print(f"jlayer: {line}", file=sys.stderr)
        found = {"error": line, "exit_code": code, "finish_reason": "interrupted"}
        raise Interrupted(found, code) from None
    finally:
        progress.close()
    rate = done.source_bytes / max(done.elapsed_s, 1e-9) / 1e6
    print(
        f"jlayer: read {done.source_bytes:,} bytes of weights in {done.elapsed_s:.2f} s "
        f"({rate:,.0f} MB/s)",
        file=sys.stderr,
    )
    if not args.json:
        print(_line(done))
    return dataclasses.asdict(done)


def _ask(args):
    """Raises UsageError unless a person says yes."""
    if not sys.stdin.isatty():
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
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("--delete-source: not confirmed; nothing was changed")


def _line(done):
    dtypes = ", ".join(f"{n} tensors in {dtype}" for dtype, n in done.dtypes.items())
    n_at_int8 = len(done.quantization["at_int8"]) if done.quantization else 0
    verb = "already holds all of" if done.status == "unchanged" else "holds"
    return (
        f"{done.target}: {verb} {done.source}, {done.n_layers} layers in {done.n_files} files, "
        f"{done.target_bytes:,} bytes, {dtypes}"
        + (
            f"; layers quantised to {done.quantization['scheme']}, "
            f"{done.block_bits:.2f} bits a weight"
            if done.block_bits
            else ""
        )
        + (f", {n_at_int8} of their matrices at int8" if n_at_int8 else "")
        + (f"; removed there: {', '.join(done.removed)}" if done.removed else "")
    )
