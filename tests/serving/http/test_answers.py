"""Answers over a real connection: what is streamed is what is told at once, and what the library
generates."""

import json

import pytest

import jlayer
from tests.serving.wire.bodies import NO_JSON, messages

PROMPT = "Once upon a time"
BODIES = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 11},
    "several": {"temperature": 0.9, "seed": 11, "n": 3},
    "greedy several": {"temperature": 0, "n": 2},
    "stopped": {"temperature": 0, "stop": ["king", " was a"]},
    "stop at the limit": {"temperature": 0, "stop": [" zzz", "e zzz", "he zzz"]},
    "penalties": {"temperature": 0.7, "seed": 2, "presence_penalty": 1, "frequency_penalty": 0.5},
    "biased": {"temperature": 0, "logit_bias": {"13": 100}},
    "one token": {"temperature": 0, "max_tokens": 1},
    "no token": {"temperature": 0, "max_tokens": 0},
    "partial characters": {"temperature": 1.5, "seed": 3, "logit_bias": {"163": 8, "223": 8}},
}
# Chats take a process each for their template.
OF_CHATS = ("seeded", "several", "greedy several", "stopped", "no token", "partial characters")


def events(text):
    """The events of a stream: JSON, and the comments."""
    found, comments = [], []
    for block in text.split("\n\n"):
        for line in filter(None, block.split("\n")):
            if line.startswith(":"):
                comments.append(line)
            else:
                assert line.startswith("data: "), line
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
    return found, comments


def streamed(client, path, body, **more):
    found = client.post(path, json={**body, "stream": True, **more})
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.headers["cache-control"] == "no-cache"
    assert found.headers["x-accel-buffering"] == "no"
    chunks, comments = events(found.text)
    assert found.text.startswith(": "), "a comment at once"
    assert comments
    assert chunks.pop() == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    return chunks


