"""Beam search against transformers' own: models of several kinds, alone and in batches."""

import numpy as np
import pytest

import jlayer
from jlayer.engine import beams, sample
from jlayer.engine.options import SamplingOptions
from jlayer.errors import UsageError
from tests.campaigns import slow_but
from tests.engine.drop_in import Both
from tests.engine.lanes import check_rows, limited
from tests.reference import dense_forms, mixture_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

PAD = 9
LONG, SHORT = [5, 17, 80, 33, 121, 64, 17], [44, 101, 7]
BATCH = [LONG, [PAD] * 4 + SHORT, LONG[::-1]]
# Longer than a window, and than what is shared at the least.
PROMPT = np.random.default_rng(4).integers(3, 133, 40).tolist()
SOME_END, MANY_END = [7, 21, 100, 60, 3, 44], list(range(10, 50))
SEARCHES = {
    "plain": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": SOME_END},
    "short": {"num_beams": 2, "length_penalty": -2.0, "eos_token_id": MANY_END},
    "early": {"num_beams": 3, "early_stopping": True, "eos_token_id": MANY_END},
    "never": {
        "num_beams": 5,
        "num_return_sequences": 5,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "eos_token_id": MANY_END,
    },
    "no penalty": {"num_beams": 4, "length_penalty": 0.0, "eos_token_id": MANY_END},
    "options": {
        "num_beams": 3,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[46], [91, 91]],
        "sequence_bias": [[[46, 93], 3.0]],
        "min_new_tokens": 4,
        "eos_token_id": MANY_END,
        "renormalize_logits": True,
    },
}


def check(both, ids, *, scale=1e-5, **options):
    """The same texts, scores and rows as transformers gives; logits within `scale` of the most."""
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options = {"max_new_tokens": 10, "pad_token_id": PAD, **options, **details}
    theirs = both.theirs.generate(torch.tensor(ids), **options)
    ours = both.ours.generate(torch.tensor(ids), **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
    found = ours.sequences_scores.numpy()
    np.testing.assert_allclose(found, theirs.sequences_scores.numpy(), rtol=0, atol=1e-5)
    for name in ("scores", "logits"):
        pairs = list(zip(ours[name], theirs[name], strict=True))
        for own, other in pairs:
            there = ~torch.isnan(own)  # those of a prompt that has ended are not computed here
            most = other[torch.isfinite(other)].abs().max().item()
            np.testing.assert_allclose(own[there], other[there], rtol=0, atol=scale * most)
        assert not torch.isnan(pairs[0][0]).any()
    return ours


@pytest.mark.parametrize("ids", [[LONG], BATCH], ids=["one", "padded batch"])
@pytest.mark.parametrize("search", SEARCHES)
def test_beams_are_those_of_transformers(both, ids, search):
    check(both, ids, **SEARCHES[search])


# One with windows; one with states, which are computed anew where a beam goes on from another; one
# with experts. A beam of the second has a state by which rounding grows tenfold in a step:
# transformers' own float32 is 2e-5 from float64 there and 7e-6 elsewhere, this 9e-5 and 1e-5.
FAMILIES = [
    ("gemma3", dense_forms, 1e-5),
    ("qwen3_5", dense_forms, 3e-5),
    ("mixtral", mixture_forms, 1e-5),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "forms", "scale"), FAMILIES, ids=["windows", "states", "experts"]
)
def test_beams_of_other_kinds_of_layers_are_those_of_transformers(family, forms, scale, tmp_path):
    other = Both(forms.save(tmp_path / "source", family))
    with other.ours:
        check(other, [PROMPT, PROMPT[::-1]], scale=scale, **SEARCHES["several"])
        check(other, [PROMPT], scale=scale, **SEARCHES["never"])


def test_equal_prompts_and_ones_that_are_longer_share_entries(both):
    check(both, [PROMPT, PROMPT], **SEARCHES["several"])


