"""OpenAI's package for Node against the server: the script does, and here is what it has found."""

import json
import threading

import numpy as np
import pytest

import jlayer
from jlayer.serving.http.guard import Rules
from jlayer.serving.queue import Limits
from tests.serving.http import node
from tests.serving.http.conftest import held, served
from tests.serving.http.test_connections import LONG, raw, until
from tests.text.tool_templates import HERMES

KEY = "s3cret"
SCENARIOS = (
    *("models", "stream", "helper", "completion", "several", "forced", "auto", "runner", "schema"),
    *("vectors", "errors"),
)


@pytest.fixture(scope="module")
def serving(model, desk):
    node.modules()
    with served(model, desk=desk, template=HERMES, rules=Rules(key=KEY)) as found:
        yield found


@pytest.fixture(scope="module")
def found(serving):
    """Of all scenarios that need nothing but a server, run by one process."""
    return node.ran(serving, *SCENARIOS, key=KEY)


def test_models(found):
    (one,) = found["models"]["list"]
    assert (one["id"], one["object"], one["max_model_len"]) == ("fable-3m", "model", 1024)
    assert found["models"]["one"] == one
    assert found["models"]["other"]["kind"] == "NotFoundError"


def test_a_stream_is_the_plain_text_and_its_usage_comes_last(found):
    plain, chunks = found["stream"]["plain"], found["stream"]["chunks"]
    last = chunks.pop()
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], plain["usage"]["total_tokens"])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == plain["choices"][0]["message"]["content"] != ""
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert found["helper"]["final"]["choices"][0]["message"]["content"] == text
    assert found["helper"]["told"] == text


def test_completions_as_the_library_gives_them(model, found):
    expected = jlayer.generate(model, "Once upon", max_new_tokens=8, temperature=0.8, seed=4)
    plain, chunks = found["completion"]["plain"], found["completion"]["chunks"]
    assert plain["choices"][0]["text"] == expected.text
    logprobs = plain["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == expected.text
    assert [len(each) for each in logprobs["top_logprobs"]] >= [2] * 8
    assert found["completion"]["echoed"]["choices"][0]["text"] == "Once upon" + expected.text
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text


def test_several_texts_stop_and_log_probabilities(found):
    choices = found["several"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    for choice in choices:
        assert " the" not in choice["message"]["content"]
        assert choice["finish_reason"] in ("stop", "length")
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 4


def test_a_tool_that_has_to_be_called_is_called_plain_and_streamed(found):
    for form in ("plain", "streamed"):
        (choice,) = found["forced"][form]["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "time")
        assert json.loads(call["function"]["arguments"])["of"] in ("here", "there")


def test_a_tool_that_may_be_called_is_called_where_the_model_does(found):
    (choice,) = found["auto"]["calls"]["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "time"
    assert json.loads(call["function"]["arguments"]) == {"of": "here"}
    (choice,) = found["auto"]["says"]["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "It is noon.")
    assert not choice["message"].get("tool_calls")


def test_the_runner_of_tools_gets_its_arguments(found):
    (given,) = found["runner"]["given"]
    assert given["of"] in ("here", "there")
    assert found["runner"]["roles"] == ["user", "assistant", "tool"]


def test_a_schema_is_held(found):
    content = json.loads(found["schema"]["message"]["content"])
    assert (list(content), found["schema"]["finish_reason"]) == (["of"], "stop")


def test_vectors_come_packed_and_as_numbers(model, found):
    expected = model.encode(["Once", "One day"], normalize=True)
    for form in ("packed", "plain"):
        rows = found["vectors"][form]["data"]
        assert [row["index"] for row in rows] == [0, 1]
        assert np.abs(np.array([row["embedding"] for row in rows]) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "kind", "status", "param", "code"),
    [
        ("temperature", "BadRequestError", 400, "temperature", None),
        ("streamed", "BadRequestError", 400, "n", None),
        ("length", "BadRequestError", 400, "messages", "context_length_exceeded"),
        ("model", "NotFoundError", 404, "model", "model_not_found"),
        ("path", "NotFoundError", 404, None, "unknown_path"),
        ("key", "AuthenticationError", 401, None, "invalid_api_key"),
    ],
)
def test_errors_are_those_that_scripts_catch(found, name, kind, status, param, code):
    error = found["errors"][name]
    assert (error["kind"], error["status"]) == (kind, status)
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) > 20


def test_a_stream_that_is_aborted_ends_the_work(model, serving, desk):
    n_before, gate = desk.status().cancelled_total, threading.Event()
    with held(model, gate):
        assert node.ran(serving, "abort", key=KEY)["abort"] == {"role": "assistant"}
        until(lambda: desk.status().cancelled_total == n_before + 1)
    until(lambda: not desk.status().riders)


def test_a_client_comes_back_when_it_is_told_to(model):
    node.modules()
    gate = threading.Event()
    with served(model, limits=Limits(people=1)) as serving:
        desk = serving.site.desk
        with held(model, gate), raw(serving, body=LONG) as first:
            until(lambda: desk.status().riders)
            with raw(serving, body=LONG) as second:
                until(lambda: desk.status().queued)
                error = node.ran(serving, "impatient")["impatient"]
                assert (error["kind"], error["code"]) == ("RateLimitError", "queue_full")
                process = node.started(serving, "patient")
                until(lambda: serving.site.answered["/v1/completions", 429] >= 2)
                second.close()
                first.close()
                gate.set()
                assert node.ended(process)["patient"]["completion_tokens"] == 2
