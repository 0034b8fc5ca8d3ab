"""Every family on two and three devices gives the logits and the tokens of Transformers, or those
that it gives on one."""

from dataclasses import replace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.plan.machine import PLATFORMS
from tests.reference import dense_forms, gpt_oss_forms, latent_forms, mixture_forms
from tests.reference.drawn import drawn_here, drawn_there

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
PROMPTS = IDS[:, :9].tolist()


@pytest.fixture
def joined(monkeypatch):
    """Experts and quantized tiles cross to each device as one array, as they do to GPUs."""
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=True))


def found(folder, n, n_new):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", devices=n) as model:
        drawn = drawn_here(model, PROMPTS, n_new=n_new) if n_new else []
        return model.logits(IDS), drawn


def of_transformers(forms, folder, n_new):
    """The same. Nothing is compiled for it."""
    drawn = drawn_there(forms.load(folder, torch.float32), PROMPTS, n_new=n_new) if n_new else []
    return forms.reference_logits(folder, IDS, torch.float32).numpy(), drawn


def assert_same(own, expected):
    np.testing.assert_allclose(own[0], expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    assert own[1] == expected[1]


def test_those_of_every_session_are_there():
    assert FORMS.keys() >= FIRST.keys()


@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_family(tmp_path, name, joined):
    folder, (n, n_new) = tmp_path / "model", FIRST[name]
    FORMS[name].save(folder, name)
    assert_same(found(folder, n, n_new), of_transformers(FORMS[name], folder, n_new))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FORMS.keys() - FIRST.keys()))
def test_any_family(tmp_path, name):
    """A prompt alone: what follows is no different."""
    FORMS[name].save(tmp_path / "model", name)
    assert_same(*(found(tmp_path / "model", n, 0) for n in (2, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(mixture_forms.MIXTURES))
def test_joined_experts(tmp_path, name, joined):
    mixture_forms.save(tmp_path / "model", name)
    assert_same(*(found(tmp_path / "model", n, 0) for n in (2, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_sinks_and_experts_as_published(tmp_path, n, joined):
    gpt_oss_forms.write(tmp_path / "model", *gpt_oss_forms.drawn())
    assert_same(*(found(tmp_path / "model", each, 3) for each in (n, 1)))
