"""Logits → token, on the host: applies generation options, and adds sampling noise.

The order is that of transformers 5 (`_get_logits_processor`):
    always         [logit_bias], sequence_bias, encoder_repetition_penalty, repetition_penalty,
                   [frequency_penalty, presence_penalty], no_repeat_ngram_size,
                   encoder_no_repeat_ngram_size, bad_words_ids, min_length or min_new_tokens
    when sampling  temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff
Those in brackets are not in transformers. The two penalties act on generated tokens only, as OpenAI
and vLLM define them, and at vLLM's place, right after the repetition penalty. Those of
encoders act on the prompt, which transformers takes for what an encoder read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jlayer.engine.filters import FILTERS
from jlayer.engine.options import SamplingOptions
from jlayer.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Choice:
    """A chosen token and, if options.logprobs is set, log-probabilities.

    They are computed from the raw logits, before any option, as in OpenAI and vLLM. `top`: (id,
    log-probability) of the likeliest tokens, likeliest first. `logits`, `scores`: float32 [V]
    before and after all options, where these are kept.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    scores: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Padding:
    """Tokens of a prompt that the model does not see: how many, and how many of them come first.

    Options act on a padded prompt as in transformers: those that look for repeated tokens see
    padding too, and only repetition_penalty passes over what stands at the beginning.

    `n_embedded`: the places of a prompt of embeddings, with its padding. Options see no id of it,
    but lengths count it; and repetition_penalty passes over as many new tokens as there is padding
    at the beginning, as in transformers.
    """

    n_tokens: int = 0
    n_first: int = 0
    n_embedded: int = 0


NO_PADDING = Padding()


def choose(
    logits: np.ndarray,
    *,
    options: SamplingOptions,
    history: Sequence[int],
    n_prompt: int,
    sequence: int = 0,
    padding: Padding = NO_PADDING,
    allowed: np.ndarray | None = None,
) -> Choice:
    """Chooses the token after `history` (prompt, then new tokens) in sequence number `sequence`.

    `logits`: float32 [V]. `allowed`: bool [V], the tokens that a constraint allows; None: all. The
    noise depends on the seed, the sequence and the position, which is the length of `history`
    without its padding; so plain, speculative and batched decoding choose alike.
    Raises CheckpointError (non-finite logits) or UsageError (the options leave no token).
    """
    _check_finite(logits, position=len(history))
    scores = processed(
        logits,
        options=options,
        history=history,
        n_prompt=n_prompt,
        padding=padding,
        allowed=allowed,
    )
    position = len(history) + padding.n_embedded - padding.n_tokens
    key = NoiseKey(options.seed, sequence, position)
    return pick(scores, logits, options=options, key=key)


def pick(
    scores: np.ndarray, logits: np.ndarray, *, options: SamplingOptions, key: NoiseKey
) -> Choice:
    """The token that `scores` [V] give, which options have made of `logits`. Raises UsageError
    where they leave none."""
    check_choosable(scores, position=key.position)
    if options.is_greedy:
        token = int(np.argmax(scores))
    else:
        assert options.seed is not None, "options.seeded() draws the seed, once for all tokens"
        ids, weights = candidates(scores, options=options)
        token = int(ids[np.argmax(weights + noise(ids, key))])
    found = chosen(token, logits, options=options)
    if options.keeps_logits:
        found = replace(found, logits=np.array(logits, np.float32))
    if options.keeps_scores:
        final = scores if options.is_greedy else warped(scores, options=options)
        final = log_softmax(final) if options.renormalize_logits else final
        found = replace(found, scores=final)
    return found


def chosen(token: int, logits: np.ndarray, *, options: SamplingOptions) -> Choice:
    """A token, with log-probabilities by `logits` where the options ask for them."""
    if options.logprobs is None:
        return Choice(token)
    return _with_logprobs(token, logits, n_top=options.logprobs)


