"""The command line: a table of verbs, each a module that is imported when chosen, and one way to
end.

Results go to stdout, all else to stderr. With --json exactly one object is printed, whatever
happens. A refusal is one line; a traceback shows only for our own bugs, or with --debug.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback

from jlayer.errors import JlayerError, UsageError

# verb -> (module, what `jlayer --help` says of it)
VERBS = {
    "demo": ("jlayer.app.verbs.demo", "stream the bundled model and watch it tell a story"),
    "convert": ("jlayer.app.verbs.convert", "turn a published checkpoint into one file a layer"),
    "verify": ("jlayer.app.verbs.verify", "read a converted folder whole and check every byte"),
    "export": ("jlayer.app.verbs.export", "write a converted folder back as published"),
    "plan": (
        "jlayer.app.verbs.plan",
        "what a model needs of memory and disk, before any of it is used",
    ),
    "generate": ("jlayer.app.verbs.generate", "continue a text"),
    "bench": (
        "jlayer.app.verbs.bench",
        "measure each stage against its ceiling, then whole sweeps",
    ),
    "eval": ("jlayer.app.verbs.eval", "how well a model predicts a text, or two models compared"),
}
INTERRUPTED, TERMINATED, BUG = 130, 143, 1


class Terminated(BaseException):
    """SIGTERM: leaves by the same doors as an interrupt."""


class Interrupted(BaseException):
    """Raised by a verb that was interrupted and has a result all the same; `code` is what the
    program ends with."""

    def __init__(self, result: dict, code: int):
        super().__init__(code)
        self.result, self.code = result, code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, exit code 2."""

    def error(self, message):
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(argv, as_json)
    except BrokenPipeError:
        # Whoever read our output has left; a second error at exit is kept from them too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except JlayerError as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _fail(error, error.exit_code, as_json, getattr(error, "report", {}))
    except Interrupted as stop:
        _print_json(stop.result) if as_json else None
        return stop.code
    except (KeyboardInterrupt, Terminated) as stop:
        word, code = (
            ("terminated", TERMINATED)
            if isinstance(stop, Terminated)
            else ("interrupted", INTERRUPTED)
        )
        return _fail(word, code, as_json, {"finish_reason": "interrupted"})
    except Exception as error:
        if as_json:
            _print_json(
                {"error": f"a bug in jlayer: {type(error).__name__}: {error}", "exit_code": BUG}
            )
        raise


def _run(argv, as_json):
    parser = _top_parser()
    if not argv:
        parser.print_help()
        return 0
    if argv[0] not in VERBS:
        parser.parse_args(argv[:1])  # --help, --version, or the error that offers the verbs
    verb = importlib.import_module(VERBS[argv[0]][0])
    own = Parser(prog=f"jlayer {argv[0]}", description=verb.__doc__, formatter_class=_Help)
    verb.add_arguments(own)
    own.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    result = verb.run(own.parse_args(argv[1:]))
    if as_json:
        _print_json(result)
    return 0


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)


def _top_parser():
    from jlayer import __version__

    table = "\n".join(f"  {verb:<10}{line}" for verb, (_, line) in VERBS.items())
    parser = Parser(
        prog="jlayer",
        description="Run language models far larger than the GPU, layer by layer.",
        epilog=f"verbs:\n{table}\n\njlayer VERB --help tells more of one.",
        formatter_class=_Help,
        usage="jlayer VERB [options]",
    )
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help="what to do, see below")
    parser.add_argument("--version", action="version", version=f"jlayer {__version__}")
    return parser


def _fail(error, code, as_json, more):
    line = " ".join(str(error).split())
    print(f"jlayer: {line}", file=sys.stderr)
    if as_json:
        _print_json({"error": line, "exit_code": code, **more})
    return code


def _print_json(result):
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _terminate(number, frame):
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
