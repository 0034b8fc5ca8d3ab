"""Generation options: defaults, ranges, what is refused, and which source of an option wins."""

import math

import numpy as np
import pytest

from jlayer.engine.options import (
    ALIASES,
    DEFAULT_NEW_TOKENS,
    SamplingOptions,
    check_draft,
    check_given,
    is_option,
)
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError

V = 97


# Against transformers


@pytest.mark.reference
def test_defaults_are_those_of_transformers():
    from transformers import GenerationConfig

    theirs = GenerationConfig._get_default_generation_params()
    ours = SamplingOptions()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == theirs[name]
    for name in ("no_repeat_ngram_size", "min_length", "num_return_sequences", "num_beams"):
        assert getattr(ours, name) == theirs[name]
    assert theirs["max_length"] == DEFAULT_NEW_TOKENS


@pytest.mark.reference
def test_every_option_of_transformers_is_known_ignored_or_refused():
    from transformers import GenerationConfig

    theirs = {name for name in vars(GenerationConfig()) if name != "_original_object_hash"}
    assert theirs
    assert [name for name in theirs if not is_option(name)] == []
    # ... and its defaults stand in nobody's way.
    SamplingOptions.from_mapping(GenerationConfig._get_default_generation_params())


# What the user and the published file may say


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("do_sample", [1, "yes"], "true or false"),
        ("temperature", [-0.1, math.nan, math.inf, "1", True], "finite number from 0 up"),
        ("top_k", [-1, 1.5, True], "integer from 0 up"),
        ("top_p", [0, -0.5, 1.01, math.nan, "x"], r"\(0, 1\]"),
        ("min_p", [-0.1, 1.1, math.nan], r"\[0, 1\]"),
        ("repetition_penalty", [0, -1, math.nan, math.inf], "above 0"),
        ("presence_penalty", [2.1, -2.1, math.nan], r"\[-2, 2\]"),
        ("frequency_penalty", [2.1, -2.1, math.nan], r"\[-2, 2\]"),
        ("no_repeat_ngram_size", [-1, 1.0], "integer from 0 up"),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {-1: 0.0}, {"x": 1}, 3, {1: "2"}], "ids"),
        ("sequence_bias", [{(): 1.0}, {3: 1.0}, [[[1], 1.0], [[1], 2.0]], {(1,): math.inf}], "seq"),
        ("bad_words_ids", [[3], [[]], [[-1]], [["a"]], 5], "list of lists"),
        ("typical_p", [0, 1.1, math.nan, "x"], r"\(0, 1\]"),
        ("epsilon_cutoff", [-0.1, 1, math.nan], r"\[0, 1\)"),
        ("eta_cutoff", [-0.1, 1, math.nan], r"\[0, 1\)"),
        ("min_new_tokens", [-1], "from 0 up"),
        ("max_new_tokens", [-1, 2.5, "3"], "from 0 up"),
        ("max_length", [-1], "from 0 up"),
        ("eos_token_id", [-1, [1, "2"], "2"], "token id"),
        ("stop", ["", ["a", ""], [1], 5], "non-empty"),
        ("num_return_sequences", [0, -1, 1.0], "from 1 up"),
        ("num_beams", [0, 513, 2.0, True], "from 1 to 512"),
        ("length_penalty", [math.nan, math.inf, "1"], "finite number"),
        ("early_stopping", [1, "always"], "never"),
        ("output_scores", [1, "yes"], "true or false"),
        ("seed", [-1, 1.5, "7", 2**64, True], "integer from 0 to"),
        ("logprobs", [-1, True], "from 0 up"),
        ("prompt_logprobs", [-1, True], "from 0 up"),
        ("prompt_logprobs_from", [0, -1, 1.5], "from 1 up"),
        ("speculate", [1, True, ["off"]], "one of auto, off, lookup, draft"),
        ("draft_tokens", [0, -1, 512, 1.5, "8", True], "integer from 1 to 511"),
    ],
)
def test_option_out_of_range_is_refused_by_name_and_range(name, values, words):
    for value in values:
        with pytest.raises(UsageError, match=words) as caught:
            SamplingOptions.from_mapping({name: value})
        assert ALIASES.get(name, name) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_unknown_option_offers_the_closest_name():
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        SamplingOptions.from_mapping({"temprature": 1.0})


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [("num_beam_groups", 4, 1), ("top_h", 0.9, None), ("suppress_tokens", [1], [])],
)
def test_what_is_not_done_is_refused_wherever_it_comes_from(name, value, harmless):
    with pytest.raises(UsageError, match=name):
        SamplingOptions.from_mapping({name: value, "num_beams": 8})
    published = {name: value, "do_sample": True, "num_beams": 8}
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*overrule it in Python with {name}="):
        SamplingOptions.from_mapping({}, generation_config=published)
    for neutral in (None, harmless):
        SamplingOptions.from_mapping({name: neutral}, generation_config={name: value})
        SamplingOptions.from_mapping({}, generation_config={name: neutral})


