"""Tools and reasoning through the server: calls that are forced, read, and told back to a model."""

import json

import pytest

from tests.serving.http.conftest import client_of, served
from tests.serving.http.test_answers import streamed
from tests.serving.wire.bodies import messages
from tests.text.tool_templates import HERMES

CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "x",
            "parameters": {
                "type": "object",
                "properties": {"of": {"enum": ["here", "there"]}},
                "required": ["of"],
            },
        },
    }
    for name in ("weather", "time")
]
BODY = {"messages": messages("Hello"), "tools": TOOLS, "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def client(model, desk):
    with served(model, desk=desk, template=HERMES) as serving, client_of(serving) as found:
        yield found


def joined(chunks):
    """(content, calls) of what was streamed."""
    content, calls = "", {}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            for name in ("id", "type"):
                if name in part:
                    call[name] = part[name]
            for name, text in part["function"].items():
                call["function"][name] += text
    return content, [calls[at] for at in sorted(calls)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ],
)
def test_calls_that_are_forced_are_told_plain_and_streamed(client, choice, names):
    body = {**BODY, "tool_choice": choice, "parallel_tool_calls": False}
    (plain,) = client.post(CHAT, json=body).json()["choices"]
    assert plain["finish_reason"] == "tool_calls"
    assert plain["message"]["content"] is None
    (call,) = plain["message"]["tool_calls"]
    assert call["function"]["name"] in names
    assert json.loads(call["function"]["arguments"])["of"] in ("here", "there")
    chunks = streamed(client, CHAT, body)
    content, (found,) = joined(chunks)
    assert (content, found["function"]) == ("", call["function"])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    arguments = [c for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert len(arguments) > 2, "arguments come as they are written"


def test_tools_that_may_be_called_need_not_be(client):
    (choice,) = client.post(CHAT, json={**BODY, "max_tokens": 5}).json()["choices"]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]


def test_calls_and_their_results_go_back_to_the_model(client):
    call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": '{"of": 1}'}}
    said = [
        *messages("Hello"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    ids = client.post("/tokenize", json={"messages": said}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert '{"name": "time", "arguments": {"of": 1}}' in text
    assert "<tool_response>\nnoon\n</tool_response>" in text
    assert client.post(CHAT, json={**BODY, "messages": said, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, None),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_tools_that_are_none_are_named(client, part, param):
    found = client.post(CHAT, json={**BODY, **part})
    assert found.status_code == 400
    if param is not None:
        assert found.json()["error"]["param"].startswith(param)


def test_a_template_of_no_known_kind_is_no_silent_loss(model, desk):
    with served(model, desk=desk) as serving, client_of(serving) as client:
        found = client.post(CHAT, json=BODY)
        assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")
        body = {**BODY, "tool_choice": "none", "max_tokens": 1}
        assert client.post(CHAT, json=body).status_code == 200


def test_reasoning_is_told_apart(model, desk):
    """A template that opens the reasoning, and a text that is made to close it."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
        "{# ends with </think> #}"
    )
    pattern = "(yes|no), I think</think>\n\nIt is (so|not so)"
    body = {"messages": messages("x"), "max_tokens": 60, "temperature": 0, "guided_regex": pattern}
    with served(model, desk=desk, template=template) as serving, client_of(serving) as client:
        message = client.post(CHAT, json=body).json()["choices"][0]["message"]
        assert message["reasoning_content"] in ("yes, I think", "no, I think")
        assert message["content"] in ("It is so", "It is not so")
        deltas = [c["choices"][0]["delta"] for c in streamed(client, CHAT, body)]
        for name in ("reasoning_content", "content"):
            assert "".join(delta.get(name, "") for delta in deltas) == message[name]
