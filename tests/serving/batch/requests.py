"""Lines of batches for the tests, and what they were answered."""

import json

import pytest

ANIMALS = ("fox", "cat", "wolf", "king")


def request(custom_id, prompt="Once upon a time", **body):
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": prompt, "max_tokens": 6, "temperature": 0, **body},
    }


def many(n):
    """Requests of all kinds that end in different passes: greedy, drawn, several texts, wrong.

    The two likeliest tokens of a draw lie 1.6e-4 apart or more, among 1,000 on fable-3m. At a
    temperature of 0.9 two lay 9e-6 apart, where it depends on who rides beside which one is drawn.
    """
    kinds = ({}, {"temperature": 0.8}, {"temperature": 0.85, "n": 2}, {"logprobs": 2})
    for at in range(n):
        own = {"max_tokens": -1} if at % 10 == 7 else kinds[at % 4]
        prompt = f"Once upon a time there was a {ANIMALS[at % 4]} who had {at} hats and"
        yield request(f"line {at}", prompt, **{"max_tokens": 3 + at % 7, **own})


def written(path, requests):
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    return path


def answers(path):
    """custom_id -> its line, without what tells the time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "each is answered once"
    for line in lines:
        line["response"]["body"].pop("created", None)
    return found


def assert_same(found, expected):
    """What two runs answered is equal; log-probabilities are sums, whose order depends on who else
    rides, so they are equal up to rounding."""
    assert found.keys() == expected.keys()
    for custom_id, line in found.items():
        other = expected[custom_id]
        pairs = zip(_logprobs(line), _logprobs(other), strict=True)
        for own, others in pairs:
            assert own == pytest.approx(others, abs=1e-4)
        assert line == other, f"{line}\n{other}"


def _logprobs(line):
    """Takes the figures out of a line, one choice after another."""
    for choice in line["response"]["body"].get("choices", ()):
        if choice["logprobs"] is not None:
            yield choice["logprobs"].pop("token_logprobs")
            yield from choice["logprobs"].pop("top_logprobs")
