"""Functions that a user gives to `generate`: logits processors, stopping criteria, and what may
follow a prefix, with transformers' arguments.

They get torch tensors on the CPU where torch is imported already, as whoever wrote them for
transformers has done; else numpy arrays. torch is never imported for them.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.engine.options import SamplingOptions
from jlayer.errors import UsageError

NAMES = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
# transformers' own class -> the option that makes one: it would put the user's in its place.
_MADE_BY = {
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "EosTokenCriteria": "eos_token_id",
    "StopStringCriteria": "stop",
}
_MAX_LENGTH = "MaxLengthCriteria"
_LENGTHS = ("max_new_tokens", "max_length")


class Raised(Exception):
    """A function of the user's has raised what is its `__cause__`."""


@dataclass(frozen=True)
class Functions:
    """`processors`: (ids [B, T], scores [B, V]) -> scores; `criteria`: (ids, scores so far or None)
    -> whether each row ends; `allowed`: (number of the prompt, ids [T]) -> ids that may follow."""

    processors: tuple[Callable, ...] = ()
    criteria: tuple[Callable, ...] = ()
    allowed: Callable | None = None

    def check(self, options: SamplingOptions) -> None:
        """Raises UsageError where guesses are asked for, or an option makes what is among the
        functions too: transformers would leave out the option's."""
        for name in options.guessing:
            raise UsageError(
                f"{name}: found {getattr(options, name)!r} with functions, which see each token "
                "before the next one is guessed; leave one of them out"
            )
        plain = SamplingOptions()
        for each in (*self.processors, *self.criteria):
            name = _class_of(each)
            option = _MADE_BY.get(name)
            if option is not None and getattr(options, option) != getattr(plain, option):
                raise UsageError(f"{option}: given, and a {name} among the functions too; keep one")

    def scores(
        self, ids: np.ndarray, scores: np.ndarray, prompts: Sequence[int], asked: Sequence[int]
    ) -> np.ndarray:
        """float32 [B, V] after the functions. `prompts`: the number of each row's prompt; `asked`:
        the rows that go on. Raises Raised, UsageError."""
        if self.allowed is not None:
            scores = self._restricted(ids, scores, prompts, asked)
        for processor in self.processors:
            given = tensors(ids), tensors(scores)
            found = _call(processor, *given)
            scores = _scores(found, scores.shape, asked, who=_name_of(processor))
        return scores

    def _restricted(self, ids, scores, prompts, asked):
        """Where nothing allowed is left in any row of a prompt, what is allowed counts alone: as in
        transformers."""
        scores = scores.copy()
        for prompt in dict.fromkeys(prompts[number] for number in asked):
            rows = [number for number in asked if prompts[number] == prompt]
            mask = np.full((len(rows), scores.shape[1]), -np.inf, np.float32)
            for place, number in enumerate(rows):
                found = _call(self.allowed, prompt, tensors(ids[number]))
                where = f"for prompt {prompt} at position {ids.shape[1]}"
                mask[place, _allowed(found, scores.shape[1], where=where)] = 0
            found = scores[rows] + mask
            scores[rows] = found if (found > -np.inf).any() else mask
        return scores

    def ended(self, ids: np.ndarray, scores: Sequence[np.ndarray] | None) -> np.ndarray:
        """bool [B]: whether a row ends with its last token. Raises Raised, UsageError."""
        ended = np.zeros(len(ids), bool)
        for criterion in self.criteria:
            given = None if scores is None else tuple(map(tensors, scores))
            found = _call(criterion, tensors(ids), given)
            ended |= _ends(found, len(ids), who=_name_of(criterion))
        return ended


