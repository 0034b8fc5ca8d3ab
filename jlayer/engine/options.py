"""Generation options: names, defaults, allowed values, and which are refused or ignored.

Names and defaults are those of transformers' GenerationConfig. An option that changes the output
but is not implemented is refused by name. `sample` applies options to logits.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError

DEFAULT_NEW_TOKENS = 20  # of transformers, if neither the user nor the published file sets it
MAX_SEED = (1 << 64) - 1

# Name of an option in transformers -> name here.
ALIASES = {"stop_strings": "stop", "sequence_bias": "logit_bias"}

# Options of transformers that change the output and are not implemented -> values with no effect.
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

# Options of transformers that cannot change the output here: for beam search, encoders, speed and
# bookkeeping. `renormalize_logits` shifts all scores equally. `remove_invalid_values` replaces
# non-finite logits, which are an error here.
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
# None from a user turns an option off. For these the value that does so is not the default.
_NONE_MEANS = {"top_k": 0}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when a sequence ends; every field is checked on creation.

    temperature: 0 is greedy. top_k 0, top_p 1, min_p None: off. seed: None until `seeded` draws it.
    logprobs: None, or the number of likeliest tokens to report besides the chosen one. Raises
    UsageError with the option, the value and the range.
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
        """The user's `options`, then those published with the model, then transformers' defaults.

        A user's None turns an option off, as in transformers. `generation_config` may be a whole
        config.json; keys that are no option are ignored. `sampling_implied`: a temperature, top_k,
        top_p or min_p from the user turns do_sample on, as in jlayer's own interface; in that of
        transformers users set do_sample themselves. Raises UsageError (a bad option of the user;
        for an unknown one with the closest name), CheckpointError (a bad option in the file
        `where`) or UnsupportedModelError (one in it that is not implemented).
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
        merged = cls(**{**published, **given})
        if vocab_size is not None:
            merged.check(vocab_size)
        return merged

    def check(self, vocab_size: int) -> None:
        """Raises UsageError if an id is outside the vocabulary."""
        biased = [token for token, _ in self.logit_bias]
        for name, ids in (("eos_token_id", self.eos_token_id), ("logit_bias", biased)):
            if ids and max(ids) >= vocab_size:
                raise UsageError(_outside(name, max(ids), vocab_size))

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def seeded(self) -> SamplingOptions:
        """These options with a seed; if none was given, the system draws one."""
        # 53 bits, so that JSON readers with only float64 keep the seed exact.
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))

    def new_tokens_limit(self, n_prompt: int, *, context: int | None = None) -> int:
        """The most new tokens: max_new_tokens, else max_length minus the prompt, else 20.

        The last two are reduced to fit `context`. Raises UsageError if max_new_tokens does not fit.
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


# Option -> (a parser that raises ValueError or TypeError, the expected range): see _CHECKS.


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
    """{id: bias}, or transformers' forms {(id,): bias} and [[[id], bias], ...].

    A bias of -inf rules a token out.
    """
    biases = {}
    for token, bias in value.items() if isinstance(value, Mapping) else value:
        if isinstance(token, list | tuple):
            (token,) = token  # a bias on a sequence of tokens is not implemented: ValueError
        if isinstance(token, str) and token.isdecimal():  # keys in JSON are always text
            token = int(token)
        token = _COUNT(token)
        if token in biases:
            raise ValueError
        biases[token] = _real(lambda number: number < math.inf)(bias)
    return tuple(sorted(biases.items()))


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
    """The names that `SamplingOptions.from_mapping` applies, including those of transformers."""
    return (*(field.name for field in fields(SamplingOptions)), *ALIASES)


def is_option(name: str) -> bool:
    """Whether `from_mapping` knows a name: to apply, to ignore or to refuse."""
    return name in option_names() or name in REFUSED or name in IGNORED


def _given(options):
    """The user's options under our names; None means off."""
    off_values = {field.name: field.default for field in fields(SamplingOptions)} | _NONE_MEANS
    given = {}
    for name, value in options.items():
        ours = ALIASES.get(name, name)
        if ours in off_values:
            if ours in given:
                raise UsageError(f"{name}: {ours} is the same option and was given too; keep one")
            given[ours] = off_values[ours] if value is None else value
        elif name in REFUSED:
            if not _leaves_output_alone(name, value):
                raise UsageError(_refusal(name, value))
        elif name not in IGNORED:
            raise UsageError(unknown_name("option", name, option_names()))
    return given


def _published(generation_config, *, where, overruled):
    """The options of a published file, checked here so that an error names the file."""
    published = {}
    for name, value in generation_config.items():
        ours = ALIASES.get(name, name)
        if name in REFUSED and name not in overruled and not _leaves_output_alone(name, value):
            raise UnsupportedModelError(f"{where}: {_refusal(name, value)}")
        if ours in _CHECKS and value is not None:
            published[ours] = _checked(ours, value, where=where)
    return published


def _leaves_output_alone(name, value):
    # Other objects (such as arrays) may define their own ==, so only plain values are compared.
    plain = isinstance(value, bool | int | float | str | list | tuple | dict)
    return any(value is neutral or (plain and value == neutral) for neutral in REFUSED[name])


def _refusal(name, value):
    return f"{name}: found {reprlib.repr(value)}, which jlayer does not support; leave it out"


def _outside(name, token, vocab_size):
    return f"{name}: found id {token}, expected ids below the vocabulary of {vocab_size}"
