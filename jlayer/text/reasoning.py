"""Reasoning in an answer, apart from what the answer says: its marks, and text split at them.

The splitter comes first, and what it calls content goes to the parser of tool calls (`calls`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jlayer.text.decoders import overlap

REASONING, CONTENT = "reasoning", "content"
Piece = tuple[str, str]  # (REASONING or CONTENT, text)


@dataclass(frozen=True)
class ReasoningMarks:
    """The texts before and after the reasoning of an answer."""

    begin: str
    end: str

    def are_left_open(self, prompt: str) -> bool:
        """Whether a prompt ends with the beginning of the reasoning, as some templates write it."""
        return prompt.rstrip().endswith(self.begin)

    def token_ids(self, tokenizer) -> tuple[int, int] | None:
        """Both marks as tokens, as `Constraint.after_reasoning` takes them; None where one of them
        is written in several."""
        added = tokenizer.library.get_added_tokens_decoder().items()
        ids = {str(token.content): token_id for token_id, token in added}
        found = ids.get(self.begin), ids.get(self.end)
        return None if None in found else found

    def shown_tokens(self, tokenizer) -> frozenset[int]:
        """The special tokens among the marks, which `TextStream` is to show."""
        known = tokenizer.special_tokens
        return frozenset(known[mark] for mark in (self.begin, self.end) if mark in known)


MARKS = (
    ReasoningMarks("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM 4.5, SmolLM 3
    ReasoningMarks("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ReasoningMarks("<seed:think>", "</seed:think>"),
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
)


def reasoning_marks_of(template: str, added_tokens: Iterable[str] = ()) -> ReasoningMarks | None:
    """The marks that a chat template's source names, else those for which the tokenizer has tokens
    of their own; None where there are none."""
    added = frozenset(added_tokens)
    named = (marks for marks in MARKS if marks.end in template)
    of_tokens = (marks for marks in MARKS if {marks.begin, marks.end} <= added)
    return next(named, None) or next(of_tokens, None)


class ReasoningSplitter:
    """Text in pieces -> pieces of reasoning and of content.

    Reasoning stands at the beginning of an answer, once. Nothing is lost but the marks, the line
    breaks beside them, and white space before the first. A mark in later text is text.
    """

    def __init__(self, marks: ReasoningMarks | None, *, is_open: bool = False):
        """`is_open`: the prompt ends within the reasoning. Without marks, all text is content."""
        self._marks = marks
        self._held = ""
        self._stage = self._content if marks is None else self._before
        if marks is not None and is_open:
            self._stage = self._opened

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain with `text`."""
        self._held += text
        pieces, stage = [], None
        while stage != self._stage:
            stage = self._stage
            pieces += stage()
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back for a mark that did not come."""
        held, self._held = self._held, ""
        kind = REASONING if self._stage in (self._opened, self._reasoning) else CONTENT
        return [(kind, held)] if held else []

    # Each stage gives what is certain, and may set the next.

    def _before(self):
        begun, mark = self._held.lstrip(), self._marks.begin
        if begun.startswith(mark):
            self._held, self._stage = begun[len(mark) :], self._opened
        elif not mark.startswith(begun):
            self._stage = self._content
        return []

    def _opened(self):
        self._held = self._held.lstrip("\n")
        if self._held:
            self._stage = self._reasoning
        return []

    def _reasoning(self):
        text, found, rest = self._held.partition(self._marks.end)
        if found:
            self._held, self._stage = rest, self._closed
        else:
            text = text[: len(text) - overlap(text, self._marks.end)]
        text = text.rstrip("\n")
        if not found:
            self._held = self._held[len(text) :]
        return [(REASONING, text)] if text else []

    def _closed(self):
        self._held = self._held.lstrip("\n")
        if self._held:
            self._stage = self._content
        return []

    def _content(self):
        text, self._held = self._held, ""
        return [(CONTENT, text)] if text else []
