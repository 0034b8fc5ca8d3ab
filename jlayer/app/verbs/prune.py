"""Leave out the layers of a model that change least, and write the rest as a layered checkpoint.

    jlayer prune MODEL TARGET --drop-layers N --text FILE

One forward pass over the text shows the influence of every layer: 1 - the cosine of its input and
its output, on average over the tokens. The N layers of least influence are left out. Before
anything is written, a report shows the influences, and the perplexity of held-out text without 0 to
N layers: the last quarter of the text, or --held-out. The others are converted as jlayer convert
does it, under new numbers.

A run that was stopped while it wrote goes on when the same command is run again, with the layers
that it had chosen.
"""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import contextmanager

from jlayer.app import options, progress
from jlayer.app.inputs import folder_of, read_text
from jlayer.app.running import describe, opened
from jlayer.app.streams import tell
from jlayer.checkpoint.hub import Weights
from jlayer.errors import UsageError
from jlayer.interrupts import check
from jlayer.run_config import RunConfig
from jlayer.spec import ITEM_BYTES

RUN = ("device_memory", "host_memory", "device", "devices", "host_share")
LEAST_TOKENS = 64  # of either part of a text: fewer tell nothing of a model
HELD_OUT_SHARE = 4  # the last of so many parts of the text, where no other is given


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument("target", metavar="TARGET", help="folder for the layered checkpoint")
    parser.add_argument(
        "--drop-layers", type=int, metavar="N", required=True, help="how many layers to leave out"
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8; - is stdin")
    line = "text whose perplexity is measured (default: the last quarter of --text)"
    parser.add_argument("--held-out", metavar="FILE", help=line)
    line = "layers that stay, whatever their influence, such as 0,31"
    parser.add_argument("--keep", metavar="LIST", help=line)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens (default: the context, at most 1024)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(ITEM_BYTES),
        help="compute in it, and cast all weights to it (default: keep each weight's own dtype)",
    )
    options.add_quantize(parser)
    options.add_overwrite(parser)
    options.add_run(parser, RUN)
    options.add_offline(parser)
    options.add_follow_links(parser)


def run(args) -> dict:
    """Chooses the layers, unless an earlier run has, reports, and converts the rest."""
    run_options = options.given(args, *RUN, "dtype", "follow_links")
    RunConfig.from_options(**run_options)
    keep = _check(args)
    texts = {"text": read_text(args.text, option="--text")}
    if args.held_out is not None:
        texts["held_out"] = read_text(args.held_out, option="--held-out")
    folder = folder_of(args.ref, offline=args.offline, weights=Weights.CONVERT)
    pruning, is_resumed = _chosen(args, folder, keep, texts, run_options)
    if not args.json:
        print("\n".join(_report(pruning)), flush=True)
    from jlayer.app.converted import converted, line_of

    done = converted(
        folder,
        args.target,
        dtype=args.dtype,
        quantize=args.quantize,
        overwrite=args.overwrite,
        follow_links=args.follow_links,
        prune=pruning,
    )
    if not args.json:
        print(line_of(done))
    return {
        "ref": args.ref,
        "target": args.target,
        "n_layers": pruning.n_layers,
        "drop_layers": len(pruning.dropped),
        "dropped": list(pruning.dropped),
        **pruning.found,
        "resumed": is_resumed,
        "converted": dataclasses.asdict(done),
    }


def _check(args):
    """The layers that stay. What no model could take is said before a file is opened. Raises
    UsageError."""
    if args.drop_layers < 1:
        raise UsageError(f"--drop-layers: found {args.drop_layers}, expected at least 1")
    if args.text == "-" and args.held_out == "-":
        raise UsageError("--held-out: found -, which is --text already; name a file")
    for name, least in (("max_tokens", LEAST_TOKENS), ("window", 2)):
        found = getattr(args, name)
        if found is not None and found < least:
            raise UsageError(f"{options.flag(name)}: found {found}, expected at least {least}")
    words = [] if args.keep is None else args.keep.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise UsageError(f"--keep: found {args.keep!a:.80}, expected numbers of layers as in 0,31")
    return tuple(sorted({int(word) for word in words}))


