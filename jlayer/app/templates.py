"""The options that say which chat template is rendered, and with which variables."""

from __future__ import annotations

import argparse
import json

from jlayer.app.inputs import argument_text, read_text
from jlayer.errors import UsageError

TEMPLATE, VARIABLE = "--chat-template", "--template-var"


def add_template(parser: argparse.ArgumentParser, *, implied: str = "") -> None:
    """`implied`: what else the options mean, in words."""
    parser.add_argument(TEMPLATE, metavar="F", help=f"a file with another template{implied}")
    parser.add_argument(
        VARIABLE,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a value that the template reads, such as enable_thinking=false, or tools or documents"
        f" with a list; may be repeated{implied}",
    )


def template_of(args: argparse.Namespace) -> dict:
    """The options `chat_template` and `chat_template_kwargs` of `encode_prompts`; None: not given.
    Raises UsageError or StorageError."""
    path = args.chat_template
    template = None if path is None else read_template(path)
    variables = template_variables(args.template_var)
    return {"chat_template": template, "chat_template_kwargs": variables or None}


def read_template(path: str) -> str:
    """Raises UsageError or StorageError."""
    found = read_text(path, option=TEMPLATE)
    if "{" not in found:
        raise UsageError(f"{TEMPLATE}: {path} holds no template: nothing in {{braces}}")
    return found


def system_of(args: argparse.Namespace) -> str | None:
    """What --system says. Raises UsageError."""
    return None if args.system is None else argument_text(args.system, option="--system")


def template_variables(words: list[str]) -> dict:
    """NAME=JSON, as often as it is given -> values by name."""
    found = {}
    for word in words:
        name, equals, raw = argument_text(word, option=VARIABLE).partition("=")
        where = f"{VARIABLE} {name}" if equals else f"{VARIABLE}: found {word!r:.60}"
        if not equals or not name.isidentifier():
            raise UsageError(f"{where}: expected NAME=JSON, such as enable_thinking=false")
        if name in found:
            raise UsageError(f"{where}: given twice")
        try:
            found[name] = json.loads(raw, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: {raw!r:.60} is not JSON ({error}); expected true, false, a number, text "
                "in double quotes ('\"high\"'), a list or an object"
            ) from None
    return found


def _without_doubles(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