@pytest.mark.slow
@pytest.mark.parametrize("extra", [BODIES[name] for name in OF_CHATS], ids=OF_CHATS)
def test_a_chat_that_is_streamed_is_the_plain_one(client, extra):
    body = {"messages": messages(PROMPT), "max_tokens": 16, **extra}
    plain = client.post("/v1/chat/completions", json=body).json()
    chunks = streamed(client, "/v1/chat/completions", body, stream_options={"include_usage": True})
    usage = chunks.pop()
    assert (usage["choices"], usage["usage"]) == ([], plain["usage"] | usage["usage"])
    for choice in plain["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        assert all("role" not in each["delta"] for each in own[1:])
        text = "".join(each["delta"].get("content", "") for each in own)
        assert text == choice["message"]["content"]
        reasons = [each["finish_reason"] for each in own]
        assert reasons == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len(plain["choices"]) == extra.get("n", 1)


@pytest.mark.parametrize("extra", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
def test_a_completion_is_what_the_library_generates_streamed_or_not(model, client, extra, echo):
    body = {"prompt": PROMPT, "max_tokens": 16, "logprobs": 2, **extra}
    n, limit = body.pop("n", 1), body.get("max_tokens")
    options = {k: v for k, v in extra.items() if k not in ("n", "max_tokens")}
    expected = jlayer.generate(
        model,
        PROMPT,
        max_new_tokens=limit,
        logprobs=2,
        num_return_sequences=1 if extra.get("temperature") == 0 else n,
        **options,
    )
    expected = expected if isinstance(expected, list) else [expected] * n
    if echo:
        body.pop("logprobs")
    body |= {"echo": echo, "n": n}
    plain = client.post("/v1/completions", json=body).json()
    before = PROMPT if echo else ""
    assert [c["text"] for c in plain["choices"]] == [before + one.text for one in expected]
    assert [c["finish_reason"] for c in plain["choices"]] == [one.finish_reason for one in expected]
    assert plain["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in expected)
    assert plain["usage"]["prompt_tokens"] == expected[0].prompt_tokens
    chunks = streamed(client, "/v1/completions", body)
    for choice in plain["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [r for each in own if (r := each["finish_reason"])] == [choice["finish_reason"]]
        if not echo:
            rows = [each["logprobs"] for each in own if each["logprobs"]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [one for row in rows for one in row[name]] == choice["logprobs"][name]
            probs = [row["logprob"] for row in expected[choice["index"]].logprobs]
            assert choice["logprobs"]["token_logprobs"] == probs


def test_offsets_of_new_tokens_stand_in_their_text(client):
    body = {"prompt": PROMPT, "max_tokens": 20, "logprobs": 0, "temperature": 0}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_log_probabilities_of_a_chat(client):
    body = {
        "messages": messages(PROMPT),
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    entries = choice["logprobs"]["content"]
    raw = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert raw.decode() == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
    chunks = streamed(client, "/v1/chat/completions", body)
    rows = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [one for row in rows for one in row["content"]] == entries


def test_a_token_that_ends_a_text_has_its_entry(client):
    """lm-eval drops the last entry, so the new token must be there whatever it is."""
    end = 1
    body = {
        "prompt": [[5, 6, 7]],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "logit_bias": {str(end): 100},
    }
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|end_of_text|>"]


def test_prompts_of_a_list_are_answered_in_their_order(model, client):
    prompts = [PROMPT, [0, 48, 1278], "The fox"]
    body = {"prompt": prompts, "max_tokens": 5, "temperature": 0}
    found = client.post("/v1/completions", json=body).json()
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        one = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
        assert one["choices"][0]["text"] == choice["text"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]


def test_progress_comes_as_json_where_it_is_asked_for_only(client):
    body = {"messages": messages(PROMPT), "max_tokens": 3}
    plain = streamed(client, "/v1/chat/completions", body)
    assert {chunk["object"] for chunk in plain} == {"chat.completion.chunk"}
    asked = {"stream_options": {"jlayer_progress": True}}
    found = streamed(client, "/v1/chat/completions", body, **asked)
    told = [chunk for chunk in found if chunk["object"] == "jlayer.progress"]
    assert told
    for chunk in told:
        assert chunk["choices"] == []
        assert chunk["jlayer"]["n_layers"] == 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_no_json_is_refused_in_openais_form(client, path, raw):
    found = client.post(path, content=raw)
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_is_json_whatever_it_is_called(client):
    """curl -d sends the type of a form."""
    raw = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
        found = client.post("/v1/completions", content=raw, headers={"content-type": kind})
        assert found.status_code == 200


def test_a_body_that_is_compressed_is_refused(client):
    found = client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert found.status_code == 415
    assert found.json()["error"]


def test_a_refusal_of_a_stream_is_a_status(client):
    body = {"messages": messages(PROMPT), "stream": True, "temperature": -1}
    found = client.post("/v1/chat/completions", json=body)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/v1", 404, None),
        ("POST", "/v1/models/", 405, "GET"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/completions", 405, "POST"),
        ("PUT", "/v1/requests/x", 405, "DELETE, GET, HEAD"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("GET", "/v1/requests/nothing", 404, None),
        ("GET", "/v1/models/gpt-9", 404, None),
        ("GET", "/%00/..%2f", 404, None),
        ("GET", "/" + "a" * 5000, 404, None),
    ],
)
def test_errors_have_one_form_on_every_path(client, method, path, status, allow):
    found = client.request(method, path)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    if allow is not None:
        assert set(allow.split(", ")) <= set(found.headers["allow"].split(", "))


def test_models_under_each_of_their_names(client):
    (found,) = client.get("/v1/models").json()["data"]
    assert (found["id"], found["max_model_len"], found["object"]) == ("fable-3m", 1024, "model")
    for name in ("fable-3m", "fable"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        body = {"model": name, "prompt": PROMPT, "max_tokens": 1}
        assert client.post("/v1/completions", json=body).json()["model"] == "fable-3m"


def test_metrics_are_read_by_prometheus_own_parser(client):
    parser = pytest.importorskip("prometheus_client.parser")
    client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
    families = {
        each.name: each
        for each in parser.text_string_to_metric_families(client.get("/metrics").text)
    }
    (riders,) = families["jlayer_riders"].samples
    assert riders.value >= 0
    assert sum(each.value for each in families["jlayer_layers"].samples) == 6
    tokens = families["jlayer_tokens"].samples[0].value
    client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True})
    again = client.get("/metrics").text
    families = {each.name: each for each in parser.text_string_to_metric_families(again)}
    assert families["jlayer_tokens"].samples[0].value == tokens + 2
    answered = {
        (each.labels["path"], each.labels["status"]): each.value
        for each in families["jlayer_http_answers"].samples
    }
    assert answered["/v1/completions", "200"] >= 2


def test_an_estimate_of_a_body_and_of_numbers(client):
    body = {"prompt": [5] * 10, "max_tokens": 20}
    found = client.post("/v1/estimate", json=body).json()
    assert (found["prompt_tokens"], found["new_tokens"], found["fits"]) == (10, 20, True)
    assert found["forward_passes"] == 20
    numbers = {"prompt_tokens": 10, "max_tokens": 20}
    same = client.post("/v1/estimate", json=numbers).json()
    assert {**same, "seconds": 0} == {**found, "seconds": 0}
    assert same["cache_bytes"] > 0
    for wrong in ({}, {"prompt_tokens": 0}, {"prompt_tokens": 10, "max_tokens": 2000}):
        assert client.post("/v1/estimate", json=wrong).status_code == 400


def test_a_choice_is_held(client):
    body = {"prompt": PROMPT, "guided_choice": ["yes", "no"], "max_tokens": 9}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] in ("yes", "no")
