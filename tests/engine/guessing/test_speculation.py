"""Guessed tokens change nothing: speculative decoding is plain decoding token for token, whatever
is guessed, by whomever and how much. Faults in the middle are in `test_speculation_faults`."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlayer
from jlayer.convert import convert_checkpoint
from tests.campaigns import slow_but
from tests.conftest import BUNDLED
from tests.engine.guesses import PROMPT, Made, Plain, is_whole, n_passes
from tests.engine.test_engine import opened

MODES = ["auto", "lookup", "draft"]
SEED = {"seed": 5}


@pytest.fixture(scope="module")
def own_int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "layered"
    convert_checkpoint(BUNDLED, folder, quantize="int4")
    return folder


@pytest.fixture(scope="module")
def fable_model(fable, own_int4):
    """The bundled model, with its own int4 copy as the draft."""
    with opened(fable, draft=own_int4) as model:
        yield model


@pytest.fixture(scope="module")
def fable_plain(fable_model):
    return Plain(fable_model)


# Modes, widths, temperatures

WIDTHS = {1: 24, 2: 24, 7: 24, 8: 24, 15: 24, 63: 210, 200: 210}  # -> new tokens


# Each mode, and a chain, a tree and the widest tree of a chunk of 16 rows.
QUICK = [("auto", 15), ("lookup", 7), ("draft", 1), ("draft", 15)]


@pytest.mark.parametrize("case", slow_but(product(MODES, WIDTHS), QUICK), ids=str)
def test_every_mode_and_width_gives_the_plain_tokens(model, plain, case):
    mode, width = case
    for temperature in (0, 0.7, 1):
        options = {"max_new_tokens": WIDTHS[width], "temperature": temperature, **SEED}
        (found,) = plain.check(PROMPT, speculate=mode, draft_tokens=width, **options)
        stats = found.stats
        assert 0 < stats["verified"] <= width * stats["sweeps"]
        assert sum(stats["accepted_by_depth"]) == len(found.token_ids) - stats["sweeps"]
    assert is_whole(model)


@pytest.mark.parametrize("mode", MODES)
def test_a_width_that_is_chosen_gives_the_plain_tokens(model, plain, mode):
    for temperature in (0, 1):
        options = {"max_new_tokens": 24, "temperature": temperature, **SEED}
        plain.check(PROMPT, speculate=mode, **options)
    assert is_whole(model)


# Options

SOME = {"max_new_tokens": 24, "temperature": 0.7, **SEED}
OPTIONS = {
    "top k": SOME | {"top_k": 5},
    "top p": SOME | {"top_p": 0.8},
    "min p": SOME | {"min_p": 0.2, "temperature": 1},
    "all three": SOME | {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 3},
    "repetition": SOME | {"repetition_penalty": 1.3},
    "greedy repetition": {"max_new_tokens": 24, "temperature": 0, "repetition_penalty": 1.3},
    "use": SOME | {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    "ngrams": {"max_new_tokens": 24, "temperature": 0, "no_repeat_ngram_size": 2},
    "of the prompt": SOME | {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "bias": SOME | {"logit_bias": {9: 3.0, 11: -4.0, 300: 2.0}, "logprobs": 0},
    "many": SOME | {"min_new_tokens": 12, "eos_token_id": list(range(0, 1000, 3))},
    "end inside": SOME | {"eos_token_id": list(range(0, 1000, 17))},
    "stop": SOME | {"stop": ["the", "."]},
    "stop over tokens": {"max_new_tokens": 24, "temperature": 0, "stop": ["d t", "he w", "s a"]},
    "special stop": SOME | {"stop": ["<|end_of_text|>"], "logit_bias": {0: 6.0, 1: 6.0, 2: 6.0}},
    "three": SOME | {"num_return_sequences": 3},
    "three, ended apart": SOME | {"num_return_sequences": 3, "stop": ["e"], "temperature": 1},
    "one token": SOME | {"max_new_tokens": 1},
    "two": SOME | {"max_new_tokens": 2},
    "three tokens": SOME | {"max_new_tokens": 3, "logprobs": 2},
}


# Those that are much like another one, each with programs of its own.
LIKE_OTHERS = ("top p", "min p", "repetition", "of the prompt", "three", "special stop", "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else [])
        for name in OPTIONS
    ],
)
def test_every_option_acts_as_in_plain_decoding(fable_model, fable_plain, name):
    for mode in MODES:
        fable_plain.check("The old king said", speculate=mode, draft_tokens=15, **OPTIONS[name])
    assert is_whole(fable_model)


@pytest.mark.slow
def test_options_act_in_the_middle_of_what_was_accepted(fable_model, fable_plain, monkeypatch):
    """Every end that a text can have, at every place of a tree that was right to the end."""
    prompt = fable_model.text.encode("The")[-1:]  # a single one: the tree has room beside it
    base = {"max_new_tokens": 16, "temperature": 0}
    (whole,) = fable_plain.generations(prompt, **base)
    tokens = whole.token_ids
    Made(chain, {tuple(prompt): tokens}).within(fable_model, monkeypatch)
    for end in sorted({*tokens}):
        (found,) = fable_plain.check(
            prompt, speculate="lookup", draft_tokens=15, **base, eos_token_id=end
        )
        assert found.token_ids == tokens[: tokens.index(end) + 1]
        assert found.stats["sweeps"] == 1
    for at in range(1, len(whole.text) - 3, 3):
        stop = whole.text[at : at + 3]
        (found,) = fable_plain.check(
            prompt, speculate="lookup", draft_tokens=15, **base, stop=[stop], logprobs=1
        )
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.stats["sweeps"] == 1
    for most in range(1, 17):
        (found,) = fable_plain.check(
            prompt, speculate="lookup", draft_tokens=15, temperature=0, max_new_tokens=most
        )
        assert (found.token_ids, found.stats["sweeps"]) == (tokens[:most], 1)
    assert is_whole(fable_model)


@pytest.mark.slow
def test_steps_join_to_the_text(fable_model, fable_plain):
    for stop in ([], ["the"]):
        options = SOME | {"stop": stop}
        (want,) = fable_plain.generations("The old king said", **options)
        steps = list(jlayer.stream(fable_model, "The old king said", draft_tokens=15, **options))
        assert [token for step in steps for token in step.token_ids] == want.token_ids
        assert "".join(step.text for step in steps) == want.text
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [
            want.finish_reason
        ]
        assert len(steps) < len(want.token_ids)


@pytest.mark.slow
def test_the_own_int4_copy_gives_many_tokens_a_pass(fable_model, fable_plain):
    options = {"max_new_tokens": 48, "temperature": 0}
    (found,) = fable_plain.check("The old king said", speculate="draft", draft_tokens=15, **options)
    assert len(found.token_ids) / found.stats["sweeps"] >= 4


# Trees made by hand: what is right, wrong, hidden


def chain(want, most, deepest):
    """The right tokens, one after another."""
    return [(place - 1, token) for place, token in enumerate(want[: min(most, deepest)])]


def wrong(want, most, deepest):
    return [(place - 1, (token + 1) % 133) for place, token in enumerate(want[:most])]


def full(want, most, deepest):
    """As wide as may be, below the root, with the right one last."""
    others = [token for token in range(133) if token != want[0]]
    return [(-1, token) for token in [*others[: most - 1], want[0]]]


def broom(want, most, deepest):
    """The same token at every depth, and the right ones beside it."""
    nodes, parent = [], -1
    for token in want[: min(deepest, most // 2)]:
        nodes += [(parent, (token + 1) % 133), (parent, token)]
        parent = len(nodes) - 1
    return nodes


TREES = {chain: lambda n: n, wrong: lambda n: 0, full: lambda n: 1, broom: lambda n: n // 2}


@pytest.mark.parametrize("width", [1, 2, 7, 15])
@pytest.mark.parametrize("tree_of", TREES, ids=lambda tree_of: tree_of.__name__)
def test_a_tree_gives_what_it_has_right_and_one_more(model, plain, monkeypatch, tree_of, width):
    for temperature in (0, 1):
        prompt, options = [5], {"max_new_tokens": 24, "temperature": temperature, **SEED}
        (want,) = plain.generations(prompt, **options)
        made = Made(tree_of, {tuple(prompt): want.token_ids}).within(model, monkeypatch)
        (found,) = plain.check(prompt, speculate="lookup", draft_tokens=width, **options)
        n_right = TREES[tree_of](width)
        assert all(depth == n_right for depth in made.depths[:-1])
        assert found.stats["sweeps"] == n_passes(24, made.depths) == -(-24 // (n_right + 1))
    assert is_whole(model)


def hidden(rng, p_right=0.7):
    """Random trees, in which the right tokens are hidden at random places."""

    def tree_of(want, most, deepest):
        count = int(rng.integers(0, most + 1))
        nodes, depths, is_right = [], [], []
        used = set()
        for _ in range(count):
            parent = int(rng.integers(-1, len(nodes)))
            if len(nodes) and rng.random() < 0.5:  # long ones too
                parent = len(nodes) - 1
            depth = 1 if parent < 0 else depths[parent] + 1
            if depth > deepest:
                continue
            right = want[depth - 1]
            token = right if rng.random() < p_right else int(rng.integers(133))
            if (parent, token) in used:
                continue
            used.add((parent, token))
            nodes.append((parent, token))
            depths.append(depth)
            is_right.append((parent < 0 or is_right[parent]) and token == right)
        return nodes

    return tree_of


HIDDEN_PROMPTS = [PROMPT, PROMPT[:17], [*PROMPT[:18], 3, 3], [4, 4]]


def check_hidden(model, plain, monkeypatch, seed, n_prompts, temperature, p_right):
    prompts = HIDDEN_PROMPTS[:n_prompts]
    options = {"max_new_tokens": 20, "temperature": temperature, **SEED}
    each = [plain.generations(prompt, **options)[0].token_ids for prompt in prompts]
    wants = dict(zip(map(tuple, prompts), each, strict=True))
    rng = np.random.default_rng(seed)
    made = Made(hidden(rng, p_right), wants).within(model, monkeypatch)
    found = jlayer.generate(model, prompts, speculate="lookup", draft_tokens=7, **options)
    assert [one.token_ids for one in found] == each
    if n_prompts == 1:
        assert found[0].stats["sweeps"] == n_passes(20, made.depths)
    n_accepted = sum(found[0].stats["accepted_by_depth"])
    assert n_accepted == sum(made.depths)
    assert is_whole(model)


hiding = {
    "seed": st.integers(0, 1 << 30),
    "n_prompts": st.integers(1, len(HIDDEN_PROMPTS)),
    "temperature": st.sampled_from([0, 0.7, 1]),
    "p_right": st.sampled_from([0.1, 0.5, 0.9]),
}


@pytest.mark.slow
@settings(max_examples=25, derandomize=True)
@given(**hiding)
def test_right_tokens_are_found_wherever_they_are_hidden(model, plain, **case):
    with pytest.MonkeyPatch.context() as patch:
        check_hidden(model, plain, patch, **case)


@pytest.mark.slow
@settings(max_examples=300)
@given(**hiding)
def test_right_tokens_are_found_in_a_longer_campaign(model, plain, **case):
    with pytest.MonkeyPatch.context() as patch:
        check_hidden(model, plain, patch, **case)
