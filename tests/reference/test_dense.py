"""Every dense family: a tiny random model of each, saved by Transformers, gives its logits here,
however it is cut and however its tokens come; and with each of its switches changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.families.registry import FAMILIES
from jlayer.plan.shapes import RunShape
from tests.campaigns import slow_but
from tests.reference.dense_forms import DENSE, load, reference_logits, save
from tests.reference.drawn import drawn_here, drawn_there
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
N_TOKENS = 40  # several windows, of 5 to 8
IDS = np.random.default_rng(0).integers(3, 133, (1, N_TOKENS))
# Token by token, then in pieces that fit neither the windows nor the sizes of chunks.
PIECES = (1, 1, 2, 7, 3, 11, 15)
PROMPTS = [IDS[0, :n].tolist() for n in (31, 5, 12, 1)]
N_NEW = 12
SWITCHES = [
    pytest.param(name, change, id=f"{name}-{number}")
    for name, dense in DENSE.items()
    for number, change in enumerate(dense.wrong)
]
# Those that run in every test session: each switch in one of them.
FIRST = {
    *("ministral3", "gemma4", "phi4-mini", "olmo2", "granite", "cohere-qk", "stablelm-qk"),
    *("nemotron", "qwen3_5"),
}
# A cache cannot go on where the rotary embedding of a text changes: see `test_longrope`.
CROSSES = {"phi4-mini"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> a folder as it is published; each is made once."""
    made: dict[str, Path] = {}

    def source(name):
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("dense") / name, name)
        return made[name]

    return source


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def expected_logits(folder):
    return reference_logits(folder, IDS, torch.float32).numpy()


def test_every_family_has_a_model_here():
    known = {dense.model_type for dense in DENSE.values()}
    assert {model_type for model_type in FAMILIES if model_type in known} == known


@pytest.mark.parametrize("name", slow_but(DENSE, FIRST))
def test_logits_of_a_prompt(sources, name):
    folder = sources(name)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        assert_close(model.logits(IDS), expected_logits(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DENSE if name not in CROSSES])
def test_logits_of_every_position_with_a_cache(sources, name, tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_many_lengths_in_a_batch_under_the_smallest_budget(sources, name, tmp_path, monkeypatch):
    """In tiles, and as many tokens as a window holds many times over: the tokens that Transformers
    draws for each prompt by itself."""
    convert_checkpoint(sources(name), tmp_path / "layered")
    expected = drawn_there(load(sources(name), torch.float32), PROMPTS, n_new=N_NEW)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", context=64) as model:
        whole = drawn_here(model, PROMPTS, n_new=N_NEW)
    set_tile_bytes(monkeypatch, 3000)
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", context=64) as model:
        drawn_here(model, PROMPTS, n_new=N_NEW)
        least = model.engine.plan.as_dict()["smallest_device_memory_bytes"]
    with AutoModel.from_pretrained(
        tmp_path / "layered", device="cpu", context=64, device_memory=least
    ) as model:
        assert not model.plan.tiling.is_whole
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == whole == expected


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
