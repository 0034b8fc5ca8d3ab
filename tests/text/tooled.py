"""Tools, calls of them, and the templates that write such calls: what the tests of both directions
share."""

import json
import re

import pytest

from jlayer.text.calls import Arguments, CallBegun, Content, ToolParser
from jlayer.text.conventions import CONVENTIONS
from jlayer.text.tools import parameters_of, read_tools
from tests.conftest import NO_SHARED_DATA, SHARED_DATA
from tests.text import chats, tool_templates
from tests.text.samples import user

NAMES = {convention.name: convention for convention in CONVENTIONS}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "now": {"type": "boolean"},
        "deep": {
            "type": "object",
            "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "note": {"type": ["string", "null"], "maxLength": 5},
    },
    "required": ["city", "unit"],
    "$defs": {"one": {"type": ["integer", "null"], "minimum": 0, "maximum": 50}},
}
ROWS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "weather-2", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "nothing", "description": "Does nothing."}},
]
TOOLS = read_tools(ROWS)
SCHEMAS = parameters_of(TOOLS)
FULL = {
    "city": 'Zürich 5" </tool_cal \\ \n😀 {',
    "unit": "f",
    "days": 3,
    "now": False,
    "deep": {"a": [1, None]},
    "note": None,
}
CALLS = {
    "one": [("weather", FULL)],
    "without arguments": [("nothing", {})],
    "several": [("weather", {"city": "3", "unit": "c"}), ("nothing", {}), ("weather", FULL)],
    "an empty text": [("weather", {"city": "", "unit": "c", "note": "3"})],
}
OF_TEMPLATES = {
    "hermes": tool_templates.HERMES,
    "qwen 2.5": None,  # the published one, from the shared data
    "qwen 3": chats.QWEN3,
    "qwen 3 coder": tool_templates.QWEN3_CODER,
    "glm 4": chats.GLM4,
    "llama 3": tool_templates.LLAMA3,
    "mistral": chats.MISTRAL,
    "mistral nemo": tool_templates.MISTRAL_NEMO,
    "mistral small": tool_templates.MISTRAL_SMALL,
    "mistral, by name": tool_templates.MISTRAL_NAMED,
}


def template_of(name):
    if OF_TEMPLATES[name] is not None:
        return OF_TEMPLATES[name]
    if not SHARED_DATA.is_dir():
        pytest.skip(NO_SHARED_DATA)
    path = SHARED_DATA / "tokenizers" / "qwen2.5-chat-template" / "tokenizer_config.json"
    return json.loads(path.read_text())["chat_template"]


def asked_for(calls, content=None, n_id=9):
    """OpenAI's messages: a question, and the answer that makes calls."""
    rows = [
        {
            "id": f"call{at:0{n_id - 4}}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for at, (name, arguments) in enumerate(calls)
    ]
    return [*user("?"), {"role": "assistant", "content": content, "tool_calls": rows}]


def parsed(convention, pieces, **options):
    """(content, calls), from the events, which must agree with what the parser itself has."""
    parser = ToolParser(convention, SCHEMAS, **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    content = "".join(event.text for event in events if isinstance(event, Content))
    begun = [event for event in events if isinstance(event, CallBegun)]
    texts = ["" for _ in begun]
    for event in events:
        if isinstance(event, Arguments):
            assert event.text
            texts[event.index] += event.text
    assert [event.index for event in begun] == list(range(len(begun)))
    found = [(event.id, event.name, text) for event, text in zip(begun, texts, strict=True)]
    assert found == [(call.id, call.name, call.arguments) for call in parser.calls]
    assert content == parser.content
    return content, found


def values(found):
    return [(name, json.loads(text)) for _, name, text in found]


def without_thoughts(answer):
    """Without reasoning that is empty, as templates write it."""
    return re.sub(r"^\s*<think>\s*</think>", "", answer)
