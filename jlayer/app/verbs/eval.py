"""How well a model predicts a text, or how far two models' predictions are apart.

    jlayer eval perplexity REF --text FILE
    jlayer eval compare A B --text FILE

The text is encoded whole, with the beginning token that the tokenizer was published with, and cut
into windows of --window tokens that begin --stride apart: each predicts what the one before it has
not. Bits per byte are of the tokens' share of the text's UTF-8.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import contextmanager

from jlayer.app import progress
from jlayer.app.verbs.generate import RUN, describe
from jlayer.errors import StorageError, UsageError


def add_arguments(parser):
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    one = kinds.add_parser("perplexity", help="of one model", description="Perplexity of a model.")
    one.add_argument("ref", metavar="REF", help="a folder or a hub id")
    two = kinds.add_parser(
        "compare",
        help="of two models, and their divergence",
        description="Perplexity of two models; mean KL divergence of B's predictions from A's in "
        "nats, and the share of tokens that both hold likeliest.",
    )
    two.add_argument("a", metavar="A", help="a folder or a hub id, to be held against")
    two.add_argument("b", metavar="B", help="another, of the same vocabulary")
    two.add_argument("--scratch", metavar="DIR", help="where A's logits wait (default: /tmp)")
    for own in (one, two):
        own.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8")
        own.add_argument("--max-tokens", type=int, metavar="N", help="of the text's beginning")
        own.add_argument(
            "--window", type=int, metavar="N", help="tokens (default: the context, at most 1024)"
        )
        own.add_argument("--stride", type=int, metavar="N", help="tokens (default: the window)")
        own.add_argument("--offline", action="store_true", help="take nothing from the network")
        for name, line in RUN.items():
            own.add_argument(f"--{name.replace('_', '-')}", help=line)
        # Here too, so that they may stand behind the rest.
        own.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args) -> dict:
    text = _read(args.text)
    if args.max_tokens is not None and args.max_tokens < 2:
        raise UsageError(f"--max-tokens: found {args.max_tokens}, expected at least 2")
    from jlayer.api import AutoModel
    from jlayer.measure.evaluate import compare, perplexity

    options = {name: getattr(args, name) for name in RUN if getattr(args, name) is not None}
    cut = {"length": args.window, "stride": args.stride, "told": _tell}
    text_of = {}  # the text as the model reads it: ids, and how many a byte

    @contextmanager
    def opened(ref):
        with (
            AutoModel.from_pretrained(ref, offline=args.offline, **options) as model,
            progress.shown(model, None, words=lambda number: f"sweep {number + 1}"),
        ):
            print(f"jlayer: {ref}: {describe(model)}", file=sys.stderr)
            yield model

    def encoded(model):
        text_of["ids"], text_of["a_byte"] = _encode(model, text, args.max_tokens)
        return text_of["ids"]

    if args.kind == "perplexity":
        with opened(args.ref) as model:
            done = perplexity(model, encoded(model), **cut)
        found = _result(args.ref, done, text_of["a_byte"])
        if not args.json:
            print(_line(found))
        return found
    refs = [lambda ref=ref: opened(ref) for ref in (args.a, args.b)]
    done = compare(*refs, encoded, scratch=args.scratch, **cut)
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


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"--text: {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"--text: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text: {path}: not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from None


def _encode(model, text, max_tokens):
    """The text's ids, and how many of them a byte takes."""
    from jlayer.text.tokenizer import NO_TOKENIZER

    if model.text is None:
        raise UsageError(NO_TOKENIZER.format(folder=model.folder))
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
        f"{found['sweeps']} sweeps"
    )


def _tell(done, of):
    if sys.stderr.isatty() or done == of:
        print(f"jlayer: {done} of {of} windows", file=sys.stderr)
