"""One call of a tool as a model wrote it, in each form: where it ends, its name, its arguments.

An element reads text that grows, and looks at no character twice but for a few. What stands around
calls is left to `calls`. What is no call raises NoCall, whatever it is: nothing here fails.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

MAX_DEPTH = 64
LONGEST_HEAD = 200  # a name, and what stands between it and the arguments
MOST_INSIDE = 32  # marks that end a call, within the values of one
_KEYS = {"name", "arguments", "parameters", "type", "id", "function"}
_SPACE = re.compile(r"[ \t\r\n]*")
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_FIRST_NAME = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"')
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME = re.compile(r"[A-Za-z0-9_-]")
_NAMED = re.compile(
    r"([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\]\s*([A-Za-z0-9]{1,64})\s*)?(?:\[ARGS\])?\s*(?=\{)"
)


class NoCall(Exception):
    """The text is no call of a tool that was offered."""


@dataclass(frozen=True)
class Found:
    """A call that ends at `end` of the text. arguments: a JSON object, as text."""

    end: int
    name: str
    arguments: str
    id: str | None = None


class ObjectEnd:
    """Where a JSON object ends that begins at a place of a text."""

    _STOPS = re.compile(r'["\\{}\[\]]')

    def __init__(self, at: int):
        self._at, self._depth, self._is_text = at, 0, False

    def find(self, text: str) -> int | None:
        """None while it goes on. Raises NoCall where it is nested too deep."""
        while stop := self._STOPS.search(text, self._at):
            character, end = stop[0], stop.end()
            if character == "\\":
                if end == len(text):
                    self._at = stop.start()
                    return None
                end += self._is_text
            elif character == '"':
                self._is_text = not self._is_text
            elif not self._is_text:
                self._depth += 1 if character in "{[" else -1
                if self._depth > MAX_DEPTH:
                    raise NoCall
            self._at = end
            if self._depth <= 0 and not self._is_text:
                return end
        self._at = len(text)
        return None


class Element(ABC):
    """A call that may begin at a place of a text. `tools`: name -> the schema of its parameters."""

    def __init__(self, at: int, tools: Mapping[str, Mapping], *, is_bare: bool = False):
        """`is_bare`: nothing announced a call, so that only arguments tell it from other JSON."""
        self._at, self._tools, self._is_bare = at, tools, is_bare

    @abstractmethod
    def read(self, text: str) -> Found | None:
        """The call; None while more text may complete it. Raises NoCall."""

    def head(self, text: str) -> tuple[str, int] | None:
        """(name, where the arguments begin as JSON) once that is known, for forms of which the
        arguments are a part as they stand."""
        return None

    def _known(self, name):
        if name not in self._tools:
            raise NoCall
        return name


class JsonElement(Element):
    """{"name": ..., "arguments": {...}}."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._end: ObjectEnd | None = None
        self._is_checked = False

    def read(self, text):
        if self._end is None and not self._begin(text):
            return None
        if not self._is_checked:
            self._check_beginning(text)
        end = self._end.find(text)
        return None if end is None else self._found(text[self._at : end], end)

    def head(self, text):
        match = _HEAD.match(text, self._at)
        return (match[1], match.end()) if match else None

    def _begin(self, text):
        """-> whether the object begins at the place."""
        if text[self._at] != "{":
            raise NoCall
        self._end = ObjectEnd(self._at)
        return True

    def _check_beginning(self, text):
        """Other JSON is not held back until it ends."""
        key, name = _FIRST_KEY.match(text, self._at), _FIRST_NAME.match(text, self._at)
        if key is not None and key[1] not in _KEYS:
            raise NoCall
        if name is not None:
            self._known(name[1])
        self._is_checked = name is not None or (key is not None and key[1] != "name")
        if not self._is_checked and len(text) - self._at > LONGEST_HEAD:
            raise NoCall

    def _found(self, whole, end):
        members = members_of(whole)
        if isinstance(members.get("function", ("", 0))[1], dict):
            members = {**members, **members_of(members["function"][0])}
        text, value = members.get("arguments", members.get("parameters", ("", None)))
        if isinstance(value, str):  # JSON within JSON
            text, value = value, parsed(value)
        if value is None and not self._is_bare:
            text, value = "{}", {}
        name = members.get("name", ("", None))[1]
        if not isinstance(value, dict) or not isinstance(name, str):
            raise NoCall
        own_id = members.get("id", ("", None))[1]
        return Found(end, self._known(name), text, own_id if isinstance(own_id, str) else None)


