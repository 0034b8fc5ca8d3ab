"""model.generate as transformers' own: padding, lengths, arguments, and what they imply."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import jlayer
from jlayer.errors import CheckpointError, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

PAD, EOS = 9, 2
LONG, SHORT = [5, 17, 80, 33, 121, 64, 17], [44, 101, 7]
LEFT = [LONG, [PAD] * 4 + SHORT]


# Padding without a mask


@pytest.mark.parametrize(
    "published",
    [
        {"pad_token_id": PAD, "eos_token_id": EOS},
        {"pad_token_id": PAD},
        {"pad_token_id": PAD, "eos_token_id": PAD},  # cannot be told from an end: no padding
        {"pad_token_id": PAD, "eos_token_id": [EOS, PAD]},
        {"eos_token_id": PAD},
        {"eos_token_id": EOS},
        {},
    ],
    ids=str,
)
def test_a_padded_batch_without_a_mask_is_read_as_transformers_reads_it(both, published):
    with both.published(**published):
        both.same(torch.tensor(LEFT), max_new_tokens=6)
        both.same(torch.tensor(LEFT), max_new_tokens=6, pad_token_id=PAD)
        both.same(torch.tensor(LEFT), max_new_tokens=6, pad_token_id=None)
        both.same(torch.tensor(LEFT), max_new_tokens=6, eos_token_id=[PAD, 4])
        both.same(torch.tensor(LEFT), max_new_tokens=6, attention_mask=torch.ones(2, 7))
        both.same(torch.tensor([LEFT[1]]), max_new_tokens=6)
        both.same(torch.tensor([[44, PAD, 101, PAD, 7]]), max_new_tokens=6)


def test_every_kind_of_ids_has_the_same_padding(both):
    with both.published(pad_token_id=PAD, eos_token_id=EOS):
        expected = both.same(torch.tensor(LEFT), max_new_tokens=5)
        alone = both.same(torch.tensor([SHORT]), max_new_tokens=5)
        assert expected[1][-5:] == alone[0][-5:]
        mask = [[int(token != PAD) for token in row] for row in LEFT]
        kinds = [
            LEFT,
            [[np.int64(token) for token in row] for row in LEFT],
            [np.array(row) for row in LEFT],
            [torch.tensor(row) for row in LEFT],
            np.array(LEFT),
            jnp.array(LEFT),
        ]
        encoded = transformers.BatchEncoding({"input_ids": LEFT, "attention_mask": mask})
        kinds += [encoded, dict(encoded), transformers.BatchEncoding({"input_ids": LEFT})]
        kinds += [encoded.convert_to_tensors("pt"), {**encoded, "token_type_ids": [[0] * 7] * 2}]
        for given in kinds:
            found = both.ours.generate(given, max_new_tokens=5)
            assert np.asarray(found).tolist() == expected, given
        assert both.ours.generate(**encoded, max_new_tokens=5).tolist() == expected
        # jlayer.generate gives the new ones alone, and takes a flat list as it stands.
        new = [row[-5:] for row in expected]
        for given in kinds:
            found = jlayer.generate(both.ours, given, max_new_tokens=5)
            assert [one.token_ids for one in found] == new
        flat = jlayer.generate(both.ours, LEFT[1], max_new_tokens=5).token_ids
        whole = both.theirs.generate(
            torch.tensor(LEFT[1:]), attention_mask=torch.ones(1, 7), max_new_tokens=5
        )
        assert flat == whole[0, -5:].tolist() != new[1]


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_any_kind_leaves_out_what_it_marks_wherever_it_stands(both, dtype):
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]], dtype=dtype)
    with both.published(pad_token_id=PAD):
        both.same(torch.tensor(LEFT), attention_mask=mask, max_new_tokens=6)


def test_a_mask_that_fits_nothing_is_refused(both):
    for mask, words in (
        ([[1, 1]], "another shape"),
        (1, "another shape"),
        ([[1, 1, 2]], "found 2, expected 0 .* or 1"),
        ([[0, 0, 0]], "a row of padding alone"),
    ):
        with pytest.raises(UsageError, match=words):
            both.ours.generate([SHORT], attention_mask=mask, max_new_tokens=2)
    with pytest.raises(UsageError, match="given twice"):
        both.ours.generate(
            {"input_ids": [SHORT], "attention_mask": [[1, 1, 1]]}, attention_mask=[[1, 1, 1]]
        )
    with pytest.raises(UsageError, match="expected input_ids"):
        both.ours.generate({"ids": [SHORT]})


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "sequence_bias": [[[PAD], 30.0]]},
        {"encoder_repetition_penalty": 2.5},
        {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[44], 30.0], [[PAD], 20.0]]},
        {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 3.0},
        {"encoder_repetition_penalty": 3.0, "repetition_penalty": 1.4},
        {"min_length": 11, "eos_token_id": [80, 4]},
        {"min_length": 40, "min_new_tokens": 1, "eos_token_id": list(range(10, 133))},
        {"min_length": 40, "min_new_tokens": 0, "eos_token_id": list(range(10, 133))},
        {"min_new_tokens": 3, "eos_token_id": list(range(10, 133))},
        {"max_length": 10, "max_new_tokens": None},
    ],
    ids=str,
)
def test_options_act_on_a_padded_prompt_as_in_transformers(both, options):
    options = {"max_new_tokens": 9, **options}
    with both.published(pad_token_id=PAD):
        both.same(torch.tensor(LEFT), **options)
        holes = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]])
        both.same(torch.tensor(LEFT), attention_mask=holes, **options)
        both.same(torch.tensor([LONG]), **options)


def test_rows_that_end_early_are_filled_as_in_transformers(both):
    rows = torch.tensor([LONG, LONG[::-1]])
    free = both.same(rows, max_new_tokens=8)
    end = next(token for token in free[0][7:] if token not in free[1])
    for published, options in (
        ({}, {"pad_token_id": 77}),
        ({"pad_token_id": 78}, {}),
        ({"pad_token_id": 78}, {"pad_token_id": torch.tensor(77)}),
        ({"pad_token_id": 78}, {"pad_token_id": None}),
        ({}, {}),
    ):
        with both.published(**published):
            found = both.same(rows, max_new_tokens=8, eos_token_id=end, **options)
            assert len(found[0]) == 15
            assert found[0][-1] != free[0][-1]


# Lengths


def test_a_published_max_length_that_leaves_no_room_is_refused(both):
    with both.published(max_length=7):
        for refused in (both.theirs, both.ours):
            with pytest.raises((ValueError, UsageError), match=r"max_length.*7|7.*max_length"):
                refused.generate(torch.tensor([LONG]))
        for call in (jlayer.generate, jlayer.stream):
            with pytest.raises(UsageError, match=r"json: max_length: found 7, .* 7 .*max_new_tok"):
                call(both.ours, LONG)
        # The padding counts, the user's choice wins, and where there is room all of it is used.
        with pytest.raises(UsageError, match="max_length"):
            both.ours.generate(torch.tensor([[PAD] * 4 + SHORT]), pad_token_id=PAD)
        both.same(torch.tensor([LONG]), max_new_tokens=2)
        both.same(torch.tensor([LONG]), max_length=9)
        assert len(both.same(torch.tensor([SHORT]))[0]) == 7
    for call in (both.theirs.generate, both.ours.generate):
        with pytest.raises((ValueError, UsageError), match="max_length"):
            call(torch.tensor([LONG]), max_length=5)


def test_a_published_max_new_tokens_of_nothing_is_refused_and_can_be_overruled(both):
    both.ours.generation_config, before = {"max_new_tokens": 0}, both.ours.generation_config
    try:
        with pytest.raises(CheckpointError, match=r"max_new_tokens: found 0.*-n"):
            jlayer.generate(both.ours, LONG)
        assert len(jlayer.generate(both.ours, LONG, max_new_tokens=2).token_ids) == 2
        assert jlayer.generate(both.ours, LONG, max_new_tokens=0).token_ids == []  # asked for
    finally:
        both.ours.generation_config = before


def test_a_prompt_that_fills_the_context_is_refused(both):
    with pytest.raises(UsageError, match="512 tokens fill the context of 512"):
        jlayer.generate(both.ours, [7] * 512)
    with pytest.raises(ValueError, match="max_length"):
        both.theirs.generate(torch.tensor([[7] * 512]))


@pytest.mark.parametrize("published", [{"max_new_tokens": 5000}, {"max_length": 5000}, {}])
def test_what_the_makers_set_is_cut_to_the_room(both, published):
    prompt = [7] * 505
    with both.published(**published):
        assert len(jlayer.generate(both.ours, prompt).token_ids) == 7
        for asked in ({"max_new_tokens": 8}, {"max_length": 513}):
            with pytest.raises(UsageError, match=f"{next(iter(asked))}.* 512; .* 7"):
                jlayer.generate(both.ours, prompt, **asked)


@pytest.mark.usefixtures("all_shapes")
def test_what_the_makers_set_is_cut_to_the_memory(both):
    needed = 0
    with jlayer.AutoModel.from_pretrained(both.folder, device="cpu") as model:
        decoding, _ = model.decoding(LONG, options={"max_new_tokens": 60})
        needed = decoding.plan.device_peak_bytes
        decoding.close()
    options = {"device": "cpu", "device_memory": needed, "keeps_layers": False}
    with jlayer.AutoModel.from_pretrained(both.folder, **options) as model:
        with pytest.raises(jlayer.DoesNotFitError):
            model.decoding(LONG, options={"max_new_tokens": 500})
        model.generation_config = {"max_new_tokens": 500}
        decoding, _ = model.decoding(LONG, options={})
        decoding.close()
        assert "max_new_tokens is 500, cut to" in decoding.notes[0]
        limits = {lane.limit for lane in decoding.lanes}
        assert len(limits) == 1
        assert 60 <= limits.pop() < 500


# Arguments


def test_arguments_stand_in_transformers_order():
    theirs = list(inspect.signature(transformers.GenerationMixin.generate).parameters)
    ours = list(inspect.signature(jlayer.Model.generate).parameters)
    assert ours[: len(theirs) - 1] == theirs[:-1]  # the last is kwargs


def test_arguments_as_in_transformers(both):
    tokenizer = object()
    ids = torch.tensor([LONG])
    plain = both.same(ids, max_new_tokens=4)
    for options in (
        {"synced_gpus": False},
        {"synced_gpus": None, "assistant_model": None, "stopping_criteria": None},
        {"logits_processor": transformers.LogitsProcessorList()},
        {"stopping_criteria": transformers.StoppingCriteriaList()},
        {"use_cache": True, "trust_remote_code": False},
        {"tokenizer": tokenizer},
        {"eos_token_id": torch.tensor(132)},
        {"eos_token_id": torch.tensor([132, 131])},
    ):
        assert both.same(ids, max_new_tokens=4, **options) == plain
    assert both.ours.generate(inputs=ids, max_new_tokens=4).tolist() == plain
    assert both.ours.generate(ids.to(both.ours.device), max_new_tokens=4).tolist() == plain
    assert both.ours.generate(input_ids=ids, max_new_tokens=4).tolist() == plain
    end = plain[0][8]
    for kind in (torch.tensor(end), torch.tensor([end]), np.array(end), jnp.array([end, 132])):
        assert both.ours.generate(ids, max_new_tokens=4, eos_token_id=kind).tolist()[0][-1] == end
    with pytest.raises(UsageError, match="inputs: input_ids was given too"):
        both.ours.generate(ids, input_ids=ids)
    details = both.ours.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    assert details.sequences.tolist() == details["sequences"].tolist() == plain


def test_a_generation_config_is_the_users(both):
    ids = torch.tensor([LEFT[1]])
    Config = transformers.GenerationConfig
    with both.published(max_new_tokens=9, pad_token_id=3, repetition_penalty=1.1):
        with_room, _ = both.ours.decoding(ids, options={})
        with_room.close()
        assert with_room.notes == ()
        for config in (
            Config(max_new_tokens=3),
            Config(max_length=9, max_new_tokens=None, pad_token_id=PAD),
            Config(repetition_penalty=3.0, some_field_of_the_users=1),
            Config(return_dict_in_generate=None, eos_token_id=[5]),
        ):
            ours = both.ours.generate(ids, config)
            if config.max_length is None:
                assert ours.tolist() == both.theirs.generate(ids, config).tolist()
            assert both.ours.generate(ids, generation_config=config).tolist() == ours.tolist()
            new = jlayer.generate(both.ours, ids, generation_config=config)[0].token_ids
            assert new == ours[0, 7:].tolist()
        both.same(ids, generation_config=Config(max_new_tokens=3), max_new_tokens=5)
        both.same(ids, generation_config=Config(num_beams=3, max_new_tokens=3))
        with pytest.raises(UsageError, match="suppress_tokens"):
            both.ours.generate(ids, Config(suppress_tokens=[3]))
        with pytest.raises(UsageError, match="generation_config: found int"):
            both.ours.generate(ids, 5)


def test_no_ids_start_from_the_beginning_token(both):
    with both.published(bos_token_id=4):
        expected = both.theirs.generate(max_new_tokens=4).tolist()
        assert both.ours.generate(max_new_tokens=4).tolist() == expected
        expected = both.theirs.generate(max_new_tokens=4, bos_token_id=6).tolist()
        assert both.ours.generate(max_new_tokens=4, bos_token_id=6).tolist() == expected
    with pytest.raises(UsageError, match="no bos_token_id"):
        both.ours.generate(max_new_tokens=4)


def test_ids_of_every_shape_give_all_their_answers(both):
    options = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "seed": 1}
    for flat in (LONG, np.array(LONG), [np.int64(token) for token in LONG]):
        assert len(both.ours.generate(flat, **options)) == 2
    assert both.ours.logits({"input_ids": [LONG]}).shape == (1, 7, 133)
    with pytest.raises(UsageError, match="logits: found padding"):
        both.ours.logits({"input_ids": [LONG], "attention_mask": [[0] + [1] * 6]})


# Draws


def test_equal_prompts_draw_alike_with_a_seed_and_each_their_own_without(both):
    options = {"max_new_tokens": 12, "temperature": 1.5}
    seeded = jlayer.generate(both.ours, [LONG] * 3, seed=4, **options)
    assert len({tuple(one.token_ids) for one in seeded}) == 1
    drawn = jlayer.generate(both.ours, [LONG] * 3, **options)
    assert len({tuple(one.token_ids) for one in drawn}) == 3
    for one in drawn:  # and its seed gives it again
        again = jlayer.generate(both.ours, LONG, seed=one.seed, **options)
        assert again.token_ids == one.token_ids
    rows = both.ours.generate([LONG] * 3, max_new_tokens=12, do_sample=True)
    assert len({tuple(row) for row in rows}) == 3


def test_a_seed_means_the_same_however_a_row_is_padded(both):
    options = {"max_new_tokens": 9, "do_sample": True, "seed": 8, "pad_token_id": PAD}
    padded = both.ours.generate(LEFT, **options)
    assert padded[1][7:] == both.ours.generate([SHORT], **options)[0][3:]
