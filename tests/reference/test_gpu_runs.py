"""On a GPU: what a run can do besides greedy tokens gives what it gives in transformers, or what it
gives there without it.

JAX_PLATFORMS=cuda python -m pytest -n 0 tests/reference/test_gpu_runs.py
"""

import os
from contextlib import closing

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine import prompt_cache
from jlayer.engine.gpu import gpu_memories
from jlayer.measure.evaluate import perplexity
from jlayer.measure.influence import curve
from tests.conftest import BUNDLED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
DEVICE = "gpu"
pytestmark = [
    pytest.mark.reference,
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_memories(), reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        os.environ["JAX_PLATFORMS"] == "cpu",
        reason="JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda",
    ),
]
IDS = np.random.default_rng(0).integers(3, 4096, (2, 70))
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def opened(folder=BUNDLED, **options):
    return AutoModel.from_pretrained(folder, device=DEVICE, dtype="float32", **options)


@pytest.fixture(scope="module")
def ours():
    with opened() as model:
        yield model


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, attn_implementation="eager"
    )


def test_texts_as_vectors(ours, theirs):
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(IDS)).last_hidden_state.numpy()
    for pooling, expected in (("mean", hidden.mean(axis=1)), ("last", hidden[:, -1])):
        found = ours.encode(IDS, pooling=pooling)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_beams(ours, theirs):
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    expected = theirs.generate(torch.tensor(IDS), **options).numpy()
    np.testing.assert_array_equal(ours.generate(IDS, **options), expected)


def test_embeddings_in_place_of_ids(ours, theirs):
    given = theirs.get_input_embeddings()(torch.tensor(IDS)).detach()
    expected = theirs.generate(inputs_embeds=given, **GREEDY)
    assert ours.generate(inputs_embeds=given, **GREEDY).tolist() == expected.tolist()


def test_a_module_of_torch(ours, theirs):
    from jlayer.torch import StreamedCausalLM

    ids = torch.tensor(IDS)
    with torch.no_grad():
        expected = theirs(ids, labels=ids)
    found = StreamedCausalLM(ours)(ids, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=0)
    most = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5 * most)


def test_kept_prompts(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "BLOCK", 16)
    ids = IDS[0].tolist()
    expected = jlayer.generate(ours, ids, max_new_tokens=12).token_ids
    for n_kept in (0, 64):
        with opened(prompt_cache=tmp_path / "kept") as model:
            found = jlayer.generate(model, ids, max_new_tokens=12)
        assert (found.token_ids, found.stats["kept_tokens"]) == (expected, n_kept)


def test_a_run_is_put_down_and_taken_up(ours, tmp_path):
    ids, options = IDS[0].tolist(), {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    with closing(ours.session(ids, **options)) as whole:
        expected = whole.result().token_ids
    with closing(ours.session(ids, **options)) as session:
        for _ in session:
            if len(session.token_ids[0]) >= 5:
                break
        ours.save_session(tmp_path / "run", session)
    with opened() as other, closing(other.load_session(tmp_path / "run")) as session:
        assert session.result().token_ids == expected


def test_a_draft_for_one_call_gives_its_memory_back(ours):
    expected = ours.generate(IDS[:1], **GREEDY)
    before = ours.plan.as_dict()["device"]
    found = ours.generate(IDS[:1], assistant_model=BUNDLED, **GREEDY)
    np.testing.assert_array_equal(found, expected)
    assert ours.plan.as_dict()["device"]["draft_bytes"] > 0
    np.testing.assert_array_equal(ours.generate(IDS[:1], **GREEDY), expected)
    assert ours.plan.as_dict()["device"]["draft_bytes"] == before["draft_bytes"] == 0


def test_without_layers_in_one_pass(ours):
    ids = IDS.ravel().tolist()
    for one in curve(ours, ids, (3, 1), length=35):
        with opened(without_layers=one.dropped) as model:
            expected = perplexity(model, ids, length=35).nll
        assert one.nll == pytest.approx(expected, abs=2e-5)
