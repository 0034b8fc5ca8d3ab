"""The desk: everybody's text is what it would be alone, whoever comes, leaves and waits."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine import prompt_cache
from jlayer.errors import DoesNotFitError, UsageError
from jlayer.serving import progress
from jlayer.serving.desk import Desk, Stopping
from jlayer.serving.job import CANCELLED, DONE, FAILED, Order
from jlayer.serving.queue import Limits, QueueFull
from jlayer.streaming.steps import Run

PATIENCE_S = 60
END = 1  # the model's end token
ENDLESS = {"temperature": 0, "max_new_tokens": 900, "eos_token_id": None}


def order(model, prompt, **more):
    options = {"temperature": 0, "max_new_tokens": 12, **more.pop("options", {})}
    return Order(tuple(model.text.encode(prompt)), model.sampling_options(options), **more)


def alone(model, prompt, **options):
    return jlayer.generate(model, prompt, **{"temperature": 0, "max_new_tokens": 12, **options})


@contextmanager
def slowed(model, seconds):
    """Each forward pass takes so long."""

    def wait(step, tile):
        if isinstance(step, Run) and step.tile == 0:
            time.sleep(seconds)

    with model.engine.watch.also(wait):
        yield


def until(condition):
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.002)


def test_the_time_left_is_that_of_the_passes_left(model, desk):
    """The prompt's own pass gives a token, too: that does not make the others faster."""
    found = []

    def hear(job):
        told = job.progress()
        found.append((told.tokens, told.eta_s / told.seconds_a_pass if told.eta_s else 0))

    options = {"max_new_tokens": 30, "eos_token_id": None, "speculate": "off"}
    desk.submit(order(model, "Once upon a time", options=options), hear).wait(PATIENCE_S)
    assert len(found) > 20
    assert [passes for _, passes in found] == pytest.approx([30 - tokens for tokens, _ in found])


def test_a_job_has_the_text_of_generate_step_by_step(model, desk):
    heard = []
    asked = order(model, "Once upon a time", options={"logprobs": 2})
    job = desk.submit(asked, lambda job: heard.append(len(job.sequences[0].steps)))
    job.wait(PATIENCE_S)
    (text,), expected = job.sequences, alone(model, "Once upon a time", logprobs=2)
    assert (job.state, text.text, text.token_ids) == (DONE, expected.text, expected.token_ids)
    assert text.finish_reason == expected.finish_reason
    assert heard == sorted(heard)
    assert len(set(heard)) > 5, "it is told of steps as they come"
    choices = [choice for step in text.steps for choice in step.choices]
    assert [one.logprob for one in choices] == [each["logprob"] for each in expected.logprobs]


def test_all_who_wait_ride_together_and_each_is_alone(model, desk):
    prompts = [f"There was once a {animal} who" for animal in ("fox", "wolf", "goose", "cat")]
    drawn = {"temperature": 0.9, "seed": 3, "num_return_sequences": 2}
    before = desk.status().passes_total
    jobs = [
        desk.submit(order(model, prompt, options=drawn, client=str(n)))
        for n, prompt in enumerate(prompts)
    ]
    for job in jobs:
        job.wait(PATIENCE_S)
    n_passes = desk.status().passes_total - before
    for prompt, job in zip(prompts, jobs, strict=True):
        expected = alone(model, prompt, **drawn)
        assert [text.text for text in job.sequences] == [one.text for one in expected]
    assert n_passes < 2 * 12, "12 tokens of each, and the prompts"


def test_a_text_that_is_cancelled_ends_within_a_tile_or_two(model, desk):
    steps = []
    job = desk.submit(order(model, "Once", options=ENDLESS))
    until(lambda: job.sequences[0].steps)
    with model.engine.watch.also(lambda step, tile: steps.append(isinstance(step, Run))):
        n_before = sum(steps)
        job.cancel()
        job.wait(PATIENCE_S)
        assert sum(steps) - n_before <= 3
    assert job.state == CANCELLED
    assert 0 < job.n_tokens < 900
    assert desk.status().riders == 0 or not model.engine.scheduler.wait_until(lambda: True)


def test_one_that_waits_is_cancelled_at_once(model, desk):
    with slowed(model, 0.2):
        job = desk.submit(order(model, "Once", options=ENDLESS))
        until(lambda: job.state != "queued")
        others = [desk.submit(order(model, "Once", options=ENDLESS)) for _ in range(20)]
        for other in others:
            other.cancel()
        job.cancel()
        for one in (job, *others):
            assert one.wait(PATIENCE_S).state == CANCELLED
    assert len(model.engine.kept) == model.engine.n_alive


