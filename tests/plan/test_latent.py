"""Plans of models with latent attention: their caches, what stays on the device and what moves, and
DeepSeek V3 and Kimi K2 within 4 GiB."""

import json
import math
from dataclasses import replace

import jax
import pytest

from jlayer.catalogue import model_json
from jlayer.config import model_config
from jlayer.engine.programs import Programs
from jlayer.engine.size import Size
from jlayer.families.experts import ROUTER
from jlayer.families.latent import KV_B
from jlayer.plan.cutting import cut
from jlayer.plan.memory import activation_bytes, cache_bytes, resident_bytes, temporary_bytes
from jlayer.plan.shapes import Shapes, pool_rows
from jlayer.plan.tiles import Tier
from jlayer.streaming.devices import Devices
from tests.plan.models import machine, plan_of, weights_of
from tests.plan.test_memory import compile_all

# The published shapes, in bfloat16.
V3 = json.loads(model_json("deepseek-v3"))
del V3["quantization_config"]
K2 = {
    **V3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.827,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "topk_group": 1,
    "vocab_size": 163840,
}
MODELS = {"deepseek_v3": V3, "kimi_k2": K2}


def config(name, **more):
    return model_config({**MODELS[name], **more}, where="config.json")


@pytest.mark.parametrize("name", MODELS)
def test_what_stays_on_the_device_and_an_entry_of_the_cache(name):
    cfg, raw = config(name), MODELS[name]
    numbers = 61 * (2 * 7168 + 1536 + 512) + 7168
    # Float32, whatever is computed in.
    biases = (61 - raw["first_k_dense_replace"]) * raw["n_routed_experts"]
    assert resident_bytes(weights_of(cfg)) == 2 * numbers + 4 * biases
    assert cache_bytes(cfg, 1000, item_bytes=2) == 61 * 1000 * (512 + 64) * 2


FEW = {"n_routed_experts": 80, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize("tile_bytes", [64 << 20, 1 << 20])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_used_uncut_is_a_tile_that_every_pass_moves(name, tile_bytes):
    """However small the others are, in 16 bits as it is published, quantized or not."""
    raw, sizes = MODELS[name], {}
    for stored in ("bfloat16", "int4"):
        weights = weights_of(config(name, **FEW, num_hidden_layers=5), stored=stored)
        tiling = cut(weights, tile_bytes, platform="gpu")
        sizes[stored] = [tiling.sizes[n] for n in sorted(tiling.uncut)]
        assert tiling.uncut <= set(tiling.certain)
        assert all(tiling.shapes[n].ends_stage for n in tiling.uncut)
        assert all(tiling.shapes[n].joined is None for n in tiling.uncut)
        assert tiling.n_bytes == sum(tiling.sizes)
    kv_b, router = raw["num_attention_heads"] * 256 * 512 * 2, 80 * 7168 * 2
    dense = raw["first_k_dense_replace"]
    assert sizes["int4"] == sizes["bfloat16"] == [kv_b] * dense + [kv_b, router] * (5 - dense)


def test_small_routers_stay():
    few = {**FEW, "n_routed_experts": 64}
    for n_experts, moves in ((64, False), (80, True)):
        cfg = config("kimi_k2", **few | {"n_routed_experts": n_experts}, num_hidden_layers=2)
        tiling = cut(weights_of(cfg), 64 << 20, platform="gpu")
        found = {name for tile in tiling.tiles for name in tile.uncut}
        assert found == ({KV_B, ROUTER} if moves else {KV_B})
        router = 64 * 7168 * 4 * (not moves)
        norms = 2 * (2 * (2 * 7168 + 1536 + 512) + 7168)
        assert resident_bytes(weights_of(cfg)) == norms + router + 4 * n_experts


@pytest.mark.parametrize("name", MODELS)
def test_the_scale_of_scores_is_that_of_the_published_config(name):
    how, factor = config(name).attention, MODELS[name]["rope_scaling"]["factor"]
    assert how.scale == pytest.approx(192**-0.5 * (0.1 * math.log(factor) + 1) ** 2)
    assert how.rope.attention_factor == 1.0


@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("kimi_k2", marks=pytest.mark.slow)])
def test_it_is_planned_within_4_gib(name):
    """With all layers and all experts; for fewer tokens in less. What room is left keeps first what
    is used uncut."""
    for budget, tokens in ((4 << 30, 4096), (3 << 29, 512)):
        on = machine(device_budget=budget, host_budget=64 << 30)
        shape = {"context": tokens, "longest": tokens}
        plan = plan_of(config(name), on=on, stored="int4", **shape)
        assert plan.fits
        sizes, tiers = plan.tiling.sizes, plan.tiers
        kept = {n for n, size in enumerate(sizes) if size and tiers[n] is Tier.DEVICE}
        uncut = plan.tiling.uncut
        others = sum(plan.tiling.device_sizes[n] for n in kept - uncut)
        assert uncut <= kept or others < max(plan.tiling.device_sizes[n] for n in uncut)
        item = 61 * 576 * 2
        assert plan.device.cache_bytes in (item * pool_rows(shape["context"]), 0) or (
            plan.host.cache_bytes >= item * pool_rows(shape["context"])
        )


# Small enough to compile programs for; no layer has experts.
SMALL = model_config(
    {
        **V3,
        "hidden_size": 256,
        "intermediate_size": 704,
        "vocab_size": 1000,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
    },
    where="here",
)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("tile_bytes", [None, 100_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tokens", "capacity"), [(2, 64), (8, 1024), (64, 1024), (512, 64)])
def test_temporaries_of_compiled_programs_stay_within_the_formula(
    tokens, capacity, dtype, tile_bytes, direct
):
    how = SMALL.attention
    cfg = replace(SMALL, attentions=(replace(how, q_rank=None),)) if direct else SMALL
    weights = weights_of(cfg, stored=dtype, dtype=dtype)
    tiling = cut(weights, tile_bytes, platform="cpu")
    programs = Programs(cfg, dtype=dtype, devices=Devices(jax.devices("cpu")[:1]))
    compile_all(programs, tiling, Size(tokens, 1, tokens, capacity, capacity), with_head=False)
    found = programs.temporary_bytes
    shapes = Shapes(1, (capacity,), capacity, tokens, tokens)
    bound = temporary_bytes(weights, shapes, tiling, platform="cpu")
    assert found <= bound < 5 * found


def test_a_row_takes_what_its_entry_is_made_of_until_its_query_is_there():
    """Beside the products of its query, of which there may be as many again."""
    direct = replace(SMALL, attentions=(replace(SMALL.attention, q_rank=None),))
    few, many = (Shapes(1, (64,), 64, 64, n_rows) for n_rows in (64, 128))
    each, without = (
        activation_bytes(cfg, many, item_bytes=2, whole=False)
        - activation_bytes(cfg, few, item_bytes=2, whole=False)
        for cfg in (SMALL, direct)
    )
    assert each - without == 64 * 2 * (64 + 16)
