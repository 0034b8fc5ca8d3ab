"""A model that is called as transformers' models are: the same logits, and no argument is lost."""

import inspect

import numpy as np
import pytest

from jlayer.engine.called import HARMLESS, REFUSED, TAKEN
from jlayer.errors import UsageError
from tests.engine.drop_in import opened

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

ROWS = [[5, 17, 80, 33, 121], [44, 101, 7, 9, 2]]
ONES = [[1] * 5] * 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("called") / "source")


def test_a_call_gives_the_logits_that_transformers_gives(both):
    ids = torch.tensor(ROWS)
    found = both.ours(ids, attention_mask=torch.ones_like(ids))
    expected = both.theirs(ids).logits.detach().numpy()
    assert found.logits.dtype == np.float32
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=2e-5)
    assert found[0] is found["logits"] is found.logits


@pytest.mark.parametrize("mask", [ONES, np.ones((2, 5)), torch.ones(2, 5, dtype=torch.bool), None])
def test_a_mask_of_ones_says_nothing(both, mask):
    expected = both.ours.logits(ROWS)
    assert np.array_equal(both.ours.logits(ROWS, attention_mask=mask), expected)
    assert np.array_equal(both.ours(input_ids=ROWS, attention_mask=mask).logits, expected)
    encoded = {"input_ids": ROWS, "attention_mask": mask}
    assert np.array_equal(both.ours(**encoded).logits, expected)
    assert np.array_equal(both.ours(encoded).logits, expected)


def test_padding_and_what_is_no_mask_are_refused(both):
    padded = [[0, 1, 1, 1, 1], [1] * 5]
    for ask in (both.ours, both.ours.logits):
        with pytest.raises(UsageError, match="found padding in attention_mask"):
            ask(ROWS, padded)
        with pytest.raises(UsageError, match="attention_mask: of another shape"):
            ask(ROWS, [[1] * 5])
        with pytest.raises(UsageError, match="attention_mask: given twice"):
            ask({"input_ids": ROWS, "attention_mask": ONES}, ONES)
    with pytest.raises(UsageError, match="input_ids: none given"):
        both.ours()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("labels", ROWS),
        ("past_key_values", object()),
        ("position_ids", ROWS),
        ("logits_to_keep", 1),
        ("return_dict", False),
    ],
)
def test_what_a_call_does_not_do_is_refused_by_name(both, name, value):
    with pytest.raises(UsageError, match=f"^{name}: found .*does not support"):
        both.ours(ROWS, **{name: value})


def test_an_unknown_argument_is_refused_with_the_closest(both):
    with pytest.raises(UsageError, match="'atention_mask' is not known: did you mean 'attention_m"):
        both.ours(ROWS, atention_mask=ONES)


def test_what_asks_for_nothing_more_is_taken(both):
    expected = both.ours.logits(ROWS)
    harmless = {"use_cache": True, "token_type_ids": [[0] * 5] * 2, "num_items_in_batch": 3}
    assert harmless.keys() == HARMLESS
    neutral = {name: value for name, (*_, value) in REFUSED.items()}
    assert np.array_equal(both.ours(ROWS, **harmless, **neutral).logits, expected)
    theirs = both.theirs(torch.tensor(ROWS)).logits
    more = both.theirs(torch.tensor(ROWS), use_cache=True, num_items_in_batch=3).logits
    assert torch.equal(theirs, more)


def test_every_argument_of_transformers_own_is_known():
    from transformers.utils.generic import TransformersKwargs

    names = set(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
    names |= set(TransformersKwargs.__optional_keys__)
    assert names - {"self", "kwargs"} <= {*TAKEN, *REFUSED, *HARMLESS}
    assert not HARMLESS & REFUSED.keys()
