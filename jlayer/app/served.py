"""What `serve` and `batch` share: the options of a model that answers requests, and its names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec

from jlayer.app import options
from jlayer.app.inputs import name_of
from jlayer.app.templates import TEMPLATE, read_template
from jlayer.errors import UsageError


def add_served(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--served-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the model's name for clients (default: that of MODEL); may be repeated",
    )
    parser.add_argument(TEMPLATE, metavar="F", help="a file with another template")
    options.add_run(parser)
    options.add_processes(parser)
    options.add_draft(parser)
    options.add_adapters(parser)
    options.add_context(parser)
    options.add_prompts(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)


def run_options(args: argparse.Namespace) -> dict:
    names = (*options.RUN, *options.PROCESSES, *options.PROMPTS, "context", "draft", "follow_links")
    return options.given(args, *names) | options.adapters_of(args)


def template_of(args: argparse.Namespace) -> str | None:
    """Raises UsageError or StorageError."""
    return None if args.chat_template is None else read_template(args.chat_template)


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Under which clients may ask for the model, the one that answers carry first. Raises
    UsageError."""
    if not all(map(str.strip, args.served_name)):
        raise UsageError("--served-name: is empty; give a name, or leave it out")
    own = name_of(args.ref) if os.path.exists(args.ref) else args.ref.partition("@")[0]
    found = tuple(dict.fromkeys([*args.served_name, own, name_of(own)]))
    for name in adapter_names(args):
        if name in found:
            raise UsageError(
                f"--adapter: {name} is a name of the model itself; give the adapter another one"
            )
    return found


def adapter_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Under which clients may ask for the model with an adapter. Raises UsageError."""
    return tuple(name for name, _ in options.adapters_of(args).get("adapters", ()))


def check_packages(verb: str, packages: Sequence[str], *, extra: str = "serve") -> None:
    """Raises UsageError where one is not installed; `extra`: what of ours brings it."""
    for name in packages:
        if find_spec(name) is None:
            raise UsageError(
                f'{verb}: the package {name} is not installed; pip install -e ".[{extra}]"'
            )
