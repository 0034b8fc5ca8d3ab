"""Families with latent attention: tiny random models of each, saved by Transformers, give their
logits and their tokens here, however they are cut and however the tokens come."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.pieces import expands
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape, rows_for
from jlayer.plan.tiles import Tier
from tests.campaigns import slow_but
from tests.reference.drawn import assert_quantized_stands_for, drawn_here, drawn_there
from tests.reference.latent_forms import FORMS, load, reference_logits, save
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
N_TOKENS = 40
IDS = np.random.default_rng(0).integers(3, 133, (1, N_TOKENS))
# Token by token, then in pieces that do not fit the sizes of chunks.
PIECES = (1, 1, 2, 7, 3, 11, 15)
PROMPTS = [IDS[0, :n].tolist() for n in (31, 5, 12, 1)]
N_NEW = 12
# Those that run in every test session.
FIRST = ("deepseek_v3", "deepseek_v2-lite", "glm4_moe_lite")
NAMES = slow_but(FORMS, FIRST)
SWITCHES = [
    pytest.param(name, change, id=f"{name}-{number}")
    for name, form in FORMS.items()
    for number, change in enumerate(form.wrong)
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> a folder as it is published; each is made once."""
    made = {}

    def source(name):
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("latent") / name, name)
        return made[name]

    return source


@pytest.fixture(scope="module")
def expected(sources):
    """name -> the logits of IDS, of Transformers; each is computed once."""
    made = {}

    def logits(name):
        if name not in made:
            made[name] = reference_logits(sources(name), IDS, torch.float32).numpy()
        return made[name]

    return logits


def assert_close(found, expected, most=None):
    most = np.abs(expected).max() if most is None else most
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * most)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_prompt(sources, expected, name):
    """All tokens at once: a key and a value are made of each. Of few at a time none is."""
    with AutoModel.from_pretrained(sources(name), device="cpu") as model:
        how = model.engine.cfg.attention
        assert [expands(how, tokens=rows_for(n)) for n in (N_TOKENS, *PIECES[:-2])] == [
            *(True, False, False, False, False, False)
        ]
        assert_close(model.logits(IDS), expected(name))


@pytest.mark.parametrize("name", slow_but(FORMS, FIRST[:1]))
def test_logits_of_a_prompt_of_which_few_tokens_come_at_a_time(sources, expected, name):
    with AutoModel.from_pretrained(sources(name), device="cpu") as model:
        forward = model.engine.start(RunShape(longest=8, context=N_TOKENS, all_logits=True))
        for at in range(0, N_TOKENS, 8):
            found = forward.sweep([IDS[0, at : at + 8].tolist()], [at], all_logits=True)
            assert_close(found, expected(name)[:, at : at + 8], np.abs(expected(name)).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_logits_of_every_position_with_a_cache(sources, expected, name, tmp_path):
    convert_checkpoint(sources(name), tmp_path / "layered")
    logits = expected(name)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu") as model:
        forward = model.engine.start(RunShape(longest=16, context=N_TOKENS, all_logits=True))
        at = 0
        for size in PIECES:
            found = forward.sweep([IDS[0, at : at + size].tolist()], [at], all_logits=True)
            assert_close(found, logits[:, at : at + size], np.abs(logits).max())
            at += size
        assert at == N_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_lengths_in_a_batch_under_the_smallest_budget(sources, name, tmp_path, monkeypatch):
    """In tiles: the tokens that Transformers draws for each prompt by itself, with its cache."""
    convert_checkpoint(sources(name), tmp_path / "layered")
    there = drawn_there(load(sources(name), torch.float32), PROMPTS, n_new=N_NEW)
    set_tile_bytes(monkeypatch, 3000)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", context=64) as model:
        drawn = drawn_here(model, PROMPTS, n_new=N_NEW)
        least = model.engine.plan.as_dict()["smallest_device_memory_bytes"]
    with AutoModel.from_pretrained(
        tmp_path / "layered", device="cpu", context=64, device_memory=least
    ) as model:
        assert not model.plan.tiling.is_whole
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == drawn == there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3-direct"])
def test_pools_in_host_memory(sources, name):
    """Each comes to the device for its layer, and what was written goes back."""
    prompt, n_new = PROMPTS[0], 150
    options = {"temperature": 0, "max_new_tokens": n_new, "eos_token_id": None}
    with AutoModel.from_pretrained(sources(name), device="cpu", dtype="float32") as model:
        expected = jlayer.generate(model, prompt, **options).token_ids
        machine = replace(model.plan.machine, device_budget=1)
        shape = RunShape(1, len(prompt), len(prompt) + n_new, sweeps=n_new)
        least = make_plan(model.engine.weights, machine, shape).device_peak_bytes
    with AutoModel.from_pretrained(
        sources(name), device="cpu", dtype="float32", device_memory=least
    ) as model:
        found = jlayer.generate(model, prompt, **options)
        assert model.plan.cache is Tier.HOST
    assert found.token_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), SWITCHES)
