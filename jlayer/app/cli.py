"""The command line: a table of verbs, each a module that is imported when chosen.

Results go to stdout, everything else to stderr. With --json exactly one object is printed, also
after an error or a signal. An error is one line; a traceback is shown for our own bugs, and with
--debug.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from contextlib import suppress

from jlayer.app import options
from jlayer.app.ending import Interrupted, code_of, word_of
from jlayer.app.parser import Parser
from jlayer.app.streams import OutputError, ReaderLeft, prepare, quiet, takes_utf8
from jlayer.engine.deciding import end
from jlayer.errors import JlayerError
from jlayer.interrupts import STOPS, check, hold, release, released

# verb -> (module, its line in `jlayer --help`)
VERBS = {
    "demo": ("jlayer.app.verbs.demo", "stream the bundled model and watch it tell a story"),
    "convert": ("jlayer.app.verbs.convert", "turn a published checkpoint into one file a layer"),
    "prune": ("jlayer.app.verbs.prune", "leave out the layers that change least"),
    "verify": ("jlayer.app.verbs.verify", "check every byte of a converted folder"),
    "seal": ("jlayer.app.verbs.seal", "take changed files beside the weights into the manifest"),
    "export": ("jlayer.app.verbs.export", "write a converted folder back as published"),
    "plan": ("jlayer.app.verbs.plan", "show the memory and disk a model needs, and its speed"),
    "generate": ("jlayer.app.verbs.generate", "continue a text"),
    "chat": ("jlayer.app.verbs.chat", "talk with a model, in the terminal or over a pipe"),
    "serve": ("jlayer.app.verbs.serve", "answer OpenAI's protocol over HTTP, with a page"),
    "batch": ("jlayer.app.verbs.batch", "answer a file of requests, line by line"),
    "tune": ("jlayer.app.verbs.tune", "train a low-rank adapter of a model"),
    "bench": (
        "jlayer.app.verbs.bench",
        "measure each stage against its limit, then the whole",
    ),
    "list": ("jlayer.app.verbs.list", "list the models at hand, and whether they fit"),
    "pull": ("jlayer.app.verbs.pull", "fetch a model from the hub"),
    "remove": ("jlayer.app.verbs.remove", "remove a model from the hub's cache"),
    "eval": ("jlayer.app.verbs.eval", "measure perplexity, or compare two models"),
}
BUG = 1


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code.

    Signals are held meanwhile, and acted on at safe points; see `jlayer.interrupts`.
    """
    holds_here = hold()
    try:
        code = _outcome(sys.argv[1:] if argv is None else argv)
        end(code)
        return code
    finally:
        if holds_here:
            release()


def _outcome(argv):
    """Runs the verb, prints what it ends with, and returns the exit code."""
    as_json, is_printed = _is_asked("--json", argv), False
    try:
        result = _run(argv)
        is_printed = True
        if as_json and result is not None:
            _print_json(result)
        check()
        return 0
    except ReaderLeft:
        return 0
    except JlayerError as error:
        if _is_asked("--debug", argv):
            traceback.print_exc()
        return _fail(error.command_line, error.exit_code, as_json, getattr(error, "report", {}))
    except Interrupted as stop:
        if as_json:
            _print_last(stop.result)
        return stop.code
    except STOPS as stop:
        more = {"finish_reason": "interrupted"}
        return _fail(word_of(stop), code_of(stop), as_json and not is_printed, more)
    except Exception as error:
        if as_json:
            line = f"a bug in jlayer: {type(error).__name__}: {error}"
            _print_last({"error": line, "exit_code": BUG})
        raise


def _is_asked(option, argv):
    """Whether an option without a value is given; before a verb's own parser has read the line,
    or where it refuses to."""
    return option in argv[: argv.index("--")] if "--" in argv else option in argv


def _run(argv):
    """The result of the verb, once all that it printed is written; None where only help was
    printed. A signal that was held goes before the result, and before an error."""
    try:
        check()
        result = _run_verb(argv)
    except SystemExit:  # --help, --version
        _flush()
        raise
    except Exception:
        check()
        raise
    check()
    _flush()
    return result


def _run_verb(argv):
    parser = _top_parser()
    if not argv:
        parser.print_help()
        return None
    if argv[0] not in VERBS:
        parser.parse_args(argv[:1])  # --help, --version, or the error that lists the verbs
    verb = importlib.import_module(VERBS[argv[0]][0])
    own = Parser(prog=f"jlayer {argv[0]}", description=verb.__doc__)
    verb.add_arguments(own)
    options.add_output(own)
    args = own.parse_args(argv[1:])
    with quiet(args.quiet):
        return verb.run(args)


def _top_parser():
    from jlayer import __version__

    table = "\n".join(f"  {verb:<10}{line}" for verb, (_, line) in VERBS.items())
    parser = Parser(
        prog="jlayer",
        description="Run language models far larger than the GPU, layer by layer.",
        epilog=f"commands:\n{table}\n\njlayer COMMAND --help shows the options of a command.",
        usage="jlayer COMMAND [options]",
    )
    parser.add_argument(
        "verb", choices=list(VERBS), metavar="COMMAND", help="what to do, see below"
    )
    parser.add_argument("--version", action="version", version=f"jlayer {__version__}")
    return parser


def _fail(line, code, as_json, more):
    line = " ".join(line.split())
    print(f"jlayer: {line}", file=sys.stderr)
    if as_json:
        _print_last({"error": line, "exit_code": code, **more})
    with suppress(ReaderLeft, OutputError):  # what the verb printed before
        _flush()
    return code


def _print_last(result):
    """Prints the object that goes with an exit code which is settled: nothing changes it now."""
    with suppress(*STOPS, ReaderLeft, OutputError):
        _print_json(result)


def _print_json(result):
    print(json.dumps(result, ensure_ascii=not takes_utf8(sys.stdout)))
    _flush()


def _flush():
    with released():  # a reader that does not read must not keep the program from ending
        sys.stdout.flush()


if __name__ == "__main__":
    prepare()
    sys.exit(main())
