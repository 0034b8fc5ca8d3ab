"""Data files of the package, by name: configs of known models, and presets for runs."""

from __future__ import annotations

import difflib
import re
import tomllib
from importlib.resources import files

from jlayer.config import parse_choice
from jlayer.errors import UsageError

_PACKAGE = "jlayer.data.configs"


def names(kind: str) -> tuple[str, ...]:
    """The names of all files of a kind: "models" or "runs"."""
    entries = files(_PACKAGE).joinpath(kind).iterdir()
    return tuple(sorted(entry.name.rsplit(".", 1)[0] for entry in entries if "." in entry.name))


def model_json(name: str) -> bytes:
    """The published config.json of a known model. Raises UsageError with the closest name."""
    known = names("models")
    if name not in known:
        raise UsageError(
            f"model {name!r} is not known: {_offered(name, known)}known are {', '.join(known)}; "
            "or name a folder, a config.json or a hub id (owner/name)"
        )
    return files(_PACKAGE).joinpath("models", f"{name}.json").read_bytes()


def preset(name: str) -> dict:
    """The options of a preset, by Python name. Raises UsageError with the closest name."""
    parse_choice(name, names("runs"), option="preset")
    return tomllib.loads(files(_PACKAGE).joinpath("runs", f"{name}.toml").read_text())


def _offered(name, known):
    """The known model that shares most words with the name, its size among them; else the one that
    is spelt nearly so."""

    def shared(other):
        return len(_words(name) & _words(other))

    def likeness(other):
        return difflib.SequenceMatcher(None, name.lower(), other).ratio()

    sizes = {word for word in _words(name) if word.endswith("b") and word[0].isdigit()}
    sized = [one for one in known if sizes & _words(one) and shared(one) > 1]
    near = sized or difflib.get_close_matches(name.lower(), known, n=1)
    if not near:
        return ""
    return f"did you mean {max(near, key=lambda one: (shared(one), likeness(one)))!r}? "


def _words(name):
    """llama3-8B -> llama, 3, 8b"""
    return set(re.findall(r"[0-9]+b|[0-9]+|[a-z]+", name.lower()))
