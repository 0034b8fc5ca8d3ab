"""Every family with experts: a tiny random model of each, saved by Transformers, gives its logits
here, as published and converted, however its tokens come; and with each of its switches changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError
from jlayer.families import deepseek
from jlayer.families.registry import FAMILIES, layer_kinds
from jlayer.plan.shapes import RunShape
from tests.campaigns import slow_but
from tests.reference.drawn import drawn_here, drawn_there
from tests.reference.mixture_forms import MIXTURES, load, reference_logits, save
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
N_TOKENS = 40  # several windows, of 6 and 7
IDS = np.random.default_rng(0).integers(3, 133, (1, N_TOKENS))
# Token by token, then in pieces that fit neither the windows nor the sizes of chunks.
PIECES = (1, 1, 2, 7, 3, 11, 15)
PROMPTS = [IDS[0, :n].tolist() for n in (31, 5, 12, 1)]
N_NEW = 12
SWITCHES = [
    pytest.param(name, change, id=f"{name}-{number}")
    for name, dense in MIXTURES.items()
    for number, change in enumerate(dense.wrong)
]
# Those that run in every test session: each form of router in one of them.
FIRST = {"qwen2_moe-some", "glm4_moe", "ernie4_5_moe-some", "phimoe", "qwen3_next", "granitemoe"}
FIRST |= {"llama4"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> a folder as it is published; each is made once."""
    made: dict[str, Path] = {}

    def source(name):
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("mixture") / name, name)
        return made[name]

    return source


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def expected_logits(folder):
    return reference_logits(folder, IDS, torch.float32).numpy()


def first(names):
    return slow_but(names, FIRST)


def test_every_family_with_experts_has_a_model_here():
    known = {dense.model_type for dense in MIXTURES.values()}
    assert known <= set(FAMILIES)
    latent = {row.model_type for row in deepseek.FAMILIES}  # in test_latent
    others = ("mixtral", "minimax_m2", "llama4_text")
    with_experts = {name for name in FAMILIES if "moe" in name or name in others}
    assert with_experts - latent <= known


@pytest.mark.parametrize("name", first(MIXTURES))
def test_logits_of_a_prompt(sources, name):
    folder = sources(name)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert any(kind.n_experts for kind in layer_kinds(model.engine.cfg))
        assert_close(model.logits(IDS), expected_logits(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_logits_of_every_position_with_a_cache_of_a_converted_folder(sources, name, tmp_path):
    convert_checkpoint(sources(name), tmp_path / "layered")
    expected = expected_logits(sources(name))
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu") as model:
        forward = model.engine.start(RunShape(longest=16, context=N_TOKENS, all_logits=True))
        at = 0
        for size in PIECES:
            found = forward.sweep([IDS[0, at : at + size].tolist()], [at], all_logits=True)
            np.testing.assert_allclose(
                *(found, expected[:, at : at + size]),
                rtol=0,
                atol=TOLERANCE * np.abs(expected).max(),
            )
            at += size
        assert at == N_TOKENS


def test_layers_that_guess_further_tokens_are_left_out(sources, tmp_path):
    """Released ones of GLM 4.5 have one after the last, with leaves of its own."""
    folder = tmp_path / "guesses"
    shutil.copytree(sources("glm4_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): array
        for name, array in tensors.items()
        if ".layers.2." in name
    }
    more["model.layers.3.eh_proj.weight"] = np.ones((24, 48), np.float32)
    save_file(tensors | more, folder / "model.safetensors")
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert any("left out: layer 3 (" in note for note in model.notes)
        assert_close(model.logits(IDS), expected_logits(sources("glm4_moe")))
    more["model.layers.1.eh_proj.weight"] = more["model.layers.3.eh_proj.weight"]
    save_file(tensors | more, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not of this model.*: model.layers.1.eh_proj"):
        AutoModel.from_pretrained(folder, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "glm4_moe", "qwen3_next", "gemma4", "llama4"])
def test_many_lengths_in_a_batch_under_the_smallest_budget(sources, name, tmp_path, monkeypatch):
    """In tiles: the tokens that Transformers draws for each prompt by itself."""
    convert_checkpoint(sources(name), tmp_path / "layered")
    expected = drawn_there(load(sources(name), torch.float32), PROMPTS, n_new=N_NEW)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", context=64) as model:
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == expected
    set_tile_bytes(monkeypatch, 600)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", context=64) as model:
        drawn_here(model, PROMPTS, n_new=N_NEW)
        least = model.engine.plan.as_dict()["smallest_device_memory_bytes"]
    with AutoModel.from_pretrained(
        tmp_path / "layered", device="cpu", context=64, device_memory=least
    ) as model:
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phimoe", "phimoe-longrope"])
def test_a_head_with_a_bias_is_cut_and_multiplied_by_the_host(sources, name, monkeypatch):
    """Some of its rows; of the second one the matrix is the embedding."""
    set_tile_bytes(monkeypatch, 600)
    with AutoModel.from_pretrained(sources(name), device="cpu", host_share=0.5) as model:
        of_head = [tile.for_host for tile in model.plan.tiling.shapes if tile.kind is None]
        assert set(of_head) == {True, False}
        assert len(of_head) > 4
        assert_close(model.logits(IDS), expected_logits(sources(name)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), SWITCHES)
def test_every_switch_is_read_and_matters(sources, name, change, tmp_path):
    shutil.copytree(sources(name), tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    expected = expected_logits(tmp_path / "changed")
    with AutoModel.from_pretrained(tmp_path / "changed", device="cpu") as model:
        found = model.logits(IDS)
    assert_close(found, expected)
    before = expected_logits(sources(name))
    assert np.abs(found - before).max() > 1e-3 * np.abs(before).max()
