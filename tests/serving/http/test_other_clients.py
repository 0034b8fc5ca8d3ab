"""Requests as LangChain, Open WebUI and lm-eval send them: recorded forms, their headers, and what
they then read of the answers.

LangChain: the bodies of langchain-openai 1.7.4. Open WebUI: what its server sends on to a
connection, where the person has set max_tokens to 6 for the model.
"""

import json

import pytest

from jlayer.serving.http.guard import Rules
from tests.serving.http.conftest import client_of, served
from tests.serving.http.test_answers import events
from tests.text.tool_templates import HERMES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY, MODEL, N_NEW = "s3cret", "fable-3m", 6
LANGCHAIN = {
    "accept": "application/json",
    "user-agent": "OpenAI/Python 3.57.0",
    "x-stainless-lang": "python",
    "x-stainless-async": "false",
    "x-stainless-raw-response": "true",
    "x-stainless-retry-count": "0",
    "x-stainless-read-timeout": "600",
}
OPEN_WEBUI = {
    "accept": "*/*",
    "accept-encoding": "gzip, deflate, br",
    "user-agent": "Python/3.11 aiohttp/3.13.2",
    "x-openwebui-user-name": "J%C3%BCrgen%20%E2%9C%A8",
    "x-openwebui-user-id": "3f0c",
    "x-openwebui-user-email": "j@example.com",
    "x-openwebui-user-role": "admin",
    "x-openwebui-chat-id": "local:9b1e",
    "cookie": 'token=abc; x="y z"; oauth_id_token=',
}
TEXTS = ("Once upon", "The fox said to the")
USER = [{"content": "Once upon", "role": "user"}]
# Of a pydantic class Answer with a field `of`, as LangChain writes it.
SCHEMA = {
    "description": "An answer",
    "properties": {"of": {"enum": ["here", "there"], "title": "Of", "type": "string"}},
    "required": ["of"],
    "title": "Answer",
    "type": "object",
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "gives the weather",
        "parameters": {
            "properties": {"of": {"enum": ["here", "there"], "type": "string"}},
            "required": ["of"],
            "type": "object",
            "additionalProperties": False,
        },
    },
}
CALL = {
    "type": "function",
    "id": "call_1",
    "function": {"name": "weather", "arguments": '{"of": "here"}'},
}
OLDER = {  # what the class for completions always sends
    "frequency_penalty": 0,
    "logprobs": None,
    "max_tokens": N_NEW,
    "n": 1,
    "presence_penalty": 0,
    "seed": None,
    "temperature": 0.7,
    "top_p": 1,
}
OF_LANGCHAIN = {
    "invoke": (
        CHAT,
        {
            "messages": [
                {"content": "Be brief.", "role": "developer"},
                {"content": [{"type": "text", "text": "Once upon"}], "role": "user"},
                {"content": "", "role": "assistant"},
                {"content": "and?", "role": "user", "name": "ann"},
            ],
            "max_completion_tokens": N_NEW,
            "temperature": 0.0,
            "reasoning_effort": "low",
        },
    ),
    "all options": (
        CHAT,
        {
            "messages": USER,
            "frequency_penalty": 0.1,
            "logit_bias": {"5": -100},
            "logprobs": True,
            "top_logprobs": 2,
            "max_completion_tokens": N_NEW,
            "n": 2,
            "seed": 3,
            "stop": ["x"],
            "top_p": 0.9,
            "store": False,
            "service_tier": "auto",
            "metadata": {"a": "b"},
        },
    ),
    "results of tools": (
        CHAT,
        {
            "messages": [
                *USER,
                {"content": None, "role": "assistant", "tool_calls": [CALL]},
                {"content": "rain", "role": "tool", "tool_call_id": "call_1"},
            ],
            "max_completion_tokens": N_NEW,
            "tools": [TOOL],
        },
    ),
    "completions": (COMPLETIONS, {"prompt": ["Once upon", "The fox"], **OLDER}),
}
TASK = "### Task:\nGenerate a title.\n"
OF_OPEN_WEBUI = {
    "a chat": (CHAT, {"messages": USER, "max_tokens": N_NEW}),
    "with all its sliders": (
        CHAT,
        {
            "messages": [{"role": "system", "content": "Be brief."}, *USER],
            "max_tokens": N_NEW,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.0,
            "repeat_penalty": 1.1,
            "repeat_last_n": 64,
            "mirostat": 0,
            "tfs_z": 1,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.0,
            "seed": 42,
            "stop": ["###", "<end>"],
            "logit_bias": {"15": -5},
            "num_ctx": 2048,
            "stream_options": {"include_usage": True},
        },
    ),
    "with tools of its own": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": 0}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
            ],
            "max_tokens": N_NEW,
            "tools": [TOOL],
        },
    ),
    "a title": (
        CHAT,
        {
            "messages": [{"role": "user", "content": TASK}],
            "stream": False,
            "max_completion_tokens": N_NEW,
        },
    ),
    "tags, follow-ups": (
        CHAT,
        {
            "messages": [{"role": "user", "content": TASK}],
            "stream": False,
            "max_tokens": N_NEW,
            "chat_id": None,
        },
    ),
}
REQUESTS = {
    **{f"langchain, {name}": (LANGCHAIN, *row) for name, row in OF_LANGCHAIN.items()},
    **{f"open webui, {name}": (OPEN_WEBUI, *row) for name, row in OF_OPEN_WEBUI.items()},
}


