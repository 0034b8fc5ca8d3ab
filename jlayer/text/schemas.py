"""JSON schemas and patterns that clients send: their limits, the place of what is wrong in one, and
the grammars that say the same.

Limits hold before any work. What a grammar allows is left to `constraint`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jlayer.errors import UsageError
from jlayer.text.guidance import complaint, library, limit_child
from jlayer.text.sandbox import run_apart

MAX_SCHEMA_BYTES = 64 << 10
MAX_DEPTH = 64
MAX_PROPERTIES = 2_000
MAX_PATTERN_BYTES = 4 << 10
MAX_CHOICES = 1_000
# JSON leaves the white space between its parts open, and a weak model may write nothing else.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}
OPTIONS_KEY = "x-guidance"  # where the library looks for them in a schema
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")


def checked_schema(schema, where: str) -> dict:
    """A schema within the limits, as plain JSON. Whether the library takes it is not yet known.

    Raises UsageError, with the place.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise UsageError(f"{where}: found {_kind(schema)}, expected a JSON schema, an object")
    _check_size(schema, where)
    try:
        text = json.dumps(schema, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise UsageError(f"{where}: {len(text)} bytes, over the limit of {MAX_SCHEMA_BYTES}")
    return json.loads(text)


def _check_size(schema, where):
    """Without recursion: a nest of 100,000 lists is valid input."""
    left, n_properties, n_bytes = [(schema, 1)], 0, 0
    while left:
        value, depth = left.pop()
        n_bytes += len(value) if isinstance(value, str | Sequence | Mapping) else 1
        if n_bytes > MAX_SCHEMA_BYTES:
            raise UsageError(f"{where}: over the limit of {MAX_SCHEMA_BYTES} bytes")
        if not isinstance(value, Mapping | list | tuple):
            continue
        if depth > MAX_DEPTH:
            raise UsageError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        inside = value.values() if isinstance(value, Mapping) else value
        left += [(each, depth + 1) for each in inside]
        if isinstance(value, Mapping):
            n_bytes += sum(map(len, map(str, value)))
            properties = value.get("properties")
            n_properties += len(properties) if isinstance(properties, Mapping) else 0
        if n_properties > MAX_PROPERTIES:
            raise UsageError(f"{where}: over the limit of {MAX_PROPERTIES} properties in all")


def checked_pattern(pattern, where: str) -> str:
    """A regular expression within the limit. Raises UsageError."""
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(f"{where}: found {_kind(pattern)}, expected a regular expression")
    n_bytes = len(_encoded(pattern, where))
    if n_bytes > MAX_PATTERN_BYTES:
        raise UsageError(f"{where}: {n_bytes} bytes, over the limit of {MAX_PATTERN_BYTES}")
    return pattern


def checked_choices(choices, where: str) -> list[str]:
    """Some texts to choose from, within the limits. Raises UsageError."""
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise UsageError(f"{where}: found {_kind(choices)}, expected a list of texts")
    if len(choices) > MAX_CHOICES:
        raise UsageError(f"{where}: {len(choices)} choices, over the limit of {MAX_CHOICES}")
    for at, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise UsageError(f"{where}[{at}]: found {_kind(choice)}, expected a text")
    n_bytes = sum(len(_encoded(choice, where)) for choice in choices)
    if n_bytes > MAX_SCHEMA_BYTES:
        raise UsageError(f"{where}: {n_bytes} bytes, over the limit of {MAX_SCHEMA_BYTES}")
    return list(choices)


def _encoded(text, where):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: not valid Unicode ({error.reason})") from None


def _kind(value):
    return f"{value!r:.40}" if isinstance(value, str | int | float | None) else type(value).__name__


# Grammars


def json_rule(schema: Mapping) -> str:
    """What stands for a schema within a grammar. The options are not a client's to set."""
    return "%json " + json.dumps({**schema, OPTIONS_KEY: JSON_OPTIONS})


def pattern_rule(pattern: str) -> str:
    """What stands for a regular expression within a grammar."""
    return f"/{library().regex_to_lark(pattern, '')}/"


def text_rule(text: str) -> str:
    """What stands for a given text within a grammar."""
    return json.dumps(text)


def hides_text(schema: Mapping) -> bool:
    """Whether a schema may allow text that does not stand in it."""
    return any(word in json.dumps(schema) for word in ('"pattern', '"format"'))


def whole_grammar(rules: str, tokens: Iterable[str] = (), *, hides: bool) -> str:
    """A grammar of some rules, one of them named `start`.

    Where the next bytes are certain, the library allows the one token that the tokenizer would make
    of them, which is best. But of the text of an added token it makes that token, and then does not
    take it. So where a grammar may write such a text, it chooses no token by itself. `tokens`: the
    texts of added tokens; `hides`: the grammar may write texts that do not stand in it.
    """
    if hides or any(token in rules or json.dumps(token)[1:-1] in rules for token in tokens):
        rules = f'%llguidance {{"no_forcing": true}}\n{rules}'
    return rules


# The place of what is wrong


def place_of(schema: Mapping) -> str:
    """The innermost part of a refused schema that is refused by itself, such as
    ".properties.x.items"; "" where that is the whole, or takes too long to find."""
    done = run_apart("schemas", json.dumps(schema).encode(), what="schema")
    return json.loads(done.stdout) if done is not None and not done.returncode else ""


def child() -> None:
    """What the other process does to find the place."""
    schema = json.load(sys.stdin)
    limit_child()
    sys.stdout.write(json.dumps(_innermost(schema, schema)))


def _innermost(schema, root):
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for place, part in _parts(schema):
        if isinstance(part, dict) and complaint(f"start: {json_rule({**shared, **part})}"):
            return place + _innermost(part, root)
    return ""


def _parts(schema: Mapping) -> Iterator[tuple[str, object]]:
    """(place, schema) of each schema right inside another one."""
    for key in _OBJECTS:
        inside = schema.get(key)
        for name, part in inside.items() if isinstance(inside, Mapping) else ():
            yield f".{key}.{name}", part
    for key in _SCHEMAS:
        if key in schema:
            yield f".{key}", schema[key]
    for key in _LISTS:
        inside = schema.get(key)
        for at, part in enumerate(inside if isinstance(inside, list) else ()):
            yield f".{key}[{at}]", part
