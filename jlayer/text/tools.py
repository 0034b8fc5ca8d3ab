"""Tools that a client offers: read strictly, made known to a template, and called for by force.

How a model writes a call is in `conventions`; what it wrote is read by `calls`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jlayer.errors import UsageError
from jlayer.text.constraint import Constraint
from jlayer.text.conventions import Convention
from jlayer.text.elements import NoCall, parsed
from jlayer.text.guidance import RefusedGrammar
from jlayer.text.schemas import checked_schema, hides_text, json_rule, place_of, text_rule

MAX_TOOLS = 128
MAX_CALLS = 16  # of a message whose calls are forced
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY = {"type": "object"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. parameters: the JSON schema of its arguments, an object.
    row: as the client sent it, which is what a template gets."""

    name: str
    parameters: Mapping
    row: Mapping
    where: str


def read_tools(rows, where: str = "tools") -> list[Tool]:
    """Tools in OpenAI's form. Raises UsageError with the place of what is wrong."""
    if rows is None:
        return []
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise UsageError(f"{where}: found a {type(rows).__name__}, expected a list of tools")
    if len(rows) > MAX_TOOLS:
        raise UsageError(f"{where}: {len(rows)} tools, over the limit of {MAX_TOOLS}")
    tools, names = [], {}
    for at, row in enumerate(rows):
        tool = _read_tool(row, f"{where}[{at}]")
        if tool.name in names:
            raise UsageError(
                f"{where}[{at}].function.name: {tool.name!r} is the name of "
                f"{where}[{names[tool.name]}] already; which one a call means could not be known"
            )
        names[tool.name] = at
        tools.append(tool)
    return tools


def _read_tool(row, where):
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: found a {type(row).__name__}, expected an object")
    if row.get("type") != "function":
        raise UsageError(f"{where}.type: found {row.get('type')!r:.60}, expected 'function'")
    function = row.get("function")
    if not isinstance(function, Mapping):
        raise UsageError(f"{where}.function: found {function!r:.60}, expected an object")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}.function.name: found {name!r:.80}, expected 1 to 64 letters, digits, '_', '-'"
        )
    where = f"{where}.function"
    if not isinstance(function.get("description") or "", str):
        raise UsageError(f"{where}.description: expected a text")
    parameters = function.get("parameters")
    if parameters is None:
        return Tool(name, {**_ANY, "properties": {}}, row, f"{where}.parameters")
    plain = checked_schema(parameters, f"{where}.parameters")
    if plain.get("type", "object") != "object":
        raise UsageError(
            f"{where}.parameters.type: found {plain['type']!r:.60}, expected 'object': arguments "
            "have names"
        )
    if not isinstance(plain.get("properties", {}), Mapping):
        raise UsageError(f"{where}.parameters.properties: expected an object of schemas")
    return Tool(name, {**_ANY, **plain}, row, f"{where}.parameters")


def parameters_of(tools: Iterable[Tool]) -> dict[str, Mapping]:
    """Name -> schema of the parameters, as `ToolParser` takes them."""
    return {tool.name: tool.parameters for tool in tools}


# Whether tools are called


@dataclass(frozen=True)
class ToolChoice:
    """may_call: the model is told of the tools. must_call: it has to call one of `tools`."""

    may_call: bool
    must_call: bool
    tools: tuple[Tool, ...]


