"""Every option against transformers' own processors, and draws against the rule of the noise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.engine import sample
from jlayer.engine.options import SamplingOptions
from jlayer.engine.sample import choose, gumbel
from jlayer.errors import CheckpointError, UsageError

V = 97
N_PROMPT = 7


def random_logits(seed=0, *, n_rows=None):
    shape = (V,) if n_rows is None else (n_rows, V)
    return (np.random.default_rng(seed).standard_normal(shape) * 4).astype(np.float32)


def history_of(n, seed=0):
    """Few distinct tokens, so that penalties and n-grams find repetitions."""
    return np.random.default_rng(seed).integers(0, 9, n).tolist()


def warped(logits, options, history, n_prompt=N_PROMPT):
    """Float64 [V]: what sampling draws from, -inf where it does not, up to a shift."""
    scores = sample.processed(logits, options=options, history=history, n_prompt=n_prompt)
    ids, weights = sample.candidates(scores, options=options)
    full = np.full(len(logits), -np.inf)
    full[ids] = weights
    return full


# Against transformers


@pytest.fixture(scope="module")
def reference():
    """options -> what transformers makes of logits after a history, through its own composition."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda ours, custom: ours,
    )

    def run(options, logits, history, n_prompt=N_PROMPT):
        config = GenerationConfig(**options)
        config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
        config._eos_token_tensor = (
            None if config.eos_token_id is None else torch.tensor(config.eos_token_id)
        )
        processors = GenerationMixin._get_logits_processor(
            model, config, input_ids_seq_length=n_prompt
        )
        ids = torch.tensor([history])
        scores = processors(ids, torch.tensor(logits)[None])[0].numpy()
        return scores, [type(each).__name__ for each in processors]

    return run


ALWAYS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"sequence_bias": {(3,): 2.5, (90,): -1.0, (4,): -math.inf}},
    {"sequence_bias": {(8, 3): 2.5, (90,): -1.0, (5, 8, 3): 0.3, (3,): -math.inf, (0,): 0.1}},
    {"sequence_bias": [[[7], 0.1], [[2, 5, 7], 0.7], [[5, 7], -2.3], [[1] * 30, 9.0]]},
    {"bad_words_ids": [[3], [8, 90], [5, 7], [2, 5, 1], [1] * 30]},
    {"bad_words_ids": [[2], [5, 2], [4]], "eos_token_id": [2, 5]},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 40, "eos_token_id": [2, 5]},
    {"min_length": 40, "eos_token_id": [2, 5]},
    {"min_length": 15, "eos_token_id": [2, 5]},
    {"min_length": 3, "min_new_tokens": 2, "eos_token_id": [5]},
    {
        "sequence_bias": {(1,): 3.0, (2,): -2.0},
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[11]],
        "min_new_tokens": 30,
        "eos_token_id": [2, 60],
    },
]
SAMPLING = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V + 20},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "top_p": 1e-6},
    {"top_k": 0, "min_p": 0.1},
    {"top_k": 0, "min_p": 1.0},
    {"top_k": 0, "min_p": 0.0},
    {"top_k": 0, "typical_p": 0.9},
    {"top_k": 0, "typical_p": 0.2, "temperature": 2.0},
    {"top_k": 20, "typical_p": 1e-6},
    {"top_k": 0, "epsilon_cutoff": 0.02},
    {"top_k": 0, "epsilon_cutoff": 0.99},
    {"top_k": 0, "eta_cutoff": 0.3, "temperature": 3.0},
    {"top_k": 9, "eta_cutoff": 0.99},
    {"temperature": 1.8, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
    {"temperature": 3.0, "top_k": 12, "top_p": 0.6},
]


@pytest.mark.reference
@pytest.mark.parametrize("options", ALWAYS, ids=str)
@pytest.mark.parametrize("n_history", [N_PROMPT, 20])
def test_processors_give_the_very_scores_of_transformers(reference, options, n_history):
    logits, history = random_logits(n_history), history_of(n_history)
    expected, names = reference(options, logits, history)
    ours = SamplingOptions.from_mapping(options, vocab_size=V)
    found = sample.processed(logits, options=ours, history=history, n_prompt=N_PROMPT)
    assert names, "this case tests nothing"
    np.testing.assert_array_equal(found, expected)
    assert choose(logits, options=ours, history=history, n_prompt=N_PROMPT).token_id == int(
        expected.argmax()
    )


