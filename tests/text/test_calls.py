"""Calls of tools in what a model writes: through the templates of all conventions and back, and
what is none."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.text.calls import MOST_MISTAKEN, Arguments, CallBegun, Content, ToolParser
from jlayer.text.conventions import convention_of
from jlayer.text.stream import TextStream
from jlayer.text.tools import messages_for_template
from tests.text import chats, templates, tool_templates
from tests.text.marked import answer_of, divided, marked_tokenizer, streamed
from tests.text.tooled import (
    CALLS,
    NAMES,
    OF_TEMPLATES,
    ROWS,
    SCHEMAS,
    asked_for,
    parsed,
    template_of,
    values,
    without_thoughts,
)

# Through templates and back


def taken():
    """Templates with the cases they take: some take one call at a time. The one of the shared data
    takes several; where these are not, its tests are skipped."""
    conventions = {name: text and convention_of(text) for name, text in OF_TEMPLATES.items()}
    return [
        (name, case)
        for name, convention in conventions.items()
        for case, calls in CALLS.items()
        if convention is None or convention.is_parallel or len(calls) == 1
    ]


@pytest.mark.parametrize(("name", "case"), taken())
@pytest.mark.parametrize("content", ["", "Let me see <b>."])
def test_calls_are_read_as_their_template_wrote_them(here, name, case, content):
    template, calls, tokenizer = template_of(name), CALLS[case], marked_tokenizer()
    convention = convention_of(template)
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
        (tool_templates.QWEN3_CODER.replace("tool_call>", "seed:tool_call>"), None),
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
    parser = ToolParser(NAMES["hermes"], SCHEMAS)
    deep = '<tool_call>{"name": "weather", "arguments": ' + "[" * 64
    assert parser.feed(deep) == [Content(deep)]
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
