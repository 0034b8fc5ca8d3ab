"""The Jinja environment of chat templates, piece by piece that of transformers.

Jinja's sandbox bounds neither time nor memory, so this is imported in the process that `sandbox`
starts, and nowhere else. Importing it also imports what Jinja would import only when a template
needs it: that would fail once the process can open no more files.
"""

from __future__ import annotations

import encodings.unicode_escape  # noqa: F401
import html  # noqa: F401
import json
import pprint  # noqa: F401
import re
import textwrap  # noqa: F401
from collections.abc import Mapping
from datetime import datetime

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.sandbox
from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

MIN_VERSION = (3, 1, 6)  # older ones have known ways out of the sandbox

__all__ = [
    "Refused",
    "SecurityError",
    "TemplateSyntaxError",
    "TooLong",
    "check_version",
    "compile_template",
    "render",
]


class Refused(Exception):
    """The template called raise_exception."""


class TooLong(Exception):
    """The text is longer than the limit."""


def check_version() -> None:
    """Raises ImportError where the installed Jinja is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    if found < MIN_VERSION:
        raise ImportError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox")


def compile_template(
    source: str, *, now: datetime, generation: tuple[str, str] = ("", "")
) -> jinja2.Template:
    """`now`: what strftime_now writes. `generation`: what is written before and after the body of
    each {% generation %}. Raises TemplateSyntaxError."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.extend(generation=generation)
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": now.strftime,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(source)


def render(template: jinja2.Template, variables: Mapping, *, limit: int) -> str:
    """The text, which is made in chunks so that one beyond `limit` characters raises TooLong."""
    chunks, length = [], 0
    for chunk in template.generate(**variables):
        length += len(chunk)
        if length > limit:
            raise TooLong
        chunks.append(chunk)
    return "".join(chunks)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj, attribute):
        """Jinja gives an undefined value that prints as nothing; no honest template asks for it."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__}")


class Generation(jinja2.ext.Extension):
    """{% generation %} marks assistant text for training; its body is plain text, between the two
    texts that `compile_template` was given."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller):
        before, after = self.environment.generation
        return before + caller() + after


class Dict:
    """`dict` without its attributes."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without private names."""

    def __init__(*args, **kwargs):  # as Jinja's own, so that a name may be `self`
        self, *args = args
        names = dict(*args, **kwargs)
        for name in names:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name, value):
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name):
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


def raise_exception(message):
    raise Refused(message)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
