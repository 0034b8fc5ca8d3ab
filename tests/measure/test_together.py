"""What link and the host's cores move together, by made-up speeds."""

from dataclasses import replace

import pytest

from jlayer.measure.together import Together, together
from jlayer.plan.hosting import EXCHANGE_S, all_stages
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from tests.plan.models import LLAMA_70B, machine, weights_of


@pytest.mark.parametrize(
    ("link_s", "cores_s", "exchange_s", "least", "share", "seconds"),
    [
        (2.0, 2.0, 0.0, 1.0, 0.5, 1.0),
        (3.0, 1.0, 0.0, 0.75, 0.75, 0.75),
        (3.0, 1.0, 0.4, 0.75, 0.65, 1.05),  # the cores wait for a while, and get fewer
        (1.0, 9.0, 1.0, 0.9, 0.0, 1.0),  # the exchange alone takes as long as the link
        (1.0, 9.0, 2.0, 0.9, 0.0, 1.0),
    ],
)
def test_link_and_cores_end_at_the_same_time(link_s, cores_s, exchange_s, least, share, seconds):
    both = Together(link_s, cores_s, exchange_s, 100, 100)
    assert both.least_s == pytest.approx(least)
    assert both.share == pytest.approx(share)
    assert both.seconds(both.share) == pytest.approx(seconds)
    assert both.seconds(0) == link_s
    for other in (share / 2, (1 + share) / 2):
        assert both.seconds(other) >= both.seconds(both.share) - 1e-9


def test_the_option_counts_rows_that_stay_on_the_device_too():
    both = Together(3.0, 1.0, 0.0, 400, 1000)
    assert both.option == 0.3  # three quarters of what passes
    assert both.seconds_with(0.3) == pytest.approx(both.seconds(0.75))
    assert both.seconds_with(0.9) == pytest.approx(1.0)  # all that passes, and no more


def test_bytes_over_both_speeds_are_the_least_seconds():
    on = replace(machine(device_budget=20 << 30, host_budget=200 << 30), link_speed=55e9)
    plan = make_plan(weights_of(LLAMA_70B), on, RunShape(1, 1, 64))
    assert 0 < plan.put_bytes < plan.tiling.n_bytes
    speeds = HostSpeeds((("bfloat16", ((1, 80e9), (64, 20e9))),), 40e9)
    for n_tokens, cores in ((1, 80e9), (64, 20e9), (128, 10e9)):
        both = together(plan, speeds, n_tokens)
        assert both.least_s == pytest.approx(plan.put_bytes / (cores + 40e9))
    assert both.exchange_s == EXCHANGE_S * all_stages(plan.tiling)
    assert (both.passing_bytes, both.all_bytes) == (plan.put_bytes, plan.tiling.n_bytes)


def test_nothing_is_said_of_both_where_one_is_missing():
    plan = make_plan(weights_of(LLAMA_70B), machine(), RunShape(1, 1, 64))
    forms = (("bfloat16", ((1, 80e9), (64, 20e9))),)
    assert together(plan, None, 1) is None
    assert together(plan, HostSpeeds(forms, None), 1) is None
    assert together(plan, HostSpeeds((("int4", forms[0][1]),), 40e9), 1) is None  # other weights
    assert together(plan, HostSpeeds(forms, 40e9), 1) is not None
