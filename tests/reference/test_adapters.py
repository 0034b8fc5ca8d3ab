"""Requests for several adapters that share their forward passes, held against PEFT: each has the
logits and the tokens of the model with its own adapter."""

from dataclasses import replace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.plan import making as plans
from jlayer.plan.machine import PLATFORMS
from tests.reference import dense_forms
from tests.reference.adapters import FORMS, adapted
from tests.reference.drawn import drawn_there

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

IDS = np.random.default_rng(0).integers(3, 60, (1, 24))
PROMPT = IDS[0, :9].tolist()
# Of different ranks and matrices: all, one layer's, a head's too.
NAMED = {
    "patterns": FORMS["patterns"],
    "few": FORMS["few modules"],
    "head": {"r": 3, "target_modules": ["lm_head", "o_proj"]},
}
N_NEW = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder of a model, those of adapters by name, by name what PEFT has of each)."""
    home = tmp_path_factory.mktemp("adapters")
    base = home / "model"
    dense_forms.save(base, "llama")
    folders, expected = {name: home / name for name in NAMED}, {}
    for name in (*NAMED, None):
        if name is None:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(base, dtype=torch.float32)
        else:
            model = adapted(base, folders[name], **NAMED[name])
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits.numpy()
        expected[name] = logits, drawn_there(model, [PROMPT], n_new=N_NEW)[0]
    return base, folders, expected


@pytest.mark.parametrize(
    ("host_share", "devices", "tile_bytes"),
    [
        (0.5, 1, 1500),
        *(pytest.param(*how, marks=pytest.mark.slow) for how in ((0, 1, None), (1, 1, None))),
        pytest.param(0, 2, 1500, marks=pytest.mark.slow),
    ],
)
def test_each_has_what_peft_has(made, monkeypatch, host_share, devices, tile_bytes):
    base, folders, expected = made
    if tile_bytes:
        monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=devices > 1))
    given = {"host_share": host_share, "devices": devices, "device": "cpu", "dtype": "float32"}
    how = {"temperature": 0, "max_new_tokens": N_NEW, "eos_token_id": None}
    with AutoModel.from_pretrained(base, adapters=folders, **given) as model:
        found = {name: model.submit(PROMPT, adapter=name, **how) for name in expected}
        for name, (logits, tokens) in expected.items():
            assert found[name].result().token_ids == tokens
            allowed = 1e-5 * np.abs(logits).max()
            own = model.logits(IDS, adapter=name)
            np.testing.assert_allclose(own, logits, rtol=0, atol=allowed)