def test_an_array_is_not_mistaken_for_nothing():
    with pytest.raises(UsageError, match="suppress_tokens"):
        SamplingOptions.from_mapping({"suppress_tokens": np.array([1, 2])})


def test_user_comes_before_generation_config_and_that_before_defaults():
    published = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [1, 2],
        "top_k": None,
        "_from_model_config": True,
        "transformers_version": "4.40.0",
        "pad_token_id": 0,
        "hidden_size": 64,
    }
    found = SamplingOptions.from_mapping({"temperature": 0.2}, generation_config=published)
    assert (found.temperature, found.top_p, found.top_k) == (0.2, 0.9, 50)
    assert found.do_sample
    assert found.eos_token_id == (1, 2)


def test_none_from_the_user_turns_an_option_off():
    published = {"top_k": 20, "top_p": 0.9, "eos_token_id": 2, "max_new_tokens": 5, "min_p": 0.1}
    off = dict.fromkeys([*published, "temperature", "stop_strings"])
    found = SamplingOptions.from_mapping(off, generation_config=published)
    assert (found.top_k, found.top_p, found.min_p) == (0, 1.0, None)
    assert (found.eos_token_id, found.max_new_tokens) == ((), None)


def test_a_wrong_value_in_the_file_is_the_files_fault():
    for raw, words in (
        ({"do_sample": True, "temperature": -1}, "temperature"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"eos_token_id": 500}, "eos_token_id.*500"),
    ):
        with pytest.raises(CheckpointError, match=rf"some\.json: {words}"):
            SamplingOptions.from_mapping({}, generation_config=raw, vocab_size=V, where="some.json")


def test_ids_outside_the_vocabulary_are_refused():
    for name, value in (
        ("eos_token_id", [1, V]),
        ("logit_bias", {V: 1.0}),
        ("sequence_bias", {(V, 1): 1.0}),
        ("bad_words_ids", [[1], [1, V]]),
    ):
        with pytest.raises(UsageError, match=f"{name}.*{V}"):
            SamplingOptions.from_mapping({name: value}, vocab_size=V)


def test_a_warper_means_sampling_only_where_that_is_implied():
    assert SamplingOptions.from_mapping({"temperature": 0.7}).is_greedy
    implied = {"sampling_implied": True}
    assert not SamplingOptions.from_mapping({"temperature": 0.7}, **implied).is_greedy
    assert not SamplingOptions.from_mapping({"top_p": 0.7}, **implied).is_greedy
    assert SamplingOptions.from_mapping({"temperature": 0}, **implied).is_greedy
    assert SamplingOptions.from_mapping({"seed": 1}, **implied).is_greedy
    given = {"do_sample": False, "temperature": 0.7}
    assert SamplingOptions.from_mapping(given, **implied).is_greedy


def test_several_sequences_need_sampling():
    with pytest.raises(UsageError, match=r"num_return_sequences.*greedy"):
        SamplingOptions.from_mapping({"num_return_sequences": 2})
    SamplingOptions.from_mapping({"num_return_sequences": 2, "do_sample": True})


