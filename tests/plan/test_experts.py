"""What a plan keeps of experts, and what it expects a forward pass to move."""

from dataclasses import replace

import pytest

from jlayer.config import model_config
from jlayer.plan.experts import rooms_need, sizes_of
from jlayer.plan.need import total
from tests.plan.models import machine, plan_of

GIB = 1 << 30
MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 3000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}


def mixture(**changes):
    return model_config(MIXTURE | changes, where="here")


def test_the_rooms_of_guesses_are_in_the_sum_and_within_the_budget():
    plan = plan_of(mixture(), on=machine(device_budget=3 * GIB))
    (size, *_) = (each.device for each in sizes_of(plan.tiling))
    assert plan.experts.guessed == 8  # of 9 MiB each
    without = rooms_need(plan.tiling, replace(plan.experts, guessed=0))
    assert rooms_need(plan.tiling, plan.experts).device - without.device == 2 * 8 * size
    assert total(plan.device) <= plan.device.budget_bytes
    assert all(0 < n < 64 for n in plan.experts.on_device)


@pytest.mark.parametrize(
    ("options", "guessed"),
    [
        ({"on": machine(device_budget=20 * GIB)}, 0),  # all experts are on the device
        ({"on": machine(platform="cpu")}, 0),  # no link
        ({"on": machine(device_budget=3 * GIB), "keeps_layers": False}, 0),
    ],
)
def test_there_are_no_guesses_where_there_is_nothing_to_guess(options, guessed):
    assert plan_of(mixture(), **options).experts.guessed == guessed


def test_the_smallest_budget_has_no_room_for_guesses_and_is_none_the_larger_for_them():
    least = plan_of(mixture(), on=machine(device_budget=20 * GIB), keeps_layers=False)
    assert plan_of(mixture(), on=machine(device_budget=total(least.device))).fits
    assert least.experts.guessed == 0


def test_an_expert_that_is_too_large_is_not_guessed():
    large = mixture(moe_intermediate_size=12_288, num_experts=8, num_experts_per_tok=2)
    plan = plan_of(large, on=machine(device_budget=3 * GIB, host_budget=40 * GIB))
    assert sizes_of(plan.tiling)[0].device > 128 << 20
    assert plan.experts.guessed == 0
