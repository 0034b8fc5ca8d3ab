"""A batch beside people: each line answered once, as it would be alone, however it is stopped."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

import jlayer
from jlayer.errors import CheckpointError, StorageError
from jlayer.serving import desk as desks
from jlayer.serving.batch.answers import Answers
from jlayer.serving.batch.journal import Journal
from jlayer.serving.batch.lines import Lines
from jlayer.serving.batch.names import Names, model_key
from jlayer.serving.batch.run import Run
from jlayer.serving.desk import Desk, Stopping
from jlayer.serving.job import DONE, FAILED, Order
from jlayer.serving.queue import Limits, QueueFull
from jlayer.serving.wire.served import Served
from jlayer.streaming.steps import Run as RunStep
from tests.serving.batch.requests import answers, assert_same, many, request, written

PATIENCE_S = 60


@pytest.fixture
def batch(model, desk, tmp_path):
    """Call it with requests: runs them from where the output is. Few are asked ahead, since every
    new number of riders takes a program."""
    served = Served.of(model, names=("fable",))

    def go(requests, *, desk=desk, name="out", **options):
        source = written(tmp_path / "in", requests)
        with Lines(source) as lines, Journal(tmp_path / name) as journal:
            names = Names(lines.digest, model_key(model))
            journal.read(names)
            run = Run(desk, Answers(served), lines, journal, names, **{"most_ahead": 2, **options})
            run.run()
        return run

    return go


def test_each_line_is_answered_as_it_would_be_alone(model, desk, batch, tmp_path):
    before = desk.status().passes_total
    with slowed(model, 0.02):  # so that the next line is there when the next pass begins
        run = batch(many(20))
    n_passes = desk.status().passes_total - before
    found = answers(tmp_path / "out")
    assert list(found) != [f"line {at}" for at in range(20)], "who ends first is written first"
    for at, one in enumerate(many(20)):
        line, body = found[one["custom_id"]], one["body"]
        status, answer = line["response"]["status_code"], line["response"]["body"]
        if body["max_tokens"] < 0:
            assert (status, answer["error"]["param"]) == (400, "max_tokens")
            continue
        assert (status, line["error"], answer["model"]) == (200, None, "fable")
        if not body["temperature"]:
            text = jlayer.generate(
                model, body["prompt"], temperature=0, max_new_tokens=body["max_tokens"]
            ).text
            assert [choice["text"] for choice in answer["choices"]] == [text]
        assert len(answer["choices"]) == body.get("n", 1)
        assert ("logprobs" in body) == (answer["choices"][0]["logprobs"] is not None), at
    assert (run.n_done, run.n_refused, run.n_lines) == (20, 2, 20)
    assert run.first_refusal.startswith("line 8: 400, max_tokens: ")
    assert run.new_tokens == sum(
        line["response"]["body"]["usage"]["completion_tokens"]
        for line in found.values()
        if line["response"]["status_code"] == 200
    )
    n_alone = sum(max(0, one["body"]["max_tokens"]) for one in many(20))
    assert n_passes < 0.7 * n_alone, "two ride in each"


def test_stopped_and_gone_on_it_is_what_it_is_undisturbed(batch, tmp_path):
    batch(many(20), name="undisturbed")
    out, kept = tmp_path / "out", [0]

    def stop_soon():
        if out.read_bytes().count(b"\n") > kept[-1]:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            batch(many(20), pause=stop_soon)
        kept.append(len(answers(out)))
    assert sorted({*kept, 20}) == [*kept, 20], "each goes on, none is at the end"
    assert batch(many(20)).n_before == kept[-1]
    assert_same(answers(out), answers(tmp_path / "undisturbed"))


def test_a_finished_batch_asks_nothing_again(desk, batch):
    batch(many(5))
    before = desk.status().requests_total
    run = batch(many(5))
    assert (run.n_before, run.n_done, run.eta_s) == (5, 5, None)
    assert desk.status().requests_total == before


def test_lines_that_are_all_wrong_are_all_answered(batch, tmp_path):
    run = batch(request(f"line {at}", None, max_tokens=1) for at in range(600))
    assert (run.n_done, run.n_refused) == (600, 600)
    found = answers(tmp_path / "out").values()
    assert {line["response"]["status_code"] for line in found} == {400}


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"stream": True}, 400, "stream"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"max_tokens": 10**6}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "prompt"),
        ({"temperature": "hot"}, 400, "temperature"),
    ],
)
def test_a_wrong_body_is_its_own_line(batch, tmp_path, more, status, param):
    batch([request("good"), request("wrong", **more)])
    found = answers(tmp_path / "out")
    assert found["good"]["response"]["status_code"] == 200
    assert found["wrong"]["response"]["status_code"] == status
    assert found["wrong"]["response"]["body"]["error"]["param"] == param


def test_prompts_are_scored_as_the_server_does(model, batch, tmp_path):
    batch([request("a", "Once upon a time", max_tokens=0, echo=True, logprobs=1)])
    (line,) = answers(tmp_path / "out").values()
    (choice,) = line["response"]["body"]["choices"]
    ids = model.text.encode("Once upon a time")
    assert choice["text"] == "Once upon a time"
    assert [one is None for one in choice["logprobs"]["token_logprobs"]] == [
        at == 0 for at in range(len(ids))
    ]


def test_a_full_queue_is_waited_for(model, batch, tmp_path):
    desk = Desk(model, limits=Limits(batch=1))
    desk.start()
    try:
        run = batch(many(20), desk=desk)
    finally:
        desk.stop()
    assert run.n_done == len(answers(tmp_path / "out")) == 20


@contextmanager
def slowed(model, seconds):
    """Each forward pass takes so long."""

    def wait(step, tile):
        if isinstance(step, RunStep) and step.tile == 0:
            time.sleep(seconds)

    with model.engine.watch.also(wait):
        yield


def test_a_person_begins_in_the_next_pass_of_a_batch_that_fills_them(
    model, batch, tmp_path, monkeypatch
):
    monkeypatch.setattr(desks, "MOST_RIDERS", 2)
    desk = Desk(model)
    desk.start()
    person, came = None, 0

    def come_once():
        nonlocal person, came
        status = desk.status()
        if person is None and status.riders == 2 and status.queued_batch:
            came = status.passes_total
            options = model.sampling_options({"temperature": 0, "max_new_tokens": 1})
            person = desk.submit(Order(tuple(model.text.encode("Once")), options))
            assert person.wait(PATIENCE_S).state == DONE
            assert desk.status().passes_total - came <= 2, "the one under way, and its own"

    try:
        with slowed(model, 0.05):
            requests = [request(f"line {at}", max_tokens=20 + at) for at in range(6)]
            run = batch(requests, desk=desk, pause=come_once, most_ahead=6)
    finally:
        desk.stop()
    assert person is not None
    assert run.n_done == 6
    alone = jlayer.generate(model, "Once upon a time", temperature=0, max_new_tokens=25).text
    texts = {
        name: line["response"]["body"]["choices"][0]["text"]
        for name, line in answers(tmp_path / "out").items()
    }
    assert texts["line 5"] == alone
    assert all(alone.startswith(text) for text in texts.values()), "they lost nothing"


# What the engine's own failures do, on a desk that fails as it is told.


@dataclass
class Text:
    steps: list = field(default_factory=list)
    finish_reason: str = "length"


class Answered:
    def __init__(self, order, error):
        self.order, self.error, self.is_over = order, error, True
        self.state = DONE if error is None else FAILED
        self.sequences, self.prompt_logprobs = [Text()], None

    def cancel(self):
        pass


class Failing:
    """A desk whose nth order fails with `errors[n]`."""

    def __init__(self, errors, refuses=()):
        self.errors, self.refuses, self.n = errors, list(refuses), 0

    def submit(self, order, listener):
        if self.refuses:
            raise self.refuses.pop()
        self.n += 1
        job = Answered(order, self.errors.get(self.n))
        listener(job)
        return job


DISK = StorageError("disk: a read failed")


def test_a_line_that_fails_by_the_engine_s_fault_is_asked_again(batch, tmp_path):
    desk = Failing({2: DISK}, refuses=[QueueFull("full", 1.0)])
    assert batch(map(request, "abc"), desk=desk).n_refused == 0
    assert desk.n == 4
    assert list(answers(tmp_path / "out")) == ["a", "c", "b"]


def test_one_that_fails_again_while_others_are_answered_has_its_error(batch, tmp_path):
    desk = Failing({2: CheckpointError("logits: not finite"), 4: CheckpointError("again")})
    batch(map(request, "abc"), desk=desk)
    found = answers(tmp_path / "out")
    assert found["b"]["response"]["status_code"] == 500
    assert found["b"]["response"]["body"]["error"]["message"] == "again"


@pytest.mark.parametrize("errors", [dict.fromkeys(range(2, 50), DISK), {2: Stopping("the end")}])
def test_an_engine_that_fails_ends_the_run_and_what_is_answered_is_kept(batch, tmp_path, errors):
    with pytest.raises(type(errors[2])):
        batch(map(request, "abc"), desk=Failing(errors), most_ahead=1)
    assert list(answers(tmp_path / "out")) == ["a"]
    batch(map(request, "abc"), desk=Failing({}))
    assert list(answers(tmp_path / "out")) == ["a", "b", "c"]
