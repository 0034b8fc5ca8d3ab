"""Data files of the package, by name: configs of known models, and presets for runs."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from jlayer.config import parse_choice

_PACKAGE = "jlayer.data.configs"


def names(kind: str) -> tuple[str, ...]:
    """The names of all files of a kind: "models" or "runs"."""
    entries = files(_PACKAGE).joinpath(kind).iterdir()
    return tuple(sorted(entry.name.rsplit(".", 1)[0] for entry in entries if "." in entry.name))


def model_json(name: str) -> bytes:
    """The published config.json of a known model. Raises UsageError with the closest name."""
    parse_choice(name, names("models"), option="model")
    return files(_PACKAGE).joinpath("models", f"{name}.json").read_bytes()


def preset(name: str) -> dict:
    """The options of a preset, by Python name. Raises UsageError with the closest name."""
    parse_choice(name, names("runs"), option="preset")
    return tomllib.loads(files(_PACKAGE).joinpath("runs", f"{name}.toml").read_text())
