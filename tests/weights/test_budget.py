"""The plan's sums: held against compiled programs, against refusals, and against known sizes of
known models."""

import functools

import pytest

from jlayer.config import ModelConfig, Rope
from jlayer.errors import DoesNotFitError
from jlayer.families import layer_leaves
from jlayer.weights.budget import (
    CHUNK_TOKENS,
    block_temporary_bytes,
    capacity_for,
    chunks,
    make_plan,
    shapes_of_run,
)

LLAMA_70B = ModelConfig(
    "llama",
    128256,
    8192,
    28672,
    80,
    64,
    8,
    128,
    131072,
    1e-5,
    Rope(),
    False,
    False,
    False,
    False,
    "silu",
    "bfloat16",
)
SMALL = ModelConfig(
    "llama",
    1000,
    256,
    704,
    2,
    8,
    2,
    48,
    4096,
    1e-5,
    Rope(),
    False,
    False,
    False,
    False,
    "silu",
    "bfloat16",
)


def plan_of(cfg, **options):
    return make_plan(
        cfg,
        **{
            "stored_dtype": "bfloat16",
            "dtype": "bfloat16",
            "device_budget": 4 << 30,
            "host_budget": 16 << 30,
            "context_bytes": 0,
            "shared_memory": False,
            **shapes_of_run(batch=1, longest=20, context=100),
            **options,
        },
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 150, 255, 256, 257, 511, 512, 513, 700, 4096])
def test_chunks_hold_all_tokens_with_little_padding(n):
    sizes = chunks(n)
    assert set(sizes) <= set(CHUNK_TOKENS)
    assert sum(sizes) >= n
    assert sum(sizes) - n < max(64, 256)
    assert list(sizes) == sorted(sizes, reverse=True)


def test_capacity_doubles():
    assert [capacity_for(n) for n in (1, 64, 65, 128, 129, 5000)] == [64, 64, 128, 128, 256, 8192]


def test_known_sizes_of_llama_3_70b():
    plan = plan_of(LLAMA_70B)
    assert plan.tile_bytes == 1_711_308_800  # one layer in bfloat16
    assert plan.model_bytes == 141_107_412_992
    assert plan.as_dict()["tiers"]["disk_layers"] == 80


@pytest.mark.parametrize("tokens", CHUNK_TOKENS)
@pytest.mark.parametrize("capacity", [64, 1024])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_temporaries_of_the_compiled_block_stay_within_the_formula(tokens, capacity, stored, dtype):
    import jax

    from jlayer.model.block import block
    from jlayer.model.cache import cache_struct
    from jlayer.model.params import layer_struct

    args = (
        layer_struct(SMALL, {leaf.name: stored for leaf in layer_leaves(SMALL)}),
        jax.ShapeDtypeStruct((1, tokens, SMALL.hidden_size), dtype),
        cache_struct(SMALL, batch=1, capacity=capacity, dtype=dtype),
        jax.ShapeDtypeStruct((1, tokens), "int32"),
    )
    program = jax.jit(functools.partial(block, cfg=SMALL), donate_argnums=2).lower(*args).compile()
    bound = block_temporary_bytes(
        SMALL,
        batch=1,
        tokens=tokens,
        capacity=capacity,
        item_bytes=2 if dtype == "bfloat16" else 4,
        casts=stored != dtype,
    )
    found = program.memory_analysis().temp_size_in_bytes
    assert found <= bound
    assert bound <= 4 * found + (1 << 20)  # a bound that is far off refuses what would fit


def test_refusal_shows_the_sum_and_the_smallest_budget_and_that_one_is_accepted():
    plan = plan_of(LLAMA_70B, device_budget=1 << 30)
    with pytest.raises(DoesNotFitError, match=r"slots 3\.19 GiB") as refusal:
        plan.check()
    assert refusal.value.report["plan"]["fits"] is False
    smallest = plan.as_dict()["smallest_device_memory_bytes"]
    assert plan_of(LLAMA_70B, device_budget=smallest).fits
    assert not plan_of(LLAMA_70B, device_budget=smallest - 1).fits


def test_the_peak_is_the_sum_of_its_terms():
    plan = plan_of(LLAMA_70B).as_dict()
    for memory in (plan["device"], plan["host"]):
        terms = [
            value for name, value in memory.items() if name not in ("budget_bytes", "peak_bytes")
        ]
        assert memory["peak_bytes"] == sum(terms)
