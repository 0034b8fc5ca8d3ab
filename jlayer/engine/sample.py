"""Logits → id, on the host: what the generation options mean, in which order, and sampling's noise.

Names, defaults and order are those of transformers' GenerationConfig and its logits processors;
what changes the output and is not done here is refused by name. Where logits come from, and when a
text ends, is left to `generate`.

Order, as in transformers 5 (`_get_logits_processor`):
    always         logit_bias, repetition_penalty, [frequency_penalty, presence_penalty],
                   no_repeat_ngram_size, min_length, min_new_tokens
    when sampling  temperature, top_k, top_p, min_p
The two in brackets are not in transformers: they act on generated tokens only, as OpenAI and vLLM
define them, in vLLM's place, right after the repetition penalty.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError

DEFAULT_NEW_TOKENS = 20  # transformers', where neither the user nor the model's makers say
MAX_SEED = (1 << 64) - 1

# transformers' word for an option of ours.
ALIASES = {"stop_strings": "stop", "sequence_bias": "logit_bias"}

# Options of transformers that change the output and are not done here -> what leaves it alone.
REFUSED = {
    "assistant_ensemble_weight": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "custom_generate": (None,),
    "dola_layers": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "logits_processor": (None, []),
    "max_time": (None,),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "penalty_alpha": (None, 0),
    "prefix_allowed_tokens_fn": (None,),
    "stopping_criteria": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}

# Options of transformers that cannot change the output of a decoder that draws one token at a time:
# beams' and encoders' own, speed, bookkeeping. `renormalize_logits` shifts a whole row, and what
# `remove_invalid_values` would mend is refused here.
IGNORED = frozenset(
    """
    _commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind bos_token_id cache_config cache_implementation compile_config
    continuous_batching_config decoder_start_token_id disable_compile diversity_penalty
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty is_assistant
    length_penalty low_memory max_cache_len max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule pad_token_id prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits return_dict_in_generate speculation_type
    target_lookbehind transformers_version use_cache use_mtp
    """.split()  # noqa: SIM905 - forty names are read better as a paragraph
)
_WARPERS = ("temperature", "top_k", "top_p", "min_p")
# What None from a user means where it is not the default: transformers leaves the option out then.
_NONE_MEANS = {"top_k": 0}


@dataclass(frozen=True)
class SamplingOptions:
    """How ids are chosen and when a sequence ends; every field is checked when the object is made.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p None are off. seed None: `seeded` draws one.
    `logprobs`: None, or how many of the likeliest tokens to report beside the chosen one.
    Raises UsageError: the option, what was found, the range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    num_return_sequences: int = 1
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = _checked(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.num_return_sequences > 1 and self.is_greedy:
            raise UsageError(
                f"num_return_sequences: found {self.num_return_sequences} with greedy decoding, "
                "which gives one; set do_sample=True and a temperature above 0"
            )

    @classmethod
    def from_mapping(
        cls,
        options: Mapping,
        *,
        generation_config: Mapping | None = None,
        vocab_size: int | None = None,
        sampling_implied: bool = False,
        where: str = "generation_config.json",
    ) -> SamplingOptions:
        """The user's `options`, then what the model's makers set, then transformers' defaults.

        A user's None turns an option off, as in transformers. `generation_config` may be a whole
        config.json: what is no option is passed over. `sampling_implied`: a temperature, top_k,
        top_p or min_p from the user means do_sample (jlayer's own interface; transformers' users
        say it themselves).
        Raises UsageError (an option of the user's, with the closest known name), CheckpointError
        (one of `where`) or UnsupportedModelError (one of `where` that is not done here).
        """
        given = _given(options)
        published = _published(generation_config or {}, where=where, overruled=options)
        eos_ids = published.get("eos_token_id", ()) if "eos_token_id" not in given else ()
        if vocab_size is not None and eos_ids and max(eos_ids) >= vocab_size:
            raise CheckpointError(f"{where}: {_outside('eos_token_id', max(eos_ids), vocab_size)}")
        if "max_length" in given and "max_new_tokens" not in given:
            published.pop("max_new_tokens", None)
        if sampling_implied and "do_sample" not in given and not given.keys().isdisjoint(_WARPERS):
            given["do_sample"] = True
        found = cls(**{**published, **given})
        if vocab_size is not None:
            found.check(vocab_size)
        return found

    def check(self, vocab_size: int) -> None:
        """Raises UsageError where an id is outside the vocabulary."""
        biased = [token for token, _ in self.logit_bias]
        for name, ids in (("eos_token_id", self.eos_token_id), ("logit_bias", biased)):
            if ids and max(ids) >= vocab_size:
                raise UsageError(_outside(name, max(ids), vocab_size))

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def seeded(self) -> SamplingOptions:
        """These options with a seed: drawn from the system where none is given (53 bits: JSON)."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))

    def new_tokens_limit(self, n_prompt: int, *, context: int | None = None) -> int:
        """How many tokens may follow: max_new_tokens, else what max_length leaves, else 20.

        `context` cuts the last two short. Raises UsageError, with both figures, where
        max_new_tokens goes beyond it.
        """
        room = math.inf if context is None else max(0, context - n_prompt)
        if self.max_new_tokens is None:
            wanted = DEFAULT_NEW_TOKENS if self.max_length is None else self.max_length - n_prompt
            return min(max(0, wanted), room)
        if self.max_new_tokens > room:
            raise UsageError(
                f"max_new_tokens: {n_prompt} prompt tokens + {self.max_new_tokens} new ones, but "
                f"the context is {context}; ask for at most {room}"
            )
        return self.max_new_tokens


@dataclass(frozen=True)
class Choice:
    """One drawn token, and where asked for the log-probabilities that the model itself gives.

    These are of the raw logits, before any option acts, as OpenAI and vLLM report them. `top`: (id,
    log-probability) of the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(
    logits: np.ndarray,
    *,
    options: SamplingOptions,
    history: Sequence[int],
    n_prompt: int,
    sequence: int = 0,
) -> Choice:
    """The token that follows `history` (prompt, then new tokens) in sequence number `sequence`.

    `logits`: float32 [V]. The noise is that of position `len(history)`, so plain, speculative and
    batched decoding draw alike.
    Raises CheckpointError (non-finite logits) or UsageError (the options leave no token).
    """
    _check_finite(logits, position=len(history))
    scores = processed(logits, options=options, history=history, n_prompt=n_prompt)
    if options.is_greedy:
        token = int(np.argmax(scores))
    else:
        assert options.seed is not None, "options.seeded() draws the seed, once for all tokens"
        ids, weights = candidates(scores, options=options)
        noise = _noise_at(ids, seed=options.seed, sequence=sequence, position=len(history))
        token = int(ids[np.argmax(weights + noise)])
    if options.logprobs is None:
        return Choice(token)
    return _with_logprobs(token, logits, n_top=options.logprobs)


def verify(
    logits: np.ndarray,
    drafted: Sequence[int],
    *,
    options: SamplingOptions,
    history: Sequence[int],
    n_prompt: int,
    sequence: int = 0,
) -> list[Choice]:
    """What plain decoding would draw: the accepted part of `drafted`, and the one token after it.

    `logits`: float32 [T, V], T > len(drafted); row i is what the model says after `history` and
    `drafted[:i]`. A drafted token is accepted if and only if it is the draw; nothing follows an
    end-of-sequence token. Errors as in `choose`.
    """
    assert len(logits) > len(drafted)
    chosen, history = [], list(history)
    for row, guess in zip(logits, (*drafted, None), strict=False):
        choice = choose(row, options=options, history=history, n_prompt=n_prompt, sequence=sequence)
        chosen.append(choice)
        history.append(choice.token_id)
        if choice.token_id != guess or choice.token_id in options.eos_token_id:
            break
    return chosen


def processed(
    logits: np.ndarray, *, options: SamplingOptions, history: Sequence[int], n_prompt: int
) -> np.ndarray:
    """Float32 [V]: `logits` after all that acts on greedy decoding too; what is ruled out is -inf.

    Float32, as in transformers: the same scores bit for bit, so the same greedy token.
    """
    scores = np.array(logits, dtype=np.float32)
    n_new = len(history) - n_prompt
    with np.errstate(over="ignore"):  # a score beyond float32 is refused below
        for token, bias in options.logit_bias:
            scores[token] += np.float32(bias)
        if options.repetition_penalty != 1.0:
            _penalise_repetition(scores, history, penalty=np.float32(options.repetition_penalty))
        if options.frequency_penalty or options.presence_penalty:
            _penalise_use(scores, history[n_prompt:], options=options)
    if options.no_repeat_ngram_size:
        _ban_repeated_ngrams(scores, history, size=options.no_repeat_ngram_size)
    if len(history) < options.min_length or n_new < options.min_new_tokens:
        scores[list(options.eos_token_id)] = -np.inf
    _check_choosable(scores, position=len(history))
    return scores


def candidates(scores: np.ndarray, *, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """What sampling draws from: ids (ascending) and float64 `scores / temperature`, maximum 0.

    Float64, since a division in float32 overflows at a small temperature and a sum over 128k tokens
    loses what top_p compares; a shift of all cancels. Ties at the edge of top_k all stay, as in
    transformers; at that of top_p the lower id stays.
    """
    kept = scores > -np.inf
    if 0 < options.top_k < len(scores):
        kept &= scores >= np.partition(scores, -options.top_k)[-options.top_k]
    ids = np.flatnonzero(kept)
    weights = scores[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # the smallest temperatures: -inf is right, only 0 is drawn
        weights = (weights - weights.max()) / options.temperature
    for select in (_within_top_p, _within_min_p):
        kept = select(weights, options)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def gumbel_noise(seed: int, sequence: int, position: int, vocab_size: int) -> np.ndarray:
    """Standard Gumbel noise, float64 [V]; a token's noise is the same at any `vocab_size`.

    Philox4x64-10 (Salmon et al., 2011), key (seed, 0), counter (block, position, sequence, 0) with
    blocks from 1: word i of the stream is token i's. Its upper 52 bits n give u = (n + 1/2) / 2^52,
    exact and never 0 or 1; the noise is -log(-log u). Raw words, since numpy promises these across
    versions, unlike Generator's distributions.
    """
    ids = np.arange(vocab_size)
    return _noise_at(ids, seed=seed, sequence=sequence, position=position)


def _noise_at(ids, *, seed, sequence, position):
    """`gumbel_noise` of the ascending `ids` alone: words are cheap, logarithms are not."""
    if not len(ids):
        return np.zeros(0)
    counter = np.array([0, position, sequence, 0], dtype=np.uint64)
    stream = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    return _gumbel(stream.random_raw(int(ids[-1]) + 1)[ids])


def _gumbel(words):
    # 52 bits and a half are 53: with one more, the largest word would round to u = 1.
    return -np.log(-np.log(((words >> np.uint64(12)) + 0.5) * 2.0**-52))


def _penalise_repetition(scores, history, *, penalty):
    """Prompt included, and a token once however often it stands there, as in transformers."""
    seen = _ids_within(history, len(scores))
    found = scores[seen]
    scores[seen] = np.where(found < 0, found * penalty, found / penalty)


def _penalise_use(scores, generated, *, options):
    seen, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
    scores[seen] -= np.float32(options.frequency_penalty) * counts.astype(np.float32)
    scores[seen] -= np.float32(options.presence_penalty)


def _ban_repeated_ngrams(scores, history, *, size):
    """Rules out every token that once followed the last `size - 1` tokens."""
    history = np.asarray(history, dtype=np.int64)
    if len(history) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    prefix = history[len(history) + 1 - size :]
    followers = windows[(windows[:, :-1] == prefix).all(axis=1), -1]
    scores[_ids_within(followers, len(scores))] = -np.inf


def _ids_within(ids, vocab_size):
    """Unique ids that the head can give: a few models embed more tokens than they predict."""
    unique = np.unique(np.asarray(ids, dtype=np.int64))
    return unique[unique < vocab_size]


def _within_top_p(weights, options):
    """The fewest likeliest tokens whose probability reaches top_p: at least one."""
    if options.top_p >= 1.0:
        return slice(None)
    mass = np.exp(weights)
    mass /= mass.sum()
    spare = 1.0 - options.top_p
    # All tokens of less than spare / V together have less than `spare`: they go without a sort,
    # which would take 13 ms for 128k of them.
    small = mass < min(spare / len(mass), mass.max())
    # Ascending, and of equal mass the higher id first, so that it is the first to go.
    large = np.flatnonzero(~small)[::-1]
    order = large[np.argsort(mass[large], kind="stable")]
    below = mass[small].sum() + np.cumsum(mass[order]) <= spare
    below[-1] = False
    return np.sort(order[~below])


def _within_min_p(weights, options):
    """Tokens at least min_p times as likely as the likeliest, whose weight is 0."""
    return slice(None) if options.min_p is None else np.exp(weights) >= options.min_p


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


def _check_choosable(scores, *, position):
    best = scores.max()
    if best == -np.inf:
        raise UsageError(
            f"position {position}: the options rule out every token; relax no_repeat_ngram_size, "
            "logit_bias or min_new_tokens"
        )
    if not np.isfinite(best):
        raise UsageError(
            f"position {position}: repetition_penalty or logit_bias takes a score beyond float32; "
            "set it closer to neutral"
        )


# The door: a row an option, (what turns a value into the right thing or raises ValueError, range).


def _boolean(value):
    if not isinstance(value, bool | np.bool_):
        raise ValueError
    return bool(value)


def _integer(low, high=(1 << 31) - 1):
    def parse(value):
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
            raise ValueError
        value = operator.index(value)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _real(accepts):
    def parse(value):
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
            raise ValueError
        value = float(value)
        if not accepts(value):
            raise ValueError
        return value

    return parse


def _maybe(parse):
    return lambda value: None if value is None else parse(value)


def _strings(value):
    listed = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in listed):
        raise ValueError
    return listed


def _ids(value):
    listed = (value,) if isinstance(value, numbers.Integral) else value
    return tuple(_COUNT(token) for token in listed)


def _bias(value):
    """{id: bias}, or transformers' forms {(id,): bias} and [[[id], bias], ...]. -inf rules out."""
    found = {}
    for token, bias in value.items() if isinstance(value, Mapping) else value:
        if isinstance(token, list | tuple):
            (token,) = token  # a bias on several tokens in a row is not done: ValueError
        if isinstance(token, str) and token.isdecimal():  # JSON has no other keys
            token = int(token)
        token = _COUNT(token)
        if token in found:
            raise ValueError
        found[token] = _real(lambda number: number < math.inf)(bias)
    return tuple(sorted(found.items()))


_COUNT = _integer(0)
_FROM_0 = "an integer from 0 up"
_OPENAI_PENALTY = (_real(lambda number: -2 <= number <= 2), "a number in [-2, 2] (0 is off)")
_CHECKS = {
    "do_sample": (_boolean, "true or false"),
    "temperature": (
        _real(lambda number: 0 <= number < math.inf),
        "a finite number from 0 up (0 is greedy)",
    ),
    "top_k": (_COUNT, f"{_FROM_0} (0 is off)"),
    "top_p": (_real(lambda number: 0 < number <= 1), "a number in (0, 1]"),
    "min_p": (_maybe(_real(lambda number: 0 <= number <= 1)), "a number in [0, 1]"),
    "repetition_penalty": (
        _real(lambda number: 0 < number < math.inf),
        "a finite number above 0 (1 is off)",
    ),
    "presence_penalty": _OPENAI_PENALTY,
    "frequency_penalty": _OPENAI_PENALTY,
    "no_repeat_ngram_size": (_COUNT, f"{_FROM_0} (0 is off)"),
    "logit_bias": (_bias, "single token ids, each with one finite number or -inf"),
    "min_new_tokens": (_COUNT, _FROM_0),
    "min_length": (_COUNT, _FROM_0),
    "max_new_tokens": (_maybe(_COUNT), _FROM_0),
    "max_length": (_maybe(_COUNT), _FROM_0),
    "eos_token_id": (_ids, "a token id or a list of them"),
    "stop": (_strings, "a non-empty string or a list of them"),
    "num_return_sequences": (_integer(1), "an integer from 1 up"),
    "seed": (_maybe(_integer(0, MAX_SEED)), f"an integer from 0 to {MAX_SEED}"),
    "logprobs": (_maybe(_COUNT), _FROM_0),
}


def _checked(name, value, *, where=None):
    parse, expected = _CHECKS[name]
    try:
        return parse(value)
    except (ValueError, TypeError):
        line = f"{name}: found {reprlib.repr(value)}, expected {expected}"
    raise UsageError(line) if where is None else CheckpointError(f"{where}: {line}")


def option_names() -> tuple[str, ...]:
    """The names that `SamplingOptions.from_mapping` acts on, transformers' aliases included."""
    return (*(field.name for field in fields(SamplingOptions)), *ALIASES)


def is_option(name: str) -> bool:
    """Whether `from_mapping` knows a name: to act on it, to pass over it, or to refuse it."""
    return name in option_names() or name in REFUSED or name in IGNORED


def _given(options):
    """The user's options under our names; None means off."""
    defaults = {field.name: field.default for field in fields(SamplingOptions)} | _NONE_MEANS
    found = {}
    for name, value in options.items():
        ours = ALIASES.get(name, name)
        if ours in defaults:
            if ours in found:
                raise UsageError(f"{name}: {ours} is the same option and was given too; keep one")
            found[ours] = defaults[ours] if value is None else value
        elif name in REFUSED:
            if not _leaves_output_alone(name, value):
                raise UsageError(_refusal(name, value))
        elif name not in IGNORED:
            raise UsageError(unknown_name("option", name, option_names()))
    return found


def _published(generation_config, *, where, overruled):
    """What the model's makers set, checked here so that a fault is the file's; null is not set."""
    found = {}
    for name, value in generation_config.items():
        ours = ALIASES.get(name, name)
        if name in REFUSED and name not in overruled and not _leaves_output_alone(name, value):
            raise UnsupportedModelError(f"{where}: {_refusal(name, value)}")
        if ours in _CHECKS and value is not None:
            found[ours] = _checked(ours, value, where=where)
    return found


def _leaves_output_alone(name, value):
    # An array, or an object of the user's, has a comparison of its own; only None is plain enough.
    plain = isinstance(value, bool | int | float | str | list | tuple | dict)
    return any(value is neutral or (plain and value == neutral) for neutral in REFUSED[name])


def _refusal(name, value):
    return f"{name}: found {reprlib.repr(value)}, which jlayer does not do; leave it out"


def _outside(name, token, vocab_size):
    return f"{name}: found id {token}, expected ids below the vocabulary of {vocab_size}"
