"""Every family on two and three devices gives the logits and the tokens that it gives on one."""

from dataclasses import replace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.plan.machine import PLATFORMS
from tests.reference import dense_forms, gpt_oss_forms, latent_forms, mixture_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = np.random.default_rng(0).integers(3, 133, (1, 24))
FORMS = {
    **dict.fromkeys(dense_forms.DENSE, dense_forms),
    **dict.fromkeys(mixture_forms.MIXTURES, mixture_forms),
    **dict.fromkeys(latent_forms.FORMS, latent_forms),
}
# Those that run in every test session: norms of all heads and of each, latent attention, routers, a
# shared expert -> (on how many devices, how many tokens of a text that goes on).
FIRST = {"cohere-qk": (2, 0), "deepseek_v3": (2, 3), "olmo2": (3, 0)}


@pytest.fixture
def joined(monkeypatch):
    """Experts and quantized tiles cross to each device as one array, as they do to GPUs."""
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=True))


def found(folder, n, n_new):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", devices=n) as model:
        drawn = model.generate(IDS[:, :9].tolist(), max_new_tokens=n_new) if n_new else []
        return model.logits(IDS), np.asarray(drawn).tolist()


def assert_same(folder, n, n_new=3):
    logits, drawn = found(folder, 1, n_new)
    own, tokens = found(folder, n, n_new)
    np.testing.assert_allclose(own, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert tokens == drawn


def test_those_of_every_session_are_there():
    assert FORMS.keys() >= FIRST.keys()


@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_family(tmp_path, name, joined):
    FORMS[name].save(tmp_path / "model", name)
    assert_same(tmp_path / "model", *FIRST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FORMS.keys() - FIRST.keys()))
def test_any_family(tmp_path, name):
    """A prompt alone: what follows is no different."""
    FORMS[name].save(tmp_path / "model", name)
    assert_same(tmp_path / "model", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(mixture_forms.MIXTURES))
def test_joined_experts(tmp_path, name, joined):
    mixture_forms.save(tmp_path / "model", name)
    assert_same(tmp_path / "model", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_sinks_and_experts_as_published(tmp_path, n, joined):
    gpt_oss_forms.write(tmp_path / "model", *gpt_oss_forms.drawn())
    assert_same(tmp_path / "model", n)
