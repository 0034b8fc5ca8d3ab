"""How many rows of prompts ride beside next tokens: learnt from the time that passes take."""

from dataclasses import dataclass

import pytest

from jlayer.engine.prompt_room import PromptRoom


@dataclass
class Load:
    n_rows: int = 2100


@dataclass
class FakePlan:
    load: Load
    chunk: int = 512


@pytest.mark.parametrize(
    ("fixed_s", "row_s", "expected"),
    [(1.0, 0.0001, 2100), (1.0, 0.004, 256), (0.01, 0.01, 256)],
    ids=["the link is slow", "512 rows take as long as two passes", "arithmetic is all"],
)
def test_the_rows_settle_where_a_pass_takes_about_twice_as_long(fixed_s, row_s, expected):
    room, plan = PromptRoom(), FakePlan(Load())
    for n in range(40):
        n_rows = room.rows(plan) if n % 3 else 1
        room.learn(plan, n_prompt_rows=n_rows, seconds=fixed_s + row_s * n_rows)
    assert room.rows(plan) == expected


def test_no_more_rows_than_a_pass_has_memory_for_and_no_fewer_than_half_a_chunk():
    room = PromptRoom()
    for _ in range(10):
        room.learn(FakePlan(Load()), n_prompt_rows=room.rows(FakePlan(Load())), seconds=1.0)
    assert room.rows(FakePlan(Load())) == 2100
    assert room.rows(FakePlan(Load(600))) == 600
    assert room.rows(FakePlan(Load(100), chunk=64)) == 100
    assert PromptRoom().rows(FakePlan(Load(8), chunk=8)) == 8


def test_a_short_pass_never_takes_rows_away():
    room, plan = PromptRoom(), FakePlan(Load())
    for seconds in (0.001, 0.09, 0.002, 0.08):
        room.learn(plan, n_prompt_rows=room.rows(plan), seconds=seconds)
    assert room.rows(plan) == 2100


def test_a_pass_with_few_rows_teaches_nothing_of_many():
    room, plan = PromptRoom(), FakePlan(Load())
    for _ in range(10):
        room.learn(plan, n_prompt_rows=10, seconds=1.0)
    assert room.rows(plan) == 512