@pytest.mark.reference
@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_warpers_keep_and_weigh_what_transformers_does(reference, options, seed):
    options = {"do_sample": True, **options}
    logits, history = random_logits(seed), history_of(20, seed)
    expected, _ = reference(options, logits, history)
    found = warped(logits, SamplingOptions.from_mapping(options, vocab_size=V), history)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(found)
    # One rounding to float32, at scores up to 16 / 0.3.
    expected, found = expected[kept] - expected.max(), found[kept] - found.max()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=8e-6)


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(20))
def test_all_options_together_act_in_the_order_of_transformers(reference, seed):
    rng = np.random.default_rng(seed)
    options = {
        "do_sample": True,
        "sequence_bias": {(int(i),): float(rng.normal() * 3) for i in range(12)},
        "bad_words_ids": [[9], [13, 14]],
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
        "min_length": 22,
        "min_new_tokens": 25,
        "eos_token_id": [1, 80],
        "temperature": float(rng.uniform(0.5, 2)),
        "top_k": 30,
        "top_p": 0.92,
        "min_p": 0.02,
        "typical_p": 0.95,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.05,
    }
    logits, history = random_logits(seed), history_of(24, seed)
    expected, names = reference(options, logits, history)
    assert names == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
    ]
    found = warped(logits, SamplingOptions.from_mapping(options, vocab_size=V), history)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(found)
    expected, found = expected[kept] - expected.max(), found[kept] - found.max()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=8e-6)


# Penalties on use, which transformers lacks


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    logits, history = random_logits(), [3, 3, 4, 5, 5, 5, 6]
    options = SamplingOptions(presence_penalty=0.5, frequency_penalty=0.25)
    found = sample.processed(logits, options=options, history=history, n_prompt=2)
    expected = logits.copy()
    for token, count in {4: 1, 5: 3, 6: 1}.items():
        expected[token] -= np.float32(0.25 * count) + np.float32(0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[3], found[7]) == (logits[3], logits[7])


def test_presence_and_frequency_penalties_follow_the_repetition_penalty():
    logits = np.zeros(4, np.float32)
    logits[1] = 2.0
    options = SamplingOptions(repetition_penalty=2.0, presence_penalty=0.5)
    found = sample.processed(logits, options=options, history=[0, 1], n_prompt=1)
    assert found[1] == 2.0 / 2.0 - 0.5


# The noise


def philox4x64(counter, key):
    """Philox4x64-10 as published, in integers of any size: Salmon et al. (2011), Random123."""
    mask, c, k = (1 << 64) - 1, list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & mask, (first >> 64) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_philox_of_this_file_is_the_published_one():
    """Random123's known answer for a zero counter and key (kat_vectors)."""
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


