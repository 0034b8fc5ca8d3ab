"""llguidance, the library behind constrained output: imported at first use, within limits.

What a client sends is a program, and the library's own limits do not hold for all of them: a schema
of 1,300 bytes compiles for six minutes. So a grammar that may be such is compiled in another
process first, which is ended after CPU_S. What a grammar says is left to `schemas`, which tokens it
allows to `constraint`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import weakref

from jlayer.errors import UsageError
from jlayer.text.sandbox import limit_process, run_apart

CPU_S = 0.4  # of a compilation; schemas in use take 1 to 20 ms
MEMORY_BYTES = 512 << 20  # address space of the process that tries it
# The library's own limits; those that are not here are its defaults.
LIMITS = {
    "initial_lexer_fuel": 500_000,  # of a compilation
    "step_lexer_fuel": 200_000,  # of a token: 0.1 s at most
    "max_lexer_states": 100_000,  # of a text: 20 MB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# A grammar that is no longer takes 0.1 s at most, unless it holds one of these words. Measured on a
# core, without the other process: 50 patterns that must all match, 339 s; 600 patterns of keys, of
# which no two may match one, 24 s; multipleOf 1,000,003, 4.5 s and 280 MB. What is long takes its
# length: 2,000 properties, 0.2 s; 500 lists with 100,000 items and more, 0.7 s.
PLAIN_BYTES = 4 << 10
COSTLY = ('"pattern', '"allOf"', '"multipleOf"', "&", "~")

_CACHE = weakref.WeakKeyDictionary()  # our tokenizer -> the library's
_LOCK = threading.Lock()


class RefusedGrammar(UsageError):
    """A grammar that the library does not take, or cannot follow any further."""


def library():
    """The module llguidance. Raises UsageError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "constrained output (a schema, a regular expression, a forced tool call) needs "
            'llguidance, which is not installed; run: pip install -e ".[serve]"'
        ) from None
    return llguidance


def tokenizer_of(tokenizer):
    """The library's own form of a `Tokenizer`, made once: it takes 0.7 s for 128,000 tokens.

    Raises UsageError where the library cannot tell the bytes of its tokens.
    """
    with _LOCK:
        if tokenizer not in _CACHE:
            make, end = library().LLTokenizer, tokenizer.eos_token_id
            if end is None:  # the library needs one; `Constraint` puts in those of the request
                end = min(tokenizer.special_tokens.values(), default=0)
            try:
                _CACHE[tokenizer] = make(tokenizer.library.to_str(), eos_token=end)
            except (ValueError, RuntimeError) as error:
                raise UsageError(
                    f"{tokenizer.where}: no constrained output with a tokenizer of this form "
                    f"({_one_line(str(error))})"
                ) from None
        return _CACHE[tokenizer]


def matcher_of(tokenizer, grammar: str):
    """A matcher at the beginning of a text. `grammar`: in Lark's form, as the library extends it.

    Raises RefusedGrammar.
    """
    reason = _reason_against(grammar) if _may_be_costly(grammar) else None
    if reason is not None:
        raise RefusedGrammar(reason)
    matcher = _matcher(tokenizer_of(tokenizer), grammar)
    refuse_errors(matcher)
    return matcher


def refuse_errors(matcher) -> None:
    """Raises RefusedGrammar where a matcher has given up."""
    if matcher.is_error():
        raise RefusedGrammar(_in_our_words(matcher.get_error()))


def complaint(grammar: str) -> str | None:
    """What the library has against a grammar, which it compiles in the calling process."""
    found = _matcher(library().LLTokenizer("byte"), grammar).get_error()
    return _in_our_words(found) if found else None


def child() -> None:
    """What the other process does: import, set the limits, compile, write one line of JSON."""
    grammar = json.load(sys.stdin)
    limit_child()
    sys.stdout.write(json.dumps(complaint(grammar)))


def limit_child() -> None:
    library()
    limit_process(cpu_s=CPU_S, memory_bytes=MEMORY_BYTES)


def _may_be_costly(grammar):
    return len(grammar) > PLAIN_BYTES or any(word in grammar for word in COSTLY)


@functools.lru_cache(maxsize=64)
def _reason_against(grammar):
    """What is wrong with a grammar, found by another process; or None."""
    library()
    done = run_apart("guidance", json.dumps(grammar).encode(), what="grammar")
    if done is None or done.returncode:
        return f"too complex: it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MB to compile"
    return json.loads(done.stdout)


def _matcher(tokenizer, grammar):
    made = library()
    limits = made.LLParserLimits(**LIMITS)
    matcher = made.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some limits are met at the first token
    return matcher


# Part of what the library says -> what it means to whoever wrote the schema.
_WORDS = (
    ("too many states", "too complex: its patterns reach too many states in this text"),
    ("too many expressions", "too complex: too many patterns or repetitions"),
    ("(grammar) too big", "too complex: too many patterns or ranges"),
    ("schema too large", "too complex: it grows too large where its parts are combined"),
    ("Unable to determine if regex", "too complex: its patterns cannot be combined"),
    ("panic:", "too complex"),
    ("Enable 'coerce_one_of'", "'oneOf' with parts that may both hold; use 'anyOf'"),
    ("present in a registry", "a '$ref' to another document; expected one that begins with '#'"),
)
# Where in a grammar of ours something is wrong tells nobody anything.
_PLACE = re.compile(
    r"^at \d+\(\d+\): |failed to compile JSON schema: |\n +\d+ \| .*"
    r'|invalid regex "(?:[^"\\]|\\.)*" \(in regex\): ',
    re.DOTALL,
)


def _in_our_words(message):
    for found, words in _WORDS:
        if found in message:
            return words
    message = _PLACE.sub("", message).replace("Unimplemented keys:", "keywords not supported:")
    return _one_line(message)


def _one_line(message):
    """White space as single spaces, 200 characters at most."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:200]