def _chosen(args, folder, keep, texts, run_options):
    """(the layers that are left out, whether an earlier run has chosen them)."""
    from jlayer.convert.pruning import check_to_prune, pruning_there
    from jlayer.convert.transform.pruned import Pruning

    n_layers = check_to_prune(folder, args.target, n_dropped=args.drop_layers, keep=keep)
    asked = {
        "drop_layers": args.drop_layers,
        "keep": list(keep),
        "max_tokens": args.max_tokens,
        "window": args.window,
        "dtype": args.dtype,
        "text": _digest(texts["text"]),
        "held_out": _digest(texts["held_out"]) if "held_out" in texts else None,
    }
    earlier = None if args.overwrite else pruning_there(args.target)
    if earlier is not None:
        _check_same(args.target, earlier.asked, asked)
        tell(f"{args.target}: the layers were chosen before; going on with these")
        return earlier, True
    found = _measured(args, folder, keep, texts, run_options)
    dropped = tuple(found["curve"][-1]["dropped"])
    return Pruning(n_layers, dropped, asked, found), False


def _check_same(target, there, here):
    for name, value in here.items():
        if there.get(name) != value:
            is_text = name in ("text", "held_out")
            found = "another text" if is_text else f"{there.get(name)}, not {value}"
            raise UsageError(
                f"{target}: was begun with {options.flag(name)} {found}; run that command again to "
                "resume, or start again with --overwrite"
            )


def _measured(args, folder, keep, texts, run_options):
    """The influences, and the curve of perplexity by layers left out, for JSON."""
    from jlayer.measure.influence import curve, influences

    @contextmanager
    def opened_without(dropped):
        check()
        with (
            opened(folder, without_layers=dropped, **run_options) as model,
            progress.shown(model, None, words=lambda number: f"forward pass {number + 1}"),
        ):
            tell(f"{_without(dropped)}: {describe(model)}")
            yield model

    with opened_without(()) as model:
        for note in model.notes:
            tell(note)
        ids, held_out = _parts(model, texts, args.max_tokens)
        of = influences(model, ids, length=args.window, told=lambda *_: check())
    order = of.least(args.drop_layers, keep)
    losses = []
    rest = {"length": args.window, "told": lambda dropped: lambda *_: check()}
    for loss in curve(opened_without, held_out, order, **rest):
        tell(f"{_without(loss.dropped)}: perplexity {loss.perplexity:.4f}")
        losses.append({"n": len(loss.dropped), **dataclasses.asdict(loss)})
    return {
        "influence": list(of.of_layers),
        "calibration_tokens": of.n_tokens,
        "held_out_tokens": len(held_out),
        "curve": [{**one, "dropped": list(one["dropped"])} for one in losses],
    }


def _parts(model, texts, max_tokens):
    """(ids to calibrate with, held-out ids). Raises UsageError where either is too short."""
    if model.text is None:
        raise UsageError(
            f"{model.folder}: no tokenizer.json or tokenizer.model, and a text is read as tokens; "
            "put the published tokenizer files beside the weights"
        )
    ids = model.text.encode(texts["text"])[:max_tokens]
    if "held_out" in texts:
        held_out = model.text.encode(texts["held_out"])[:max_tokens]
    else:
        cut = len(ids) - len(ids) // HELD_OUT_SHARE
        ids, held_out = ids[:cut], ids[cut:]
    is_apart = "held_out" in texts
    last = ("--held-out", "") if is_apart else ("--text", " in its last quarter")
    for (option, where), part in ((("--text", ""), ids), (last, held_out)):
        if len(part) < LEAST_TOKENS:
            raise UsageError(
                f"{option}: {len(part)} tokens{where}, expected at least {LEAST_TOKENS}; give a "
                "longer text"
            )
    return ids, held_out


def _report(pruning):
    """The influences and the curve, as lines of two tables."""
    from jlayer.app import table

    found, dropped = pruning.found, set(pruning.dropped)
    rows = [
        (str(layer), f"{value:.4f}", "left out" if layer in dropped else "stays")
        for layer, value in enumerate(found["influence"])
    ]
    lines = table.lines(("layer", "influence", ""), rows, right=(0, 1), columns=table.width())
    rows = [
        (str(one["n"]), f"{one['perplexity']:.4f}", _numbers(one["dropped"]))
        for one in found["curve"]
    ]
    head = ("left out", "perplexity", "layers")
    return [*lines, "", *table.lines(head, rows, right=(0, 1), columns=table.width())]


def _numbers(layers):
    return ", ".join(map(str, layers)) or "none"


def _without(dropped):
    return f"without layers {_numbers(dropped)}" if dropped else "all layers"


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()
