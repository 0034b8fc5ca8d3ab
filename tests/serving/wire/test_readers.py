"""What readers tell of jobs: echo with log-probabilities, and streams that go on from any token."""

import random

import pytest

from jlayer.engine.lane import Step
from jlayer.engine.sample import Choice
from jlayer.serving.wire.asked import Reader
from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.resumed import PLACES, KeptJob, KeptText, ResumedReader
from jlayer.text.stream import StopWatcher, TextStream
from tests.serving.wire.bodies import messages, served

TEXT = " there was a 🙂 king, and naïve 象 said: no"


@pytest.fixture(scope="module")
def model():
    return served()


def score(token):
    return Choice(token, -1.0 - token / 5000, ((5, -0.25), (token, -1.0 - token / 5000)))


def steps(model, ids, sizes, stops=()):
    """A text in passes of so many tokens, as the engine would give it."""
    stream, watcher, found, at = TextStream(model.text, continues=True), StopWatcher(stops), [], 0
    for size in sizes:
        part = ids[at : at + size]
        text = "".join(watcher.feed(stream.step(token)) for token in part)
        at += size
        if at >= len(ids):
            text += watcher.feed(stream.finish()) + watcher.finish()
        found.append(Step(text, tuple(part), None, tuple(map(score, part))))
    return found


def cuts(random, n):
    while n:
        size = min(n, random.choice([1, 1, 2, 3]))
        n -= size
        yield size


def told(reader):
    events = [*reader.begin(), *reader.take()]
    assert reader.is_over
    return [*events, *reader.end(reader.usage())], reader.teller.whole(reader.usage())


def test_echo_scores_the_prompt_and_the_first_of_it_has_none(model):
    ids = model.text.encode("Once upon")
    rows = [None]
    rows += [
        {"token_id": t, "logprob": score(t).logprob, "top": [list(p) for p in score(t).top]}
        for t in ids[1:]
    ]
    new = model.text.encode(TEXT, add_special_tokens=False)[:4]

    body = {"prompt": "Once upon", "max_tokens": 4, "echo": True, "logprobs": 1}
    given = {}

    def sampling(options):
        given.update(options)
        return model.sampling({k: v for k, v in options.items() if k != "prompt_logprobs"})

    asked = read_completion(body, served(sampling=sampling))
    assert given["prompt_logprobs"] == 1
    assert asked.waits_for_prompt
    job = KeptJob([KeptText(steps(model, new, [2, 2]), "length")], rows)
    events, whole = told(Reader(asked, [job]))
    (choice,) = whole["choices"]
    assert choice["text"] == "Once upon" + model.text.decode(new, continues=True)
    legacy = choice["logprobs"]
    assert len(legacy["tokens"]) == len(ids) + 4
    assert (legacy["token_logprobs"][0], legacy["top_logprobs"][0]) == (None, None)
    assert None not in legacy["token_logprobs"][1:]
    for token, offset in zip(legacy["tokens"][1:], legacy["text_offset"][1:], strict=True):
        assert choice["text"].startswith(token, offset)
    streamed = [each["choices"][0] for each in events if each["choices"]]
    assert "".join(each["text"] for each in streamed) == choice["text"]
    parts = [each["logprobs"] for each in streamed if each["logprobs"]]
    for name, values in legacy.items():
        assert [one for part in parts for one in part[name]] == values


def test_a_prompt_that_is_still_scored_is_waited_for(model):
    def sampling(options):
        return model.sampling({k: v for k, v in options.items() if k != "prompt_logprobs"})

    body = {"prompt": [5, 6], "max_tokens": 2, "echo": True, "logprobs": 0}
    asked = read_completion(body, served(sampling=sampling))
    job = KeptJob([KeptText(steps(model, [7, 8], [1, 1]), None)], None, is_over=False)
    reader = Reader(asked, [job])
    assert list(reader.take()) == []
    row = {"token_id": 6, "logprob": -1.0, "top": []}
    reader.jobs = [KeptJob(job.sequences, [None, row], is_over=False)]
    assert next(each["choices"][0]["logprobs"]["tokens"] for each in reader.take()) == [
        *map(model.tokens.key_of, (5, 6))
    ]


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("stops", [(), ("king, and zzz", "said"), ("象",)])
def test_a_stream_goes_on_from_any_event_in_whatever_passes_it_comes_again(model, kind, stops):
    """Drawn again after a restart, tokens are the same; the passes that they come in are not."""
    source = random.Random(5)
    ids = model.text.encode(TEXT, add_special_tokens=False)
    body = {"max_tokens": 99, "n": 2, "temperature": 1, "stop": list(stops)}
    if kind == "chat":
        asked = read_chat({**body, "messages": messages("x"), "logprobs": True}, model)
    else:
        asked = read_completion({**body, "prompt": "Once", "logprobs": 1}, model)

    def job():
        texts = [
            KeptText(steps(model, ids[:n], cuts(source, n), stops), "stop")
            for n in (len(ids), len(ids) - 3)
        ]
        return KeptJob(texts, None)

    def pieces(events):
        found = {0: ["", []], 1: ["", []]}
        for event in events:
            for choice in event["choices"]:
                own = found[choice["index"]]
                own[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                probs = choice["logprobs"] or {}
                own[1] += probs.get("tokens") or [e["token"] for e in probs.get("content", ())]
        return found

    first, _ = told(ResumedReader(asked, [job()], [0, 0], model.text))
    for at, event in enumerate(first):
        position = event["jlayer_seq"]
        rest, _ = told(ResumedReader(asked, [job()], position, model.text))
        before, after = pieces(first[: at + 1]), pieces(rest)
        for choice, whole in pieces(first).items():
            assert [one + two for one, two in zip(before[choice], after[choice], strict=True)] == (
                whole
            )
        numbers = [each["jlayer_seq"] for each in rest]
        assert all(
            one <= two
            for n in (0, 1)
            for one, two in zip(
                [number[n] for number in numbers],
                [number[n] for number in numbers[1:]],
                strict=False,
            )
        )
    assert pieces(first)[0][1] == [*map(model.tokens.key_of, ids)] or kind == "chat"
    assert first[-1]["jlayer_seq"][0] // PLACES == len(ids)
