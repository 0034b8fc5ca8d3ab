"""The module of PyTorch: logits, loss and texts of transformers' own model, and in its pipeline."""

import numpy as np
import pytest

from jlayer import AutoModel, UsageError
from tests.conftest import BUNDLED
from tests.tiny import tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jlayer.torch import StreamedCausalLM  # noqa: E402 - where both are installed

IDS = torch.tensor(np.random.default_rng(4).integers(3, 133, (2, 9)))
RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same weights here and in transformers."""
    folder = tiny_llama(tmp_path_factory.mktemp("module"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = StreamedCausalLM.from_pretrained(folder, device="cpu")
    yield ours, theirs
    ours.model.close()


def near(found, expected):
    most = TOLERANCE * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(most))


def test_logits_and_loss_are_those_of_transformers(both):
    ours, theirs = both
    found = ours(IDS, labels=IDS)
    some = {"labels": torch.where(RIGHT.bool(), IDS, -100), "num_items_in_batch": 5}
    with torch.no_grad():
        expected, summed = theirs(IDS, labels=IDS), theirs(IDS, **some).loss
    assert type(found) is type(expected)
    near(found.logits, expected.logits)
    near(found.loss, expected.loss)
    assert found[0] is found.loss
    assert ours(IDS).loss is None
    near(ours(IDS, **some).loss, summed)
    for labels, words in (
        (IDS[:, :5], r"labels: found \[2, 5\], expected \[2, 9\]"),
        (IDS + 200, "labels: found id 325, expected -100, or ids below the vocabulary of 133"),
        (torch.full_like(IDS, -1), "labels: found id -1"),
    ):
        with pytest.raises(UsageError, match=words):
            ours(IDS, labels=labels)


def test_padding_is_no_part_of_a_row(both):
    """At its end as in transformers; before it, each row is what it is without."""
    ours, theirs = both
    labels = torch.where(RIGHT.bool(), IDS, -100)
    found = ours(IDS, attention_mask=RIGHT, labels=labels)
    with torch.no_grad():
        expected = theirs(IDS, attention_mask=RIGHT, labels=labels)
    near(found.logits[RIGHT.bool()], expected.logits[RIGHT.bool()])
    near(found.loss, expected.loss)
    assert found.logits[~RIGHT.bool()].isnan().all()
    left = RIGHT.flip(1)
    near(ours(IDS, left).logits[1, 4:], ours(IDS[1:, 4:]).logits[0])
    with pytest.raises(UsageError, match="labels: one is predicted from padding"):
        ours(IDS, attention_mask=left, labels=IDS)


def test_embeddings_in_place_of_ids(both):
    ours, theirs = both
    given = torch.tensor(np.random.default_rng(5).normal(size=(2, 9, 24)), dtype=torch.float32)
    labels = torch.where(RIGHT.bool(), IDS, -100)
    for mask, own in ((None, IDS), (RIGHT, labels)):
        found = ours(inputs_embeds=given, attention_mask=mask, labels=own)
        with torch.no_grad():
            expected = theirs(inputs_embeds=given, attention_mask=mask, labels=own)
        seen = torch.ones_like(IDS).bool() if mask is None else mask.bool()
        near(found.logits[seen], expected.logits[seen])
        near(found.loss, expected.loss)
        assert found.logits[~seen].isnan().all()
    options = {"inputs_embeds": given, "max_new_tokens": 4, "do_sample": False}
    assert ours.generate(**options).tolist() == theirs.generate(**options).tolist()
    with pytest.raises(UsageError, match="input_ids: none given"):
        ours()


def test_it_generates_as_transformers(both):
    ours, theirs = both
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(IDS, **options).tolist() == theirs.generate(IDS, **options).tolist()
    options |= {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    found, expected = ours.generate(IDS, **options), theirs.generate(IDS, **options)
    assert type(found) is type(expected)
    assert found.sequences.tolist() == expected.sequences.tolist()
    near(found.sequences_scores, expected.sequences_scores)
    ours.generation_config.max_new_tokens = 2
    try:
        assert ours.generate(IDS, do_sample=False).shape == (2, 11)
        assert ours.generate(IDS, None, do_sample=False).shape == (2, 11)
        assert ours.generate(IDS, generation_config=None, do_sample=False).shape == (2, 11)
        given = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
        assert ours.generate(IDS, given).shape == (2, 12)
    finally:
        ours.generation_config.max_new_tokens = None


def test_what_it_has_of_a_model_of_transformers(both):
    ours, theirs = both
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)
    assert not [*ours.parameters()]
    assert not ours.training
    assert ours.can_generate()
    ours.tie_weights()
    for name, value in (("output_attentions", True), ("inputs_embeds", IDS), ("nothing", 1)):
        with pytest.raises(UsageError, match=name):
            ours(IDS, **{name: value})
    with pytest.raises(UsageError, match="device_memory: given with an open model"):
        StreamedCausalLM(ours.model, device_memory="1GiB")


def test_the_pipeline_gives_the_same_text(fable):
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    texts = ["Once upon a time", "The fox"]
    options = {"max_new_tokens": 12, "do_sample": False}
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        found, expected = (
            transformers.pipeline("text-generation", model=one, tokenizer=tokenizer, device=at)(
                texts, **options
            )
            for one, at in ((StreamedCausalLM(model), None), (theirs, "cpu"))
        )
    assert found == expected
    assert len(found[0][0]["generated_text"]) > len(texts[0])


def test_the_hf_class_of_lm_eval(fable):
    """Scores and texts of its own model, with padding and stop strings."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    pairs = [("Once upon a time", " there was"), ("The fox", " said."), ("A", " b")]
    until = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        scored, drawn = [], []
        for one in (StreamedCausalLM(model), theirs):
            hf = models.HFLM(pretrained=one, tokenizer=tokenizer, batch_size=2)
            asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
            scored.append(hf.loglikelihood(asked))
            asked = [Instance("generate_until", {}, (text, until), 0) for text, _ in pairs]
            drawn.append(hf.generate_until(asked))
    assert drawn[0] == drawn[1]
    for (found, is_greedy), (expected, was_greedy) in zip(*scored, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
        assert is_greedy == was_greedy