def test_a_generation_config_says_it_too_and_a_user_overrules_it(both):
    with both.published(num_beams=3, length_penalty=0.5, early_stopping=True):
        found = both.same(torch.tensor([LONG]), max_new_tokens=6)
        assert both.same(torch.tensor([LONG]), max_new_tokens=6, num_beams=1) != found
        assert jlayer.generate(both.ours, LONG, max_new_tokens=6).token_ids == found[0][7:]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4, "top_k": 5, "temperature": 0.7},
        {"num_beams": 2, "top_k": 0, "top_p": 0.5, "eos_token_id": MANY_END},
        {"num_beams": 3, "top_k": 0, "typical_p": 0.3, "epsilon_cutoff": 0.02},
    ],
    ids=str,
)
def test_beams_are_drawn_as_transformers_draws_them_with_the_same_noise(both, options, monkeypatch):
    """The largest sums of log-probabilities and Gumbel noise are draws without replacement."""
    n, seed = options["num_beams"], 11
    n_drawn = iter(range(1 << 20))

    def multinomial(probabilities, num_samples):
        ids, position = np.arange(133), len(LONG) + next(n_drawn)
        keys = [sample.NoiseKey(seed, beam, position) for beam in range(n)]
        noise = np.concatenate([sample.noise(ids, key) for key in keys])
        return torch.topk(probabilities.double().log() + torch.tensor(noise), num_samples)[1]

    ours = both.ours.generate([LONG], do_sample=True, max_new_tokens=8, seed=seed, **options)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    theirs = both.theirs.generate(torch.tensor([LONG]), do_sample=True, max_new_tokens=8, **options)
    assert [row[: len(own)] for own, row in zip(ours, theirs.tolist(), strict=True)] == ours


@pytest.mark.parametrize("rows", slow_but([2, 3, 8], (2,)))
def test_beams_that_do_not_fit_in_one_pass_wait_for_each_other(both, rows):
    options = {**SEARCHES["several"], "max_new_tokens": 8}
    expected = both.ours.generate([PROMPT, LONG], **options)
    with limited(both.ours, rows=rows):
        assert both.ours.generate([PROMPT, LONG], **options) == expected


def test_beams_list_the_rows_that_they_share_and_give_all_of_them_back(both):
    model, options = both.ours, {"num_beams": 4, "max_new_tokens": 9, "speculate": "off"}
    decoding, _ = model.decoding(PROMPT, options=options)
    scheduler, lanes = model.engine.scheduler, decoding.riding
    scheduler.join(lanes)
    assert (len(lanes), len(decoding.lanes)) == (4, 1)
    for n_new in range(8):
        scheduler.advance(decoding.lanes, once=True)
        tables = [lane.table.rows for lane in lanes]
        assert {len(rows) for rows in tables} == {len(PROMPT) + n_new}
        prompts = np.stack([rows[: len(PROMPT)] for rows in tables])
        assert (prompts == prompts[0]).all()
        assert len(np.unique(np.concatenate(tables))) <= len(PROMPT) + 4 * n_new
        pool = model.engine.caches.pool
        assert pool.n_free + len(np.unique(np.concatenate(tables))) == pool.n_rows
    scheduler.advance(decoding.lanes, once=True)
    assert decoding.lanes[0].finish_reason == "length"
    decoding.close()
    assert model.engine.n_alive == 0


def test_a_search_that_is_dropped_or_suspended_leaves_nothing(both):
    model, options = both.ours, {"num_beams": 3, "max_new_tokens": 9}
    expected = jlayer.generate(model, PROMPT, **options).token_ids
    decoding, _ = model.decoding(PROMPT, options=options)
    scheduler = model.engine.scheduler
    scheduler.join(decoding.riding)
    for _ in range(4):
        scheduler.advance(decoding.lanes, once=True)
    decoding.suspend()
    assert model.engine.n_alive == 0
    assert decoding.admit_waiting()
    for _ in decoding:
        pass
    assert decoding.lanes[0].token_ids == expected
    assert model.engine.n_alive == 0


def test_a_kept_text_of_a_search_is_gone_on_from(both):
    model = both.ours
    model.engine.kept.most = 1
    try:
        decoding, _ = model.decoding(PROMPT, options={"num_beams": 3, "max_new_tokens": 9})
        decoding.keeps = True
        for _ in decoding:
            pass
        said = [*PROMPT, *decoding.lanes[0].token_ids, 5, 6]
        options = {"max_new_tokens": 5, "speculate": "off"}
        more, _ = model.decoding(said, options=options)
        assert more.stats.kept_tokens >= len(PROMPT)
        for _ in more:
            pass
        check_rows(model)
    finally:
        model.engine.kept.most = 0
        model.engine.kept.clear()
    assert more.lanes[0].token_ids == jlayer.generate(model, said, **options).token_ids


