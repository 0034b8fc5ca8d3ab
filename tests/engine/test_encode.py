"""Texts as vectors: the final hidden states of transformers' base model, pooled; each the same
alone and beside others."""

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel, CheckpointError, UsageError
from tests.conftest import BUNDLED
from tests.engine.lanes import GREEDY, limited
from tests.reference.dense_forms import save
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, 133, length).tolist() for length in (90, 1, 7, 40, 33)]
PROMPTS[3][:30] = PROMPTS[0][:30]  # two begin alike
TOLERANCE = 1e-5
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3", "qwen3_5", "olmo2")]


@pytest.fixture(scope="module", params=["llama", "granite", *SLOW])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param) / "source", request.param)


@pytest.fixture(scope="module")
def model(folder):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as opened:
        yield opened


def reference(folder, prompts, pooling):
    """Of transformers' base model, each prompt by itself."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = [whole.model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in prompts]
    return np.array([one.mean(0) if pooling == "mean" else one[-1] for one in states])


def assert_near(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_it_pools_the_last_hidden_states_of_transformers(folder, model, pooling):
    expected = reference(folder, PROMPTS, pooling)
    found = model.encode(PROMPTS, pooling)
    assert_near(found, expected)
    alone = np.array([model.encode(ids, pooling) for ids in PROMPTS])
    assert alone.shape == found.shape
    assert_near(alone, found)
    lengths = np.linalg.norm(model.encode(PROMPTS[:2], pooling, normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_is_no_part_of_a_text(model, pooling):
    """As a tokenizer gives it: rows of one length, on either side."""
    longest = max(map(len, PROMPTS))
    for pad in (lambda row, rest: row + rest, lambda row, rest: rest + row):
        ids = np.array([pad(row, [0] * (longest - len(row))) for row in PROMPTS])
        mask = np.array([pad([1] * len(row), [0] * (longest - len(row))) for row in PROMPTS])
        found = model.encode({"input_ids": ids, "attention_mask": mask}, pooling)
        assert_near(found, model.encode(PROMPTS, pooling))


def test_texts_share_their_sweeps_with_each_other_and_with_runs(model):
    """As many passes as one text takes, and beside a run that is alive no further ones."""
    scheduler = model.engine.scheduler
    before = scheduler.n_passes
    together = model.encode(PROMPTS)
    assert scheduler.n_passes == before + 1
    handle = model.submit(PROMPTS[2], **GREEDY, max_new_tokens=6)
    assert_near(model.encode(PROMPTS), together)
    ids = handle.result().token_ids
    assert scheduler.n_passes <= before + 1 + 7
    assert ids == jlayer.generate(model, PROMPTS[2], **GREEDY, max_new_tokens=6).token_ids


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_comes_in_portions_and_after_kept_ones(model, pooling):
    """Chunk after chunk; what a kept text has is computed again where it is pooled."""
    prompt = [*RNG.integers(3, 133, 70).tolist(), *PROMPTS[0]]
    expected = model.encode([prompt, *PROMPTS], pooling)
    kept, _ = model.decoding(prompt[:100], options={**GREEDY, "max_new_tokens": 1})
    kept.keeps = True
    for _ in kept:
        pass
    n_before = model.engine.scheduler.n_passes
    with limited(model, rows=64, chunk=32):
        assert_near(model.encode([prompt, *PROMPTS], pooling), expected)
    assert model.engine.scheduler.n_passes >= n_before + 3


def test_texts_are_tokenized_as_transformers_does(fable):
    texts = ["Once upon a time", "The fox, who was clever, said nothing at all."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        found = model.encode(texts)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert_near(found, reference(BUNDLED, ids, "mean"))
        assert_near(model.encode(texts[0]), found[0])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([[1, 2]], {"pooling": "cls"}, "pooling: found 'cls', expected one of mean, last"),
        ([[1, 2], []], {}, "found list in a list of prompts"),
        ([], {}, "prompt: an empty list"),
        ([[1, 500]], {}, "500"),
        ([[1] * 600], {}, "600"),
        ([[1, 2]], {"adapter": "none"}, "adapter"),
    ],
)
def test_what_cannot_be_encoded_is_refused(model, texts, options, message):
    with pytest.raises(UsageError, match=message):
        model.encode(texts, **options)


@pytest.mark.slow
def test_the_hosts_cores_multiply_too(folder, model, monkeypatch):
    """Also the head, of which no row is wanted; and with no more memory than is planned."""
    set_tile_bytes(monkeypatch, 3_000)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", host_share=0.5) as shared:
        assert shared.plan.host_share > 0
        assert_near(shared.encode(PROMPTS), model.encode(PROMPTS))
        held = shared.engine.sweeper.most_activation_bytes
        assert held <= shared.plan.device.activation_bytes


def test_a_text_without_numbers_fails_alone(model, monkeypatch):
    read = model.engine.embedding.read

    def damaged(ids):
        return {
            name: np.where((ids == 99)[:, None], np.nan, rows).astype(rows.dtype)
            for name, rows in read(ids).items()
        }

    good = [token for token in PROMPTS[0] if token != 99]
    want = model.encode(good)
    monkeypatch.setattr(model.engine.embedding, "read", damaged)
    with pytest.raises(CheckpointError, match="not finite"):
        model.encode([good, [3, 99, 4]])
    assert_near(model.encode(good), want)