def read_tool_choice(value, tools: Sequence[Tool], where: str = "tool_choice") -> ToolChoice:
    """ "auto" (as without one), "none", "required", or the name of a tool in OpenAI's form.

    Raises UsageError.
    """
    if value is None:
        value = "auto" if tools else "none"
    if value in ("auto", "none"):
        return ToolChoice(value == "auto" and bool(tools), False, tuple(tools))
    if not tools:
        raise UsageError(f"{where}: found {value!r:.80}, but there are no tools")
    if value == "required":
        return ToolChoice(True, True, tuple(tools))
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or value.get("type") != "function":
        raise UsageError(
            f"{where}: found {value!r:.80}, expected 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        raise UsageError(f"{where}.function.name: {name!r:.80} is none of the tools")
    return ToolChoice(True, True, chosen)


def calls_only(
    tokenizer, convention: Convention, tools: Sequence[Tool], *, is_parallel: bool = True, **sizes
) -> Constraint:
    """Holds a text to calls of `tools`, written by the convention, and nothing else.

    `is_parallel`: there may be several, where the convention has that. Arguments hold to the
    schemas, without properties that a schema does not name. `sizes`: as of `Constraint`.
    Raises UsageError with the place in a schema that cannot be held to.
    """
    rules = _Rules(tokenizer, convention)
    names = [rules.call(at, tool) for at, tool in enumerate(tools)]
    more = ""
    if is_parallel and convention.is_parallel:
        more = f"({rules.literal(convention.between)} call){{0,{MAX_CALLS - 1}}}"
    begin, end = rules.literal(convention.begin), rules.literal(convention.end)
    lines = [f"start: {begin} call {more} {end}", f"call: {' | '.join(names)}", *rules.lines]
    try:
        return Constraint.lark(tokenizer, "\n".join(lines), hides=rules.hides, **sizes)
    except RefusedGrammar as error:
        for tool in tools:
            place = place_of({"properties": {"": dict(tool.parameters)}})
            if place:
                place = place.removeprefix(".properties.")
                raise UsageError(f"{tool.where}{place}: {error}") from None
        raise UsageError(f"tools: {error}") from None


class _Rules:
    """The rules of a grammar for calls. hides: what they allow may be hidden in patterns."""

    def __init__(self, tokenizer, convention):
        self._convention = convention
        added = tokenizer.library.get_added_tokens_decoder()
        ids = {str(token.content): token_id for token_id, token in added.items()}
        self._ids = {mark: ids[mark] for mark in convention.marks if mark in ids}
        self._marks = re.compile("|".join(map(re.escape, self._ids)) or "(?!)")
        self.lines: list[str] = []
        self.hides = False

    def literal(self, text: str) -> str:
        """A text, in which a mark that is a token of its own is that token."""
        parts, at = [], 0
        for mark in self._marks.finditer(text):
            parts += [text_rule(text[at : mark.start()]), f"<[{self._ids[mark[0]]}]>"]
            at = mark.end()
        return " ".join(part for part in (*parts, text_rule(text[at:])) if part != '""')

    def call(self, at: int, tool: Tool) -> str:
        """Adds the rules of a call. -> their name"""
        name, schema = f"tool_{at}", _closed(tool.parameters)
        before, after = self._convention.call.format(name=tool.name, arguments="\0").split("\0")
        if self._convention.form in ("json", "named"):
            inside = self._json(f"arguments_{at}", schema)
        else:
            inside = self._parameters(name, schema)
        self.lines.append(f"{name}: {self.literal(before)} {inside} {self.literal(after)}")
        return name

    def _json(self, name, schema):
        self.hides |= hides_text(schema)
        self.lines.append(f"{name}: {json_rule(schema)}")
        return name

    def _parameters(self, name, schema):
        """Each parameter by itself, in the order of the schema, texts without quotes."""
        before, between, after = _AROUND[self._convention.form]
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required, found = schema.get("required", ()), []
        for at, (key, part) in enumerate(schema.get("properties", {}).items()):
            own = f"{name}_{at}"
            part = part if isinstance(part, Mapping) else {}
            head = self.literal(f"{before}{key}{between}")
            if part.get("type") == "string" and "enum" not in part and "const" not in part:
                self.hides = True
                suffix = text_rule(after)
                self.lines.append(f"{own}_value[suffix={suffix}]: /(?s:.*)/")
                self.lines.append(f"{own}: {head} {own}_value")
            else:
                texts = part.get("enum", [part["const"]] if "const" in part else [None])
                if all(isinstance(text, str) for text in texts):
                    value = "(" + " | ".join(map(text_rule, texts)) + ")"
                else:
                    value = self._json(f"{own}_value", {**shared, **part})
                self.lines.append(f"{own}: {head} {value} {self.literal(after)}")
            found.append(own if key in required else f"{own}?")
        return " ".join(found)


# What stands before a parameter's name, between that and its value, and after it.
_AROUND = {
    "function": ("<parameter=", ">\n", "\n</parameter>\n"),
    "keys": ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
}


def _closed(schema):
    """A schema whose objects have no further properties, unless it speaks of such."""
    return {"additionalProperties": False, "properties": {}, **schema}


# What a template is given


def messages_for_template(
    messages: Sequence[Mapping], convention: Convention | None = None
) -> list[dict]:
    """OpenAI's messages, as the templates of transformers read them.

    The arguments of calls are objects, not their JSON text. A result of a tool names the tool, and
    is one text. Ids have the length that the convention's templates ask for.
    """
    names: dict[str, str] = {}
    return [_message(message, convention, names) for message in messages]


def _message(message, convention, names):
    if not isinstance(message, Mapping):
        return message  # whoever renders says what is wrong with it
    message = dict(message)
    if isinstance(message.get("tool_calls"), Sequence) and message["tool_calls"]:
        message["tool_calls"] = [_call(call, convention, names) for call in message["tool_calls"]]
    elif "tool_calls" in message:
        del message["tool_calls"]  # templates look whether the key is there
    if message.get("role") == "tool":
        given = message.get("tool_call_id")
        if isinstance(given, str):
            message["tool_call_id"] = _id(given, convention)
            if given in names:
                message.setdefault("name", names[given])
        message["content"] = _one_text(message.get("content"))
    return message


def _call(call, convention, names):
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    call, function = dict(call), dict(function)
    if isinstance(call.get("id"), str):
        names[call["id"]] = function.get("name")
        call["id"] = _id(call["id"], convention)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(NoCall):  # else the template writes the text as it is
            function["arguments"] = parsed(arguments or "{}")
    elif arguments is None:
        function["arguments"] = {}
    return {**call, "function": function}


def _id(given, convention):
    """An id of the length that is asked for: the same for the same one."""
    n_id = convention.n_id if convention else None
    if n_id is None or (len(given) == n_id and given.isalnum() and given.isascii()):
        return given
    return hashlib.sha256(given.encode(errors="replace")).hexdigest()[:n_id]


def _one_text(content):
    """Blocks of text as one."""
    if not isinstance(content, list):
        return content
    texts = [block.get("text") for block in content if isinstance(block, Mapping)]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        return json.dumps(content)
    return "".join(texts)
