"""What each generation option may be: how its value is read, and the range that an error names."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Mapping

import numpy as np

from jlayer.config import parse_choice
from jlayer.errors import CheckpointError, UsageError
from jlayer.plan.shapes import CHUNK_ROWS

MAX_SEED = (1 << 64) - 1
# How tokens are guessed ahead: as pays best, not at all, from the text so far, or by a draft model.
SPECULATE = ("auto", "off", "lookup", "draft")
MOST_BEAMS = CHUNK_ROWS[-1]  # they ride together
MOST_NODES = CHUNK_ROWS[-1] - 1  # guessed tokens in a chunk beside the next one


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


def _early(value):
    """When beam search ends: transformers' True, False or "never", which JSON and a command line
    have as words."""
    words = {"true": True, "false": False, "never": "never"}
    return words[value] if isinstance(value, str) and value in words else _boolean(value)


def _word(value):
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _mode(value):
    """A way of guessing tokens. Raises UsageError with the closest name."""
    if not isinstance(value, str):
        raise ValueError
    return parse_choice(value, SPECULATE, option="speculate")


def _ids(value):
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy, jax or torch
    listed = (value,) if isinstance(value, numbers.Integral) else value
    return tuple(_COUNT(token) for token in listed)


def _id(value):
    """One id, or the only one of an array. Published files may have -1, which is no token's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        (value,) = value
    return _integer(-1)(value)


def _bias(value):
    """{id: bias} or [(id, bias), ...]. A bias of -inf rules a token out."""
    found = {}
    for token, bias in value.items() if isinstance(value, Mapping) else value:
        if isinstance(token, str) and token.isdecimal():  # keys in JSON are always text
            token = int(token)
        token = _COUNT(token)
        if token in found:
            raise ValueError
        found[token] = _real(lambda number: number < math.inf)(bias)
    return tuple(sorted(found.items()))


def _sequence(value):
    """Ids that follow one another, at least one."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(_COUNT(token) for token in value)


def _sequence_bias(value):
    """transformers' forms {(id, ...): bias} and [[[id, ...], bias], ...], in the order in which it
    adds them: of single ids first, then by length, the first length first."""
    found = {}
    for ids, bias in value.items() if isinstance(value, Mapping) else value:
        ids = _sequence(ids)
        if ids in found:
            raise ValueError
        found[ids] = _real(lambda number: number < math.inf)(bias)
    lengths = list(dict.fromkeys([1, *map(len, found)]))
    return tuple(sorted(found.items(), key=lambda pair: lengths.index(len(pair[0]))))


def _sequences(value):
    return tuple(dict.fromkeys(map(_sequence, value)))


_COUNT = _integer(0)
_FROM_0 = "an integer from 0 up"
# Other programs take -1 for it.
_UNTIL_IT_ENDS = "a text stops where the model ends it, so give the most that it may take"
_OPENAI_PENALTY = (_real(lambda number: -2 <= number <= 2), "a number in [-2, 2] (0 is off)")
# option -> (a parser that raises ValueError or TypeError, the expected range)
RANGES = {
    "do_sample": (_boolean, "true or false"),
    "temperature": (
        _real(lambda number: 0 <= number < math.inf),
        "a finite number from 0 up (0 is greedy)",
    ),
    "top_k": (_COUNT, f"{_FROM_0} (0 is off)"),
    "top_p": (_real(lambda number: 0 < number <= 1), "a number in (0, 1]"),
    "min_p": (_maybe(_real(lambda number: 0 <= number <= 1)), "a number in [0, 1]"),
    "typical_p": (_real(lambda number: 0 < number <= 1), "a number in (0, 1] (1 is off)"),
    "epsilon_cutoff": (_real(lambda number: 0 <= number < 1), "a number in [0, 1) (0 is off)"),
    "eta_cutoff": (_real(lambda number: 0 <= number < 1), "a number in [0, 1) (0 is off)"),
    "repetition_penalty": (
        _real(lambda number: 0 < number < math.inf),
        "a finite number above 0 (1 is off)",
    ),
    "encoder_repetition_penalty": (
        _real(lambda number: 0 < number < math.inf),
        "a finite number above 0 (1 is off)",
    ),
    "presence_penalty": _OPENAI_PENALTY,
    "frequency_penalty": _OPENAI_PENALTY,
    "no_repeat_ngram_size": (_COUNT, f"{_FROM_0} (0 is off)"),
    "encoder_no_repeat_ngram_size": (_COUNT, f"{_FROM_0} (0 is off)"),
    "logit_bias": (_bias, "single token ids, each with one finite number or -inf"),
    "sequence_bias": (
        _sequence_bias,
        "sequences of token ids, each once and with one finite number or -inf",
    ),
    "bad_words_ids": (_sequences, "a list of lists of token ids"),
    "min_new_tokens": (_maybe(_COUNT), _FROM_0),
    "min_length": (_COUNT, _FROM_0),
    "max_new_tokens": (_maybe(_COUNT), f"{_FROM_0}; {_UNTIL_IT_ENDS}"),
    "max_length": (_maybe(_COUNT), _FROM_0),
    "bos_token_id": (_maybe(_id), "a token id"),
    "eos_token_id": (_ids, "a token id or a list of them"),
    "pad_token_id": (_maybe(_id), "a token id"),
    "stop": (_strings, "a non-empty string or a list of them"),
    "num_return_sequences": (_integer(1), "an integer from 1 up"),
    "num_beams": (_integer(1, MOST_BEAMS), f"an integer from 1 to {MOST_BEAMS} (1 is off)"),
    "length_penalty": (_real(math.isfinite), "a finite number"),
    "early_stopping": (_early, 'true, false or "never"'),
    "renormalize_logits": (_boolean, "true or false"),
    "seed": (_maybe(_integer(0, MAX_SEED)), f"an integer from 0 to {MAX_SEED}"),
    "logprobs": (_maybe(_COUNT), _FROM_0),
    "prompt_logprobs": (_maybe(_COUNT), _FROM_0),
    "prompt_logprobs_from": (_integer(1), "an integer from 1 up (1 is the second token)"),
    "speculate": (_mode, f"one of {', '.join(SPECULATE)}"),
    "draft_tokens": (_maybe(_integer(1, MOST_NODES)), f"an integer from 1 to {MOST_NODES}"),
    "adapter": (_maybe(_word), "the name of an adapter that the model was opened with"),
    "return_dict_in_generate": (_boolean, "true or false"),
    "output_scores": (_boolean, "true or false"),
    "output_logits": (_boolean, "true or false"),
}


def checked(name: str, value, *, where: str | None = None):
    """The value of an option as it is used. Raises UsageError; CheckpointError where it stands in a
    file, `where`."""
    parse, expected = RANGES[name]
    try:
        return parse(value)
    except (ValueError, TypeError):
        line = f"{name}: found {reprlib.repr(value)}, expected {expected}"
    raise UsageError(line) if where is None else CheckpointError(f"{where}: {line}")
