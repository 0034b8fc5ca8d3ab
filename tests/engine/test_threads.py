"""Four threads times five calls through every public door, each with the result that it has alone;
and a process that was forked, which has none of the threads."""

import os
import threading

import numpy as np
import pytest

import jlayer

N_THREADS, N_CALLS = 4, 5
TEXTS = ["Once upon a time", '"Who are you?" asked Dorothy.', "The king said", "日本語 🎈 and"]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(fable):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        model.text.chat_templates["default"] = CHAT
        model.tokenizer.pad_token = model.tokenizer.eos_token
        yield model


def together(work):
    """What `work(i, call)` gives in each thread and call; all threads begin at once."""
    found, failures = {}, []
    start = threading.Barrier(N_THREADS)

    def run(i):
        start.wait()
        try:
            for call in range(N_CALLS):
                found[i, call] = work(i, call)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]
    return found


def options(i, call):
    return {"max_new_tokens": 3 + i, "temperature": 0.4 * (call % 3), "seed": i, "stop": ["qq"]}


def generated(model, i, call):
    found = jlayer.generate(model, TEXTS[i], **options(i, call))
    return found.text, found.token_ids, found.seed


def streamed(model, i, call):
    steps = list(jlayer.stream(model, TEXTS[i], **options(i, call)))
    return "".join(step.text for step in steps), steps[-1].finish_reason


def batched(model, i, call):
    prompts = [TEXTS[i], TEXTS[call % 4]]
    return [one.token_ids for one in jlayer.generate(model, prompts, max_new_tokens=2 + i)]


def as_transformers(model, i, call):
    rows = [model.text.encode(text)[: 3 + i] for text in (TEXTS[i], TEXTS[call % 4])]
    width = max(map(len, rows))
    rows = np.array([[9] * (width - len(row)) + row for row in rows])
    return model.generate(rows, max_new_tokens=3, pad_token_id=9, eos_token_id=2).tolist()


def scored(model, i, call):
    return model.logits(model.text.encode(TEXTS[i])[: 2 + call]).argmax(-1).tolist()


def chatted(model, i, call):
    messages = [{"role": f"user{i}", "content": TEXTS[call % 4]}]
    return model.text.encode_chat(messages, chat_template=CHAT)


def tokenized(model, i, call):
    """Padding and truncation are settings of the tokenizer, which threads must not share."""
    found = []
    for _ in range(40):
        texts = [TEXTS[i] * 50, TEXTS[(i + 1) % 4] * 20]
        ids = model.tokenizer(texts, padding=i % 2 == 0, truncation=True, max_length=100 + 40 * i)
        found.append([len(row) for row in ids["input_ids"]])
    return found


DOORS = [generated, streamed, batched, as_transformers, scored, chatted, tokenized]


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_threads_get_what_each_gets_alone(model, door):
    alone = {(i, c): door(model, i, c) for i in range(N_THREADS) for c in range(N_CALLS)}
    assert together(lambda i, call: door(model, i, call)) == alone


@pytest.mark.slow
def test_threads_may_use_different_doors(model):
    doors = [generated, streamed, as_transformers, scored]
    alone = {(i, c): doors[i](model, i, c) for i in range(N_THREADS) for c in range(N_CALLS)}
    assert together(lambda i, call: doors[i](model, i, call)) == alone


def test_threads_that_ask_first_at_once_get_one_tokenizer_of_text(fable):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu") as model:
        found = together(lambda i, call: (model.text, model.tokenizer))
        assert len({id(text) for text, _ in found.values()}) == 1
        for i in range(N_THREADS):  # and each thread keeps its own
            assert len({id(found[i, call][1]) for call in range(N_CALLS)}) == 1
        assert len({id(own) for _, own in found.values()}) == N_THREADS


@pytest.mark.slow
def test_threads_may_each_open_a_model(fable):
    def work(i, call):
        return jlayer.generate(fable, TEXTS[i], device="cpu", max_new_tokens=1).token_ids

    alone = [work(i, 0) for i in range(N_THREADS)]
    assert together(work) == {(i, c): alone[i] for i in range(N_THREADS) for c in range(N_CALLS)}


# A forked process


def in_a_fork(work):
    """The line that `work` gives in a forked process. A process that hangs is ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work()
            line = "no error"
        except BaseException as error:
            line = f"{type(error).__name__}: {error}"
        os.write(writing, line.encode())
        os._exit(0)
    os.close(writing)
    watch = threading.Timer(60, os.kill, (child, 9))
    watch.start()
    with os.fdopen(reading) as pipe:
        line = pipe.read()
    os.waitpid(child, 0)
    watch.cancel()
    return line


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_so(model, fable):
    decoding, _ = model.decoding(TEXTS[0], options={"max_new_tokens": 3})
    uses = [
        lambda: jlayer.generate(model, TEXTS[0], max_new_tokens=1),
        lambda: jlayer.stream(model, TEXTS[0], max_new_tokens=1),
        lambda: model.generate([[5]], max_new_tokens=1),
        lambda: model.logits([[5]]),
        lambda: next(iter(decoding)),
        lambda: jlayer.AutoModel.from_pretrained(fable, device="cpu"),
    ]
    with model.engine.turn():  # a run of another thread has the engine
        for use in uses:
            assert in_a_fork(use).startswith("UsageError: this process was forked from")
        assert in_a_fork(model.close) == "no error"
    assert in_a_fork(lambda: model.text.encode("text")) == "no error"
    assert [step.token_ids for (step,) in decoding]  # the first process goes on
