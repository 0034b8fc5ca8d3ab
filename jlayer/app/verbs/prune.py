"""Leave out the layers of a model that change least, and write the rest as a layered checkpoint.

    jlayer prune MODEL TARGET --drop-layers N --text FILE

One forward pass over the text shows the influence of every layer: 1 - the cosine of its input and
its output, on average over the tokens. The N layers of least influence are left out. Before
anything is written, a report shows the influences, and the perplexity of held-out text without 0 to
N layers: the last quarter of the text, or --held-out. The others are converted as jlayer convert
does it, under new numbers.

A run that was stopped goes on when the same command is run again: with what it had measured, and
with the layers that it had chosen.
"""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import contextmanager

from jlayer.app import options, progress
from jlayer.app.ending import Interrupted, code_of, word_of
from jlayer.app.inputs import folder_of, read_text
from jlayer.app.running import describe, opened
from jlayer.app.streams import tell
from jlayer.checkpoint.hub import Weights
from jlayer.errors import CheckpointError, DoesNotFitError, StorageError, UsageError
from jlayer.interrupts import STOPS, check
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
    """(the layers that are left out, whether something of an earlier run was taken)."""
    from jlayer.convert.pruning import check_to_prune, pruning_there
    from jlayer.convert.target.measured import measuring
    from jlayer.convert.transform.pruned import Pruning

    source = check_to_prune(folder, args.target, n_dropped=args.drop_layers, keep=keep)
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
        if found := _difference(earlier.asked, asked):
            raise UsageError(_refusal(args.target, found))
        tell(f"{args.target}: the layers were chosen before; going on with these")
        return earlier, True
    with measuring(args.target, {**asked, "model": source.digest}, note=tell) as measured:
        is_resumed = _takes(args, measured)
        with _said_to_go_on(args.target, measured):
            found = (measured.found or {}).get("report")
            if found is None:
                found = _measured(args, folder, source, keep, texts, run_options, measured)
    dropped = tuple(found["curve"][-1]["dropped"])
    return Pruning(source.n_layers, dropped, asked, found), is_resumed


def _takes(args, measured):
    """Whether an earlier run has measured some of it. Raises UsageError where that was something
    else, and CheckpointError; with --overwrite it is measured anew."""
    try:
        there = measured.there()
        found = None if there is None else _difference(there, measured.asked)
    except CheckpointError:
        if not args.overwrite:
            raise
        there, found = None, "something that is damaged"
    if found:
        if not args.overwrite:
            raise UsageError(_refusal(args.target, found))
        tell(f"{args.target}: was begun with {found}; measuring anew")
    elif there is not None:
        measured.take()
        tell(f"{args.target}: some of it was measured before; going on from there")
        return True
    return False


def _difference(there, here):
    """What an earlier run was begun with, where this one is not; None: the same."""
    for name, value in here.items():
        if there.get(name) == value:
            continue
        if name == "model":
            return "another model, or this one as it was before"
        found = (
            "another text" if name in ("text", "held_out") else f"{there.get(name)}, not {value}"
        )
        return f"{options.flag(name)} {found}"
    return None


def _refusal(target, found):
    return (
        f"{target}: was begun with {found}; run that command again to resume, or start again with "
        "--overwrite"
    )


@contextmanager
def _said_to_go_on(target, measured):
    """Says of an end before the end that the same command goes on. Raises Interrupted."""
    from jlayer.convert import RESUME

    try:
        yield
    except STOPS as stop:
        left = f"what was measured stays; {RESUME}" if measured.found else "nothing was measured"
        line = f"{target}: {word_of(stop)}; {left}"
        tell(line)
        found = {"error": line, "exit_code": code_of(stop), "finish_reason": "interrupted"}
        raise Interrupted(stop, found) from None
    except (StorageError, DoesNotFitError) as error:
        if measured.found:
            error.args = (f"{error}; {RESUME}", *error.args[1:])
        raise


def _measured(args, folder, source, keep, texts, run_options, measured):
    """The influences, and the curve of perplexity by layers left out, for JSON. Saves what is
    known after each forward pass."""
    from jlayer.measure.influence import SoFar, curve, influences

    so_far = SoFar.from_dict(measured.found["so_far"]) if measured.found else SoFar()

    def told(*_):
        measured.save({"so_far": so_far.as_dict()})
        check()

    with (
        opened(folder, **run_options) as model,
        progress.shown(model, None, words=lambda number: f"forward pass {number + 1}"),
    ):
        for note in (describe(model), *model.notes):
            tell(note)
        ids, held_out = _parts(model, texts, args.max_tokens)
        how = {"length": args.window, "so_far": so_far, "told": told}
        of, losses = influences(model, ids, **how), []
        order = of.least(args.drop_layers, keep)
        source.check(order)  # before the rest is measured
        for loss in curve(model, held_out, order, **how):
            tell(f"{_without(loss.dropped)}: perplexity {loss.perplexity:.4f}")
            losses.append({"n": len(loss.dropped), **dataclasses.asdict(loss)})
    found = {
        "influence": list(of.of_layers),
        "calibration_tokens": of.n_tokens,
        "held_out_tokens": len(held_out),
        "curve": [{**one, "dropped": list(one["dropped"])} for one in losses],
    }
    measured.save({"report": found})
    return found


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