def test_the_same_option_under_two_names_is_refused():
    with pytest.raises(UsageError, match="same option"):
        SamplingOptions.from_mapping({"stop": "a", "stop_strings": ["b"]})


def test_options_are_hashable_and_normal():
    found = SamplingOptions(
        stop="x", eos_token_id=np.int64(3), logit_bias={"5": 1, 2: -math.inf}, seed=np.uint64(8)
    )
    assert hash(found) == hash(
        SamplingOptions(
            stop=("x",), eos_token_id=(3,), logit_bias=((2, -math.inf), (5, 1.0)), seed=8
        )
    )


def test_a_seed_is_drawn_once_and_kept():
    assert SamplingOptions(seed=4).seeded().seed == 4
    drawn = SamplingOptions(do_sample=True).seeded()
    assert 0 <= drawn.seed < 2**53
    assert drawn.seeded() is drawn


def test_how_many_tokens_may_follow():
    assert SamplingOptions().new_tokens_limit(7) == 20
    assert SamplingOptions().new_tokens_limit(7, context=10) == 3
    assert SamplingOptions(max_length=30).new_tokens_limit(7) == 23
    assert SamplingOptions(max_length=30).new_tokens_limit(7, width=9) == 21
    with pytest.raises(UsageError, match=r"max_length: found 7, .* 7 tokens already"):
        SamplingOptions(max_length=7).new_tokens_limit(7)
    assert SamplingOptions(max_new_tokens=0).new_tokens_limit(7, context=7) == 0
    assert SamplingOptions(max_new_tokens=9, max_length=8).new_tokens_limit(7) == 9
    with pytest.raises(UsageError, match=r"7 prompt tokens \+ 4 .* 10.* 3"):
        SamplingOptions(max_new_tokens=4).new_tokens_limit(7, context=10)
    both = {"max_new_tokens": 100}
    found = SamplingOptions.from_mapping({"max_length": 9}, generation_config=both)
    assert found.new_tokens_limit(7) == 2


# Guessing tokens


def test_how_tokens_are_guessed_is_a_known_way_or_refused_with_the_closest():
    for way in ("auto", "off", "lookup", "draft"):
        assert SamplingOptions.from_mapping({"speculate": way}).speculate == way
    with pytest.raises(UsageError, match="speculate 'lokup' is not known: did you mean 'lookup'"):
        SamplingOptions.from_mapping({"speculate": "lokup"})
    assert SamplingOptions() == SamplingOptions(speculate="auto", draft_tokens=None)
    assert SamplingOptions.from_mapping({"speculate": None}).speculate == "off"
    assert SamplingOptions.from_mapping({"draft_tokens": 511}).draft_tokens == 511


@pytest.mark.parametrize("check", [SamplingOptions.from_mapping, check_given])
def test_a_number_of_guesses_is_refused_where_none_are_made(check):
    for way in ("off", None):
        with pytest.raises(UsageError, match="draft_tokens: found 8, but speculate is 'off'"):
            check({"speculate": way, "draft_tokens": 8})
    check({"speculate": "lookup", "draft_tokens": 8})
    check({"speculate": "off", "draft_tokens": None})


def test_a_way_that_needs_a_draft_model_is_refused_without_one():
    with pytest.raises(UsageError, match="open the model with draft=FOLDER") as refused:
        check_draft("draft", None)
    assert refused.value.command_line.endswith("; give --draft REF")
    for way in ("auto", "off", "lookup", None):
        check_draft(way, None)
    check_draft("draft", "folder", unused=True)


@pytest.mark.parametrize("way", ["off", "lookup"])
def test_a_draft_model_that_would_be_loaded_for_nothing_is_refused(way):
    check_draft(way, "folder")  # an opened model may run without the draft that it has
    with pytest.raises(UsageError, match=f"draft: found folder, but speculate is '{way}'"):
        check_draft(way, "folder", unused=True)


def test_a_published_file_says_nothing_of_guessing():
    published = {"speculate": "nonsense", "draft_tokens": -1}
    assert SamplingOptions.from_mapping({}, generation_config=published) == SamplingOptions()
