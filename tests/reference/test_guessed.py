"""Every form of router: what it guesses of the next layer changes no number."""

from itertools import pairwise

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.families.registry import layer_kinds
from jlayer.plan.shapes import RunShape
from tests.reference import latent_forms, mixture_forms
from tests.streaming.conftest import set_expert_rooms

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

N_TOKENS = 8
IDS = np.random.default_rng(1).integers(3, 133, N_TOKENS).tolist()
FORMS = [(mixture_forms, name) for name in mixture_forms.MIXTURES]
FORMS += [(latent_forms, name) for name in latent_forms.FORMS if "dense" not in name]
# One of each kind: by groups in float32, with a norm of its own, two experts one after another.
FIRST = {"gemma4"}


def said(folder, patch, guessed):
    """(logits of tokens one by one, the totals, whether two layers with experts follow one
    another)"""
    set_expert_rooms(patch, on_device=1, in_host=12, guessed=guessed)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        run = model.engine.start(RunShape(1, 1, N_TOKENS, sweeps=N_TOKENS))
        found = [run.sweep([[token]], [at]) for at, token in enumerate(IDS)]
        run.close()
        kinds = pairwise(layer_kinds(model.engine.cfg))
        follow = any(one.n_experts and other.n_experts for one, other in kinds)
        return np.array(found), model.engine.totals, follow


@pytest.mark.parametrize(
    ("forms", "name"),
    [
        pytest.param(forms, name, id=name, marks=() if name in FIRST else pytest.mark.slow)
        for forms, name in FORMS
    ],
)
def test_a_router_guesses_for_the_layer_before_it(tmp_path, monkeypatch, forms, name):
    folder = forms.save(tmp_path / name, name)
    with monkeypatch.context() as patched:
        expected, plain, _ = said(folder, patched, 0)
    with monkeypatch.context() as patched:
        found, totals, follow = said(folder, patched, 2)
    np.testing.assert_array_equal(found, expected)
    assert plain.experts_guessed == 0
    assert (totals.experts_guessed > 0) == follow
    assert totals.experts_wasted < max(1, totals.experts_guessed)
    assert totals.put_bytes >= plain.put_bytes