def test_what_is_wrong_is_said_when_it_is_asked(model, desk):
    with pytest.raises(UsageError, match="outside the vocabulary"):
        desk.submit(Order((5, 10**6), model.sampling_options({})))
    with pytest.raises(UsageError, match="longer than the context"):
        desk.submit(Order((5,) * 5000, model.sampling_options({})))
    job = desk.submit(
        order(
            model,
            "Once",
            options={"logit_bias": dict.fromkeys(range(model.config.vocab_size), -np.inf)},
        )
    )
    job.wait(PATIENCE_S)
    assert job.state == FAILED
    assert "rule out every token" in str(job.error)


def test_a_constraint_says_what_a_text_may_be(model, desk):
    ids = model.text.encode(" wolf")

    class Only:
        """The tokens of a word, and then the end."""

        def __init__(self, n_read=0):
            self.n_read = n_read

        @property
        def is_over(self):
            return self.n_read >= len(ids)

        def allowed(self, more):
            found = np.zeros(model.config.vocab_size, bool)
            place = self.n_read + len(more)
            found[ids[place] if place < len(ids) else END] = True
            return found

        def accept(self, tokens):
            assert tokens == [ids[self.n_read]]
            self.n_read += 1

        def copy(self):
            return Only(self.n_read)

    drawn = {"temperature": 1.0, "seed": 1, "num_return_sequences": 3}
    job = desk.submit(order(model, "There was a", options=drawn, constraint=Only()))
    job.wait(PATIENCE_S)
    assert [(t.text, t.finish_reason) for t in job.sequences] == [(" wolf", "stop")] * 3


def test_a_constraint_that_fails_takes_nobody_along(model, desk):
    class Failing:
        is_over = False

        def allowed(self, more):
            return np.ones(model.config.vocab_size, bool)

        def accept(self, tokens):
            raise UsageError("regex: a limit was met")

        def copy(self):
            return self

    fails = desk.submit(order(model, "There was a", constraint=Failing()))
    beside = desk.submit(order(model, "There was a"))
    assert (fails.wait(PATIENCE_S).state, str(fails.error)) == (FAILED, "regex: a limit was met")
    assert beside.wait(PATIENCE_S).sequences[0].text == alone(model, "There was a").text


@pytest.fixture
def tight(fable, room_for):
    """A desk on budgets for two texts of 64 tokens."""
    budgets = room_for(2, 64)
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32", **budgets) as model:
        desk = Desk(model, limits=Limits(people=4, client=3), keeps=0)
        desk.start()
        yield model, desk
        desk.stop()
        assert model.engine.n_alive == 0


FILLING = {"max_new_tokens": 50, "eos_token_id": None}


def test_those_for_whom_there_is_no_room_begin_as_others_end(tight):
    model, desk = tight
    prompts = ["One", "Two", "Three", "Four"]
    jobs = [desk.submit(order(model, each, options=FILLING, client=each)) for each in prompts]
    with pytest.raises(DoesNotFitError, match="needed"):
        desk.submit(order(model, "One", options={"max_new_tokens": 900, "eos_token_id": None}))
    for job in jobs:
        assert job.wait(PATIENCE_S).state == DONE, job.error
    for prompt, job in zip(prompts, jobs, strict=True):
        assert job.sequences[0].text == alone(model, prompt, **FILLING).text


def test_a_person_goes_before_batches_and_these_lose_nothing(tight):
    model, desk = tight
    with slowed(model, 0.01):
        batch = [
            desk.submit(order(model, f"Tale {n}", options=FILLING, is_batch=True)) for n in range(3)
        ]
        until(lambda: all(job.sequences[0].steps for job in batch[:2]))
        person = desk.submit(order(model, "Once", options={"max_new_tokens": 8}))
        person.wait(PATIENCE_S)
        assert not any(job.is_over for job in batch)
        assert batch[1].n_suspended == 1, "the one that began last gave its room"
    for job in batch:
        job.wait(PATIENCE_S)
    for n, job in enumerate(batch):
        assert job.sequences[0].text == alone(model, f"Tale {n}", **FILLING).text


def test_a_full_queue_refuses(tight):
    model, desk = tight
    with slowed(model, 0.05):
        jobs = []
        greedy = order(model, "One", options=FILLING, client="greedy")
        with pytest.raises(QueueFull, match="of this client"):
            jobs.extend(desk.submit(greedy) for _ in range(20))
        jobs.append(desk.submit(order(model, "One", options=FILLING, client="other")))
        for job in jobs:
            job.cancel()


def test_it_stops_with_a_word_to_everybody(model):
    desk = Desk(model)
    desk.start()
    with slowed(model, 0.1):
        jobs = [desk.submit(order(model, "Once", options=ENDLESS)) for _ in range(3)]
        until(lambda: jobs[0].sequences[0].steps)
        desk.stop()
    for job in jobs:
        assert (job.wait(PATIENCE_S).state, type(job.error)) == (FAILED, Stopping)
    with pytest.raises(Stopping):
        desk.submit(order(model, "Once"))
    assert not desk.is_alive
    assert model.engine.n_alive == 0


