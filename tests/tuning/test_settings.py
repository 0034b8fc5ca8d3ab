"""Settings of a run: their ranges, and what is said of others."""

import json
import math
import re
from dataclasses import fields

import numpy as np
import pytest

from jlayer.errors import UsageError
from jlayer.tuning.optimizer import AdamW, Moments
from jlayer.tuning.settings import RANGES, SCHEDULES, WHOLE, Settings

NUMBERS = [name for name in RANGES if name not in WHOLE]


def refused(**settings):
    """What is said of them, to users of Python and of the command line."""
    with pytest.raises(UsageError) as found:
        Settings(**settings)
    for words in (str(found.value), found.value.command_line):
        assert len(words.splitlines()) == 1
        assert len(words) < 200
    return str(found.value), found.value.command_line


def with_room(name, value):
    """A setting, and tokens enough for a text of any length, or texts short enough."""
    more = {"length": {"tokens_per_step": 1 << 31}, "tokens_per_step": {"length": 2}}
    return Settings(**({name: value} | more.get(name, {})))


def test_defaults():
    settings = Settings()
    assert settings.as_dict() == {
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "clip": 1.0,
        "dropout": 0.0,
        "tokens_per_step": 4096,
        "length": 512,
        "epochs": 1.0,
        "steps": None,
        "seed": 0,
        "packs": True,
        "eval_every": 0,
        "save_every": 20,
    }
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings
    assert {field.name for field in fields(Settings)} == {*RANGES, "schedule", "packs"}


@pytest.mark.parametrize("name", RANGES)
def test_each_number_has_a_range_whose_ends_are_in_it(name):
    least, most, words = RANGES[name]
    for value in (least, most):
        # 1 token is less than the shortest text of 2.
        if (name, value) == ("tokens_per_step", 1):
            continue
        assert getattr(with_room(name, value), name) == value
    kind = "a whole number" if name in WHOLE else "a number"
    below, above = (
        (least - 1, most + 1)
        if name in WHOLE
        else (math.nextafter(least, -1), math.nextafter(most, math.inf))
    )
    for value in (below, above, -1):
        message, command_line = refused(**{name: value})
        assert message == f"{name}: found {value!r}, expected {kind} {words}"
        assert command_line == "--" + message.replace(name, name.replace("_", "-"), 1)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    "value",
    [True, "1", "x" * 1000, math.nan, math.inf, -math.inf, [1], 1j, 10**5000, -(10**5000)],
    ids=range(10),
)
def test_what_is_no_number_of_the_range(name, value):
    message, _ = refused(**{name: value})
    assert message.startswith(f"{name}: found ")
    assert ", expected a" in message


@pytest.mark.parametrize("name", RANGES)
def test_whole_numbers_are_no_fractions_and_only_steps_may_be_left_out(name):
    if name in WHOLE:
        assert refused(**{name: 600.0})[0].startswith(f"{name}: found 600.0, expected a whole")
    if name == "steps":
        assert Settings(steps=None).steps is None
    else:
        assert refused(**{name: None})[0].startswith(f"{name}: found None, expected")


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "dropout"])
def test_a_number_may_be_whole(name):
    value = 0 if name.startswith("beta") else 1
    assert getattr(Settings(**{name: value}), name) == value


def test_schedules():
    assert [Settings(schedule=name).schedule for name in SCHEDULES] == list(SCHEDULES)
    for other in ("Cosine", "", None, [], "é\n" * 100):
        message, command_line = refused(schedule=other)
        assert message.endswith("expected cosine, linear, constant")
        assert command_line == f"--{message}"
    assert refused(packs="no")[0] == "packs: found 'no', expected True or False"


def test_the_lanes_of_a_step():
    assert Settings(tokens_per_step=1000, length=300).lanes == 3
    assert Settings(tokens_per_step=300, length=300).lanes == 1
    message, command_line = refused(tokens_per_step=299, length=300)
    assert message == (
        "tokens_per_step: found 299, expected at least one text of length 300; take more, or a "
        "smaller length"
    )
    assert re.match("--tokens-per-step: found 299, ", command_line)


@pytest.mark.parametrize("gradient", [0.0, 1e-20, 1.0])
@pytest.mark.parametrize(
    "extreme",
    [
        {},
        *({name: RANGES[name][end]} for name in ("beta1", "beta2", "epsilon") for end in (0, 1)),
        {"beta1": RANGES["beta1"][1], "beta2": RANGES["beta2"][1], "epsilon": RANGES["epsilon"][0]},
        {"learning_rate": RANGES["learning_rate"][0]},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_finite_in_float32(extreme, gradient):
    settings = Settings(**extreme)
    state = {0: np.ones(6, np.float32)}
    gradients = {0: np.full(6, gradient, np.float32)}
    adam, moments = AdamW(settings, lambda array: array), Moments.of(state)
    for _ in range(3):
        state, moments = adam.step(
            state, gradients, moments, rate=settings.learning_rate, factor=1.0
        )
        assert np.isfinite(state[0]).all()
    assert np.float32(settings.learning_rate) > 0
