"""Functions of the user's: they see what transformers shows them, and what they say counts."""

import subprocess
import sys
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

import jlayer
from jlayer.engine.functions import taken
from jlayer.errors import UsageError
from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

PAD = 9
LONG, SHORT = [5, 17, 80, 33, 121, 64, 17], [44, 101, 7]
BATCH = [LONG, [PAD] * 4 + SHORT, LONG[::-1]]
ENDS = list(range(20, 40))


class Seen:
    """Notes the ids that it is shown."""

    def __init__(self):
        self.ids = []

    def note(self, ids):
        assert (type(ids), ids.dtype) == (torch.Tensor, torch.int64)
        self.ids.append(ids.tolist())


class Shifts(Seen, transformers.LogitsProcessor):
    """Makes tokens near the last one less likely, and writes into what it is given."""

    def __call__(self, ids, scores):
        self.note(ids)
        assert scores.dtype == torch.float32
        places = (ids[:, -1:] + torch.arange(40)) % scores.shape[1]
        return scores.scatter_add_(1, places, torch.full(places.shape, -3.0))


class EndsAfter(Seen, transformers.StoppingCriteria):
    """Ends rows by their last two tokens."""

    def __call__(self, ids, scores, **_):
        self.note(ids)
        self.scores = scores
        return ((ids[:, -1] + ids[:, -2]) % 5 == 0) & (ids.shape[1] > 9)


def near(prompt, ids):
    """Some tokens after the last one, others for each prompt: enough for three beams, ends apart
    (of fewer, some would stand in for others, and which is left to torch)."""
    assert ids.ndim == 1
    return [(int(ids[-1]) + 7 * prompt + more) % 133 for more in range(3, 70, 4)]


def both_ways(both, ids, **options):
    """What both give, with a function of its own kind each: (ours, theirs) with the functions."""
    options = {"max_new_tokens": 9, "pad_token_id": PAD, "eos_token_id": ENDS, **options}
    details = {"return_dict_in_generate": True, "output_scores": True}
    found = []
    for model in (both.ours, both.theirs):
        own = {
            name: value() if isinstance(value, type) else value for name, value in options.items()
        }
        functions = {
            name: [own.pop(name)]
            for name in ("logits_processor", "stopping_criteria")
            if name in own
        }
        if model is both.theirs:
            functions = {
                name: (
                    transformers.LogitsProcessorList(value)
                    if name == "logits_processor"
                    else transformers.StoppingCriteriaList(value)
                )
                for name, value in functions.items()
            }
        result = model.generate(torch.tensor(ids), **own, **functions, **details)
        found.append((result, [each for (each,) in functions.values()]))
    (ours, _), (theirs, _) = found
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for own, other in zip(ours.scores, theirs.scores, strict=True):
        there = ~torch.isnan(own)
        np.testing.assert_allclose(own[there], other[there], rtol=0, atol=2e-5)
    return found


@pytest.mark.parametrize("ids", [[LONG], BATCH], ids=["one", "padded batch"])
@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": Shifts},
        {"logits_processor": Shifts, "repetition_penalty": 1.5, "min_new_tokens": 4},
        {"stopping_criteria": EndsAfter},
        {"logits_processor": Shifts, "stopping_criteria": EndsAfter, "bad_words_ids": [[93]]},
        {"prefix_allowed_tokens_fn": near},
        {
            "prefix_allowed_tokens_fn": near,
            "logits_processor": Shifts,
            "sequence_bias": [[[8], 9.0]],
        },
        {"prefix_allowed_tokens_fn": lambda prompt, ids: [46], "bad_words_ids": [[46]]},
    ],
    ids=" and ".join,
)
def test_functions_see_and_decide_what_they_do_in_transformers(both, ids, options):
    (_, ours), (_, theirs) = both_ways(both, ids, **options)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.ids == other.ids
        assert own.ids


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": Shifts},
        {"stopping_criteria": EndsAfter, "num_return_sequences": 3},
        {"prefix_allowed_tokens_fn": near, "num_return_sequences": 2},
        {"prefix_allowed_tokens_fn": near, "logits_processor": Shifts, "length_penalty": 0.3},
    ],
    ids=" and ".join,
)
def test_functions_act_on_beams(both, options):
    (_, ours), (_, theirs) = both_ways(both, [LONG], num_beams=3, **options)
    assert [own.ids for own in ours] == [other.ids for other in theirs]
    if "stopping_criteria" in options:
        (own,), (other,) = ours, theirs
        for one, two in zip(own.scores, other.scores, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)
    both_ways(both, BATCH, num_beams=3, **options)