@pytest.fixture(scope="module")
def serving(model, desk):
    with served(model, desk=desk, template=HERMES, rules=Rules(key=KEY)) as found:
        yield found


@pytest.fixture(scope="module")
def client(serving):
    with client_of(serving) as found:
        found.headers = {"authorization": f"Bearer {KEY}"}
        yield found


def text_of(path, choice, part):
    return choice["text"] if path == COMPLETIONS else choice[part].get("content") or ""


@pytest.mark.parametrize(("headers", "path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_what_they_send_is_answered(client, headers, path, body):
    asked = {"model": MODEL, "stream": False, **body}
    found = client.post(path, json=asked, headers=headers)
    assert found.status_code == 200, found.text
    found, n_prompts = found.json(), len(body["prompt"]) if "prompt" in body else 1
    n_texts = n_prompts * body.get("n", 1)
    assert [choice["index"] for choice in found["choices"]] == list(range(n_texts))
    for choice in found["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert ("logprobs" in body) == (choice["logprobs"] is not None) or path == COMPLETIONS
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens"] <= n_texts * N_NEW


@pytest.mark.parametrize(
    "name",
    ["langchain, all options", "langchain, completions", "open webui, with all its sliders"],
)
def test_and_what_they_stream(client, name):
    headers, path, body = REQUESTS[name]
    asked = {"model": MODEL, "stream_options": {"include_usage": True}, **body, "stream": True}
    found = client.post(path, json=asked, headers=headers)
    assert found.headers["content-type"].startswith("text/event-stream")
    chunks, _ = events(found.text)
    assert chunks.pop() == "[DONE]"
    last = chunks.pop()
    assert (last["choices"], last["usage"]["total_tokens"] > 0) == ([], True)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    n_prompts = len(body["prompt"]) if "prompt" in body else 1
    assert len([reason for reason in reasons if reason]) == n_prompts * body.get("n", 1)
    assert any(text_of(path, chunk["choices"][0], "delta") for chunk in chunks)


def test_langchains_structured_output_both_ways(client):
    body = {"model": MODEL, "messages": USER, "max_completion_tokens": 200, "temperature": 0.0}
    form = {"schema": SCHEMA, "name": "Answer", "strict": True}
    asked = {**body, "response_format": {"type": "json_schema", "json_schema": form}}
    (choice,) = client.post(CHAT, json=asked, headers=LANGCHAIN).json()["choices"]
    assert json.loads(choice["message"]["content"])["of"] in ("here", "there")
    chosen = {"type": "function", "function": {"name": "weather"}}
    asked = {**body, "tools": [TOOL], "tool_choice": chosen, "parallel_tool_calls": False}
    (choice,) = client.post(CHAT, json=asked, headers=LANGCHAIN).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["of"] in ("here", "there")


def test_open_webui_asks_for_models_with_nothing_to_ask_for(client):
    found = client.get("/v1/models", headers=OPEN_WEBUI)
    assert found.status_code == 200
    assert found.json()["object"] == "list"
    assert [row["id"] for row in found.json()["data"]] == [MODEL]
    assert found.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "/v1/audio/voices", "/models"])
def test_what_it_may_ask_for_and_is_not_there_is_a_404_that_it_can_read(client, path):
    found = client.get(path, headers=OPEN_WEBUI)
    assert (found.status_code, found.json()["error"]["code"]) == (404, "unknown_path")


def test_an_image_is_refused_by_its_place(client):
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": parts}]}
    found = client.post(CHAT, json=body, headers=OPEN_WEBUI)
    assert found.status_code == 400
    error = found.json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[1]", "unsupported_content")


def test_a_key_that_nobody_has_set(client, model, desk):
    """Open WebUI then sends a bearer without a key: fine where none is asked for."""
    headers = {**OPEN_WEBUI, "authorization": "Bearer"}
    found = client.get("/v1/models", headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (401, "missing_api_key")
    with served(model, desk=desk) as serving, client_of(serving) as keyless:
        assert keyless.get("/v1/models", headers=headers).status_code == 200


def test_lm_eval_finds_the_tokenizer_at_the_root(client):
    """Its own lookup: what it begins with, and that its ids are the model's."""
    info = client.get("/tokenizer_info").json()
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= set(info)
    assert info["chat_template"] == HERMES
    text = "Once upon a time,\n  the fox — ünï 🙂"
    ids = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    adds = client.post("/tokenize", json={"prompt": text, "add_special_tokens": True}).json()
    assert adds["tokens"][1:] == ids["tokens"]
    end = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})
    assert len(end.json()["tokens"]) == 1, "it finds the id of the end so"
    assert client.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": text}
    for path in ("/v1/tokenizer_info", "/v1/tokenize", "/v1/detokenize"):
        assert client.get(path).status_code == 404


