"""Which tokens may come next, where a text is held to a schema, an expression, a grammar.

A `Constraint` knows tokens and nothing of logits. The compiling and its limits are left to
`guidance`, the checks of what a client sent to `schemas`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jlayer.errors import UsageError
from jlayer.text.guidance import (
    RefusedGrammar,
    matcher_of,
    refuse_errors,
    tokenizer_of,
)
from jlayer.text.schemas import (
    checked_choices,
    checked_pattern,
    checked_schema,
    hides_text,
    json_rule,
    pattern_rule,
    place_of,
    text_rule,
    whole_grammar,
)

_NAMED_TOKEN = re.compile(r"<\[(\d+)\]>")


class Constraint:
    """The tokens allowed after those accepted so far.

    End tokens are allowed exactly where what stands there is complete; after one, only they are. No
    other token that is left out of texts is allowed, but those that a grammar names by id. Not for
    several threads at a time; copies are.
    """

    def __init__(self, tokenizer, grammar: str, *, vocab_size: int, eos_ids: Iterable[int]):
        """`vocab_size`: of the logits, which may have ids that the tokenizer has not.

        Raises RefusedGrammar, a UsageError.
        """
        self._matcher = matcher_of(tokenizer, grammar)
        self._vocab_size = vocab_size
        self._ends = _ids(eos_ids, vocab_size)
        named = set(map(int, _NAMED_TOKEN.findall(grammar)))
        self._never = _ids(_left_out(tokenizer) - named, vocab_size)
        self._n_known = tokenizer_of(tokenizer).vocab_size
        self._reasoning: _Reasoning | None = None
        self._has_ended = False
        self._mask: np.ndarray | None = None  # what is allowed now, once it was asked for

    @classmethod
    def json_schema(cls, tokenizer, schema: Mapping, *, where: str = "schema", **sizes):
        """A JSON value that the schema allows. `sizes`: as of the class; `where`: names the schema
        in errors.

        Properties come in the order of the schema; so much white space as anybody needs is allowed
        between its parts. Raises UsageError with the place.
        """
        plain = checked_schema(schema, where)
        try:
            rule, hides = json_rule(plain), hides_text(plain)
            return cls.lark(tokenizer, f"start: {rule}", hides=hides, **sizes)
        except RefusedGrammar as error:
            raise UsageError(f"{where}{place_of(plain)}: {error}") from None

    @classmethod
    def json_object(cls, tokenizer, **sizes):
        """Any JSON object."""
        return cls.json_schema(tokenizer, {"type": "object"}, **sizes)

    @classmethod
    def regex(cls, tokenizer, pattern: str, *, where: str = "regex", **sizes):
        """A text that matches as a whole. Without lookaround, backreferences and word boundaries.

        Raises UsageError.
        """
        rule = pattern_rule(checked_pattern(pattern, where))
        try:
            return cls.lark(tokenizer, f"start: {rule}", **sizes)
        except RefusedGrammar as error:
            raise UsageError(f"{where}: {error}") from None

    @classmethod
    def choice(cls, tokenizer, choices: Sequence[str], *, where: str = "choice", **sizes):
        """One of some texts. Raises UsageError."""
        rule = " | ".join(map(text_rule, checked_choices(choices, where)))
        try:
            return cls.lark(tokenizer, f"start: {rule}", hides=False, **sizes)
        except RefusedGrammar as error:
            raise UsageError(f"{where}: {error}") from None

    @classmethod
    def lark(cls, tokenizer, grammar: str, *, hides: bool = True, **sizes):
        """A text of a grammar in Lark's form, as llguidance extends it (a token by its id: <[5]>).
        `hides`: it may write texts that do not stand in it.

        Raises RefusedGrammar, a UsageError.
        """
        added = tokenizer.library.get_added_tokens_decoder().values()
        tokens = [str(token.content) for token in added]
        return cls(tokenizer, whole_grammar(grammar, tokens, hides=hides), **sizes)

    def copy(self) -> Constraint:
        """Another one at the same place, which goes on by itself."""
        other = object.__new__(Constraint)
        other.__dict__.update(self.__dict__)
        other._matcher = self._matcher.deep_copy()
        return other

    def after_reasoning(self, marks: tuple[int, int], *, is_open: bool) -> Constraint:
        """A copy that holds only what comes after the reasoning, which is free.

        `marks`: the tokens before and after it. `is_open`: the prompt ends within it; else the text
        may begin with the first of them, and if it does not, there is no reasoning.
        """
        other = self.copy()
        other._reasoning, other._mask = _Reasoning(*marks, is_open), None
        return other

    def allowed(self, more: Sequence[int] = ()) -> np.ndarray:
        """Which tokens may follow the accepted ones and `more`: bool [V], read only.

        None may where `more` itself is not allowed. Changes nothing.
        Raises UsageError where the text cannot go on, or a limit is met.
        """
        if len(more):
            ahead = self.copy()
            for token in more:
                if not ahead._takes(int(token)):
                    return np.zeros(self._vocab_size, bool)
                ahead._advance(int(token))
            return ahead.allowed()
        if self._mask is None:
            self._mask = self._computed()
            self._mask.setflags(write=False)
        return self._mask

    def accept(self, ids: Iterable[int]) -> None:
        """Goes on by tokens that were drawn. Raises UsageError at one that is not allowed."""
        for token in ids:
            if not self._takes(int(token)):
                raise UsageError(f"constraint: token {int(token)} is not allowed here")
            self._advance(int(token))

    @property
    def is_over(self) -> bool:
        """Whether only an end token may follow, so that the text is complete as it is."""
        if self._has_ended or self._reasoning is not None:
            return self._has_ended
        mask = self.allowed()
        return self._matcher.is_accepting() and mask.sum() == mask[self._ends].sum()

    def _takes(self, token):
        if not 0 <= token < self._vocab_size:
            return False
        if self._mask is not None or self._reasoning is not None:
            return bool(self.allowed()[token])
        if token in self._ends:
            return self._has_ended or self._matcher.is_accepting()
        if self._has_ended or token in self._never:
            return False
        return self._matcher.validate_tokens([token]) == 1

    def _advance(self, token):
        self._mask, reasoning = None, self._reasoning
        if reasoning is not None and reasoning.is_open:
            self._reasoning = None if token == reasoning.end else reasoning
        elif reasoning is not None and token == reasoning.begin:
            self._reasoning = replace(reasoning, is_open=True)
        elif token in self._ends:
            self._has_ended, self._reasoning = True, None
        else:
            self._reasoning = None
            self._matcher.consume_token(token)
            refuse_errors(self._matcher)

    def _computed(self):
        mask = np.zeros(self._vocab_size, bool)
        if self._reasoning is not None and self._reasoning.is_open:
            mask[: self._n_known] = True
            mask[self._ends] = False
            return mask
        if not self._has_ended:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            refuse_errors(self._matcher)
            found = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
            mask[: len(found)] = found
            mask[self._never] = False
        mask[self._ends] = self._has_ended or self._matcher.is_accepting()
        if self._reasoning is not None:
            mask[self._reasoning.begin] = True
        if not (mask.any() or self._matcher.is_accepting()):
            raise UsageError("constraint: no token of this model can go on from here")
        return mask


@dataclass(frozen=True)
class _Reasoning:
    """The tokens around what is free; whether the first was there, or need not be."""

    begin: int
    end: int
    is_open: bool


def _left_out(tokenizer) -> set[int]:
    """Tokens that the library's grammars could write as text, and that are left out of texts; and
    its own end tokens, which it allows at every end."""
    its = tokenizer_of(tokenizer)
    special = tokenizer.special_tokens.values()
    return {*its.eos_tokens, *(token for token in special if not its.is_special_token(token))}


def _ids(ids, vocab_size):
    return np.array(sorted({int(token) for token in ids if token < vocab_size}), np.int64)
