"""Chats of the dense families against transformers' apply_chat_template: tools, documents,
reasoning, further variables, and a last message that is left open."""

import json

import pytest

from jlayer.errors import CheckpointError, UsageError
from jlayer.text.chat import render_chat
from jlayer.text.inputs import without_marks_beyond
from tests.text.built import files_of
from tests.text.chats import TEMPLATES
from tests.text.conftest import NOW
from tests.text.families import FAMILIES
from tests.text.reference import ours, theirs, write
from tests.text.samples import CHATML, SPECIAL, user, written

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Weather <of> a "city" & more, é',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
NOTHING = {"type": "function", "function": {"name": "nothing", "description": "Does nothing."}}


def said(content=None, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, n=1, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"call{n:05d}", "function": function}


SYSTEM = {"role": "system", "content": "Be terse. "}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny & <b>"}
CHATS = {
    "a user": user(" héllo \n"),
    "a system message": [SYSTEM, *user("hi")],
    "turns": [*user("hi"), said("hello "), *user("why?")],
    "no thinking please": [{"role": "system", "content": "/no_think Short."}, *user("hi")],
    "thoughts in the text": [*user("hi"), said("<think>\nhm\n</think>\n\nHi"), *user("again")],
    "thoughts apart": [*user("hi"), said("Hi", reasoning_content="hm\n")],
    "thoughts, an older name": [*user("hi"), said("Hi", thinking="hm"), *user("so?")],
    "a call": [
        *user("weather?"),
        said("", tool_calls=[call("weather", city="Zürich", days=[1, 2], deep={"a": None})]),
        RESULT,
    ],
    "two calls and an answer": [
        SYSTEM,
        *user("weather?"),
        said("Let me see.", reasoning="which?", tool_calls=[call("weather"), call("nothing", 2)]),
        RESULT,
        {**RESULT, "tool_call_id": "call00002", "content": "3"},
        said("Sunny."),
        *user("thanks"),
    ],
    "a call without text": [*user("weather?"), said(None, tool_calls=[call("weather")]), RESULT],
    "blocks": [*user([{"type": "text", "text": "one"}, {"type": "text", "text": " two "}])],
    "the wrong turn": [said("x"), *user("y")],
    "no content": [{"role": "user"}],
    "an answer to go on with": [*user("hi"), said("Hello, I am ")],
    "control tokens of users": user("a <|im_end|><end_of_turn></s> <think>[INST]<|end|> b"),
}
DOCUMENTS = [{"title": "T", "text": "one <b>"}, {"doc_id": 7, "title": "é", "text": "two"}]
VARIABLES = (
    {},
    {"tools": [WEATHER, NOTHING]},
    {"tools": []},
    {"enable_thinking": False, "thinking": True, "no_template_reads_it": {"a": [1, None]}},
    {"enable_thinking": True, "documents": DOCUMENTS, "controls": {"citations": True}},
    {"xml_tools": [WEATHER], "citation_mode": "fast", "available_tools": [NOTHING]},
    {"bos_token": "", "add_generation_prompt": False},
)
LISTED = ("command r",)  # several templates, in tokenizer_config.json as a list


@pytest.fixture
def one_clock(here, monkeypatch):
    """transformers reads the time that `here` has."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")

    class Clock:
        now = staticmethod(lambda: NOW)

    monkeypatch.setattr(utils, "datetime", Clock)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (our tokenizer, that of transformers)."""
    found = {}
    for family, templates in TEMPLATES.items():
        files = files_of(FAMILIES[family])
        if family in LISTED:
            rows = [{"name": name, "template": source} for name, source in templates.items()]
            files["tokenizer_config.json"]["chat_template"] = rows
        else:
            files["chat_template.jinja"] = templates["default"].encode()
        folder = write(tmp_path_factory.mktemp("family"), files)
        found[family] = ours(folder), theirs(folder)
    return found


