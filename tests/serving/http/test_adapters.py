"""Adapters over HTTP: each is a model with a name of its own, and requests for different ones share
forward passes."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import jlayer
from jlayer import AutoModel
from jlayer.serving.batch.answers import Answers
from jlayer.serving.wire.errors import Refused
from jlayer.serving.wire.served import Served
from tests.adapters import write_adapter
from tests.serving.http.conftest import NAMES, client_of, served
from tests.serving.wire.bodies import messages

PROMPT = "Once upon a time there was a king who had no children at all, and"
ADAPTERS = ("first", "second")


@pytest.fixture(scope="module")
def model(fable, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    folders = {
        name: write_adapter(folder / name, fable, rank=2 + seed, seed=seed, size=0.2)
        for seed, name in enumerate(ADAPTERS)
    }
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32", adapters=folders) as found:
        yield found


@pytest.fixture(scope="module")
def client(model):
    with served(model) as serving, client_of(serving) as found:
        yield found


def test_each_is_a_model_of_its_own(client):
    found = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in found] == [
        (NAMES[0], NAMES[0], None),
        *((name, NAMES[0], NAMES[0]) for name in ADAPTERS),
    ]
    assert client.get("/v1/models/second").json() == found[2]


def test_requests_for_different_ones_ride_together(model, client):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    names = (*ADAPTERS, NAMES[0], *ADAPTERS, NAMES[1])
    before = model.engine.scheduler.n_passes
    with ThreadPoolExecutor(len(names)) as threads:
        asked = [
            threads.submit(client.post, "/v1/completions", json={**body, "model": name})
            for name in names
        ]
        answers = [one.result().json() for one in asked]
    n_passes = model.engine.scheduler.n_passes - before
    assert n_passes < len(names) * body["max_tokens"] / 2
    expected = {
        name: jlayer.generate(model, PROMPT, adapter=name, temperature=0, max_new_tokens=12).text
        for name in (*ADAPTERS, None)
    }
    assert len(set(expected.values())) == len(expected)
    for name, answer in zip(names, answers, strict=True):
        is_own = name in ADAPTERS
        assert answer["choices"][0]["text"] == expected[name if is_own else None]
        assert answer["model"] == (name if is_own else NAMES[0])


def test_what_is_not_there_is_refused_as_ever(client):
    found = client.post("/v1/completions", json={"prompt": PROMPT, "model": "third"})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert all(repr(name) in error["message"] for name in (NAMES[0], *ADAPTERS))


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_a_line_of_a_batch_names_one_too(model, url):
    answers = Answers(Served.of(model, names=NAMES, chat_template="{{ messages[0].content }}"))
    body = {"prompt": PROMPT} if url == "/v1/completions" else {"messages": messages(PROMPT)}
    for name, adapter in (("second", "second"), (NAMES[1], None)):
        asked = answers.ask(url, {**body, "model": name})
        assert asked.orders[0].options.adapter == adapter
        assert asked.model == (adapter or NAMES[0])
    with pytest.raises(Refused, match="not served here"):
        answers.ask(url, {**body, "model": "third"})
