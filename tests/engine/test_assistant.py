"""transformers' assistant_model is the draft model here."""

from contextlib import closing
from types import SimpleNamespace

import pytest

import jlayer
from jlayer.errors import CheckpointError, DoesNotFitError, StorageError, UsageError
from tests.conftest import BUNDLED
from tests.programs import few_shapes

PROMPT = [5, 17, 80, 33]
GREEDY = {"max_new_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def shapes():
    with few_shapes():
        yield


@pytest.fixture(scope="module")
def models(fable, shapes):
    """One with a draft, and one without."""
    options = {"device": "cpu", "dtype": "float32"}
    with (
        jlayer.AutoModel.from_pretrained(fable, draft=BUNDLED, **options) as drafted,
        jlayer.AutoModel.from_pretrained(fable, **options) as plain,
    ):
        yield drafted, plain


def test_the_draft_of_a_model_is_its_assistant(models):
    drafted, plain = models
    expected = plain.generate([PROMPT], **GREEDY)
    for assistant in (BUNDLED, str(BUNDLED), SimpleNamespace(name_or_path=str(BUNDLED))):
        found = drafted.generate([PROMPT], assistant_model=assistant, **GREEDY)
        assert found == expected
    decoding, _ = drafted.decoding(PROMPT, options={"assistant_model": BUNDLED, **GREEDY})
    assert decoding.n_guesses > 0
    decoding.close()


def test_a_model_that_is_opened_for_it_gets_its_assistant_as_a_draft(models, fable):
    _, plain = models
    options = {"device": "cpu", "dtype": "float32", **GREEDY}
    found = jlayer.generate(fable, PROMPT, assistant_model=plain, **options)
    assert found.token_ids == plain.generate([PROMPT], **GREEDY)[0][4:]
    assert found.stats["drafted"] > 0
    with pytest.raises(UsageError, match=r"assistant_model: found .*, but draft is x; keep one"):
        jlayer.generate(fable, PROMPT, assistant_model=plain, draft="x", **options)


def draft_bytes(model):
    return model.plan.as_dict()["device"]["draft_bytes"]


def test_a_model_that_was_opened_without_a_draft_gets_one_for_the_calls_that_name_it(models):
    _, plain = models
    expected = plain.generate([PROMPT], **GREEDY)
    assert plain.generate([PROMPT], assistant_model=BUNDLED, **GREEDY) == expected
    draft = plain.engine.draft
    found = jlayer.generate(plain, PROMPT, assistant_model=BUNDLED, **GREEDY)
    assert found.token_ids == expected[0][len(PROMPT) :]
    assert found.stats["drafted"] > 0
    assert found.plan["device"]["draft_bytes"] > 0
    assert plain.engine.draft is draft, "it is loaded once"
    assert plain.generate([PROMPT], **GREEDY) == expected
    assert plain.engine.draft is None
    assert draft.n_bytes == draft_bytes(plain) == 0


def test_another_draft_takes_the_place_of_the_one_it_was_opened_with(models, fable):
    drafted, plain = models
    expected = plain.generate([PROMPT], **GREEDY)
    found = jlayer.generate(drafted, PROMPT, assistant_model=plain, **GREEDY)
    assert drafted.engine.draft.folder == str(fable)
    assert found.stats["accepted_by_depth"][0] >= found.stats["sweeps"] - 1, "it guesses all"
    assert found.token_ids == expected[0][len(PROMPT) :]
    assert drafted.generate([PROMPT], **GREEDY) == expected
    assert drafted.engine.draft.folder == str(BUNDLED)


def test_where_it_cannot_guess_nothing_changes(models, tiny, fable):
    _, plain = models
    expected = plain.generate([PROMPT], **GREEDY)
    budget = plain.plan.as_dict()["smallest_device_memory_bytes"]
    for options, error, words in (
        ({"assistant_model": tiny}, UsageError, "draft: "),
        ({"assistant_model": "nowhere"}, CheckpointError, "assistant_model: nowhere: no such file"),
        ({"assistant_model": BUNDLED, "top_k": -3}, UsageError, "top_k"),
    ):
        with pytest.raises(error, match=words):
            plain.generate([PROMPT], **options)
    with closing(plain.session(PROMPT, **GREEDY)) as session:
        next(session)
        with pytest.raises(UsageError, match=r"cannot guess while other texts .*draft='"):
            plain.generate([PROMPT], assistant_model=BUNDLED)
        assert [session.result().token_ids] == [expected[0][len(PROMPT) :]]
    assert plain.engine.draft is None
    options = {"device": "cpu", "dtype": "float32", "device_memory": budget + (64 << 10)}
    with jlayer.AutoModel.from_pretrained(fable, **options) as tight:
        with pytest.raises(DoesNotFitError, match="smaller draft model, or none"):
            tight.generate([PROMPT], assistant_model=BUNDLED)
        assert tight.engine.draft is None
        assert tight.engine.n_alive == 0


def test_a_draft_that_cannot_be_read_leaves_the_model_without_one(models, monkeypatch):
    drafted, plain = models
    expected = plain.generate([PROMPT], **GREEDY)

    def lost(*_, **__):
        raise StorageError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("jlayer.engine.draft.DraftModel.load", lost)
        with pytest.raises(StorageError, match="the disk is gone"):
            drafted.generate([PROMPT], assistant_model=plain)
        assert drafted.engine.draft is None
    assert drafted.generate([PROMPT], **GREEDY) == expected
    assert drafted.engine.draft.folder == str(BUNDLED)


def test_an_assistant_that_cannot_guess_is_refused(models):
    drafted, _ = models
    assistant = {"assistant_model": BUNDLED}
    for options, words in (
        ({"assistant_model": object()}, "found object, expected a folder"),
        ({**assistant, "num_beams": 3}, "with num_beams 3"),
        ({**assistant, "speculate": "off"}, "speculate is 'off'"),
        ({**assistant, "logits_processor": [print]}, "assistant_model: given with functions"),
    ):
        with pytest.raises(UsageError, match=words):
            drafted.generate([PROMPT], **options)
