"""Calls of tools: through the templates of all conventions and back, by force, and what is none."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.errors import UsageError
from jlayer.text.calls import MOST_MISTAKEN, Arguments, CallBegun, Content, ToolParser
from jlayer.text.conventions import CONVENTIONS, convention_of
from jlayer.text.stream import TextStream
from jlayer.text.tools import (
    MAX_CALLS,
    calls_only,
    messages_for_template,
    parameters_of,
    read_tool_choice,
    read_tools,
)
from tests.text import chats, templates, tool_templates
from tests.text.marked import answer_of, divided, marked_tokenizer, streamed
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
    "city": 'Zürich "x" </tool_cal \\ \n😀 {',
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
    from tests.conftest import NO_SHARED_DATA, SHARED_DATA

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


# Through templates and back


@pytest.mark.parametrize("name", OF_TEMPLATES)
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("content", ["", "Let me see <b>."])
def test_calls_are_read_as_their_template_wrote_them(here, name, case, content):
    template, calls, tokenizer = template_of(name), CALLS[case], marked_tokenizer()
    convention = convention_of(template)
    if len(calls) > 1 and not convention.is_parallel:
        pytest.skip("the template takes one call")
    if name in ("llama 3", "mistral", "mistral nemo", "mistral small", "hermes"):
        content = ""  # their templates leave it out beside calls
    messages = messages_for_template(asked_for(calls, content), convention)
    answer = without_thoughts(answer_of(tokenizer, template, messages, tools=ROWS)[1])
    rng = random.Random(name + case)
    for streams in (False, True):
        for pieces in divided(answer, rng):
            found = parsed(convention, pieces, streams=streams)
            assert (found[0].lstrip("\n"), values(found[1])) == (content, calls)
    shown = convention.shown_tokens(tokenizer)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    pieces = streamed(tokenizer, ids, shown)
    assert "".join(pieces) == answer
    found = parsed(convention, pieces)
    assert (found[0].lstrip("\n"), values(found[1])) == (content, calls)


def test_marks_that_are_special_tokens_are_shown_where_asked(fable):
    tokenizer = marked_tokenizer()
    text = "a[TOOL_CALLS]b<tool_call>c<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids, ())) == "ab<tool_call>c"
    shown = NAMES["mistral"].shown_tokens(tokenizer)
    assert len(shown) == 3
    assert "".join(streamed(tokenizer, ids, shown)) == "a[TOOL_CALLS]b<tool_call>c"
    assert NAMES["hermes"].shown_tokens(tokenizer) == frozenset()
    assert NAMES["mistral"].shown_tokens(fable) == frozenset()
    whole = TextStream(tokenizer, skip_special_tokens=False, shown=shown)
    assert "".join(map(whole.step, ids)) + whole.finish() == text


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (chats.QWEN3, "hermes"),
        (chats.GLM4, "glm 4"),
        (chats.MISTRAL, "mistral"),
        (tool_templates.LLAMA3, "llama 3"),
        (tool_templates.QWEN3_CODER, "qwen 3 coder"),
        (tool_templates.MISTRAL_NAMED, "mistral, by name"),
        *((source, None) for source in (chats.GEMMA3, chats.PHI4, chats.COHERE, chats.GRANITE)),
        *((source, None) for source in (templates.LLAMA3, templates.CHATML, chats.SMOLLM3)),
    ],
)
def test_a_convention_is_known_by_the_source_of_the_template(template, name):
    found = convention_of(template)
    assert (found.name if found else None) == name
    if name == "mistral":
        assert found.begin == "[TOOL_CALLS]["
        assert convention_of(tool_templates.MISTRAL_SMALL).begin == "[TOOL_CALLS] ["


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


# Content, and what looks like a call

NONE = {
    "hermes": [
        "",
        "  hello \n",
        "a <tool_call> b",
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> x',
        '<tool_call>{"name": "weather", "arguments": {"a": }}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": "\n"}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": "b',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
        '<tool_call>{"a": 1}</tool_call>',
        '<tool_call>{"function": 3, "name": "x" }',
        "<tool_call>" + '{"arguments": ' * 5_000,
        "<tool_call>" + '{"arguments": ' + "[" * 100_000,
        '<tool_call>{"name": "weather", "arguments": {"a": ' + "9" * 5_000 + "}}</tool_call>",
        "<tool_call>" * 50,
        "</tool_call>",
        "<tool_cal",
    ],
    "llama 3": [
        '{"answer": {"a": 1}}',
        '{"name": "Anna", "age": 3}',
        '{"name": "weather"}',
        '{"name": "weather", "arguments": null}',
        'I say {"name": "weather", "parameters": {}}',
        '<|python_tag|>weather.call(city="x")',
        "[1]",
        ' {"name"',
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] of what? {}",
        "[TOOL_CALLS]unknown[ARGS]{}",
        "[TOOL_CALLS]weather[ARGS]",
        "[TOOL_CALLS]weather[ARGS]{3}",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]" + "x" * 300,
    ],
    "qwen 3 coder": [
        "<function=unknown>\n</function>",
        "<function=weather>\n<parameter=city>\nx\n</function>",
        "<function=weather>\n<parameter=city>\n" + "</function>" * 50,
        "<function=weather>\nx</function>",
        "<tool_call>\n<funct",
        "<tool_call>\n{}",
        "<tool_call>\n<function=" + "x" * 300,
    ],
    "glm 4": [
        "<tool_call>unknown\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key></tool_call>",
        "<tool_call>weather",
        "<tool_call><",
    ],
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_call_is_content_as_it_was_written(name):
    rng = random.Random(1)
    for text in NONE[name]:
        for pieces in divided(text, rng, n=2) if len(text) < 1_000 else [[text]]:
            assert parsed(NAMES[name], pieces) == (text, []), text[:60]


ONE = '{"name": "weather", "arguments": {"city": "x"}}'
FOUND = [  # convention, text, content, names of calls
    ("hermes", f"a\n<tool_call>\n{ONE}", "a", 1),
    ("hermes", f"<tool_call>{ONE} {ONE}</tool_call>\n", "", 2),
    ("hermes", f"<tool_call>{ONE}</tool_call> and so", " and so", 1),
    ("hermes", f"<tool_call>{ONE}</tool", "</tool", 1),
    ("hermes", f"<tool_call>x <tool_call>{ONE}</tool_call>", "<tool_call>x", 1),
    ("hermes", f"<tool_call>{ONE}x</tool_call>", "x</tool_call>", 1),
    ("hermes", '<tool_call>{"arguments": {"city": "x"}, "name": "weather"}</tool_call>', "", 1),
    ("hermes", '<tool_call>{"name":"weather","arguments":"{\\"city\\": \\"x\\"}"}', "", 1),
    ("hermes", f'<tool_call>{{"type": "function", "function": {ONE}}}</tool_call>', "", 1),
    ("llama 3", f"\n{ONE}; {ONE}\n", "", 2),
    ("llama 3", f"<|python_tag|>{ONE}", "", 1),
    ("llama 3", f"Well: <|python_tag|>{ONE}", "Well:", 1),
    ("llama 3", f"{ONE} done", " done", 1),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {ONE}]", "", 2),
    ("mistral", f"[TOOL_CALLS][{ONE}, {{]", ", {]", 1),
    ("mistral", f"x[TOOL_CALLS]{ONE}", "x", 1),
    ("mistral", '[TOOL_CALLS]weather{"city": "x"}[TOOL_CALLS]weather[ARGS]{"city": "x"}', "", 2),
    ("qwen 3 coder", "<function=weather>\n<parameter=city>x</parameter></function>", "", 1),
]


@pytest.mark.parametrize(("name", "text", "content", "n_calls"), FOUND)
def test_calls_that_are_written_a_little_differently(name, text, content, n_calls):
    rng = random.Random(2)
    for pieces in divided(text, rng):
        found = parsed(NAMES[name], pieces)
        assert (found[0], values(found[1])) == (content, [("weather", {"city": "x"})] * n_calls)


PIECES = ["<tool_call>", "</tool_call>", ONE, "{", "}", '"', "\\", "[TOOL_CALLS]", "weather", "\n"]
PIECES += ["<function=weather>", "</function>", "<parameter=city>", "</parameter>", "[ARGS]", "{}"]
PIECES += [
    "<arg_key>city</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<|python_tag|>",
    "[",
    "]",
    ",",
]
PIECES += [" text ", '"name": "weather"', '"arguments": ', "nothing", "<", ";", ONE[:30], ONE[30:]]


@given(
    st.sampled_from(sorted(NAMES)),
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.randoms(use_true_random=False),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_pieces_do_not_matter_and_nothing_is_lost(name, words, rng, streams):
    text = "".join(words)
    convention = NAMES[name]
    whole = parsed(convention, [text], streams=streams, new_id=lambda: "x")
    for pieces in divided(text, rng, n=2):
        assert parsed(convention, pieces, streams=streams, new_id=lambda: "x") == whole
    if not whole[1]:
        assert whole[0] == text
    rest = text  # what was said stands in the text, in its order
    for character in whole[0]:
        assert character in rest
        rest = rest[rest.index(character) + 1 :]
    if not streams:
        assert all(isinstance(json.loads(call[2]), dict) for call in whole[1])


def test_content_is_not_held_back_for_long():
    parser = ToolParser(NAMES["hermes"], SCHEMAS)
    assert parser.feed("Hello ") == [Content("Hello")]
    assert parser.feed("you <too") == [Content(" you")]
    assert parser.feed("l") == []
    assert parser.feed("s") == [Content(" <tools")]
    assert parser.feed('<tool_call>{"other') == []
    assert parser.feed('"') == [Content('<tool_call>{"other"')]
    assert ToolParser(NAMES["llama 3"], SCHEMAS).feed('{"x"') == [Content('{"x"')]


def test_arguments_arrive_while_they_are_written_where_a_text_is_held_to_the_form():
    parser = ToolParser(NAMES["hermes"], SCHEMAS, streams=True, new_id=lambda: "id")
    assert parser.feed('<tool_call>\n{"name": "weather", "arguments": ') == []
    begun = [CallBegun(0, "id", "weather"), Arguments(0, '{"ci')]
    assert parser.feed('{"ci') == begun
    assert parser.feed('ty": "x') == [Arguments(0, 'ty": "x')]
    assert parser.finish() == []  # cut at a limit
    assert parser.calls[0].arguments == '{"city": "x'
    assert parser.content == ""


def test_no_more_calls_than_allowed():
    text = f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>"
    found = parsed(NAMES["hermes"], list(text), most=1)
    assert found[0] == f"\n<tool_call>{ONE}</tool_call>"
    assert len(found[1]) == 1
    assert parsed(NAMES["llama 3"], list(f"{ONE};{ONE}"), most=1)[0] == f";{ONE}"


def test_a_text_full_of_marks_is_given_up():
    text = "<tool_call>x" * MOST_MISTAKEN + f"<tool_call>{ONE}</tool_call>"
    assert parsed(NAMES["hermes"], [text]) == (text, [])
    text = text.removeprefix("<tool_call>x")
    assert len(parsed(NAMES["hermes"], [text])[1]) == 1


def test_ids():
    text = f'[TOOL_CALLS][{ONE[:-1]}, "id": "abcDEF123"}}, {ONE}, {ONE[:-1]}, "id": "long er x"}}]'
    found = parsed(NAMES["mistral"], [text])[1]
    ids = [call[0] for call in found]
    assert ids[0] == "abcDEF123"
    assert all(re.fullmatch("[A-Za-z0-9]{9}", each) for each in ids)
    assert len(set(ids)) == 3
    found = parsed(NAMES["hermes"], [f"<tool_call>{ONE}"])[1]
    assert re.fullmatch("call_[0-9a-f]{24}", found[0][0])


TYPED = [  # type, what is written, the value
    ({"type": "string"}, "3", "3"),
    ({"type": "string"}, " true\n", " true\n"),
    ({"type": "integer"}, " 3 ", 3),
    ({"type": "number"}, "3", 3),
    ({"type": "number"}, "three", "three"),
    ({"type": "boolean"}, "True", True),
    ({"type": ["string", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "3", "3"),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "3", 3),
    ({"$ref": "#/$defs/one"}, "3", "3"),
    ({"$ref": "#/$defs/none"}, "[3]", [3]),
    ({"enum": ["3", "4"]}, "3", "3"),
    ({}, '{"a": 1}', {"a": 1}),
    ({}, "NaN", "NaN"),
    ({}, '"\\ud800"', '"\\ud800"'),
    ({"type": 5, "anyOf": 3, "enum": {}}, "x", "x"),
]


@pytest.mark.parametrize(("schema", "text", "value"), TYPED)
def test_values_without_quotes_are_read_by_the_schema(schema, text, value):
    tools = {"f": {"properties": {"x": schema}, "$defs": {"one": {"type": "string"}}}}
    parser = ToolParser(NAMES["glm 4"], tools)
    parser.feed(f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>")
    assert json.loads(parser.calls[0].arguments) == {"x": value}


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
