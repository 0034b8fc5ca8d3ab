"""Large leaves that a function reads uncut, the matrices of keys and values and the routers, are
streamed: wherever they stay, the logits are those of Transformers, and what moves is what the plan
says."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError
from jlayer.families import experts
from jlayer.families.experts import ROUTER
from jlayer.families.latent import KV_B
from jlayer.plan.tiles import Tier
from jlayer.spec import ModelConfig
from jlayer.streaming.steps import Put
from tests.campaigns import slow_but
from tests.reference import latent_forms, mixture_forms
from tests.streaming.test_integrity import damage

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 40))
GREEDY = {"temperature": 0, "max_new_tokens": 6, "eos_token_id": None, "speculate": "off"}
FORMS_OF = {
    **dict.fromkeys(latent_forms.FORMS, latent_forms),
    **dict.fromkeys(mixture_forms.MIXTURES, mixture_forms),
}
FIRST = {"deepseek_v3"}
DENSE = "deepseek_v3-dense"
NAMES = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
    for name in FORMS_OF
    if name != DENSE
]


@pytest.fixture(autouse=True)
def routers_move(monkeypatch):
    """However small they are."""
    monkeypatch.setattr(experts, "MOVES_FROM", 1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> a folder as it is published; each is made once."""
    made: dict[str, Path] = {}

    def source(name):
        if name not in made:
            made[name] = FORMS_OF[name].save(tmp_path_factory.mktemp("uncut") / name, name)
        return made[name]

    return source


def expected_logits(name, folder):
    return FORMS_OF[name].reference_logits(folder, IDS, torch.float32).numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def uncut_names(cfg: ModelConfig, plan):
    """How often each leaf that is used uncut is a tile."""
    assert not any(tile.heights for tile in plan.tiles if tile.uncut)
    return Counter(name for tile in plan.tiles for name in tile.uncut)


def n_sparse(cfg):
    return sum(cfg.experts.layers) if cfg.experts.layers else cfg.num_hidden_layers


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_routers_that_are_streamed(sources, name, cuts, tiers_in_turn):
    """Each stays on the device, in host memory, or nowhere."""
    cuts(3000)
    expected = expected_logits(name, sources(name))
    tiers_in_turn(Tier.DISK, Tier.HOST, Tier.DEVICE)
    with AutoModel.from_pretrained(sources(name), device="cpu") as model:
        cfg, found = model.engine.cfg, uncut_names(model.engine.cfg, model.plan)
        assert found[ROUTER] == n_sparse(cfg)
        assert found[KV_B] == (cfg.num_hidden_layers if FORMS_OF[name] is latent_forms else 0)
        assert_close(model.logits(IDS), expected)


@pytest.mark.parametrize("tier", slow_but(Tier, (Tier.DISK,)))
def test_wherever_it_stays_the_numbers_are_the_same(sources, cuts, tiers_in_turn, tier):
    """Streamed as resident, to the bit; and a pass moves what its plan says."""
    cuts(3000)
    with AutoModel.from_pretrained(sources(DENSE), device="cpu") as model:
        prompt = IDS[0, :9].tolist()
        expected = model.logits(IDS), jlayer.generate(model, prompt, **GREEDY).token_ids
    tiers_in_turn(tier)
    with AutoModel.from_pretrained(sources(DENSE), device="cpu") as model:
        np.testing.assert_array_equal(model.logits(IDS), expected[0])
        found = jlayer.generate(model, prompt, **GREEDY)
        assert found.token_ids == expected[1]
        assert uncut_names(model.engine.cfg, model.plan) == {KV_B: 3}
        before, n_before = model.engine.totals.put_bytes, model.engine.totals.sweeps
        model.logits(IDS)
        n_sweeps = model.engine.totals.sweeps - n_before
        assert model.engine.totals.put_bytes - before == n_sweeps * model.plan.put_bytes
        assert model.plan.used_bytes == model.plan.tiling.n_bytes
    assert (model.plan.put_bytes == 0) == (tier is Tier.DEVICE)


def test_a_router_and_a_matrix_of_keys_and_values_move_once_a_pass(sources, cuts):
    cuts(3000)
    with AutoModel.from_pretrained(sources("deepseek_v3"), device="cpu") as model:
        model.logits(IDS)
        moved = []

        def on_step(step, tile):
            if isinstance(step, Put):
                moved.extend(tile.uncut)

        with model.engine.watch.also(on_step):
            model.logits(IDS)
        assert Counter(moved) == uncut_names(model.engine.cfg, model.plan)


@pytest.mark.slow
def test_a_matrix_of_keys_and_values_is_a_part_of_a_whole_layer(sources, cuts):
    cuts(None)
    with AutoModel.from_pretrained(sources(DENSE), device="cpu") as model:
        assert model.plan.tiling.is_whole
        assert all(KV_B in tile.uncut for tile in model.plan.tiles if tile.kind)
        assert not any(KV_B in tile.heights for tile in model.plan.tiles)
        assert_close(model.logits(IDS), expected_logits(DENSE, sources(DENSE)))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_hosts_cores_leave_it_to_the_device(sources, cuts, share):
    """All rows of a stage may be theirs: then what is used uncut is all that the device has."""
    cuts(3000)
    with AutoModel.from_pretrained(
        sources(DENSE), device="cpu", dtype="float32", host_share=share
    ) as model:
        assert model.plan.host_product_bytes > 0
        assert not any(tile.for_host for tile in model.plan.tiles if tile.uncut)
        assert_close(model.logits(IDS), expected_logits(DENSE, sources(DENSE)))
        assert not any("  " in label for label in model.engine.compiles)  # none of no rows


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [("self_attn.kv_b_proj", "queries"), ("mlp.gate", "route")],
)
def test_damage_is_found_as_it_is_streamed(sources, tmp_path, cuts, tensor, stage):
    cuts(3000)
    convert_checkpoint(sources("deepseek_v3"), tmp_path / "layered")
    name = f"model.layers.2.{tensor}.weight"
    file = damage(tmp_path / "layered", name, tmp_path / "damaged")
    with (
        AutoModel.from_pretrained(tmp_path / "damaged", device="cpu") as model,
        pytest.raises(CheckpointError, match=rf"layer 2 {stage}.*{file}.*{name}: damaged"),
    ):
        model.logits(IDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe-some"])
def test_a_router_in_16_bits_is_multiplied_as_it_is_published(sources, tmp_path, name, cuts):
    """In float32 where its family has it so: to cast the small numbers up loses nothing."""
    cuts(3000)
    folder = FORMS_OF[name].save(tmp_path / "model", name, dtype="bfloat16")
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        router = next(tile for tile in model.plan.tiles if ROUTER in tile.uncut)
        assert [part.dtype for part in router.parts] == ["bfloat16"]
        assert_close(model.logits(IDS), expected_logits(name, folder))