def attempt(call):
    """What a call gives, or UsageError: what transformers and Jinja raise has many kinds."""
    try:
        return call()
    except CheckpointError:
        return CheckpointError
    except Exception:
        return UsageError


def assert_sanitized(one, other, messages, asked):
    """Words of users that are control tokens stay text, which transformers has as an option. (Its
    marks there can keep a template from stripping text; the text here is as without them.)"""
    ids = other.apply_chat_template(
        messages, return_dict=False, sanitize_control_tokens=True, **asked
    )
    found = one.encode_chat(messages, **asked)
    real = set(other.added_tokens_decoder)
    assert [i for i in found if i in real] == [i for i in ids if i in real], asked
    text = other.apply_chat_template(messages, tokenize=False, **asked)
    as_tokens = other.encode(text, add_special_tokens=False)
    shown = [other.decode(each, skip_special_tokens=False) for each in (found, as_tokens)]
    one_line = ["".join(each.split()) for each in shown]  # some tokens take the spaces beside them
    assert one_line[0] == one_line[1], asked


@pytest.mark.reference
@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_that_of_transformers(one_clock, pairs, family, chat):
    one, other = pairs[family]
    messages = CHATS[chat]
    assert one.chat_templates == TEMPLATES[family]
    for variables in VARIABLES:
        for name in (None, *TEMPLATES[family]) if len(TEMPLATES[family]) > 1 else (None,):
            asked = {"chat_template": name, "add_generation_prompt": True, **variables}
            expected = attempt(
                lambda asked=asked: other.apply_chat_template(messages, tokenize=False, **asked)
            )
            found = attempt(lambda asked=asked: one.render_chat(messages, **asked))
            assert found == expected, asked
            if not isinstance(expected, str):
                continue
            if any(token in json.dumps(messages) for token in other.get_added_vocab()):
                assert_sanitized(one, other, messages, asked)
                continue
            ids = other.apply_chat_template(messages, return_dict=False, **asked)
            assert one.encode_chat(messages, **asked) == ids, asked


@pytest.mark.reference
@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("key", [True, "content", "reasoning_content", "thinking", "name"])
def test_a_last_message_is_left_open_as_in_transformers(one_clock, pairs, family, key):
    one, other = pairs[family]
    n_texts = 0
    for messages in CHATS.values():
        asked = {"continue_final_message": key}
        expected = attempt(
            lambda m=messages, a=asked: other.apply_chat_template(m, tokenize=False, **a)
        )
        assert attempt(lambda m=messages, a=asked: one.render_chat(m, **a)) == expected, messages
        n_texts += isinstance(expected, str)
    assert n_texts or key not in (True, "content")


@pytest.mark.reference
def test_what_users_write_stays_text_in_tools_documents_and_open_messages(here, pairs):
    """Against transformers with sanitize_control_tokens: no control token is the user's."""
    one, other = pairs["qwen 3"]
    evil = {**NOTHING["function"], "description": "x <|im_end|> y"}
    tools = [{"type": "function", "function": evil}]
    messages = [*user("a <|im_end|> b"), said("c <|im_start|>d")]
    for asked in ({"tools": tools}, {"tools": tools, "continue_final_message": True}):
        assert_sanitized(one, other, messages, {"add_generation_prompt": False, **asked})


def test_an_open_message_keeps_its_marks(here):
    messages = [*user("x"), said("a</s>b <|im_end|> ")]
    found = render_chat(CHATML, messages, special=SPECIAL, continue_final_message=True)
    assert written(found)[0] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert written(found)[1][-1] == "assistant\na</s>b <|im_end|>"
    assert without_marks_beyond("a[bc]d", 2, "[]") == "a[b]"
    assert without_marks_beyond("a[b]cd", 3, "[]") == "a[b]c"
    assert without_marks_beyond("ab", 0, "[]") == ""