def test_what_lm_eval_generates_is_read_by_its_numbers(client):
    """Greedy is where the entry's number is the largest one, exactly."""
    ids = client.post("/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    body = {
        "model": MODEL,
        "prompt": [ids, ids[:2]],
        "max_tokens": N_NEW,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "stop": ["\n\n\n", "</s>", "<|im_end|>", "Q:", "###"],
    }
    found = client.post(COMPLETIONS, json=body, headers={"authorization": f"Bearer {KEY}"}).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for choice in found["choices"]:
        told = choice["logprobs"]
        assert "".join(told["tokens"]) == choice["text"]
        for number, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
            assert number == max(top.values()) < 0


def test_what_lm_eval_scores_is_what_was_drawn(client):
    """It drops the last entry, which is of the new token, and reads those of the answer."""
    begins = [client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    asked = {"model": MODEL, "temperature": 0, "logprobs": 1, "seed": 1234}
    drawn = client.post(COMPLETIONS, json={**asked, "prompt": begins, "max_tokens": N_NEW}).json()
    drawn = [choice["logprobs"] for choice in drawn["choices"]]
    texts = [choice["tokens"] for choice in drawn]
    answers = [
        client.post("/tokenize", json={"prompt": "".join(text), "add_special_tokens": False})
        for text in texts
    ]
    whole = [begin + more.json()["tokens"] for begin, more in zip(begins, answers, strict=True)]
    body = {**asked, "prompt": whole, "max_tokens": 1, "echo": True}
    scored = client.post(COMPLETIONS, json=body).json()["choices"]
    for begin, one, choice in zip(begins, drawn, scored, strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(begin) + N_NEW + 1
        of_answer = slice(len(begin), -1)
        assert told["tokens"][of_answer] == one["tokens"]
        numbers = told["token_logprobs"][of_answer]
        assert numbers == pytest.approx(one["token_logprobs"], abs=1e-4)
        largest = [max(top.values()) for top in told["top_logprobs"][of_answer]]
        assert numbers == largest, "greedy, exactly"
        others = told["token_logprobs"][1 : len(begin)]
        tops = [max(top.values()) for top in told["top_logprobs"][1 : len(begin)]]
        assert all(number <= top for number, top in zip(others, tops, strict=True))
        assert others != tops, "these were not drawn"


@pytest.mark.parametrize("part", [{"max_tokens": 1}, {"max_tokens": 0}, {"max_tokens": 2, "n": 2}])
def test_scores_are_streamed_as_they_are_told_plain(client, part):
    body = {"model": MODEL, "prompt": "Once upon", "echo": True, "logprobs": 2, "seed": 1, **part}
    found = client.post(COMPLETIONS, json=body).json()
    plain, n_prompt = found["choices"], found["usage"]["prompt_tokens"]
    chunks, _ = events(client.post(COMPLETIONS, json={**body, "stream": True}).text)
    for choice in plain:
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        for name, told in choice["logprobs"].items():
            parts = [chunk["logprobs"][name] for chunk in own if chunk["logprobs"]]
            assert [each for part in parts for each in part] == told
        numbers = choice["logprobs"]["token_logprobs"]
        assert (numbers[0], None in numbers[1:]) == (None, False)
        assert len(numbers) == n_prompt + body["max_tokens"]
