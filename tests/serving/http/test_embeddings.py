"""/v1/embeddings: the real client of OpenAI gets the vectors of model.encode; what cannot be is
refused in words."""

import threading
from base64 import b64decode

import numpy as np
import openai
import pytest

from jlayer.serving.queue import Limits
from tests.serving.http.conftest import held
from tests.serving.http.test_openai import MODEL, client_of

TEXTS = ["Once upon a time", "The fox said nothing.", "A"]


@pytest.fixture(scope="module")
def openai_client(serving):
    with client_of(serving) as found:
        yield found


def vectors(answer):
    return np.array([one.embedding for one in answer.data], np.float32)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_they_are_those_of_the_library(model, openai_client, encoding):
    """The client asks for base64 itself where nothing is said, and decodes it."""
    given = {} if encoding is None else {"encoding_format": encoding}
    found = openai_client.embeddings.create(model=MODEL, input=TEXTS, **given)
    if encoding == "base64":
        raw = [np.frombuffer(b64decode(one.embedding), "<f4") for one in found.data]
        told = np.array(raw)
    else:
        told = vectors(found)
    assert (found.object, found.model, found.data[0].object) == ("list", MODEL, "embedding")
    assert [one.index for one in found.data] == [0, 1, 2]
    np.testing.assert_allclose(told, model.encode(TEXTS, normalize=True), atol=1e-6)
    n_tokens = sum(len(model.text.encode(text)) for text in TEXTS)
    assert found.usage.prompt_tokens == found.usage.total_tokens == n_tokens


def test_inputs_of_all_forms(model, openai_client):
    ids = [model.text.encode(text) for text in TEXTS]
    want = model.encode(TEXTS, "last")
    for given, rows in ((TEXTS[0], want[:1]), (ids[0], want[:1]), (ids, want)):
        found = openai_client.embeddings.create(
            model=MODEL, input=given, extra_body={"pooling": "last", "normalize": False}
        )
        np.testing.assert_allclose(vectors(found), rows, atol=1e-5 * np.abs(want).max())


def test_many_texts_are_one_request_and_share_passes(model, openai_client, desk):
    """More of them than requests of one client may wait."""
    texts = [[3 + n, 40] for n in range(Limits().client + 1)]
    scheduler, before, gate = model.engine.scheduler, desk.n_requests, threading.Event()
    found, n_before = [], scheduler.n_passes

    def ask():
        found.append(openai_client.embeddings.create(model=MODEL, input=texts))

    with held(model, gate):
        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive() and desk.n_requests < before + len(texts):
            threading.Event().wait(0.01)
        gate.set()
        asking.join(60)
    assert scheduler.n_passes - n_before <= 3
    np.testing.assert_allclose(vectors(*found), model.encode(texts, normalize=True), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "none given"),
        ({"input": []}, "input", "an empty list; give at least one input"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": ["a", 3]}, "input[1]", "found a int"),
        ({"input": [[5000]]}, "input", "outside the vocabulary"),
        ({"input": "a" * 5000}, "input", "maximum context length"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "expected float or base64"),
        ({"input": "a", "pooling": "cls"}, "pooling", "expected mean or last"),
        ({"input": "a", "dimensions": 8}, "dimensions", "not supported"),
        ({"input": "a", "user": "u" * 1001}, "user", "longer than 1000"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, body, param, message):
    found = client.post("/v1/embeddings", json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_another_model_is_not_here(openai_client):
    with pytest.raises(openai.NotFoundError):
        openai_client.embeddings.create(model="text-embedding-3-small", input="a")