class NamedElement(JsonElement):
    """name[ARGS]{...}, or as in the class above."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._named: re.Match | None = None

    def head(self, text):
        return super().head(text) if self._named is None else (self._named[1], self._at)

    def _begin(self, text):
        if text[self._at] == "{":
            return super()._begin(text)
        if not _NAME.match(text, self._at):
            raise NoCall
        if text.find("{", self._at) < 0 and len(text) - self._at <= LONGEST_HEAD:
            return False
        self._named = _NAMED.match(text, self._at)
        if self._named is None:
            raise NoCall
        self._known(self._named[1])
        self._at, self._is_checked = self._named.end(), True
        return super()._begin(text)

    def _found(self, whole, end):
        if self._named is None:
            return super()._found(whole, end)
        parsed(whole)
        return Found(end, self._named[1], whole, self._named[2])


class _Delimited(Element):
    """A call that ends with a mark, and whose parameters stand between marks of their own."""

    _START: str
    _END: str
    _HEAD: re.Pattern  # up to the first parameter, with the name
    _PARAMETER: re.Pattern
    _OPENED: str  # what a parameter begins with

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._seen = self._at
        self._is_known = False
        self._n_inside = 0

    def read(self, text):
        if not self._is_known and not self._check_beginning(text):
            return None
        while (end := text.find(self._END, self._seen)) >= 0:
            found = self._read_to(text, end)
            if found is not None:
                return found
            self._seen, self._n_inside = end + 1, self._n_inside + 1
            if self._n_inside > MOST_INSIDE:
                raise NoCall
        self._seen = max(self._seen, len(text) - len(self._END))
        return None

    def _read_to(self, text, end):
        """None where the mark stands within a value."""
        head = self._HEAD.match(text, self._at)
        values, at = {}, head.end()
        while match := self._PARAMETER.match(text, at, end):
            values[match[1]] = typed(match[2], self._tools[head[1]], match[1])
            at = match.end()
        rest = text[at:end].strip()
        if rest.startswith(self._OPENED):
            return None
        if rest:
            raise NoCall
        return Found(self._ending(end), head[1], json.dumps(values, ensure_ascii=False))

    def _check_beginning(self, text):
        head = self._HEAD.match(text, self._at)
        if head is not None:
            self._is_known = bool(self._known(head[1]))
            return True
        begun = text[self._at : self._at + len(self._START)]
        is_begun = self._START.startswith(begun) if self._START else _NAME.match(text, self._at)
        if not is_begun or len(text) - self._at > LONGEST_HEAD:
            raise NoCall
        return False

    def _ending(self, end):
        return end + len(self._END)


class FunctionElement(_Delimited):
    """<function=name><parameter=key>value</parameter></function>."""

    _START = "<function="
    _OPENED = "<parameter="
    _END = "</function>"
    _HEAD = re.compile(r"<function=([^<>\n]+)>\s*")
    _PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class KeysElement(_Delimited):
    """name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>."""

    _START = ""
    _OPENED = "<arg_key>"
    _END = "</tool_call>"
    _HEAD = re.compile(r"([A-Za-z0-9_-]{1,64})\s*(?=<)")
    _PARAMETER = re.compile(
        r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL
    )

    def _ending(self, end):
        return end  # the mark ends the calls, too


ELEMENTS = {
    "json": JsonElement,
    "named": NamedElement,
    "function": FunctionElement,
    "keys": KeysElement,
}


# JSON


def _refuse(word):
    raise ValueError(word)


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def parsed(text: str) -> dict:
    """The JSON object in `text`. Raises NoCall."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise NoCall from None
    if not isinstance(value, dict):
        raise NoCall
    return value


def members_of(text: str) -> dict[str, tuple[str, object]]:
    """Key -> (its value as it stands in the text, the value) of the JSON object in `text`."""
    parsed(text)
    found, at = {}, _after_space(text, 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, _after_space(text, at + (text[at] == ",")))
        start = _after_space(text, _after_space(text, at) + 1)
        value, at = _DECODER.raw_decode(text, start)
        found[key] = text[start:at], value
        at = _after_space(text, at)
    return found


def _after_space(text, at):
    return _SPACE.match(text, at).end()


# Values that are written without quotes

_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


def typed(text: str, schema: Mapping, key: str):
    """The value of a parameter that is written as plain text, by the type in the tool's schema.

    A text is taken as it stands where the schema says that it is one, other values are JSON, or
    words of Python's, since templates write both. What is neither is a text.
    """
    types = _types(_property(schema, key), schema)
    if types == {"string"}:
        return text
    word = text.strip()
    if word in _WORDS and (not types or _type_of(_WORDS[word]) in types or "string" not in types):
        return _WORDS[word]
    try:
        value = _DECODER.decode(word)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return text if "string" in types and _type_of(value) not in types else value


def _property(schema, key):
    properties = schema.get("properties")
    return properties.get(key, {}) if isinstance(properties, Mapping) else {}


def _types(part, root, depth=0):
    """The types that a schema names, itself or in what it refers to; none where that is unknown."""
    if not isinstance(part, Mapping) or depth > 8:
        return set()
    found = part.get("type", ())
    types = {each for each in _listed(found) if isinstance(each, str)}
    if isinstance(found, str):
        types = {found}
    types |= {_type_of(value) for value in _listed(part.get("enum"))}
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in _listed(part.get(key)):
            types |= _types(inner, root, depth + 1)
    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        types |= _types(target, root, depth + 1)
    return types | ({"integer"} if "number" in types else set())


def _listed(value):
    return value if isinstance(value, list | tuple) else ()


_NAMES = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))


def _type_of(value):
    if value is None:
        return "null"
    named = (name for kind, name in _NAMES if isinstance(value, kind))
    return next(named, "array" if isinstance(value, list) else "object")
