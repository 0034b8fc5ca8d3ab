"""The campaigns of benchmarks/serving.py at a smaller size, against a real server."""

import pytest

from benchmarks import crowds, trials
from benchmarks.served import Server
from benchmarks.serving import CROWDED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with Server() as found:
        yield found


def test_each_of_many_clients_is_told_what_it_is_told_alone(server):
    found = crowds.together(server, clients=16, tokens=12, rounds=1)
    assert found["sweeps"][0] < found["sweeps_alone"] / 2, "they share sweeps"


def test_one_who_reads_slowly_holds_up_nobody(server):
    found = crowds.slow_reader(server, seconds=4, tokens=500)
    assert found["others_beside_it_s"]["max"] < 10


def test_requests_that_never_end_stop_nobody(server):
    assert crowds.half_open(server, connections=30)["connections"] == 30


def test_nothing_is_left_of_those_who_leave():
    with Server(*CROWDED) as crowded:
        found = crowds.leaving(crowded, requests=100)
    assert found["cancelled_by_the_desk"] > 10


def test_memory_is_flat(server):
    found = crowds.many(server, requests=600, step=200)
    assert found["growth_of_the_second_half_bytes"] < 30 << 20


def test_a_slow_model_makes_nothing_else_slow():
    with Server(slowed=0.3) as slow:
        found = trials.slow_model(slow, seconds=1, clients=2)
    assert found["seconds_a_sweep"] > 1.5


def test_accepted_requests_survive_kills():
    found = trials.killed(rounds=1, requests=10)
    assert found["answered_once"] == found["accepted"] > 5
