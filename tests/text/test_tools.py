"""Tools that clients offer: what is refused, what templates are given, and calls by force."""

import json
import random
import re

import numpy as np
import pytest

from jlayer.errors import UsageError
from jlayer.text.calls import ToolParser
from jlayer.text.conventions import convention_of
from jlayer.text.tools import (
    MAX_CALLS,
    calls_only,
    messages_for_template,
    parameters_of,
    read_tool_choice,
    read_tools,
)
from tests.text.marked import answer_of, marked_tokenizer, streamed
from tests.text.tooled import (
    FULL,
    NAMES,
    OF_TEMPLATES,
    ROWS,
    TOOLS,
    asked_for,
    parsed,
    template_of,
    values,
    without_thoughts,
)

# What clients send


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("x", "tools: found a str, expected a list"),
        (function(), "tools: found a dict, expected a list"),
        ([3], r"tools\[0\]: found a int, expected an object"),
        ([{"type": "web_search"}], r"tools\[0\]\.type: found 'web_search', expected 'function'"),
        ([{"function": {}}], r"tools\[0\]\.type: found None"),
        ([{"type": "function"}], r"tools\[0\]\.function: found None, expected an object"),
        ([function(name="a b")], r"tools\[0\]\.function\.name: found 'a b', expected 1 to 64"),
        ([function(name="x" * 65)], r"tools\[0\]\.function\.name"),
        ([function(name="é")], r"tools\[0\]\.function\.name"),
        ([function(name="f\n")], r"tools\[0\]\.function\.name"),
        ([function(name=None)], r"tools\[0\]\.function\.name"),
        ([function(), function()], r"tools\[1\]\.function\.name: 'f' .* tools\[0\] already"),
        ([function(description=3)], r"tools\[0\]\.function\.description: expected a text"),
        ([function(parameters=[1])], r"tools\[0\]\.function\.parameters: found list"),
        ([function(parameters={"type": "array"})], r"parameters\.type: found 'array', expected"),
        ([function(parameters={"properties": 3})], r"parameters\.properties: expected an object"),
        ([function(parameters={"x": "y" * 66_000})], r"tools\[0\]\.function\.parameters: .* 65536"),
        ([function(name=f"f{i}") for i in range(129)], "tools: 129 tools, over the limit of 128"),
    ],
)
def test_tools_that_are_refused_name_the_place(rows, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_tools(rows)
    assert "\n" not in str(caught.value)


def test_tools_that_are_taken():
    assert read_tools(None) == read_tools([]) == []
    names = [tool.name for tool in read_tools([function(name=f"f{i}") for i in range(128)])]
    assert len(names) == 128
    found = read_tools([function(parameters={}, strict=True, description=None)])[0]
    assert found.parameters == {"type": "object"}
    assert found.row["function"]["strict"]


def test_a_choice_of_tools():
    assert read_tool_choice(None, []).may_call is False
    assert read_tool_choice("auto", []).may_call is False
    for value in (None, "auto"):
        found = read_tool_choice(value, TOOLS)
        assert (found.may_call, found.must_call) == (True, False)
    assert read_tool_choice("none", TOOLS).may_call is False
    found = read_tool_choice("required", TOOLS)
    assert (found.must_call, list(found.tools)) == (True, TOOLS)
    found = read_tool_choice({"type": "function", "function": {"name": "nothing"}}, TOOLS)
    assert (found.must_call, [tool.name for tool in found.tools]) == (True, ["nothing"])


@pytest.mark.parametrize(
    ("value", "tools", "words"),
    [
        ("required", [], "tool_choice: found 'required', but there are no tools"),
        ("any", TOOLS, "tool_choice: found 'any', expected 'auto'"),
        (3, TOOLS, "tool_choice: found 3, expected"),
        ({"type": "function"}, TOOLS, "tool_choice: found .*, expected"),
        (
            {"type": "function", "function": {"name": "x"}},
            TOOLS,
            r"tool_choice\.function\.name: 'x' is none",
        ),
    ],
)
def test_a_choice_that_is_refused(value, tools, words):
    with pytest.raises(UsageError, match=words):
        read_tool_choice(value, tools)


# What templates are given


@pytest.mark.parametrize("name", ["mistral nemo", "mistral, by name", "qwen 3", "llama 3"])
def test_a_conversation_begun_elsewhere_can_be_rendered(here, name):
    """With ids of another length, arguments as text, and results in blocks."""
    template, tokenizer = template_of(name), marked_tokenizer()
    messages = asked_for([("weather", FULL)], n_id=30)
    result = {"role": "tool", "tool_call_id": messages[1]["tool_calls"][0]["id"]}
    result["content"] = [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]
    given = json.dumps([*messages, result])
    ready = messages_for_template([*messages, result], convention_of(template))
    assert json.dumps([*messages, result]) == given
    assert ready[1]["tool_calls"][0]["function"]["arguments"] == FULL
    assert ready[2]["name"] == "weather"
    text = tokenizer.render_chat(ready, chat_template=template, tools=ROWS)
    assert "sunny" in text
    if name == "mistral nemo":
        assert len(ready[2]["tool_call_id"]) == 9
        assert text.count(ready[2]["tool_call_id"]) == 2


def test_arguments_that_are_no_object_stay_as_they_are():
    message = asked_for([("weather", {})])[1]
    for text, expected in (("", {}), ("[1]", "[1]"), ("{", "{"), (None, {}), ({"a": 1}, {"a": 1})):
        message["tool_calls"][0]["function"]["arguments"] = text
        ready = messages_for_template([message])[0]
        assert ready["tool_calls"][0]["function"]["arguments"] == expected
    assert messages_for_template([{"role": "assistant", "content": "x", "tool_calls": []}]) == [
        {"role": "assistant", "content": "x"}
    ]


# By force


def drawn(tokenizer, constraint, rng, most=500):
    ids, end = [], tokenizer.eos_token_id
    while len(ids) < most:
        mask = constraint.allowed()
        choices = np.flatnonzero(mask)
        token = end if mask[end] and rng.random() < 0.3 else int(rng.choice(choices))
        constraint.accept([token])
        if token == end:
            return ids
        ids.append(token)
    return None


def forced(convention, tools=TOOLS, **options):
    pytest.importorskip("llguidance")
    tokenizer = marked_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size + 5, "eos_ids": [tokenizer.eos_token_id]}
    return calls_only(tokenizer, convention, tools, **options, **sizes)


