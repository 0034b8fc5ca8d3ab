"""The options that several verbs share: one name and one line of help for each."""

from __future__ import annotations

import argparse
import os

from jlayer.encodings.registry import SCHEMES
from jlayer.errors import UsageError
from jlayer.sizes import parse_bytes

SLOWEST = 1_000_000  # bytes a second; what is below lacks its unit
REF = "a folder, or a hub id: owner/name[:FILE][@revision]"
# option -> (what --help says, the default in words)
RUN = {
    "device_memory": ("the most memory of the process on the device", "4GiB"),
    "host_memory": ("the most main memory of the process", "80%% of what is available"),
    "dtype": ("compute in bfloat16, float16 or float32", "the weights' own"),
    "device": ("cpu or gpu", "the accelerator, if there is one"),
    "devices": ("how many GPUs, each with its share of every layer, or all", "1"),
    "host_share": (
        "the share of the weights in main memory that its own cores multiply, from 0 to 1",
        "auto: as measured",
    ),
}
OUTPUT = {
    "json": "print one JSON object on stdout",
    "quiet": "print results and errors only, no progress",
    "debug": "show the traceback of an error",
}
_METAVARS = {
    "device_memory": "SIZE",
    "host_memory": "SIZE",
    "dtype": "DTYPE",
    "device": "DEVICE",
    "devices": "N",
    "host_share": "SHARE",
}


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def add_run(parser: argparse.ArgumentParser, names=tuple(RUN), **defaults) -> None:
    """Adds the options that say where and in how much memory a model runs.

    `defaults`: by option, where a verb has a default of its own.
    """
    for name in names:
        words, default = RUN[name]
        shown, given = defaults.get(name, default), defaults.get(name)
        line = f"{words} (default: {shown})"
        parser.add_argument(flag(name), metavar=_METAVARS[name], default=given, help=line)


PROMPTS = {
    "prompt_cache": ("FOLDER", "keep the cache of prompts there, for what begins like them"),
    "prompt_cache_size": ("SIZE", "the most of that folder; the oldest goes (default: 10GiB)"),
}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    for name, (metavar, line) in PROMPTS.items():
        parser.add_argument(flag(name), metavar=metavar, help=line)


def add_context(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    shown = "" if default is None else f" (default: {default})"
    line = f"the most tokens of prompt and new text together{shown}"
    parser.add_argument("--context", type=int, metavar="N", default=default, help=line)


def add_speeds(parser: argparse.ArgumentParser) -> None:
    """Adds the speeds that a plan takes for granted; `speed` reads them."""
    parser.add_argument("--disk-speed", metavar="B/s", help="of reading, such as 3GB/s")
    parser.add_argument("--link-speed", metavar="B/s", help="from host to device, such as 25GB/s")


def speed(words: str | None, option: str) -> int | None:
    """Bytes a second. A number alone is taken for one in GB/s by whoever writes it: 25 bytes a
    second is no speed of a disk or a link. Raises UsageError."""
    if words is None:
        return None
    found = parse_bytes(words.removesuffix("/s"), option=option)
    if found < SLOWEST:
        raise UsageError(
            f"{option}: found {words}, which is {found} bytes a second; expected at least 1 MB/s, "
            "with its unit: 3GB/s, 500MB/s"
        )
    return found


PROCESSES = {
    "coordinator": ("ADDR:PORT", "of several processes, where number 0 listens"),
    "processes": ("N", "the same command runs N times, on as many hosts (docs/hosts.md)"),
    "process_id": ("I", "which of them this is, from 0 (default: as a launcher says)"),
}


def add_processes(parser: argparse.ArgumentParser) -> None:
    for name, (metavar, line) in PROCESSES.items():
        parser.add_argument(flag(name), metavar=metavar, help=line)


def add_draft(parser: argparse.ArgumentParser) -> None:
    line = "a smaller model with the same tokenizer, which guesses tokens; it stays on the device"
    parser.add_argument("--draft", metavar="REF", help=line)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    line = "store matrices in 8 or about 4 bits a weight, at some loss of quality"
    parser.add_argument("--quantize", choices=tuple(SCHEMES), help=line)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    line = "replace another model in TARGET, or convert again"
    parser.add_argument("--overwrite", action="store_true", help=line)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    line = "a low-rank adapter, as PEFT saves it, that is used beside the weights"
    parser.add_argument("--adapter", metavar="FOLDER", help=line)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter of a verb that answers requests; `adapters_of` reads it."""
    line = "the model's own low-rank adapter, as PEFT saves it; with NAME= one that requests ask "
    line += "for as a model of this name; may be repeated"
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]FOLDER", help=line
    )


def adapters_of(args: argparse.Namespace) -> dict:
    """The options `adapter` and `adapters` of a run. A folder whose path has a "=" in it is one
    without a name. Raises UsageError."""
    own, named = [], []
    for words in args.adapter:
        name, equals, folder = words.partition("=")
        if not equals or os.path.isdir(words):
            own.append(words)
        elif name.strip() and folder:
            named.append((name, folder))
        else:
            raise UsageError(f"--adapter: found {words!r}, expected FOLDER or NAME=FOLDER")
    if len(own) > 1:
        raise UsageError(
            f"--adapter: {own[0]} and {own[1]} have no name, expected one such at most, the "
            "model's own; give the others one that requests ask for: NAME=FOLDER"
        )
    found = {"adapter": own[0]} if own else {}
    return found | ({"adapters": named} if named else {})


# Option of an adapter or of its training -> (its kind, metavar, what --help says).
TRAINING = {
    "rank": (int, "N", "the rank of an adapter's matrices"),
    "targets": (str, "LIST", "the matrices that get an adapter: all, or names as q_proj,v_proj"),
    "tokens_per_step": (int, "N", "the tokens of a step of tuning"),
    "length": (int, "N", "the most tokens of a text in tuning; longer ones are cut into pieces"),
}


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds what the size of a step of tuning depends on, each with its default in words."""
    from jlayer.tuning.adapter import AdapterConfig
    from jlayer.tuning.settings import Settings

    defaults = {**vars(AdapterConfig()), **Settings().as_dict()}
    for name, (kind, metavar, line) in TRAINING.items():
        shown = f"{line} (default: {defaults[name]})"
        parser.add_argument(flag(name), type=kind, metavar=metavar, help=shown)


def add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not use the network")


def add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask first")


def add_follow_links(parser: argparse.ArgumentParser) -> None:
    line = "take what links in the folder lead to outside of it, such as another disk"
    parser.add_argument("--follow-links", action="store_true", help=line)


def add_output(parser: argparse.ArgumentParser, **options) -> None:
    """Adds --json, --quiet and --debug. `options`: of `add_argument`."""
    for name, line in OUTPUT.items():
        parser.add_argument(flag(name), action="store_true", help=line, **options)


def given(args: argparse.Namespace, *names: str) -> dict:
    """The options of these names that the command line sets; the others keep their defaults."""
    found = {name: getattr(args, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}
