"""Draft models in a plan: what their weights take, and what a run with one needs and is told."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.config import model_config
from jlayer.errors import DoesNotFitError
from jlayer.families.registry import published_tensors
from jlayer.plan.draft import draft_bytes, draft_forms
from jlayer.plan.lanes import most_lanes
from jlayer.plan.making import fitting, make_plan, refit
from jlayer.plan.shapes import PoolSizes, RunShape, pool_rows
from jlayer.plan.tiles import Tier
from tests.plan.models import LLAMA_70B, SMALL_8B, llama, machine, plan_of, weights_of
from tests.plan.test_latent import V3

TINY = llama(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=200,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
)
# The shapes of Llama 3.2 1B, whose head is its table.
DRAFT_1B = llama(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    head_dim=64,
    tie_word_embeddings=True,
)
LAYER = "model.layers.1."


def test_a_plain_matrix_has_one_byte_a_weight_and_a_scale_a_row_on_a_gpu():
    forms = draft_forms(weights_of(TINY), "gpu")
    assert forms.keys() == published_tensors(TINY).keys()
    assert forms[LAYER + "mlp.down_proj.weight"] == 96 * 200 + 4 * 96
    assert forms["model.embed_tokens.weight"] == forms["lm_head.weight"] == 1000 * 96 + 4 * 1000
    assert forms[LAYER + "input_layernorm.weight"] == 2 * 96


def test_the_matrix_of_keys_and_values_of_a_latent_has_the_compute_dtype():
    shape = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    weights = weights_of(model_config({**V3, **shape}, where="here"), stored="float32")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    for platform in ("cpu", "gpu"):
        assert draft_forms(weights, platform)[name] == 2 * 128 * 256 * 512


@pytest.mark.parametrize(("stored", "item"), [("bfloat16", 2), ("float32", 4)])
def test_a_plain_matrix_stays_as_it_is_stored_on_a_cpu(stored, item):
    forms = draft_forms(weights_of(TINY, stored=stored, dtype="float32"), "cpu")
    assert forms[LAYER + "mlp.down_proj.weight"] == item * 96 * 200
    assert forms["model.norm.weight"] == 4 * 96  # in the compute dtype


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_quantized_matrix_keeps_its_pieces(platform):
    forms = draft_forms(weights_of(TINY, stored="int4"), platform)
    assert forms[LAYER + "mlp.down_proj.weight"] == 96 * 100 + 96 * 7  # seven groups a row
    assert forms[LAYER + "post_attention_layernorm.weight"] == 2 * 96


def test_a_table_that_is_the_head_too_is_there_once():
    whole, tied = (
        draft_bytes(weights_of(cfg), "gpu")
        for cfg in (TINY, replace(TINY, tie_word_embeddings=True))
    )
    assert whole - tied == 1000 * 96 + 4 * 1000
    assert draft_bytes(weights_of(DRAFT_1B), "gpu") == pytest.approx(1.24e9, rel=0.01)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_draft_has_a_term_of_its_own_and_takes_nothing_of_the_others(platform):
    on = machine(platform=platform, device_budget=40 << 30, host_budget=40 << 30)
    options = {"on": on, "keeps_layers": False}
    draft = weights_of(DRAFT_1B)
    alone, both = plan_of(SMALL_8B, **options), plan_of(SMALL_8B, **options, draft=draft)
    taken = both.device.draft_bytes
    assert alone.device.draft_bytes == 0
    assert taken > draft_bytes(draft, platform)
    assert replace(both.device, draft_bytes=0) == alone.device
    on_host = taken if platform == "cpu" else 0  # there it is the same memory
    assert both.host_peak_bytes == alone.host_peak_bytes + on_host
    found = both.as_dict()
    assert found["device"]["draft_bytes"] == taken
    smallest = [plan.as_dict()["smallest_device_memory_bytes"] for plan in (alone, both)]
    assert smallest[1] == smallest[0] + taken


@given(context=st.integers(1, 5000), nodes=st.integers(0, 200), least=st.integers(0, 9000))
@settings(deadline=None, max_examples=30)
def test_a_draft_has_a_pool_row_for_each_of_the_model_s(context, nodes, least):
    """Held against another with twice the layers, which has more of weights and pools alone."""
    on = machine(device_budget=80 << 30)
    run = RunShape(context=context, nodes=nodes)
    options = {"least_pool": PoolSizes(least), "keeps_layers": False}
    drafts = [weights_of(replace(TINY, num_hidden_layers=n)) for n in (3, 6)]
    one, two = (
        make_plan(weights_of(SMALL_8B), on, run, draft=draft, **options).device.draft_bytes
        for draft in drafts
    )
    rows = max(pool_rows(context + nodes), least)
    weights = [draft_bytes(draft, "gpu") for draft in drafts]
    assert two - one == weights[1] - weights[0] + 3 * rows * 2 * 2 * 24 * 2


def test_room_for_a_draft_is_kept_before_tiles_stay():
    on = machine(device_budget=8 << 30, host_budget=200 << 30)
    alone, both = (plan_of(LLAMA_70B, on=on, draft=draft) for draft in (None, weights_of(DRAFT_1B)))
    assert both.fits
    lost = alone.tier_bytes(Tier.DEVICE) - both.tier_bytes(Tier.DEVICE)
    assert lost == pytest.approx(both.device.draft_bytes, rel=0.2)


def test_a_plan_is_refitted_with_its_draft():
    draft, run = weights_of(DRAFT_1B), RunShape(longest=20, context=100)
    plan = plan_of(SMALL_8B, draft=draft)
    assert plan.device.draft_bytes
    assert refit(plan, weights_of(SMALL_8B), run, draft=draft) == plan


def test_fewer_lanes_fit_beside_a_draft():
    weights, run = weights_of(SMALL_8B), RunShape(1, 64, 64)
    on = machine(device_budget=3 << 30, host_budget=4 << 30)
    draft = weights_of(DRAFT_1B)
    most = most_lanes(weights, on, run, draft=draft)
    assert 0 < most < most_lanes(weights, on, run)
    assert make_plan(weights, on, replace(run, batch=most), draft=draft).fits
    assert not make_plan(weights, on, replace(run, batch=most + 1), draft=draft).fits


def advice(plan):
    with pytest.raises(DoesNotFitError) as refused:
        plan.check()
    return str(refused.value)


@pytest.mark.parametrize(("platform", "least"), [("gpu", 944), ("cpu", 300)])
def test_a_refusal_advises_against_the_draft_only_where_that_would_do(platform, least):
    draft = weights_of(DRAFT_1B)

    def with_budget(mib):
        on = machine(platform=platform, device_budget=mib << 20)
        return plan_of(SMALL_8B, on=on, draft=draft)

    words = "or take a smaller draft model, or none"
    some = advice(with_budget(least + 100))
    assert words in some
    assert re.search(r"\+ draft [\d.]+ GiB; give at least \d+MiB", some)
    assert plan_of(SMALL_8B, on=machine(platform=platform, device_budget=(least + 100) << 20)).fits
    assert words not in advice(with_budget(1))
    enough = int(re.search(r"give at least (\d+)MiB", some)[1])
    assert with_budget(enough).fits
    assert not with_budget(enough - 1).fits


def test_host_memory_that_has_no_room_for_the_draft_of_a_cpu_is_told_so():
    def with_host(mib, draft):
        on = machine(platform="cpu", device_budget=40 << 30, host_budget=mib << 20)
        return plan_of(SMALL_8B, on=on, draft=draft)

    assert with_host(1500, None).fits
    assert "or take a smaller draft model, or none" in advice(with_host(1500, weights_of(DRAFT_1B)))


def test_as_many_guessed_tokens_ride_as_fit():
    """Rows of logits on the host, 0.5 MB each, are what they cost here."""
    shape = RunShape(batch=3, context=100, nodes=3 * 127)

    def with_host(mib):
        on = machine(host_budget=mib << 20)
        return lambda run: make_plan(weights_of(SMALL_8B), on, run)

    assert fitting(with_host(16 << 10), shape).shapes.nodes == shape.nodes
    least = with_host(1)(replace(shape, nodes=95)).host_peak_bytes
    found = fitting(with_host(-(-least // 2**20)), shape)
    assert (found.fits, found.shapes.nodes) == (True, 95)
    tried = []
    none = fitting(lambda run: tried.append(run.nodes) or with_host(1)(run), shape)
    assert tried == [381, 190, 95, 47, 23, 11, 5, 0]
    assert (none.fits, none.shapes.nodes) == (False, 0)
