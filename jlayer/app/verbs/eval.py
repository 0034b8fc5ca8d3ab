"""Measure how well a model predicts a text, how far the predictions of two models differ, or how
well a model does at tasks.

    jlayer eval perplexity MODEL --text FILE
    jlayer eval compare A B --text FILE
    jlayer eval harness MODEL --tasks T,...

The whole text is encoded, after the beginning token of the published tokenizer, and cut into
windows of --window tokens that begin --stride apart. Each window predicts the tokens that the one
before it has not. Bits per byte count the bytes of the text in UTF-8. Tasks are those of
lm-evaluation-harness, all of whose questions share forward passes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from argparse import SUPPRESS
from contextlib import contextmanager

from jlayer.app import harness, options, progress
from jlayer.app.inputs import read_text
from jlayer.app.running import describe
from jlayer.app.streams import is_terminal, tell
from jlayer.app.together import followed, opened_for
from jlayer.errors import UsageError
from jlayer.interrupts import check
from jlayer.run_config import RunConfig
from jlayer.sizes import counted


def add_arguments(parser):
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    layout = {"formatter_class": parser.formatter_class}
    one = kinds.add_parser(
        "perplexity",
        help="of one model",
        description="Measure the perplexity of a model.",
        **layout,
    )
    one.add_argument("ref", metavar="MODEL", help=options.REF)
    two = kinds.add_parser(
        "compare",
        help="of two models, and their divergence",
        description="Measure the perplexity of two models, the mean KL divergence of B's "
        "predictions from A's in nats,\nand the share of tokens with the same likeliest token.",
        **layout,
    )
    two.add_argument("a", metavar="A", help=f"the reference: {options.REF}")
    two.add_argument("b", metavar="B", help="a model with the same vocabulary")
    two.add_argument(
        "--scratch", metavar="DIR", help="folder for A's logits (default: the system's, /tmp)"
    )
    options.add_adapter(one)
    for own in (one, two):
        own.add_argument(
            "--text", metavar="FILE", required=True, help="the text, UTF-8; - is stdin"
        )
        own.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
        own.add_argument(
            "--window", type=int, metavar="N", help="tokens (default: the context, at most 1024)"
        )
        own.add_argument("--stride", type=int, metavar="N", help="tokens (default: the window)")
        options.add_run(own)
        options.add_processes(own)
        options.add_offline(own)
        options.add_follow_links(own)
        # Here as well as before KIND; without a default, which would replace what was given there.
        options.add_output(own, default=SUPPRESS)
    three = kinds.add_parser(
        "harness",
        help="of one model at tasks of lm-evaluation-harness",
        description="Run tasks of lm-evaluation-harness (lm_eval).",
        **layout,
    )
    harness.add_arguments(three)
    options.add_output(three, default=SUPPRESS)


# What process 0 alone uses, where there are several: what a host calls its models, and files.
OF_FIRST = ("a", "b", "text", "scratch")


def run(args) -> dict | None:
    if args.kind == "harness":
        return harness.run(args)
    own = ("adapter",) if args.kind == "perplexity" else ()
    run_options = options.given(args, *options.RUN, *options.PROCESSES, *own, "follow_links")
    _check(args, run_options)
    # As `compare` opens them: what speaks against B is said before A runs.
    refs = (args.ref,) if args.kind == "perplexity" else (args.b, args.a, args.b)
    if followed(args, run_options, refs=refs, own=OF_FIRST):
        return None
    text = read_text(args.text, option="--text")
    cut = {"length": args.window, "stride": args.stride, "told": _tell}
    text_of = {}  # the text as the model reads it: ids, and tokens a byte

    @contextmanager
    def opened_and_shown(ref):
        with (
            opened_for(args, run_options, ref=ref, own=OF_FIRST) as model,
            progress.shown(model, None, words=lambda number: f"forward pass {number + 1}"),
        ):
            tell(f"{ref}: {describe(model)}")
            for note in model.notes:
                tell(note)
            yield model

    def encoded(model):
        text_of["ids"], text_of["a_byte"] = _encode(model, text, args.max_tokens)
        check()
        return text_of["ids"]

    from jlayer.measure.evaluate import compare, perplexity

    check()
    if args.kind == "perplexity":
        with opened_and_shown(args.ref) as model:
            done = perplexity(model, encoded(model), **cut)
        found = _result(args.ref, done, text_of["a_byte"])
        if not args.json:
            print(_line(found))
        return found
    both = [lambda ref=ref: opened_and_shown(ref) for ref in (args.a, args.b)]
    done = compare(*both, encoded, scratch=args.scratch, **cut)
    found = {
        "a": _result(args.a, done.first, text_of["a_byte"]),
        "b": _result(args.b, done.second, text_of["a_byte"]),
        "perplexity_ratio": done.second.perplexity / done.first.perplexity,
        "mean_kl": done.mean_kl,
        "same_top_1": done.same_top_1,
    }
    if not args.json:
        print(_line(found["a"]), _line(found["b"]), sep="\n")
        print(
            f"B against A: perplexity {found['perplexity_ratio'] - 1:+.3%}, mean KL divergence "
            f"{done.mean_kl:.6f} nats, same top-1 token {done.same_top_1:.2%}"
        )
    return found


def _check(args, run_options):
    """What no model could take is said before a file is opened. Raises UsageError."""
    for name in ("max_tokens", "window"):
        found = getattr(args, name)
        if found is not None and found < 2:
            raise UsageError(f"{options.flag(name)}: found {found}, expected at least 2")
    if args.stride is not None and not 1 <= args.stride <= (args.window or args.stride):
        most = "up" if args.window is None else f"to the window's {args.window}"
        raise UsageError(f"--stride: found {args.stride}, expected from 1 {most}")
    RunConfig.from_options(**run_options)


def _encode(model, text, max_tokens):
    """The text's ids, and their number over that of its bytes."""
    if model.text is None:
        raise UsageError(
            f"{model.folder}: no tokenizer.json or tokenizer.model, and a text is evaluated as "
            "tokens; put the published tokenizer files beside the weights"
        )
    ids = model.text.encode(text)
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = model.text.decode(ids)
    return ids, len(ids) / max(1, len(text.encode()))


def _result(ref, evaluation, tokens_a_byte):
    bits = evaluation.nll / math.log(2) * tokens_a_byte
    return {"ref": ref, **dataclasses.asdict(evaluation), "bits_per_byte": bits}


def _line(found):
    return (
        f"{found['ref']}: perplexity {found['perplexity']:.4f}, {found['nll']:.5f} nats a token, "
        f"{found['bits_per_byte']:.4f} bits a byte; {found['n_predicted']} tokens predicted in "
        f"{found['n_windows']} windows of {found['window']}, {found['stride']} apart; "
        f"{found['sweeps']} forward passes"
    )


def _tell(done, of):
    check()
    if is_terminal(sys.stderr) or done == of:
        tell(f"{done} of {counted(of, 'window')}")