def taken(options: Mapping) -> tuple[Functions | None, dict]:
    """(the functions among the options, None where there are none; the other options).

    A MaxLengthCriteria takes the place of the length, as in transformers. Raises UsageError.
    """
    rest = {name: value for name, value in options.items() if name not in NAMES}
    processors = _listed("logits_processor", options)
    criteria = _listed("stopping_criteria", options)
    allowed = options.get("prefix_allowed_tokens_fn")
    if allowed is not None and not callable(allowed):
        found = type(allowed).__name__
        raise UsageError(f"prefix_allowed_tokens_fn: found {found}, expected a function")
    for each in criteria:
        if _class_of(each) == _MAX_LENGTH:
            if given := [name for name in _LENGTHS if rest.get(name) is not None]:
                raise UsageError(
                    f"{given[0]}: given, and a {_MAX_LENGTH} among the functions too; keep one"
                )
            rest["max_length"] = each.max_length
    criteria = tuple(each for each in criteria if _class_of(each) != _MAX_LENGTH)
    if not processors and not criteria and allowed is None:
        return None, rest
    if rest.get("assistant_model") is not None:
        raise UsageError(
            "assistant_model: given with functions, which see each token before the next one is "
            "guessed; leave one of them out"
        )
    return Functions(processors, criteria, allowed), rest


def _listed(name, options):
    value = options.get(name)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(map(callable, value)):
        raise UsageError(f"{name}: found {type(value).__name__}, expected a list of functions")
    return tuple(value)


def _class_of(function):
    """The name of a class of transformers' own; otherwise that of whatever it is."""
    kind = type(function)
    is_theirs = kind.__module__.startswith("transformers.")
    return kind.__name__ if is_theirs else f"{kind.__module__}.{kind.__name__}"


def _name_of(function):
    return getattr(function, "__qualname__", None) or _class_of(function)


def _call(function, *given):
    try:
        return function(*given)
    except Exception as error:
        raise Raised from error


def tensors(array: np.ndarray):
    """An array as torch's tensor where torch is there, which no function may write back through."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "from_numpy"):
        return array.copy()
    return torch.from_numpy(array.copy())


def _scores(found, shape, asked, *, who):
    """What a processor gave, float32 of this shape: numbers in the rows `asked`, or -inf."""
    array = _array(found)
    if array is None or array.dtype.kind == "b":
        kind = type(found).__name__
        raise UsageError(
            f"logits_processor: {who} gave {kind}, expected numbers of shape {list(shape)}"
        )
    if array.shape != shape:
        raise UsageError(
            f"logits_processor: {who} gave scores of shape {list(array.shape)}, expected "
            f"{list(shape)}"
        )
    with np.errstate(over="ignore"):
        scores = np.array(array, np.float32)
    for number in asked:
        if not (scores[number] < np.inf).all():
            is_nan = np.isnan(scores[number]).any()
            kind = "no numbers (NaN)" if is_nan else "beyond float32"
            raise UsageError(
                f"logits_processor: {who} gave scores that are {kind}, expected numbers, or -inf "
                "for a token that is ruled out"
            )
    return scores


def _ends(found, n_rows, *, who):
    """What a criterion gave, bool: one for each row or, as transformers takes it too, for all."""
    array = _array(found)
    is_one_each = array is not None and array.shape in ((), (1,), (n_rows,))
    if not is_one_each or array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
        shape = "" if array is None else f" of shape {list(array.shape)}"
        raise UsageError(
            f"stopping_criteria: {who} gave {type(found).__name__}{shape}, expected a bool for "
            f"each of the {n_rows} rows, or one for all"
        )
    return array.astype(bool)


def _allowed(found, vocab_size, *, where):
    """The ids that may follow, int64. Raises UsageError unless there are some."""
    array = _array(found)
    if array is not None and not array.size:
        raise UsageError(f"prefix_allowed_tokens_fn: allows no token {where}")
    if array is None or array.dtype.kind not in "iu" or array.ndim > 1:
        raise UsageError(
            f"prefix_allowed_tokens_fn: gave {reprlib.repr(found)} {where}, expected a list of ids"
        )
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise UsageError(
            f"prefix_allowed_tokens_fn: gave id {outside.flat[0]} {where}, expected ids below the "
            f"vocabulary of {vocab_size}"
        )
    return array.astype(np.int64).reshape(-1)


def _array(found):
    """What a function gave, as numpy's: a tensor of torch on any device, or what numpy reads. None:
    no array of real numbers."""
    try:
        if hasattr(found, "detach"):
            found = found.detach().cpu()
            return (found.float() if found.is_floating_point() else found).numpy()
        array = np.asarray(found)
        # Of an array's own dtypes, such as bfloat16, numpy knows no kind.
        is_real = array.dtype.kind in "fiub" or np.can_cast(array.dtype, np.float32)
    except (NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError):
        return None
    return array if is_real else None
