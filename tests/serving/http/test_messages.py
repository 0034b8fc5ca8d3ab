"""/v1/messages: the protocol that coding agents speak."""

import json

import pytest

from tests.serving.http.conftest import client_of, served
from tests.serving.wire.bodies import messages
from tests.text.tool_templates import HERMES

PATH = "/v1/messages"
TOOL = {
    "name": "time",
    "description": "x",
    "input_schema": {
        "type": "object",
        "properties": {"of": {"enum": ["here", "there"]}},
        "required": ["of"],
    },
}
BODY = {"model": "fable", "max_tokens": 12, "messages": messages("Hello"), "temperature": 0}


@pytest.fixture(scope="module")
def client(model, desk):
    with served(model, desk=desk, template=HERMES) as serving, client_of(serving) as found:
        yield found


def streamed(client, body):
    """The events of a stream, whose names are those in their data."""
    found = client.post(PATH, json={**body, "stream": True})
    assert found.status_code == 200, found.text
    events = []
    for block in found.text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def rebuilt(events):
    """The message that a client makes of a stream, by the protocol's rules."""
    message, blocks, texts, is_open = events[0]["message"], [], [], False
    assert events[0]["type"] == "message_start"
    for event in events[1:]:
        kind = event["type"]
        if kind == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            texts.append("")
            is_open = True
        elif kind == "content_block_delta":
            assert is_open
            assert event["index"] == len(blocks) - 1
            delta = dict(event["delta"])
            assert delta.pop("type") in ("text_delta", "thinking_delta", "input_json_delta")
            (text,) = delta.values()
            texts[-1] += text
        elif kind == "content_block_stop":
            is_open = False
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    assert not is_open
    assert events[-1]["type"] == "message_stop"
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
        else:
            block[block["type"]] = text
    return {**message, "content": blocks}


def same(one, other):
    """But for what an answer alone has."""
    for message in (one, other):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
        usage = message.pop("usage")
        message["total"] = usage["input_tokens"] + usage["cache_read_input_tokens"]
        message["new"] = usage["output_tokens"]
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "max_tokens"),
        ({"stop_sequences": [" of", " zzz"]}, "stop_sequence"),
        ({"system": "Be brief."}, "max_tokens"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 300}, "tool_use"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "max_tokens"),
    ],
)
def test_a_message_that_is_streamed_is_the_plain_one(client, more, reason):
    body = {**BODY, **more}
    if reason == "tool_use":
        body["tool_choice"] = {**body["tool_choice"], "disable_parallel_tool_use": True}
    plain = client.post(PATH, json=body).json()
    assert (plain["type"], plain["role"], plain["stop_reason"]) == ("message", "assistant", reason)
    assert (plain["stop_sequence"] == " of") == (reason == "stop_sequence")
    found = rebuilt(streamed(client, body))
    if reason == "tool_use":
        (block,) = plain["content"]
        assert block["input"]["of"] in ("here", "there")
    assert same(found, plain)


def test_it_says_what_a_chat_of_openais_says(client):
    chat = {"messages": messages("Hello"), "max_tokens": 12, "temperature": 0}
    (choice,) = client.post("/v1/chat/completions", json=chat).json()["choices"]
    plain = client.post(PATH, json=BODY).json()
    assert plain["content"] == [{"type": "text", "text": choice["message"]["content"]}]


def test_blocks_become_messages(client):
    said = [
        {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "I will look."},
                {"type": "tool_use", "id": "t1", "name": "time", "input": {"of": "here"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [
                        {"type": "text", "text": "noon"},
                    ],
                },
                {"type": "text", "text": "Thanks."},
            ],
        },
    ]
    call = {"id": "t1", "type": "function"}
    call["function"] = {"name": "time", "arguments": '{"of": "here"}'}
    same_chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "I will look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "noon"},
        {"role": "user", "content": "Thanks."},
    ]
    expected = client.post("/tokenize", json={"messages": same_chat}).json()["count"]
    body = {"messages": said, "system": [{"type": "text", "text": "Be brief."}]}
    found = client.post(f"{PATH}/count_tokens", json=body).json()
    assert found == {"input_tokens": expected}


def test_an_answer_that_was_begun_is_gone_on_with(client):
    body = {**BODY, "messages": messages("Hello", "It is")}
    counted = client.post(f"{PATH}/count_tokens", json=body).json()["input_tokens"]
    chat = {
        "messages": messages("Hello", "It is"),
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert client.post("/tokenize", json=chat).json()["count"] == counted


def test_more_tokens_than_there_is_room_for_are_cut(client):
    found = client.post(PATH, json={**BODY, "max_tokens": 100_000, "stop_sequences": [" of"]})
    assert found.status_code == 200
    found = client.post(PATH, json={**BODY, "messages": messages("fox " * 2000)})
    assert found.status_code == 400
    assert "maximum context length" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"model": "gpt-9"}, 404, "not_found_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, None),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, 400, None),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, 400, None),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, None),
        ({"tools": [{"name": "a b"}]}, 400, None),
        ({"tools": [TOOL], "tool_choice": {"type": "all"}}, 400, None),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, 400, None),
        ({"temperature": -1}, 400, None),
        ({"stop_sequences": [""]}, 400, None),
        ({"thinking": 5}, 400, None),
    ],
)
def test_errors_are_in_its_form(client, part, status, kind):
    found = client.post(PATH, json={**BODY, **part})
    assert found.status_code == status, found.text
    body = found.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == (kind or "invalid_request_error")
    assert body["error"]["message"]


def test_errors_of_the_guard_too(client):
    found = client.post(PATH, json=BODY, headers={"host": "evil.example.com"})
    assert (found.status_code, found.json()["type"]) == (403, "error")
    assert client.get(PATH).json()["type"] == "error"