def test_a_switch_is_seen(sources, expected, name, change, tmp_path):
    """Changed on both sides the logits are still alike, and not those of before."""
    folder = shutil.copytree(sources(name), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    if "rope_theta" in change:
        change = {"rope_parameters": {**config["rope_parameters"], **change}}
    (folder / "config.json").write_text(json.dumps(config | change))
    logits = reference_logits(folder, IDS, torch.float32).numpy()
    assert np.abs(logits - expected(name)).max() > 1e-3 * np.abs(logits).max()
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert_close(model.logits(IDS), logits)


@pytest.mark.slow
def test_bfloat16_is_as_close_to_the_truth_as_the_reference(tmp_path):
    """Root mean square against a float64 run, pooled over five seeds."""
    ours, theirs = [], []
    for seed in range(5):
        folder = save(tmp_path / str(seed), "deepseek_v3-dense", seed=seed, dtype="bfloat16")
        exact, rough = (
            reference_logits(folder, IDS, dtype).double().numpy()
            for dtype in (torch.float64, torch.bfloat16)
        )
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            assert model.dtype == "bfloat16"
            ours.append(np.square(model.logits(IDS) - exact).mean())
        theirs.append(np.square(rough - exact).mean())
    assert np.sqrt(np.mean(ours)) <= 1.2 * np.sqrt(np.mean(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2-lite"])
def test_quantized_weights_are_those_that_they_stand_for(tmp_path, name, scheme):
    """The matrix that makes keys and values stays as it was published."""
    source = save(tmp_path / "source", name)
    assert_quantized_stands_for(
        source, tmp_path / "layered", scheme, IDS, reference_logits, tolerance=TOLERANCE
    )


@pytest.mark.slow
def test_the_hosts_cores_multiply(sources, expected, monkeypatch):
    set_tile_bytes(monkeypatch, 3_000)
    with AutoModel.from_pretrained(
        sources("deepseek_v3-dense"), device="cpu", dtype="float32", host_share=0.5
    ) as model:
        assert model.plan.host_share > 0
        assert_close(model.logits(IDS) / 2, expected("deepseek_v3-dense") / 2)


@pytest.mark.slow
def test_a_draft_with_latent_attention_guesses_what_its_own_kind_says(sources):
    """A draft that is the model itself is nearly always right."""
    options = {"temperature": 0, "max_new_tokens": 30, "eos_token_id": None}
    folder, prompt = sources("deepseek_v3-dense"), IDS[0].tolist()
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", draft=folder) as model:
        plain = jlayer.generate(model, prompt, speculate="off", **options)
        found = jlayer.generate(model, prompt, speculate="draft", draft_tokens=15, **options)
    assert found.token_ids == plain.token_ids
    assert found.stats["tokens_per_sweep"] > 3


@pytest.mark.slow
def test_guessed_tokens_change_no_token(sources):
    """Trees of guesses looked up in the text: a branch that is rejected leaves nothing behind."""
    options = {"temperature": 0, "max_new_tokens": 30, "eos_token_id": None}
    prompt = (IDS[0, :9].tolist() * 4)[:33]
    with AutoModel.from_pretrained(sources("deepseek_v3"), device="cpu") as model:
        plain = jlayer.generate(model, prompt, speculate="off", **options)
        found = jlayer.generate(model, prompt, speculate="lookup", **options)
    assert found.token_ids == plain.token_ids
