"""Every argument of transformers' generate: done, harmless by proof, or refused. The lists are from
the installed transformers, so an argument that is new there fails here."""

import inspect
import json
import re
import shutil

import numpy as np
import pytest

import jlayer
from jlayer.engine import assistant, functions, vectors
from jlayer.engine.options import SamplingOptions, is_option, option_names
from jlayer.engine.unread import BEAMS_ONLY, HARMLESS, REFUSED
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from tests.campaigns import slow_but
from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

IDS = [5, 17, 80, 33, 121, 64, 17]
FIELDS = sorted(set(vars(transformers.GenerationConfig())) - {"_original_object_hash"})
# What `generate` takes out of its keywords before anything looks at them.
TAKEN = {"tokenizer", "assistant_tokenizer", "trust_remote_code", "past_key_values", "cache_params"}

# A value of each that is not neutral. Harmless: transformers gives the same tokens with it.
VALUES = {
    "_commit_hash": None,  # refused there, but stands in files
    "_from_model_config": True,
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 2,
    "assistant_lookbehind": 3,
    "cache_config": {"max_cache_len": 40},
    "compile_config": None,
    "continuous_batching_config": None,
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "low_memory": True,
    "max_cache_len": 64,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "heuristic",
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "speculation_type": "eagle",
    "target_lookbehind": 3,
    "transformers_version": "4.0.0",
    "use_cache": False,
    # Arguments that no GenerationConfig has.
    "labels": None,
    "logits_to_keep": 1,
    "num_items_in_batch": 3,
    "synced_gpus": False,
    "token_type_ids": None,
    "tokenizer": object(),
    "trust_remote_code": True,
}
# What only changes how tokens are guessed and checked draws otherwise: equal for greedy runs alone.
GREEDY_ALONE = {"assistant_early_exit", "prompt_lookup_num_tokens"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_generation_config_is_known(name):
    assert is_option(name)


def test_every_argument_of_generate_and_forward_is_known():
    from transformers.utils.generic import TransformersKwargs

    found = set(inspect.signature(transformers.GenerationMixin.generate).parameters)
    found |= set(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
    found |= set(TransformersKwargs.__optional_keys__) | TAKEN
    ours = set(inspect.signature(jlayer.Model.generate).parameters)
    ours |= set(inspect.signature(jlayer.api.generate_ids).parameters)
    assert {name for name in found - ours - {"kwargs"} if not is_option(name)} == set()


def test_the_page_says_of_every_name_what_becomes_of_it():
    page = (REPOSITORY / "docs" / "generating.md").read_text()

    def listed(kind):
        part = re.search(rf"<!-- {kind} -->(.*?)<!-- end -->", page, re.DOTALL)[1]
        return set(re.findall(r"`(\w+)`", part))

    taken = {*functions.NAMES, assistant.NAME, vectors.NAME}
    assert listed("harmless") == HARMLESS
    assert listed("refused") == REFUSED.keys() - taken
    done = page.split("## What is acted on")[1].split("\n## ")[0]
    assert taken | set(option_names()) <= set(re.findall(r"`(\w+)`", done))


def test_the_three_lists_share_no_name():
    assert not HARMLESS & REFUSED.keys()
    assert not HARMLESS & set(option_names())
    assert not REFUSED.keys() & set(option_names())
    assert VALUES.keys() == HARMLESS


@pytest.mark.parametrize("samples", slow_but([False, True], (False,)))
@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_is_called_harmless_changes_no_token_in_transformers(both, name, samples):
    if samples and name in GREEDY_ALONE:
        return
    options = {"max_new_tokens": 8, "do_sample": samples}

    def theirs(**more):
        torch.manual_seed(3)
        return both.theirs.generate(torch.tensor([IDS]), **options, **more).tolist()

    if VALUES[name] is not None:
        assert theirs(**{name: VALUES[name]}) == theirs()
    assert SamplingOptions.from_mapping({name: VALUES[name]}) == SamplingOptions()


CHANGES = {
    "begin_suppress_tokens": [7],
    "cache_implementation": "quantized",
    "is_assistant": True,
    "output_attentions": True,
    "penalty_alpha": 0.6,
    "suppress_tokens": [7],
    "token_healing": True,
    "use_mtp": True,
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_changes_the_result_is_refused_wherever_it_stands(name):
    value = CHANGES.get(name, object() if name.endswith("_fn") else 3)
    value = False if name == "is_causal" else value
    run = {"do_sample": name != "penalty_alpha", "return_dict_in_generate": True}
    run |= {"num_beams": 2} if name in BEAMS_ONLY else {}
    with pytest.raises(UsageError, match=f"{name}: found .*leave it out"):
        SamplingOptions.from_mapping({name: value, **run})
    with pytest.raises(UsageError, match=name):
        SamplingOptions.from_mapping({name: np.array([1, 2]), **run})
    with pytest.raises(UnsupportedModelError, match=rf"a\.json: {name}: .* {name}=None"):
        SamplingOptions.from_mapping(run, generation_config={name: value}, where="a.json")
    for neutral in REFUSED[name]:  # and the advice can be followed
        SamplingOptions.from_mapping({name: neutral, **run}, generation_config={name: value})


def test_a_model_as_an_assistant_is_pointed_to_the_way_to_give_one():
    with pytest.raises(UsageError, match=r"leave it out, and open the model with draft=FOLDER"):
        SamplingOptions.from_mapping({"assistant_model": object()})


@pytest.mark.parametrize("name", sorted(set(FIELDS) & REFUSED.keys()))
def test_transformers_own_defaults_are_neutral(name):
    default = transformers.GenerationConfig._get_default_generation_params().get(name)
    assert default in REFUSED[name]


# What a published file says to runs that do not read it


UNREAD_BY_GREEDY = {
    "temperature": -1,
    "top_k": -1,
    "top_p": 7,
    "min_p": "x",
    "top_h": 0.4,
    "typical_p": 4,
    "epsilon_cutoff": 1.5,
    "eta_cutoff": 2,
    "output_scores": 3,
    "output_logits": "x",
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("name", UNREAD_BY_GREEDY)
def test_makers_options_that_a_greedy_run_does_not_read_do_not_block_it(both, name):
    published, draws = {name: UNREAD_BY_GREEDY[name]}, {"do_sample": True}
    plain = both.ours.generate([IDS], max_new_tokens=3)
    both.ours.generation_config, before = published, both.ours.generation_config
    try:
        assert both.ours.generate([IDS], max_new_tokens=3) == plain
        both.ours.generation_config = {**published, **draws}
        assert both.ours.generate([IDS], max_new_tokens=3, do_sample=False) == plain
        if name != "temperature":  # else the user's overrules it
            found = jlayer.generate(both.ours, IDS, max_new_tokens=3, temperature=0)
            assert found.token_ids == plain[0][7:]
    finally:
        both.ours.generation_config = before
    if not name.startswith("output_"):
        with pytest.raises((CheckpointError, UnsupportedModelError), match=name):
            SamplingOptions.from_mapping(draws, generation_config=published)
        SamplingOptions.from_mapping({**draws, name: None}, generation_config=published)


def test_makers_several_answers_are_for_draws_alone():
    published = {"num_return_sequences": 3, "do_sample": True, "penalty_alpha": 0.6}
    assert SamplingOptions.from_mapping({}, generation_config=published).num_return_sequences == 3
    greedy = SamplingOptions.from_mapping({"temperature": 0}, generation_config=published)
    assert greedy.num_return_sequences == 1


def test_options_that_transformers_does_not_know_are_not_read_from_a_file(both):
    published = {"presence_penalty": 1.5, "frequency_penalty": 2.0, "seed": 3, "logprobs": 2}
    published |= {"prompt_logprobs": 1, "prompt_logprobs_from": 3}
    published |= {"stop": "x", "logit_bias": {"5": 50.0}, "repetition_penalty": 1.7}
    found = SamplingOptions.from_mapping({}, generation_config=published)
    assert found == SamplingOptions(repetition_penalty=1.7)
    with both.published(**published):
        both.same(torch.tensor([IDS]), max_new_tokens=8)


def test_a_users_stop_overrules_the_makers():
    found = SamplingOptions.from_mapping({"stop": "a"}, generation_config={"stop_strings": [5]})
    assert found.stop == ("a",)


def test_without_a_generation_config_the_config_counts_and_is_named(both, tmp_path):
    folder = shutil.copytree(both.folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_length": 7, "seed": 42}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="max_length"):
        theirs.generate(torch.tensor([IDS]))
    with jlayer.AutoModel.from_pretrained(folder, device="cpu") as model:
        with pytest.raises(UsageError, match=r"/config\.json: max_length: found 7"):
            model.generate([IDS])
        expected = theirs.generate(torch.tensor([IDS]), max_new_tokens=3).tolist()
        assert model.generate([IDS], max_new_tokens=3) == expected