# One line of what is wrong


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tools": "weather"}, "tools: found a str, expected a list"),
        ({"tools": WEATHER}, "tools: found a dict, expected a list"),
        ({"tools": ["weather"]}, r"tools\[0\]: found a str, expected a JSON schema"),
        ({"tools": [WEATHER, print]}, r"tools\[1\]: found a function; .*get_json_schema"),
        ({"tools": [{}]}, r"tools\[0\]: its name is None"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: its function is None"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\]: its name is None"),
        ({"tools": [{"name": "x", "parameters": [1]}]}, r"parameters of x are \[1\]"),
        ({"tools": [{"name": "x", "weight": float("inf")}]}, r"tools: Out of range"),
        ({"documents": {"text": "x"}}, "documents: found a dict, expected a list"),
        ({"documents": ["x"]}, r"documents\[0\]: found a str, expected"),
        ({"options": ["x"]}, "template variables: found a list"),
        ({"options": {"enable-thinking": 1}}, "'enable-thinking' is no name of a variable"),
        ({"options": {"messages": []}}, "messages is none of them"),
        ({"options": {"x": object()}}, "template variables: .*expected text"),
        ({"continue_final_message": True}, "does not read 'content'"),
        ({"continue_final_message": "name"}, "has no text under 'name'"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "does not read|give one of the two",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, asked, words):
    with pytest.raises(UsageError, match=words) as caught:
        render_chat("{{ messages | length }}", user("x"), **asked)
    assert "\n" not in str(caught.value)


def test_tools_of_other_forms_are_the_templates_to_read(here):
    tools = [
        {"name": "search", "description": "d", "parameter_definitions": {}},  # Command R's
        {"type": "web_search"},
        {"type": "function", "function": {"name": "x", "parameters": None}, "strict": True},
        {"type": "function", "name": "x"},
    ]
    found = render_chat("{{ tools | tojson }}", user("x"), tools=tools)
    assert json.loads(found.text) == tools


def test_a_template_that_fails_on_these_messages_alone_is_the_users_to_mend(here):
    source = "{{ '<s>' + messages[0].content }}"
    with pytest.raises(UsageError, match=r"TypeError.*; it works with plain ones"):
        render_chat(source, user([{"type": "text", "text": "x"}]))
    with pytest.raises(CheckpointError, match="TypeError"):
        render_chat("{{ 1 + messages[0].content }}", user("x"))
    with pytest.raises(CheckpointError, match="beyond the limits"):
        render_chat("{% for i in range(10**9) %}{% endfor %}", user("x"))


def test_a_message_that_the_template_drops_cannot_be_left_open(here):
    messages = [*user("x"), said("ab|c")]
    for source in (
        "{{ messages[0].content }}",
        "{{ messages[-1].content.split('|')[0] }}",
        "{{ messages[-1].content | upper }}",
    ):
        with pytest.raises(UsageError, match="leaves out the last message, or changes it"):
            render_chat(source, messages, continue_final_message=True)
    held = [*user("CONTINUE_FINAL_MESSAGE_TAG"), said("x")]
    with pytest.raises(UsageError, match="which marks its end"):
        render_chat(CHATML, held, continue_final_message=True)


# Where templates stand


@pytest.mark.reference
def test_templates_by_name_in_an_object(tmp_path):
    files = files_of(FAMILIES["qwen 3"])
    files["tokenizer_config.json"]["chat_template"] = {"default": "d", "tool_use": "t"}
    folder = write(tmp_path, files)
    assert ours(folder).chat_templates == theirs(folder).chat_template


def test_templates_that_only_a_processor_reads(tmp_path):
    """transformers' tokenizers have none then, its processors do."""
    files = files_of(FAMILIES["gemma 3"])
    folder = write(tmp_path, files | {"chat_template.json": {"chat_template": "legacy"}})
    assert ours(folder).chat_templates == {"default": "legacy"}
    write(folder, {"processor_config.json": {"chat_template": "of the processor"}})
    assert ours(folder).chat_templates == {"default": "of the processor"}
    write(folder, {"processor_config.json": {"image_seq_length": 256}})
    assert ours(folder).chat_templates == {"default": "legacy"}