SMALL = read_tools(
    [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {
                        "unit": {"enum": ["c", "f</tool_call>"]},
                        "days": {"type": "integer", "minimum": 1, "maximum": 99},
                        "on": {"type": "boolean"},
                        "list": {"type": "array", "items": {"const": "é"}, "maxItems": 2},
                    },
                    "required": ["unit"],
                },
            },
        }
        for name in ("weather", "weather-2")
    ]
)


@pytest.mark.parametrize("name", OF_TEMPLATES)
def test_a_forced_text_is_calls_and_nothing_else(here, name):
    """And the template writes them the same way."""
    tokenizer, rng = marked_tokenizer(), random.Random(name)
    template = template_of(name)
    convention = convention_of(template)
    begun = forced(convention, SMALL)
    shown, n_calls = convention.shown_tokens(tokenizer), []
    for _ in range(8):
        ids = drawn(tokenizer, begun.copy(), rng)
        if ids is None:
            continue
        for streams in (False, True):
            parser = ToolParser(convention, parameters_of(SMALL), streams=streams)
            for piece in streamed(tokenizer, ids, shown):
                parser.feed(piece)
            parser.finish()
            assert parser.content == ""
            assert parser.calls
        n_calls.append(len(parser.calls))
        for call in parser.calls:
            arguments = json.loads(call.arguments)
            assert {"unit"} <= set(arguments) <= {"unit", "days", "on", "list"}
            assert arguments["unit"] in ("c", "f</tool_call>")
            assert 1 <= arguments.get("days", 1) <= 99
            assert arguments.get("on", True) in (True, False)
        again = asked_for([(c.name, json.loads(c.arguments)) for c in parser.calls])
        messages = messages_for_template(again, convention)
        answer = answer_of(tokenizer, template, messages)[1]
        assert values(parsed_small(convention, answer)) == [
            (call.name, json.loads(call.arguments)) for call in parser.calls
        ]
    assert n_calls
    assert max(n_calls) <= (MAX_CALLS if convention.is_parallel else 1)


def parsed_small(convention, answer):
    parser = ToolParser(convention, parameters_of(SMALL))
    parser.feed(without_thoughts(answer))
    parser.finish()
    return [(call.id, call.name, call.arguments) for call in parser.calls]


@pytest.mark.parametrize("name", [*OF_TEMPLATES])
def test_what_the_template_writes_can_be_forced(here, name):
    """Token for token, as the model saw it in training."""
    tokenizer, template = marked_tokenizer(), template_of(name)
    convention = convention_of(template)
    arguments = {key: FULL[key] for key in ("city", "unit", "days", "deep")}
    arguments["city"] = "Zürich"
    calls = [("weather", arguments)] * (2 if convention.is_parallel else 1)
    messages = messages_for_template(asked_for(calls), convention)
    answer = without_thoughts(answer_of(tokenizer, template, messages)[1]).strip("\n")
    answer = re.sub(r', "id": "[^"]*"', "", answer)  # which models leave out
    if name == "mistral":
        answer = answer.replace("}{", "}, {")  # our short form of the template leaves that out
    constraint = forced(convention)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    for at, token in enumerate(ids):
        assert constraint.allowed()[token], tokenizer.decode(ids[: at + 1])
        constraint.accept([token])
    assert constraint.allowed()[tokenizer.eos_token_id]


@pytest.mark.parametrize("name", NAMES)
def test_one_call_where_no_more_are_wanted(name):
    tokenizer, rng = marked_tokenizer(), random.Random(4)
    for _ in range(6):
        ids = drawn(tokenizer, forced(NAMES[name], TOOLS[2:], is_parallel=False), rng)
        pieces = streamed(tokenizer, ids, NAMES[name].shown_tokens(tokenizer))
        assert values(parsed(NAMES[name], pieces)[1]) == [("nothing", {})]


def test_marks_without_tokens_of_their_own_are_written_out(fable):
    pytest.importorskip("llguidance")
    sizes = {"vocab_size": 4096, "eos_ids": [1]}
    constraint = calls_only(fable, NAMES["hermes"], TOOLS[2:], is_parallel=False, **sizes)
    ids = fable.encode('<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>')
    constraint.accept([token for token in ids if token != fable.bos_token_id])
    assert constraint.is_over


def test_the_place_of_what_cannot_be_forced(here):
    bad = {"type": "object", "properties": {"x": {"items": {"not": {}}}}}
    rows = [ROWS[2], {"type": "function", "function": {"name": "f", "parameters": bad}}]
    words = r"^tools\[1\]\.function\.parameters\.properties\.x\.items: keywords not supported"
    with pytest.raises(UsageError, match=words):
        forced(NAMES["hermes"], read_tools(rows))
    with pytest.raises(UsageError, match=r"tools\[1\]\.function\.parameters\.properties\.x"):
        forced(NAMES["glm 4"], read_tools(rows))