def test_draws_are_from_what_functions_leave(both):
    """With one token left at each place; and without, each row as it is alone."""
    only = {"prefix_allowed_tokens_fn": lambda prompt, ids: [(int(ids[-1]) * 3 + 1) % 133]}
    options = {"do_sample": True, "max_new_tokens": 6, "seed": 5}
    (row,) = both.ours.generate([LONG], **options, **only)
    assert all(new == (old * 3 + 1) % 133 for old, new in pairwise(row[6:]))
    plain = both.ours.generate(BATCH, num_return_sequences=2, **options)
    shown = both.ours.generate(
        BATCH, num_return_sequences=2, logits_processor=[lambda ids, scores: scores], **options
    )
    assert shown == plain


def test_a_row_that_ends_where_nothing_else_does_is_filled_up(both):
    """transformers goes on with it until all rows have ended."""
    options = {"max_new_tokens": 9, "pad_token_id": PAD, "stopping_criteria": [EndsAfter()]}
    ours = both.ours.generate(torch.tensor(BATCH), **options).tolist()
    theirs = both.theirs.generate(
        torch.tensor(BATCH),
        **options | {"stopping_criteria": transformers.StoppingCriteriaList([EndsAfter()])},
    )
    for own, other in zip(ours, theirs.tolist(), strict=True):
        end = next(n for n in range(10, 17) if n == 16 or (own[n - 1] + own[n - 2]) % 5 == 0)
        assert own[:end] == other[:end]
        assert set(own[end:]) <= {PAD, own[-1]}


def test_jlayers_own_interface_takes_functions_too(both):
    expected = both.theirs.generate(
        torch.tensor([LONG]),
        max_new_tokens=6,
        logits_processor=transformers.LogitsProcessorList([Shifts()]),
    )[0, 7:].tolist()
    options = {"logits_processor": [Shifts()], "max_new_tokens": 6}
    assert jlayer.generate(both.ours, LONG, **options).token_ids == expected
    steps = jlayer.stream(both.ours, LONG, **options)
    assert [token for step in steps for token in step.token_ids] == expected
    assert both.ours.submit(LONG, **options).result().token_ids == expected


def test_a_length_criterion_is_the_length(both):
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(30)])
    both.same(torch.tensor([LONG]), stopping_criteria=criteria)
    with pytest.raises(UsageError, match="max_new_tokens: given, and a MaxLengthCriteria"):
        both.ours.generate([LONG], stopping_criteria=criteria, max_new_tokens=3)


def test_a_function_that_raises_ends_its_own_run_with_its_error(both):
    def fails(ids, scores):
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        both.ours.generate(BATCH, logits_processor=[fails], max_new_tokens=3)
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        both.ours.generate([LONG], logits_processor=[fails], max_new_tokens=3, num_beams=2)
    handle = both.ours.submit(LONG, logits_processor=[fails], max_new_tokens=3)
    other = both.ours.submit(SHORT, max_new_tokens=3)
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        handle.result()
    assert len(other.result().token_ids) == 3
    assert both.ours.engine.n_alive == 0


def test_what_functions_may_not_be_or_say_is_refused_by_name(both):
    repetition = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    nan = [lambda ids, scores: scores * float("nan")]
    for options, words in (
        ({"logits_processor": 5}, "logits_processor: found int, expected a list"),
        ({"logits_processor": [5]}, "logits_processor: found list, expected a list of functions"),
        ({"stopping_criteria": repetition}, "stopping_criteria: found Repet"),
        ({"prefix_allowed_tokens_fn": [5]}, "prefix_allowed_tokens_fn: found list"),
        ({"prefix_allowed_tokens_fn": lambda *_: []}, "allows no token for prompt 0 at position 7"),
        ({"logits_processor": nan}, "no numbers"),
        ({"logits_processor": [lambda ids, scores: scores[0]]}, r"shape \[133\], expected \[1, 13"),
        ({"logits_processor": [lambda ids, scores: scores - np.inf]}, "relax .* or a function"),
        (
            {"logits_processor": [repetition], "repetition_penalty": 2.0},
            "repetition_penalty: given, and a RepetitionPenaltyLogitsProcessor",
        ),
        ({"logits_processor": nan, "speculate": "lookup"}, "speculate: found 'lookup' with func"),
        ({"logits_processor": nan, "draft_tokens": 3}, "draft_tokens: found 3 with functions"),
    ):
        with pytest.raises(UsageError, match=words):
            both.ours.generate([LONG], max_new_tokens=2, **options)
    assert both.ours.engine.n_alive == 0
    both.same(
        torch.tensor([LONG]),
        logits_processor=transformers.LogitsProcessorList([repetition]),
        max_new_tokens=5,
    )