def test_a_desk_that_died_says_so(model, monkeypatch):
    desk = Desk(model)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    desk.start()

    def fail(lanes):
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(model.engine.scheduler, "join", fail)
        job = desk.submit(order(model, "Once"))
        job.wait(PATIENCE_S)
    assert "a bug" in str(job.error)
    until(lambda: not desk.is_alive)
    with pytest.raises(Stopping, match="a bug"):
        desk.submit(order(model, "Once"))
    assert model.engine.n_alive == 0


def test_the_time_left_is_right_within_a_quarter_after_two_passes(model, desk, monkeypatch):
    """By a clock that each pass sets on by a tenth of a second, or a little more."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tick(step, tile):
        if isinstance(step, Run) and step.tile == 0:
            now[0] += 0.1 + 0.01 * (len(told) % 3)

    told = []
    options = {"max_new_tokens": 30, "speculate": "off", "eos_token_id": None}
    with model.engine.watch.also(tick):
        desk.submit(order(model, "Once", options=options)).wait(PATIENCE_S)
        desk.submit(
            order(model, "Once", options=options),
            lambda job: told.append((job.progress().tokens, now[0], job.progress().eta_s)),
        ).wait(PATIENCE_S)
    left = [(now[0] - at, eta_s) for tokens, at, eta_s in told if 2 <= tokens < 30]
    assert len(left) > 20
    assert all(0.75 * took <= eta_s <= 1.25 * took for took, eta_s in left)


def test_a_conversation_costs_its_new_tokens(model, desk):
    first = desk.submit(order(model, "Once upon a time there was a king and a queen", keeps=True))
    first.wait(PATIENCE_S)
    ids = (*first.order.ids, *first.sequences[0].token_ids, 50, 51, 52)
    more = Order(ids, model.sampling_options({"temperature": 0, "max_new_tokens": 4}), keeps=True)
    second = desk.submit(more).wait(PATIENCE_S)
    assert second.stats["kept_tokens"] == len(first.order.ids) + first.n_tokens - 1


def test_a_length_that_nobody_asked_for_is_cut_to_what_there_is_room_for(tight):
    """Alone: a text is not to depend on who else is there."""
    model, desk = tight
    free = {"temperature": 0, "max_new_tokens": 1000, "eos_token_id": None}
    asked = model.sampling_options(free)
    with pytest.raises(DoesNotFitError):
        desk.submit(Order(tuple(model.text.encode("One")), asked))
    unasked = replace(asked, length_from="the context")
    jobs = [desk.submit(Order(tuple(model.text.encode(word)), unasked)) for word in ("One", "Two")]
    for job in jobs:
        job.wait(PATIENCE_S)
        (text,) = job.sequences
        assert (job.state, text.finish_reason) == (DONE, "length")
        assert len(text.token_ids) == job.limit
        more = replace(asked, max_new_tokens=job.limit + 1000 // 64)
        with pytest.raises(DoesNotFitError):
            desk.submit(Order(job.order.ids, more))


def test_each_takes_what_is_kept_of_its_prompt(fable, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "BLOCK", 8)
    texts = ["Once upon a time there was a king", "There was once a fox who went into the wood"]
    with AutoModel.from_pretrained(
        fable, device="cpu", dtype="float32", prompt_cache=tmp_path
    ) as model:
        desk = Desk(model, keeps=0)
        desk.start()

        def answers():
            jobs = [desk.submit(order(model, text, options={"speculate": "off"})) for text in texts]
            for job in jobs:
                job.wait(PATIENCE_S)
            return jobs

        first, again = answers(), answers()
        for before, job, text in zip(first, again, texts, strict=True):
            assert job.sequences[0].token_ids == before.sequences[0].token_ids
            whole = (len(model.text.encode(text)) - 1) // 8 * 8
            assert (before.stats["kept_tokens"], job.stats["kept_tokens"]) == (0, whole)
        (block,) = kept_blocks(tmp_path, model.text.encode(texts[1])[:8])
        block.write_bytes(block.read_bytes()[:-1])
        one, other = answers()
        assert (one.state, other.state) == (DONE, FAILED)
        assert "a damaged block" in str(other.error)
        desk.stop()
        assert model.engine.n_alive == 0


def kept_blocks(folder, tokens):
    """The files of blocks with these tokens."""
    said = f'\\"tokens\\": {tokens}'.encode()
    return [path for path in folder.rglob("*.safetensors") if said in path.read_bytes()]
