"""transformers' assistant_model is the draft model here."""

from types import SimpleNamespace

import pytest

import jlayer
from jlayer.errors import CheckpointError, UsageError
from tests.conftest import BUNDLED

PROMPT = [5, 17, 80, 33]
GREEDY = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def models(fable):
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


def test_an_assistant_that_cannot_guess_is_refused(models, fable):
    drafted, plain = models
    with pytest.raises(UsageError, match="opened without a draft; open it with draft="):
        plain.generate([PROMPT], assistant_model=BUNDLED)
    assistant = {"assistant_model": BUNDLED}
    for options, words in (
        ({"assistant_model": fable}, "opened with draft .*; open it with draft="),
        ({"assistant_model": object()}, "found object, expected a folder"),
        ({**assistant, "num_beams": 3}, "with num_beams 3"),
        ({**assistant, "speculate": "off"}, "speculate is 'off'"),
        ({**assistant, "logits_processor": [print]}, "assistant_model: given with functions"),
    ):
        with pytest.raises(UsageError, match=words):
            drafted.generate([PROMPT], **options)
    with pytest.raises(CheckpointError, match="assistant_model: nowhere: no such file"):
        drafted.generate([PROMPT], assistant_model="nowhere")