INF, NAN = float("inf"), float("nan")
WRONG = {
    "logits_processor": {
        "gave NoneType, expected numbers of shape": lambda ids, scores: None,
        "gave list, expected numbers": lambda ids, scores: [[1], [2, 3]],
        "gave ndarray, expected numbers": lambda ids, scores: np.full(scores.shape, "a"),
        "<lambda> gave ndarray, expected": lambda ids, scores: np.full(scores.shape, 1j),
        "gave Tensor, expected numbers": lambda ids, scores: scores > 0,
        "gave scores of shape": lambda ids, scores: 3.0,
        "are no numbers .NaN., expected numbers, or -inf": lambda ids, scores: scores * NAN,
        "are beyond float32, expected": lambda ids, scores: scores.double() + 1e300,
        "scores that are beyond": lambda ids, scores: scores.index_fill(1, ids[0, :1], INF),
    },
    "stopping_criteria": {
        "gave NoneType, expected a bool for each": lambda ids, scores: None,
        "gave str": lambda ids, scores: "",
        "gave float": lambda ids, scores: NAN,
        "gave int": lambda ids, scores: 2,
        "gave Tensor of shape .2, 1.|gave Tensor of shape .4, 1.": lambda ids, scores: (
            ids[:, :1] > 1000
        ),
        "gave Tensor of shape .3.|gave Tensor of shape .5.": lambda ids, scores: torch.zeros(
            len(ids) + 1, dtype=torch.bool
        ),
    },
    "prefix_allowed_tokens_fn": {
        "gave None for prompt 0 at position 7, expected a list": lambda prompt, ids: None,
        "allows no token for prompt 0 at position 7": lambda prompt, ids: [],
        "gave id -1 .* ids below the vocabulary of 133": lambda prompt, ids: [5, -1],
        "gave id 133": lambda prompt, ids: [5, 133],
        r"gave \[1.5\]": lambda prompt, ids: [1.5],
        r"gave \['a'\]": lambda prompt, ids: ["a"],
        r"gave \[\[1, 2\]\]": lambda prompt, ids: [[1, 2]],
        "gave .True, False.": lambda prompt, ids: [True, False],
        "gave {1, 2}": lambda prompt, ids: {1, 2},
    },
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", WRONG)
def test_what_a_function_gives_that_is_no_answer_is_refused_in_its_own_run(both, name, beams):
    """In words, and not in the run of whoever makes the forward pass."""
    options = {"num_beams": beams, "max_new_tokens": 3}
    for words, function in WRONG[name].items():
        given = {name: function if name.startswith("prefix") else [function]}
        with pytest.raises(UsageError, match=f"^{name}: .*({words})"):
            both.ours.generate([LONG, LONG[::-1]], **options, **given)
    assert both.ours.engine.n_alive == 0


def test_answers_of_other_kinds_are_taken(both):
    expected = both.ours.generate(BATCH, max_new_tokens=3)
    for given in (
        {"logits_processor": [lambda ids, scores: scores.tolist()]},
        {"logits_processor": [lambda ids, scores: scores.double().requires_grad_() * 1]},
        {"stopping_criteria": [lambda ids, scores: False]},
        {"stopping_criteria": [lambda ids, scores: torch.zeros(1, dtype=torch.bool)]},
        {"stopping_criteria": [lambda ids, scores: [0] * len(ids)]},
        {"prefix_allowed_tokens_fn": lambda prompt, ids: range(133)},
        {"prefix_allowed_tokens_fn": lambda prompt, ids: torch.arange(133)},
    ):
        assert both.ours.generate(BATCH, max_new_tokens=3, **given) == expected


@pytest.mark.parametrize("beams", [1, 2])
def test_a_function_that_asks_its_own_model_for_a_pass_is_refused(both, beams):
    """It would wait for itself, or take what the pass is about to write."""
    model = both.ours
    with closing(model.session(SHORT, max_new_tokens=3)) as begun:
        for ask in (
            lambda: model.logits([LONG]),
            lambda: model.encode([LONG]),
            lambda: model.generate([LONG], max_new_tokens=1),
            lambda: model.submit(LONG, max_new_tokens=1).result(),
            lambda: next(begun),
        ):

            def asks(ids, scores, ask=ask):
                ask()
                return scores

            with pytest.raises(UsageError, match=r"asks the same model .* open the model a second"):
                model.generate([SHORT], num_beams=beams, logits_processor=[asks])
    assert model.engine.n_alive == 0
    assert len(model.generate([SHORT], max_new_tokens=2)[0]) == 5


def test_no_functions_are_none():
    assert taken({"logits_processor": [], "stopping_criteria": None, "top_k": 3}) == (
        None,
        {"top_k": 3},
    )


ALONE = """
import sys, numpy as np, jlayer
def shift(ids, scores):
    assert type(ids) is type(scores) is np.ndarray and (ids.shape, scores.shape[0]) == ((1, 3), 1)
    scores[:, 11] = 99
    return scores
with jlayer.AutoModel.from_pretrained(sys.argv[1], device="cpu") as model:
    assert model.generate([5, 6, 7], max_new_tokens=1, logits_processor=[shift]) == [5, 6, 7, 11]
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_without_torch_functions_get_numpys_arrays(both):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, both.folder], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