def test_what_goes_badly_with_beams_is_refused(both):
    for options, words in (
        ({"num_return_sequences": 5}, "num_return_sequences: found 5 with num_beams 3"),
        ({"speculate": "lookup"}, "speculate: found 'lookup' with num_beams 3"),
        ({"draft_tokens": 4}, "draft_tokens: found 4 with num_beams 3"),
        ({"num_beam_groups": 3}, "num_beam_groups"),
        ({"diversity_penalty": 0.5}, "diversity_penalty"),
        ({"streamer": object()}, "streamer: found with num_beams 3"),
        ({"length_penalty": 200.0}, "length_penalty: found 200.0, whose scores of 20 tokens"),
        ({"length_penalty": -1e300, "max_new_tokens": 2}, "length_penalty: found -1e.300, whose"),
        ({"length_penalty": -29.0}, "num_beams: the best text's score is .*, expected one above"),
        ({"do_sample": True, "temperature": 1e-30}, "num_beams: the best text's score is .*e.30,"),
        ({"do_sample": True, "temperature": 1e-300}, "num_beams: the best text's score is -inf,"),
    ):
        with pytest.raises(UsageError, match=words):
            both.ours.generate([LONG], num_beams=3, **options)
    assert both.ours.engine.n_alive == 0
    jlayer.generate(both.ours, LONG, num_beams=3, speculate="auto", max_new_tokens=2)
    for penalty in (1e-320, 29.0, -3.0, 1e300):
        n_tokens = 1 if penalty == 1e300 else 20
        ids = both.ours.generate(
            [LONG], num_beams=2, length_penalty=penalty, max_new_tokens=n_tokens
        )
        assert len(ids[0]) == len(LONG) + n_tokens


# Text


def test_stop_strings_end_beams_as_in_transformers(fable):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(fable, dtype=torch.float32)
    with jlayer.AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as ours:
        tokenizer = ours.tokenizer
        ids = torch.tensor([tokenizer("Once upon a time there was")["input_ids"]])
        options = {"num_beams": 3, "max_new_tokens": 12, "num_return_sequences": 2}
        text = tokenizer.decode(theirs.generate(ids, **options)[0, ids.shape[1] :])
        given = {**options, "stop_strings": [text[9:12], text[20:22]], "tokenizer": tokenizer}
        expected = theirs.generate(ids, **given, pad_token_id=0, eos_token_id=[1]).tolist()
        found = ours.generate(ids, **given, pad_token_id=0, eos_token_id=[1]).tolist()
        assert found == expected
        assert len(found[0]) < ids.shape[1] + 12
        # jlayer's own looks at new text alone, and leaves the stop string out.
        one, _ = jlayer.generate(ours, ids[0].tolist(), stop=text[9:12], **options)
        assert text[9:12] not in one.text
        assert one.finish_reason == "stop"
        (step,) = jlayer.stream(ours, ids[0].tolist(), num_beams=3, max_new_tokens=12)
        assert step.text == text
        told = jlayer.generate(ours, ids[0].tolist(), num_beams=3, max_new_tokens=4, logprobs=2)
        plain = ours.logits([[*ids[0].tolist(), *told.token_ids]])[0, ids.shape[1] - 1 : -1]
        for row, token, choice in zip(plain, told.token_ids, told.logprobs, strict=True):
            expected = sample.log_softmax(row)[token]
            assert abs(choice["logprob"] - expected) < 1e-4


# The search itself


def test_the_largest_come_first_and_of_equal_ones_the_first():
    values = np.array([1, 3, -np.inf, 3, 2, 3, -np.inf], np.float32)
    assert beams.largest(values, 2).tolist() == [1, 3]
    assert beams.largest(values, 4).tolist() == [1, 3, 5, 4]
    assert beams.largest(values, 7).tolist() == [1, 3, 5, 4, 0, 2, 6]


def test_only_the_first_beam_counts_before_the_first_token():
    search = beams.Search.of(2)
    scores = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))
    options = SamplingOptions(num_beams=2, eos_token_id=2)
    found = search.advanced(scores, options=options, limit=4, grow=lambda made: made)
    assert [beam.tokens for beam in found.running] == [(0,), (1,)]
    assert not found.is_over
    assert not found.is_full
