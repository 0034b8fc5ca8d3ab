"""Files and batches of a server, by OpenAI's own client; and what others send."""

import io
import json
import threading

import openai
import pytest

from jlayer.serving.batch import run, service
from jlayer.serving.http.journal import Journal
from tests.serving.batch.requests import assert_same, many, request
from tests.serving.http.conftest import client_of, held, served
from tests.serving.http.test_connections import until
from tests.serving.http.test_openai import client_of as openai_of


@pytest.fixture(scope="module", autouse=True)
def few_ahead():
    """Every new number of riders takes a program."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "MOST_AHEAD", 2)
        yield


@pytest.fixture(scope="module")
def keeping(model, desk, tmp_path_factory):
    """A server with a folder of its own."""
    with served(model, desk=desk, journal=Journal(tmp_path_factory.mktemp("state"))) as found:
        yield found


@pytest.fixture(scope="module")
def api(keeping):
    with openai_of(keeping) as found:
        yield found


@pytest.fixture(scope="module")
def http(keeping):
    with client_of(keeping) as found:
        yield found


def raw(requests):
    return "".join(json.dumps(one) + "\n" for one in requests).encode()


def sent(api, requests):
    content = requests if isinstance(requests, bytes) else raw(requests)
    return api.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")


def begun(api, file, **more):
    return api.batches.create(
        **{
            "input_file_id": file.id,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            **more,
        }
    )


def ended(api, batch):
    until(lambda: api.batches.retrieve(batch.id).status in service.OVER)
    return api.batches.retrieve(batch.id)


def lines_of(api, file_id):
    found = [json.loads(line) for line in api.files.content(file_id).text.splitlines()]
    for line in found:
        (line["response"] or {"body": {}})["body"].pop("created", None)
    return {line["custom_id"]: line for line in found}


def test_a_batch_from_its_file_to_its_answers(api):
    requests = list(many(8))
    file = sent(api, requests)
    assert (file.purpose, file.filename, file.bytes) == ("batch", "in.jsonl", len(raw(requests)))
    assert api.files.content(file.id).content == raw(requests)
    assert api.files.retrieve(file.id) == file
    batch = begun(api, file, metadata={"for": "a test"})
    assert batch.status in ("validating", "in_progress")
    found = ended(api, batch)
    assert found.status == "completed"
    assert found.metadata == {"for": "a test"}
    assert found.expires_at == found.created_at + 24 * 3600
    counts = found.request_counts
    assert (counts.total, counts.completed, counts.failed) == (8, 7, 1)
    assert found.completed_at >= found.finalizing_at >= found.in_progress_at >= found.created_at
    good, wrong = lines_of(api, found.output_file_id), lines_of(api, found.error_file_id)
    assert good.keys() == {one["custom_id"] for one in requests} - {"line 7"}
    assert wrong["line 7"]["response"]["body"]["error"]["param"] == "max_tokens"
    for one in requests:
        if not one["body"]["temperature"] and one["body"]["max_tokens"] > 0:
            text = api.completions.create(model="fable", **one["body"]).choices[0].text
            answer = good[one["custom_id"]]["response"]["body"]
            assert answer["choices"][0]["text"] == text, "what the server answers itself"


def test_lists_go_page_by_page(api):
    files = [sent(api, [request(name)]) for name in "abc"]
    assert [one.id for one in api.files.list().data[:3]] == [file.id for file in files[::-1]]
    first = api.files.list(limit=2)
    assert first.has_more
    assert first.get_next_page().data[0].id == files[0].id
    batches = [begun(api, file) for file in files]
    assert [one.id for one in api.batches.list(limit=3).data] == [b.id for b in batches[::-1]]
    assert [one.id for one in api.batches.list(limit=1, after=batches[2].id).data] == [
        batches[1].id
    ]
    for batch in batches:
        ended(api, batch)
    assert {one.purpose for one in api.files.list(purpose="batch_output").data} == {"batch_output"}


def test_a_file_that_is_wrong_fails_its_batch_with_the_lines(api):
    chat = {**request("b"), "url": "/v1/chat/completions"}
    found = ended(api, begun(api, sent(api, [request("a"), chat, request("a")])))
    assert (found.status, found.output_file_id) == ("failed", None)
    assert [(one.line, one.code) for one in found.errors.data] == [
        (2, "invalid_line"),
        (3, "invalid_line"),
    ]
    assert "already" in found.errors.data[1].message


def test_a_batch_that_is_cancelled_keeps_what_was_answered(api, model):
    gate = threading.Event()
    with held(model, gate):
        batch = begun(api, sent(api, [request("wrong", max_tokens=-1), request("a")]))
        until(lambda: api.batches.retrieve(batch.id).status == "in_progress")
        with pytest.raises(openai.ConflictError, match="cancel that first"):
            api.files.delete(batch.input_file_id)
        assert api.batches.cancel(batch.id).status == "cancelling"
        gate.set()
        found = ended(api, batch)
    assert found.status == "cancelled"
    with pytest.raises(openai.ConflictError, match="Cannot cancel"):
        api.batches.cancel(batch.id)
    lines = lines_of(api, found.error_file_id)
    if "a" in lines:  # it may have been answered just then
        assert lines["a"]["response"] is None
        assert lines["a"]["error"]["code"] == "batch_cancelled"
    assert lines["wrong"]["response"]["status_code"] == 400
    assert api.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File"):
        api.files.retrieve(batch.input_file_id)


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"input_file_id": "file-0"}, 404, "file_id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "file_id"),
        ({"input_file_id": 5}, 400, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"metadata": {"a": 5}}, 400, "metadata"),
    ],
)
def test_what_a_batch_cannot_be_is_said_at_once(api, http, more, status, param):
    body = {"input_file_id": sent(api, [request("a")]).id, "endpoint": "/v1/completions"}
    found = http.post("/v1/batches", json={**body, "completion_window": "24h", **more})
    assert (found.status_code, found.json()["error"]["param"]) == (status, param)


def test_what_is_no_upload_is_said(http):
    file = {"file": ("in", b"{}")}
    for options, param in (
        ({"json": {}}, "file"),
        ({"data": {"purpose": "batch"}}, "file"),
        ({"files": file}, "purpose"),
        ({"files": file, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"files": file, "data": {"purpose": "batch", "expires_after[anchor]": "x"}}, None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "file"),
        (
            {
                "content": b"--a\r\nbroken",
                "headers": {"content-type": "multipart/form-data; boundary=a"},
            },
            "file",
        ),
    ):
        found = http.post("/v1/files", **options)
        assert found.status_code == 400, options
        assert param is None or found.json()["error"]["param"] == param
    for path in ("/v1/files?limit=0", "/v1/files?order=up", "/v1/batches?after=x&limit=5"):
        assert http.get(path).status_code == 400
    for path in ("/v1/files/file-1", "/v1/files/file-1/content", "/v1/batches/batch_1"):
        assert http.get(path).status_code == 404
    assert http.delete("/v1/files/file-1").status_code == 404
    assert http.post("/v1/batches/batch_1/cancel").status_code == 404


def test_without_a_folder_it_says_what_is_missing(client):
    for path in ("/v1/files", "/v1/batches"):
        found = client.get(path)
        assert found.status_code == 400
        assert "--state FOLDER" in found.json()["error"]["message"]


def test_a_batch_goes_on_with_the_next_server(model, desk, tmp_path):
    requests = list(many(12))
    gate = threading.Event()
    with served(model, desk=desk, journal=Journal(tmp_path)) as one, openai_of(one) as api:
        undisturbed = ended(api, begun(api, sent(api, requests)))
        expected = lines_of(api, undisturbed.output_file_id)
        with held(model, gate):
            batch = begun(api, sent(api, requests))
            until(lambda: api.batches.retrieve(batch.id).request_counts.total)
            threading.Timer(0.3, gate.set).start()
            one.stop()
    with served(model, desk=desk, journal=Journal(tmp_path)) as two, openai_of(two) as api:
        found = ended(api, batch)
        assert found.status == "completed"
        assert found.request_counts.total == 12
        again = lines_of(api, found.output_file_id)
        for lines in (expected, again):
            for line in lines.values():  # another batch has other ids, and other seeds
                for name in ("id", "request_id"):
                    line.pop(name, None)
                line["response"].pop("request_id")
                line["response"]["body"].pop("id")
        greedy = {one["custom_id"] for one in requests if not one["body"]["temperature"]}
        assert_same(
            {name: line for name, line in again.items() if name in greedy},
            {name: line for name, line in expected.items() if name in greedy},
        )
        assert again.keys() == expected.keys()
        assert api.batches.retrieve(undisturbed.id) == undisturbed


def test_a_batch_begun_for_another_model_is_not_mixed(model, desk, tmp_path):
    gate = threading.Event()
    with (
        served(model, desk=desk, journal=Journal(tmp_path)) as one,
        openai_of(one) as api,
        held(model, gate),
    ):
        batch = begun(api, sent(api, many(2)))
        threading.Timer(0.3, gate.set).start()
        one.stop()
    other = {"template": "{{ messages }}"}
    with (
        served(model, desk=desk, journal=Journal(tmp_path), **other) as two,
        openai_of(two) as api,
    ):
        found = ended(api, batch)
    assert found.status == "failed"
    assert "another model, dtype, context or chat template" in found.errors.data[0].message