def processed(
    logits: np.ndarray,
    *,
    options: SamplingOptions,
    history: Sequence[int],
    n_prompt: int,
    padding: Padding = NO_PADDING,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Scores, float32 [V]: `logits` after the options that always act; -inf rules a token out.

    Computed in float32 as in transformers, so scores are equal bit for bit and the greedy token is
    the same. They may leave no token: see `check_choosable`.
    """
    scores = np.array(logits, dtype=np.float32)
    n_new = len(history) - n_prompt
    # A score beyond float32 is refused below: `check_choosable`.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        for token, bias in options.logit_bias:
            scores[token] += np.float32(bias)
        if options.sequence_bias:
            _add_bias(scores, history, biases=options.sequence_bias)
        if options.encoder_repetition_penalty != 1.0:  # above 1 makes the prompt's tokens likelier
            penalty = np.float32(1 / options.encoder_repetition_penalty)
            _penalise_repetition(scores, history[:n_prompt], penalty=penalty)
        if options.repetition_penalty != 1.0:
            seen = history[padding.n_first :]
            _penalise_repetition(scores, seen, penalty=np.float32(options.repetition_penalty))
        if options.frequency_penalty or options.presence_penalty:
            _penalise_use(scores, history[n_prompt:], options=options)
    if options.no_repeat_ngram_size:
        _ban_ngrams(scores, history, of=history, size=options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size:
        size = options.encoder_no_repeat_ngram_size
        _ban_ngrams(scores, history, of=history[:n_prompt], size=size)
    for *before, last in options.bad_words_ids:
        # An end is never ruled out so, as in transformers.
        if (before or last not in options.eos_token_id) and _ends_with(history, before):
            scores[last] = -np.inf
    if options.min_new_tokens is None:
        is_short = len(history) + padding.n_embedded < options.min_length
    else:
        is_short = n_new < options.min_new_tokens
    if is_short:
        scores[list(options.eos_token_id)] = -np.inf
    if allowed is not None:
        scores[~allowed] = -np.inf
    return scores


def candidates(
    scores: np.ndarray, *, options: SamplingOptions, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that sampling draws from: (ascending ids, float64 `scores / temperature`). At
    least `least` of them, as far as `scores` leave so many.

    The weights are shifted so that the likeliest token's is 0, which changes no probability.
    float64, since a float32 division overflows at a small temperature, and a float32 sum over 128k
    tokens is too inexact for top_p. Of equal scores at the limit of top_k all stay, as in
    transformers; at the limit of top_p the lower ids stay.
    """
    kept = scores > -np.inf
    top_k = max(options.top_k, least)
    if options.top_k and top_k < len(scores):
        kept &= scores >= np.partition(scores, -top_k)[-top_k]
    ids = np.flatnonzero(kept)
    weights = scores[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature -inf is right: only 0 can be drawn
        weights = (weights - weights.max()) / options.temperature
    for select in FILTERS:
        kept = select(weights, options, least)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def warped(scores: np.ndarray, *, options: SamplingOptions, least: int = 1) -> np.ndarray:
    """float32 [V]: `scores / temperature`, -inf where `candidates` leave a token out."""
    ids, _ = candidates(scores, options=options, least=least)
    found = np.full_like(scores, -np.inf)
    with np.errstate(over="ignore"):  # at a tiny temperature they are infinite in float32
        found[ids] = (scores[ids].astype(np.float64) / options.temperature).astype(np.float32)
    return found


def log_softmax(values: np.ndarray) -> np.ndarray:
    """float32 [V], by a sum in float64."""
    exact = values.astype(np.float64)
    exact -= exact.max()
    return (exact - np.log(np.exp(exact).sum())).astype(np.float32)


def gumbel(words: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise, float64, from uniformly distributed 64-bit words.

    The upper 52 bits n give u = (n + 1/2) / 2^52, which is exact and never 0 or 1. The noise is
    -log(-log u).
    """
    # n + 1/2 needs 53 bits. With one more bit the largest word would round to u = 1.
    return -np.log(-np.log(((words >> np.uint64(12)) + 0.5) * 2.0**-52))


class NoiseKey(NamedTuple):
    """What the noise of a token depends on, besides its id."""

    seed: int
    sequence: int
    position: int


BLOCK_WORDS = 4  # of Philox4x64
# Up to one id in so many, blocks are taken one by one: 48 ids of 128k in 0.1 ms instead of 0.4.
SPARSE = 640


def noise_words(count: int, key: NoiseKey) -> np.ndarray:
    """The words of the first `count` tokens, uint64; `gumbel` makes noise of them.

    Philox4x64-10 (Salmon et al., 2011) with key (seed, 0) and counter (block, position, sequence,
    0), blocks from 1; word i of the stream belongs to token i. Uses raw words: numpy guarantees
    them across versions, unlike Generator's distributions.
    """
    return _stream(key).random_raw(count)


def noise(ids: np.ndarray, key: NoiseKey) -> np.ndarray:
    """Gumbel noise of ascending `ids`, float64. Logarithms are expensive, so they are taken only of
    the words in use."""
    n_words = int(ids[-1]) + 1
    if len(ids) * SPARSE > n_words:
        return gumbel(noise_words(n_words, key)[ids])
    stream, words, next_block = _stream(key), np.empty(len(ids), np.uint64), 0
    for place, token in enumerate(ids.tolist()):
        block, word = divmod(token, BLOCK_WORDS)
        if block >= next_block:
            stream.advance(block - next_block)
            found = stream.random_raw(BLOCK_WORDS)
            next_block = block + 1
        words[place] = found[word]
    return gumbel(words)


def _stream(key):
    counter = np.array([0, key.position, key.sequence, 0], dtype=np.uint64)
    return np.random.Philox(key=np.array([key.seed, 0], dtype=np.uint64), counter=counter)


def _add_bias(scores, history, *, biases):
    """Adds the biases of the sequences of tokens that a next one would complete: those of a token
    are summed first, as in transformers."""
    sums: dict[int, np.float32] = {}
    for (*before, last), bias in biases:
        if _ends_with(history, before):
            sums[last] = sums.get(last, np.float32(0)) + np.float32(bias)
    for token, bias in sums.items():
        scores[token] += bias


def _ends_with(history, tokens):
    return not tokens or list(history[-len(tokens) :]) == tokens


def _penalise_repetition(scores, history, *, penalty):
    """Applies the penalty once to each token of the prompt and the new text, as in transformers."""
    seen = _ids_within(history, len(scores))
    before = scores[seen]
    scores[seen] = np.where(before < 0, before * penalty, before / penalty)


def _penalise_use(scores, generated, *, options):
    seen, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
    scores[seen] -= np.float32(options.frequency_penalty) * counts.astype(np.float32)
    scores[seen] -= np.float32(options.presence_penalty)


def _ban_ngrams(scores, history, *, of, size):
    """Rules out every token that followed the last `size - 1` tokens of `history` in `of`."""
    if len(of) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(of, dtype=np.int64), size)
    prefix = history[len(history) + 1 - size :]
    followers = windows[(windows[:, :-1] == prefix).all(axis=1), -1]
    scores[_ids_within(followers, len(scores))] = -np.inf


def _ids_within(ids, vocab_size):
    """The distinct ids that have a logit: a few models embed more tokens than they predict, and
    padding may be any number."""
    unique = np.unique(np.asarray(ids, dtype=np.int64))
    return unique[(unique >= 0) & (unique < vocab_size)]


def _with_logprobs(token, logits, *, n_top):
    logprobs = np.asarray(logits, dtype=np.float64)
    logprobs = logprobs - logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    n_top = min(n_top, len(logprobs))
    top = ()
    if n_top:
        likely = np.flatnonzero(logprobs >= np.partition(logprobs, -n_top)[-n_top])
        likely = likely[np.lexsort((likely, -logprobs[likely]))][:n_top]
        top = tuple((int(i), float(logprobs[i])) for i in likely)
    return Choice(token, float(logprobs[token]), top)


def _check_finite(logits, *, position):
    finite = np.isfinite(logits)
    if not finite.all():
        first = int(np.argmin(finite))
        raise CheckpointError(
            f"position {position}: {int((~finite).sum())} of {len(logits)} logits are not finite "
            f"(token {first}: {logits[first]}); the weights are damaged, or overflow in this "
            "dtype: run verify, or choose another dtype"
        )


def check_choosable(scores: np.ndarray, *, position: int) -> None:
    """Raises UsageError where no token is left, or a score is beyond float32."""
    best = scores.max()
    if best == -np.inf:
        found = f"position {position}: the options rule out every token; relax "
        raise UsageError(
            f"{found}no_repeat_ngram_size, logit_bias, sequence_bias, bad_words_ids, "
            "min_new_tokens, the constraint or a function",
            command_line=f"{found}--no-repeat-ngram-size or --min-new-tokens",
        )
    if not np.isfinite(best):
        found = "takes a score beyond float32; set it closer to neutral"
        raise UsageError(
            f"position {position}: repetition_penalty, logit_bias or sequence_bias {found}",
            command_line=f"position {position}: --repetition-penalty {found}",
        )
