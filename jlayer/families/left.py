"""Which modules a quantization_config leaves as plain numbers: lists of names, and of patterns."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import Fields
from jlayer.parts import Quantized

METHOD = "quant_method"
# How patterns of compressed-tensors begin that are regular expressions.
REGEX = "re:"
# An expression of a file from outside: a repeated group could take exponential time.
_REPEATED_GROUP = re.compile(r"\)\s*[*+?{]")
_MOST_CHARACTERS, _MOST_STARS = 200, 4
# What repeats a character, and so may take as many steps as a name has characters, some 64.
_STAR, _STEPS_OF_STAR = re.compile(r"[*+{]\??|(?<!\()\?"), 64
# Of all expressions of a list, for each name: some milliseconds.
_MOST_STEPS = 4 * _STEPS_OF_STAR**_MOST_STARS
# What makes a name of modules an expression, as Transformers takes it: not the dots alone.
_METACHARACTERS = re.compile(r"[*+?\[\](){}|^$\\]")
_GLOBS = ("modelopt",)  # methods whose names of modules are no expressions, but for stars


def is_left(quantized: Quantized, module: str) -> bool:
    """Whether a module, by its published name, is left as plain numbers: named in full, by a module
    that it is in, by the end of its name, or by an expression."""
    names, expression = _patterns(quantized.left)
    words = module.split(".")
    starts = (".".join(words[:n]) for n in range(1, len(words) + 1))
    ends = (".".join(words[n:]) for n in range(1, len(words)))
    return any(name in names for name in (*starts, *ends)) or bool(
        expression and expression.match(module)
    )


@lru_cache(maxsize=16)
def _patterns(left):
    expressions = [name.removeprefix(REGEX) for name in left if name.startswith(REGEX)]
    names = frozenset(name for name in left if not name.startswith(REGEX))
    return names, re.compile(
        "|".join(f"(?:{each})" for each in expressions)
    ) if expressions else None


def names_left(said: Fields, *keys: str) -> tuple[str, ...]:
    """The names of modules under these keys, as Transformers takes them: those that are expressions
    match up to the end of a word."""
    return tuple(
        REGEX + rf"(?:{name})(?:(?<=\.)|(?=\.|$))" if _METACHARACTERS.search(name) else name
        for key in keys
        for name in names_in(said, key)
    )


def names_in(said: Fields, key: str) -> tuple[str, ...]:
    """A list of the names of modules, and of patterns of them."""
    names = said.raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{said.where}: {key} is {names!a:.80}, expected a list of names")
    expressions = list(filter(_METACHARACTERS.search, names))
    for name in expressions:
        if said.raw[METHOD] not in _GLOBS:
            _check_expression(said, key, name)
        elif name.count("*") > _MOST_STARS:
            raise UnsupportedModelError(
                f"{said.where}: {key} has {name!a:.80}, supported: up to {_MOST_STARS} stars"
            )
    steps = sum(map(_steps, expressions))
    if steps > _MOST_STEPS:
        raise UnsupportedModelError(
            f"{said.where}: {key} has {len(expressions)} expressions that take up to {steps} steps "
            f"for a name, supported: {_MOST_STEPS}"
        )
    return tuple(names)


def _steps(expression):
    """At most so many ways there are to match an expression with a name: each star may take any
    number of characters, each group one of its alternatives."""
    alternatives = (1 + part.count("|") for part in re.split("[()]", expression))
    return _STEPS_OF_STAR ** len(_STAR.findall(expression)) * math.prod(alternatives)


def _check_expression(said, key, name):
    expression = name.removeprefix(REGEX)
    is_long = len(expression) > _MOST_CHARACTERS or len(_STAR.findall(expression)) > _MOST_STARS
    if is_long or _REPEATED_GROUP.search(expression):
        raise UnsupportedModelError(
            f"{said.where}: {key} has the expression {name!a:.80}, supported: up to "
            f"{_MOST_CHARACTERS} characters and {_MOST_STARS} of * + ? {{, without groups that "
            "repeat"
        )
    try:
        re.compile(expression)
    except re.error as error:
        raise CheckpointError(
            f"{said.where}: {key} has {name!a:.80}, expected a regular expression ({error})"
        ) from None
