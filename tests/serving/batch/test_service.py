"""Batches as a server keeps them: when their time is over, and by a clock of the test's own."""

import json
import threading
from contextlib import contextmanager

import pytest

from jlayer.errors import StorageError
from jlayer.serving.batch import run, service
from jlayer.serving.batch.answers import Answers
from jlayer.serving.batch.names import model_key
from jlayer.serving.batch.service import HOUR_S, OVER, Service, window_s
from jlayer.serving.wire.errors import Refused
from jlayer.serving.wire.served import Served
from tests.serving.batch.requests import many, request
from tests.serving.http.conftest import held
from tests.serving.test_desk import until

NOON = 1_800_000_000
ENDLESS = {"max_tokens": 900, "ignore_eos": True}


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run, "MOST_AHEAD", 2)  # every new number of riders takes a program
    monkeypatch.setattr(service, "WATCH_S", 0.02)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(model, desk, tmp_path, clock):
    """Call it for a server's service in the folder of this test."""

    @contextmanager
    def of(**options):
        answers = Answers(Served.of(model, names=("fable",)))
        found = Service(str(tmp_path), desk, answers, model=model_key(model), clock=clock)
        try:
            yield found
        finally:
            found.stop()

    return of


def begun(batches, requests, **more):
    raw = "".join(json.dumps(one) + "\n" for one in requests).encode()
    file = batches.files.add(lambda file: file.write(raw), filename="in", purpose="batch")
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return batches.create({**body, **more})["id"]


def ended(batches, batch_id):
    until(lambda: batches.get(batch_id)["status"] in OVER)
    return batches.get(batch_id)


def lines_of(batches, file_id):
    with batches.files.open(file_id) as file:
        return {line["custom_id"]: line for line in map(json.loads, file)}


def assert_expired(line):
    assert line["response"] is None
    assert line["error"] == {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }


@pytest.mark.parametrize(
    ("window", "hours"), [("24h", 24), ("1h", 1), ("7d", 7 * 24), ("9999d", 9999 * 24)]
)
def test_windows_are_hours_or_days(window, hours):
    assert window_s(window) == hours * HOUR_S


def test_what_was_answered_in_time_is_kept_and_the_rest_is_expired(opened, clock, desk):
    quick = [request("a"), request("wrong", max_tokens=-1), request("b")]
    slow = [request(f"slow {n}", **ENDLESS) for n in range(6)]
    with opened() as batches:
        batch_id = begun(batches, quick + slow)
        assert batches.get(batch_id)["expires_at"] == NOON + 24 * HOUR_S
        until(lambda: batches.get(batch_id)["request_counts"]["completed"] == 2)
        clock.now += 24 * HOUR_S - 1
        until(lambda: desk.status().riders)
        assert batches.get(batch_id)["status"] == "in_progress"
        clock.now += 1
        found = ended(batches, batch_id)
        assert (found["status"], found["expired_at"]) == ("expired", NOON + 24 * HOUR_S)
        assert (found["completed_at"], found["cancelled_at"]) == (None, None)
        good = lines_of(batches, found["output_file_id"])
        rest = lines_of(batches, found["error_file_id"])
        assert {"a", "b"} <= good.keys()
        assert rest.keys() | good.keys() == {one["custom_id"] for one in quick + slow}
        assert rest.pop("wrong")["response"]["status_code"] == 400
        assert rest
        for line in rest.values():
            assert_expired(line)
        with pytest.raises(Refused, match="Cannot cancel a batch with status 'expired'"):
            batches.cancel(batch_id)
    until(lambda: not desk.status().riders)
    with opened() as batches:
        assert batches.get(batch_id) == found, "also told by the next server"


def test_one_whose_time_ended_while_no_server_ran_keeps_its_answers(model, opened, clock):
    with opened() as batches:
        batch_id = begun(batches, [request("a"), *(request(str(n), **ENDLESS) for n in range(3))])
        until(lambda: batches.get(batch_id)["request_counts"]["completed"] == 1)
    clock.now += 25 * HOUR_S
    with opened() as batches, held(model, threading.Event()):
        found = ended(batches, batch_id)
        assert found["status"] == "expired"
        assert "a" in lines_of(batches, found["output_file_id"])
        for line in lines_of(batches, found["error_file_id"]).values():
            assert_expired(line)


def test_one_that_waits_for_others_expires_in_time(model, opened, clock, monkeypatch):
    monkeypatch.setattr(service, "MOST_RUNNING", 1)
    with opened() as batches, held(model, threading.Event()):
        long = begun(batches, [request("a", **ENDLESS)], completion_window="3d")
        until(lambda: batches.get(long)["status"] == "in_progress")
        late = begun(batches, [request("a")], completion_window="1h")
        clock.now += HOUR_S
        found = ended(batches, late)
        assert (found["status"], found["output_file_id"]) == ("expired", None)
        assert_expired(lines_of(batches, found["error_file_id"])["a"])
        assert batches.get(long)["status"] == "in_progress"
        batches.cancel(long)


def test_one_with_all_its_answers_is_completed_however_late(opened, clock, monkeypatch):
    """The server ended between the last answer and the files: the disk was full."""

    def full(*_, **__):
        raise StorageError("free some space")

    with opened() as batches, monkeypatch.context() as disk:
        batch_id = begun(batches, many(4))
        disk.setattr(batches.files, "add", full)
        until(lambda: batches.get(batch_id)["status"] == "finalizing")
    clock.now += 25 * HOUR_S
    with opened() as batches:
        found = ended(batches, batch_id)
        assert (found["status"], found["expired_at"]) == ("completed", None)
        assert len(lines_of(batches, found["output_file_id"])) == 4


def test_one_that_an_older_server_took_for_ever_does_not_expire(opened, clock, model, tmp_path):
    gate = threading.Event()
    with opened() as batches, held(model, gate):
        batch_id = begun(batches, [request("a")])
        batches.stop()
    path = tmp_path / "batches" / f"{batch_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires_at": None}))
    clock.now += 9999 * HOUR_S
    with opened() as batches:
        assert ended(batches, batch_id)["status"] == "completed"