def noise_of(seed, sequence, position, n):
    """Gumbel noise of tokens 0 to n - 1 by the rule that `sample` states, without numpy."""
    words = []
    for block in range(1, -(-n // 4) + 1):
        words += philox4x64([block, position, sequence, 0], [seed, 0])
    return [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in words[:n]]


def drawn(logits, *, seed, sequence=0, position=0, **options):
    """The token that plain sampling at temperature 1 draws."""
    options = SamplingOptions(**{"do_sample": True, "top_k": 0, "seed": seed, **options})
    history = Positions(position)
    return choose(logits, options=options, history=history, n_prompt=0, sequence=sequence).token_id


class Positions:
    """A history of which only the length is read, so that it may be billions of tokens long."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


PLACES = [(0, 0, 0), (1, 0, 5), (2**64 - 1, 3, 8191), (20240229, 2**40, 2**33)]


@pytest.mark.parametrize(("seed", "sequence", "position"), PLACES)
def test_the_noise_is_the_published_generators(seed, sequence, position):
    """The difference of two tokens' noise, measured by the logit that makes up for it."""
    noise = noise_of(seed, sequence, position, 12)
    place = {"seed": seed, "sequence": sequence, "position": position}
    for token in range(1, 12):
        lead = noise[0] - noise[token]
        for above in (-1, 1):  # 4e-6: float32 logits up to 2^6 are finer
            logits = np.full(12, -1e9, np.float32)
            logits[[0, token]] = 0, lead + 4e-6 * above
            assert drawn(logits, **place) == (token if above == 1 else 0)


def test_noise_stays_what_it_was():
    """Written down once: a change here changes every user's text at a given seed."""
    assert noise_of(7, 1, 42, 3) == pytest.approx(
        [-0.2615806753931874, 0.9560450203728484, -0.6221713981334074], rel=1e-13
    )
    found = [drawn(np.zeros(50, np.float32), seed=7, position=p) for p in range(12)]
    assert found == [27, 28, 44, 32, 15, 27, 4, 32, 7, 11, 17, 21]


places = st.integers(0, 2**31)


@given(st.integers(0, 2**64 - 1), places, places, st.integers(1, 300), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_noise_of_a_token_does_not_depend_on_the_other_tokens(seed, sequence, position, n, more):
    place = {"seed": seed, "sequence": sequence, "position": position}
    few = np.zeros(n, np.float32)
    many = np.concatenate([few, np.full(more, -1e9, np.float32)])
    assert drawn(few, **place) == drawn(many, **place)
    ruled_out = np.flatnonzero(np.random.default_rng(seed).random(n) < 0.5)[: n - 1]
    bias = {int(token): -math.inf for token in ruled_out}
    noise = np.array(noise_of(seed, sequence, position, n))
    noise[ruled_out] = -np.inf
    assert drawn(few, **place, logit_bias=bias) == noise.argmax()


def test_noise_is_finite_at_both_ends():
    lowest, highest = gumbel(np.array([0, 2**64 - 1], np.uint64))
    assert lowest == pytest.approx(-math.log(53 * math.log(2)))
    assert highest == pytest.approx(53 * math.log(2))


def test_draws_differ_between_seeds_sequences_and_positions():
    logits = np.zeros(10_000, np.float32)
    found = [
        drawn(logits, seed=seed, sequence=sequence, position=position)
        for seed in (0, 1)
        for sequence in (0, 1)
        for position in (0, 1, 2)
    ]
    assert len(set(found)) == len(found)


def test_draws_follow_the_softmax():
    """Chi-square of 8,000 draws against softmax probabilities; at a fixed seed, so no flake."""
    logits = (np.random.default_rng(3).standard_normal(23) * 1.5).astype(np.float32)
    options = SamplingOptions(do_sample=True, temperature=1.3, top_k=0, seed=11)
    n = 8_000
    ids = [
        choose(logits, options=options, history=range(p % 200), n_prompt=0, sequence=p).token_id
        for p in range(n)
    ]
    weights = np.exp(logits.astype(np.float64) / 1.3)
    expected = n * weights / weights.sum()
    counts = np.bincount(ids, minlength=23)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 40.29  # 99th percentile at 22 degrees of freedom


@pytest.mark.parametrize("n_prompt", [0, 3, 6])
def test_a_draw_is_the_largest_of_filtered_logits_over_temperature_plus_noise(n_prompt):
    options = SamplingOptions(do_sample=True, temperature=1.7, top_k=0, seed=12)
    for n_history in range(6, 30):
        logits, history = random_logits(n_history), history_of(n_history)
        found = choose(logits, options=options, history=history, n_prompt=n_prompt, sequence=4)
        expected = logits.astype(np.float64) / 1.7 + noise_of(12, 4, n_history, V)
        assert found.token_id == int(expected.argmax())


# One token in many ways


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals():
    logits = np.zeros(9, np.float32)
    logits[[4, 6]] = 3.0
    for options in (SamplingOptions(), SamplingOptions(do_sample=True, temperature=0)):
        assert choose(logits, options=options, history=[], n_prompt=0).token_id == 4


def test_a_tiny_temperature_is_greedy_and_never_overflows():
    options = SamplingOptions(do_sample=True, temperature=5e-324, seed=1)
    logits = random_logits()
    found = choose(logits, options=options, history=[1], n_prompt=1)
    assert found.token_id == int(logits.argmax())


def test_a_draw_depends_on_the_row_alone():
    """Batch and memory layout: strided rows and fresh copies draw alike."""
    rows = random_logits(1, n_rows=6)
    options = SamplingOptions(do_sample=True, top_p=0.9, seed=3)
    for sequence in range(6):
        alike = {
            choose(row, options=options, history=[1, 2], n_prompt=1, sequence=sequence).token_id
            for row in (
                rows[sequence],
                rows[sequence].copy(),
                np.asfortranarray(rows)[sequence],
            )
        }
        assert len(alike) == 1


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits()
    options = SamplingOptions(repetition_penalty=1.5, logit_bias={3: 50.0}, logprobs=4)
    found = choose(logits, options=options, history=[3], n_prompt=1)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert found.token_id == 3
    assert found.logprob == pytest.approx(exact[3], abs=1e-12)
    order = np.argsort(-exact)[:4]
    assert [token for token, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(exact[order].tolist(), abs=1e-12)


def test_logprobs_of_equals_are_listed_by_id():
    logits = np.zeros(6, np.float32)
    options = SamplingOptions(logprobs=3)
    found = choose(logits, options=options, history=[], n_prompt=0)
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert SamplingOptions(logprobs=0).logprobs == 0
    found = choose(logits, options=SamplingOptions(logprobs=0), history=[], n_prompt=0)
    assert found.top == ()
    assert found.logprob == pytest.approx(-math.log(6))


rows = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12)


@given(rows, st.floats(1e-9, 1.0), st.integers(0, 14), st.floats(0, 1), st.floats(1e-3, 10))
@settings(max_examples=200, deadline=None)
def test_filters_always_leave_the_likeliest_and_what_top_p_needs(row, top_p, top_k, min_p, t):
    logits = np.array(row, np.float32)
    options = SamplingOptions(
        do_sample=True, temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, seed=0
    )
    ids, weights = sample.candidates(logits, options=options)
    assert int(logits.argmax()) in ids
    assert weights.max() == 0
    assert (np.diff(ids) > 0).all()
    only_p = SamplingOptions(do_sample=True, temperature=t, top_k=0, top_p=top_p)
    kept, _ = sample.candidates(logits, options=only_p)
    mass = np.exp((logits - logits.max()).astype(np.float64) / t)
    mass /= mass.sum()
    assert mass[kept].sum() >= top_p - 1e-12
    assert mass[kept].min() >= np.delete(mass, kept).max(initial=0.0)
    # Without its last token the set would fall short.
    assert mass[kept].sum() - mass[kept].min() <= top_p + 1e-12


def test_the_smallest_top_p_leaves_the_likeliest():
    options = SamplingOptions(do_sample=True, top_k=0, top_p=5e-324)
    for logits in (random_logits(), np.zeros(7, np.float32)):
        ids, _ = sample.candidates(logits, options=options)
        assert ids.tolist() == [int(logits.argmax())]


def test_of_equals_at_the_edge_of_top_p_the_lower_ids_stay():
    options = SamplingOptions(do_sample=True, top_k=0, top_p=0.5)
    ids, _ = sample.candidates(np.zeros(4, np.float32), options=options)
    assert ids.tolist() == [0, 1]


# Logits that cannot be used


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_the_checkpoints_fault(bad):
    logits = random_logits()
    logits[13] = bad
    with pytest.raises(CheckpointError, match=r"position 2: 1 of 97 logits.*token 13"):
        choose(logits, options=SamplingOptions(), history=[1, 2], n_prompt=2)


def test_options_that_rule_out_every_token():
    options = SamplingOptions(no_repeat_ngram_size=1)
    with pytest.raises(UsageError, match="rule out every token"):
        choose(np.zeros(3, np.float32), options=options, history=[0, 1, 2], n_prompt=3)


def test_a_penalty_beyond_float32_is_refused():
    options = SamplingOptions(do_sample=True, repetition_penalty=1e-40, seed=0)
    with pytest.raises(UsageError, match="beyond float32"):
        choose(np.ones(3, np.float32), options=options, history=[0], n_prompt=1)
