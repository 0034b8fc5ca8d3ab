"""Requests that outlive their connection: accepted once, answered once, told from any place."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from jlayer.serving.desk import Desk
from jlayer.serving.http.journal import Journal
from jlayer.serving.http.workers import Workers
from jlayer.serving.queue import Limits
from jlayer.serving.starts import NotNoted
from tests.serving.http.conftest import client_of, held, served
from tests.serving.http.test_answers import events
from tests.serving.http.test_connections import until
from tests.serving.test_desk import slowed
from tests.serving.wire.bodies import messages

ASYNC = {"Prefer": "respond-async"}
TEXT = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
DRAWN = {**TEXT, "temperature": 1.2, "n": 2}  # without a seed of the client's
PATH = "/v1/completions"


def accepted(client, body, headers=ASYNC, path=PATH):
    found = client.post(path, json=body, headers=headers)
    assert found.status_code == 202, found.text
    assert found.headers["location"] == f"/v1/requests/{found.json()['id']}"
    return found.json()["id"]


def state(client, name):
    return client.get(f"/v1/requests/{name}").json()


def done(client, name):
    client.get(f"/v1/requests/{name}/stream")  # its end is the end of the work
    until(lambda: state(client, name)["status"] not in ("queued", "running"))
    return state(client, name)


def stream(client, name, after=None):
    query = "" if after is None else f"?after={after}"
    found = client.get(f"/v1/requests/{name}/stream{query}")
    assert found.status_code == 200, found.text
    chunks, _ = events(found.text)
    assert chunks.pop() == "[DONE]"
    return chunks


def texts(chunks):
    found = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return found


def test_one_is_accepted_at_once_and_answered_when_it_is_done(model, client, desk):
    gate = threading.Event()
    with held(model, gate):
        name = accepted(client, TEXT)
        until(lambda: desk.status().riders)
        found = state(client, name)
        assert (found["status"], found["object"]) == ("running", "jlayer.request")
        assert found["eta_s"] is not None
        assert found["choices"][0]["text"] == ""
    found = done(client, name)
    assert found["status"] == "done"
    plain = client.post(PATH, json=TEXT).json()
    assert found["response"]["choices"] == plain["choices"]
    assert found["choices"][0]["text"] == plain["choices"][0]["text"]
    chunks = stream(client, name)
    assert texts(chunks) == {0: plain["choices"][0]["text"]}
    assert {chunk["id"] for chunk in chunks} == {found["response"]["id"]}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_goes_on_from_every_chunk(client, path):
    body = {**DRAWN, "logprobs": 1, "stream_options": {"include_usage": True}}
    if path.endswith("chat/completions"):
        del body["prompt"]
        body |= {"messages": messages("x"), "logprobs": True}
    name = accepted(client, body, path=path)
    done(client, name)
    live = stream(client, name)
    for number, chunk in enumerate(live):
        after = ",".join(map(str, chunk["jlayer_seq"]))
        rest = stream(client, name, after)
        if chunk["choices"]:
            assert len(rest) >= len(live) - number - 1
            before = texts(live[: number + 1])
            found = {
                n: before.get(n, "") + text for n, text in {0: "", 1: "", **texts(rest)}.items()
            }
            assert found == texts(live)
        told = [c["choices"][0]["logprobs"] for c in rest if c["choices"]]
        assert all(entry is None or entry for entry in told)


def test_the_numbers_of_one_choice_grow_by_each_chunk(client):
    body = {**TEXT, "temperature": 0, "stream_options": {"include_usage": True}}
    name = accepted(client, body)
    numbers = [chunk["jlayer_seq"] for chunk in stream(client, name)]
    assert numbers == sorted(set(numbers))
    done(client, name)  # the passes that its tokens came in are forgotten now
    rest = [chunk["jlayer_seq"] for chunk in stream(client, name, numbers[3])]
    assert rest == sorted(set(rest))
    assert rest[0] > numbers[3]
    assert rest[-1] == numbers[-1]


@pytest.mark.parametrize("after", ["x", "-1", "1,2", "", "1" * 20, "1.5"])
def test_a_place_that_is_none_is_refused(client, after):
    name = accepted(client, {**TEXT, "max_tokens": 1})
    found = client.get(f"/v1/requests/{name}/stream?after={after}")
    if after == "":
        assert found.status_code == 200
    else:
        assert (found.status_code, found.json()["error"]["param"]) == (400, "after")


def test_a_key_stands_for_one_request(client, desk):
    n_before = desk.status().requests_total
    headers = {"Idempotency-Key": "order 66"}
    first = accepted(client, TEXT, headers)
    assert accepted(client, TEXT, headers) == first
    done(client, first)
    assert accepted(client, TEXT, {**headers, **ASYNC}) == first, "also when it is done"
    assert desk.status().requests_total == n_before + 1
    other = client.post(PATH, json={**TEXT, "max_tokens": 3}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert accepted(client, TEXT, {"Idempotency-Key": "another"}) != first


def test_many_at_once_with_one_key_are_one(client, desk):
    n_before, names = desk.status().requests_total, []
    headers = {"Idempotency-Key": "at once"}
    threads = [
        threading.Thread(target=lambda: names.append(accepted(client, DRAWN, headers)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 1
    assert len(names) == 8
    assert desk.status().requests_total == n_before + 1


def test_a_retry_joins_what_still_runs(model, client, desk):
    gate = threading.Event()
    with held(model, gate):
        first = accepted(client, DRAWN)
        assert accepted(client, DRAWN, {**ASYNC, "x-stainless-retry-count": "1"}) == first
        assert accepted(client, DRAWN) != first, "this one is no retry"


def test_a_refusal_is_no_acceptance(client):
    headers = {"Idempotency-Key": "refused"}
    for _ in range(2):
        found = client.post(PATH, json={**TEXT, "temperature": -1}, headers=headers)
        assert (found.status_code, found.json()["error"]["param"]) == (400, "temperature")
    accepted(client, TEXT, headers)


def test_what_is_deleted_ends_and_is_forgotten(model, client, desk):
    n_before = desk.status().cancelled_total
    with held(model, threading.Event()):
        name = accepted(client, TEXT)
        until(lambda: desk.status().riders)
        found = client.delete(f"/v1/requests/{name}")
        assert found.json() == {"id": name, "object": "jlayer.request", "deleted": True}
    until(lambda: not desk.status().riders)
    assert desk.status().cancelled_total == n_before + 1
    assert client.get(f"/v1/requests/{name}").status_code == 404
    assert client.delete(f"/v1/requests/{name}").status_code == 404


def test_who_reads_its_stream_may_leave(client, desk):
    name = accepted(client, {**TEXT, "max_tokens": 40})
    with client.stream("GET", f"/v1/requests/{name}/stream") as found:
        next(found.iter_lines())
    assert done(client, name)["status"] == "done"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def test_what_was_accepted_survives_the_server(model, folder):
    """It ends amid one, and another one waits; the next server answers both, and tells a third,
    which was done, as before."""
    gate = threading.Event()
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        ended = done(client, accepted(client, DRAWN))
        told = stream(client, ended["id"])
        with held(model, gate):
            names = [accepted(client, DRAWN), accepted(client, {**DRAWN, "seed": 3})]
            serving.stop()
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        assert state(client, ended["id"])["response"] == ended["response"]
        assert texts(stream(client, ended["id"])) == texts(told)
        middle = told[len(told) // 2]["jlayer_seq"]
        before = texts(told[: len(told) // 2 + 1])
        rest = texts(stream(client, ended["id"], ",".join(map(str, middle))))
        assert {n: before.get(n, "") + rest.get(n, "") for n in (0, 1)} == texts(told)
        drawn, seeded = (done(client, name)["response"]["choices"] for name in names)
        assert [c["text"] for c in drawn] != [c["text"] for c in seeded]
        plain = client.post(PATH, json={**DRAWN, "seed": 3}).json()
        assert seeded == plain["choices"]
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    ends = [line["end"] for line in lines if "end" in line]
    assert sorted(ends) == sorted(names), "each is answered once"


def test_a_text_that_is_drawn_again_is_the_same(model, folder):
    """So a client may go on with what it has had before the crash."""
    journal = Journal(folder)
    with served(model, journal=journal) as serving, client_of(serving) as client:
        name = accepted(client, DRAWN)
        first = done(client, name)["response"]
        del journal.requests[name]["ended"]  # as if it had been killed before
        journal.rewrite()
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        assert done(client, name)["response"]["choices"] == first["choices"]
        assert done(client, name)["response"]["id"] == first["id"]


def test_a_queue_that_is_full_accepts_nothing_and_keeps_what_it_has(model, folder):
    gate = threading.Event()
    limits = Limits(people=1)
    with (
        served(model, journal=Journal(folder), limits=limits) as serving,
        client_of(serving) as client,
        held(model, gate),
    ):
        names = [accepted(client, TEXT)]
        until(lambda: serving.site.desk.status().riders)
        names.append(accepted(client, TEXT))
        until(lambda: serving.site.desk.status().queued)
        found = client.post(PATH, json=TEXT, headers={"Idempotency-Key": "k"})
        assert found.status_code == 429
        serving.stop()
    # After a restart more may wait than the queue has room for.
    journal = Journal(folder)
    with served(model, journal=journal, limits=limits) as serving, client_of(serving) as client:
        assert {done(client, name)["status"] for name in names} == {"done"}


def test_a_request_that_the_next_server_refuses_is_told_so(model, folder):
    journal = Journal(folder)
    with served(model, journal=journal) as serving, client_of(serving) as client:
        name = accepted(client, TEXT)
        done(client, name)
        record = journal.requests[name]
        del record["ended"]
        record["raw"] = record["raw"].replace('"max_tokens":12', '"max_tokens":5000')
        journal.rewrite()
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        found = done(client, name)
        assert found["status"] == "failed"
        assert found["error"]["code"] == "context_length_exceeded"
        assert client.get(f"/v1/requests/{name}/stream").status_code == 400


def test_desks_end_is_no_answer(model, folder):
    """A desk that stops ends its jobs with an error: the request stays accepted."""
    gate, own = threading.Event(), Desk(model)
    own.start()
    with served(model, journal=Journal(folder), desk=own) as serving, client_of(serving) as client:
        with held(model, gate):
            name = accepted(client, TEXT)
            until(lambda: own.status().riders)
        own.stop()
        assert state(client, name)["status"] in ("queued", "running", "done")
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        assert done(client, name)["status"] == "done"


def test_many_that_were_accepted_are_all_gone_on_with(model, folder, monkeypatch):
    """More than may be read at a time, and than may wait."""
    monkeypatch.setattr("jlayer.serving.http.lasting.LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr("jlayer.serving.http.site.Workers", lambda: Workers(1, most_waiting=2))
    journal = Journal(folder)
    with served(model, journal=journal) as serving, client_of(serving) as client:
        names = [accepted(client, {**TEXT, "max_tokens": n}) for n in range(1, 6)]
        texts = {name: done(client, name)["response"]["choices"] for name in names}
        for name in names:
            del journal.requests[name]["ended"]
        journal.rewrite()
    limits = Limits(people=1, client=1)
    journal = Journal(folder)
    with served(model, journal=journal, limits=limits) as serving, client_of(serving) as client:
        for name in names:
            assert done(client, name)["response"]["choices"] == texts[name]


def test_an_engine_that_fails_counts_and_a_server_that_is_stopped_does_not(
    model, folder, monkeypatch
):
    """The process lives on, and is stopped in order later: that is no excuse for the request."""
    monkeypatch.setattr("threading.excepthook", lambda *_: None)
    monkeypatch.setattr("jlayer.serving.starts.MOST", 3)
    name = None
    for _ in range(3):
        own = Desk(model)
        own.start()
        with (
            served(model, journal=Journal(folder), desk=own) as serving,
            client_of(serving) as client,
            failing(model),
        ):
            name = name or accepted(client, TEXT)
            until(lambda desk=own: desk.failure is not None)
            assert state(client, name)["status"] in ("queued", "running")
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        found = done(client, name)
        assert (found["status"], found["error"]["code"]) == ("failed", "given_up")
        with held(model, threading.Event()):
            other = accepted(client, TEXT)
            until(lambda: serving.site.desk.status().riders)
            serving.stop()
    for _ in range(4):
        with slowed(model, 0.2), served(model, journal=Journal(folder)) as serving:
            until(lambda s=serving: s.site.desk.status().riders)
            serving.stop()
    with served(model, journal=Journal(folder)) as serving, client_of(serving) as client:
        assert done(client, other)["status"] == "done"


@contextmanager
def failing(model):
    """The engine has a bug: what drives forward passes ends with it."""

    def fail(step, tile):
        raise ZeroDivisionError

    with model.engine.watch.also(fail):
        yield


def test_what_was_accepted_waits_for_room_on_the_disk(model, folder, monkeypatch):
    monkeypatch.setattr("jlayer.serving.http.lasting.FULL_AGAIN_S", 0.05)
    journal, n_full = Journal(folder), []
    real = journal.starts.of

    def full(name):
        start = real(name)
        if len(n_full) < 3:
            n_full.append(name)
            return replace(start, note=lambda done: done(NotNoted("the disk is full")))
        return start

    monkeypatch.setattr(journal.starts, "of", full)
    with served(model, journal=journal) as serving, client_of(serving) as client:
        name = accepted(client, TEXT)
        until(lambda: state(client, name)["status"] == "done")
        assert n_full == [name] * 3
        plain = client.post(PATH, json=TEXT).json()
        assert state(client, name)["response"]["choices"] == plain["choices"]
