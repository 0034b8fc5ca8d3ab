"""The options of a run, parsed into RunConfig."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from jlayer.config import parse_choice, unknown_name
from jlayer.errors import UsageError
from jlayer.sizes import parse_bytes
from jlayer.spec import ITEM_BYTES


@dataclass(frozen=True)
class RunConfig:
    """The options of a run. Memory in bytes; None: a default that depends on the machine."""

    device_memory: int | None = None
    host_memory: int | None = None
    dtype: str | None = None
    device: str | None = None
    context: int | None = None
    keeps_layers: bool = True  # False: every forward pass reads all layers from disk
    host_share: float | None = None  # of the rows in host memory, multiplied there; None: auto
    draft: str | None = None  # a smaller model that guesses tokens: a folder or a hub id
    adapter: str | None = None  # the folder of a low-rank adapter that is used beside the weights
    adapters: tuple[tuple[str, str], ...] = ()  # (name, folder) of those that requests ask for
    devices: int | None = 1  # its first so many; None: all
    without_layers: tuple[int, ...] = ()  # numbers of layers that are passed over
    follow_links: bool = False  # what links in a published folder lead to outside of it is taken
    coordinator: str | None = None  # of several processes, ADDR:PORT where number 0 listens
    processes: int | None = None  # on as many hosts
    process_id: int | None = None  # from 0 up
    prompt_cache: str | None = None  # a folder for the cache entries of prompts, by content
    prompt_cache_size: int = 10 << 30  # of that folder, in bytes

    @classmethod
    def from_options(cls, **options) -> RunConfig:
        """Parses options as a user writes them ("4GiB", "bfloat16").

        Raises UsageError; for an unknown name, with the closest known one.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(unknown_name("option", name, known))
        for name in ("device_memory", "host_memory", "prompt_cache_size"):
            if options.get(name) is not None:
                options[name] = parse_bytes(options[name], option=name)
        if options.get("dtype") is not None:
            options["dtype"] = parse_choice(
                str(options["dtype"]), tuple(ITEM_BYTES), option="dtype"
            )
        if options.get("device") is not None:
            options["device"] = parse_choice(options["device"], ("cpu", "gpu"), option="device")
        for name in ("keeps_layers", "follow_links"):
            if type(options.get(name, True)) is not bool:
                raise UsageError(f"{name}: found {options[name]!r}, expected a bool")
        if options.get("host_share") is not None:
            options["host_share"] = _share(options["host_share"])
        if "devices" in options:
            options["devices"] = _devices(options["devices"])
        for name, least in (("processes", 1), ("process_id", 0)):
            if options.get(name) is not None:
                options[name] = _number(options[name], name, least)
        for name, expected in (
            ("draft", "a folder or a hub id"),
            ("adapter", "a folder"),
            ("prompt_cache", "a folder"),
        ):
            if options.get(name) is not None:
                options[name] = _path(options[name], name, expected)
        options["adapters"] = _adapters(options.get("adapters"))
        if options.get("without_layers", ()) not in (None, ()):
            own = options.get("adapter") or options["adapters"]
            options["without_layers"] = _layers(options["without_layers"], own or None)
        context = options.get("context")
        if context is not None and (type(context) is not int or context < 1):
            raise UsageError(f"context: found {context!r}, expected a positive number of tokens")
        return cls(**options)


def _share(value):
    """A share from 0 to 1; None for "auto"."""
    if value == "auto":
        return None
    try:
        share = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(
            f"host_share: found {value!r:.80}, expected auto, or a share from 0 to 1, such as 0.7"
        )
    return share


def _devices(value):
    """A number of devices from 1 up; None for "all"."""
    if value == "all":
        return None
    return _number(value, "devices", 1, ", or all")


def _number(value, option, least, more=""):
    words = str(value).strip()
    if isinstance(value, bool) or not words.isascii() or not words.isdigit() or int(words) < least:
        found = f"{option}: found {value!r:.80}, expected a number from {least} up{more}"
        raise UsageError(found)
    return int(words)


def _adapters(value):
    """Pairs of a name and a folder, from a mapping or pairs."""
    pairs = value.items() if isinstance(value, Mapping) else value or ()
    expected = "expected names with the folders of adapters, {name: folder}"
    try:
        found = tuple((name, _path(folder, "adapters", expected)) for name, folder in pairs)
    except (TypeError, ValueError):
        raise UsageError(f"adapters: found {value!r:.80}, {expected}") from None
    names = [name for name, _ in found]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"adapters: found {name!r:.80} for a name, {expected}")
        if names.count(name) > 1:
            raise UsageError(f"adapters: {name} is there twice; give each a name of its own")
    return found


def _layers(value, adapter):
    """Numbers of layers, in order, each once."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(f"without_layers: found {value!r:.80}, expected numbers of layers from 0")
    if adapter is not None:
        raise UsageError(
            "without_layers: an adapter is of all layers; merge it first (jlayer convert --merge), "
            "or leave it out"
        )
    return tuple(sorted(set(numbers)))


def _path(value, option, expected):
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UsageError(f"{option}: found {value!r:.80}, expected {expected}")
    return os.fspath(value)
