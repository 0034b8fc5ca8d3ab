"""What the assistant says in a chat: its tokens, and how much the prediction of each counts.

The model's own chat template says how a chat is written. Where it marks what the assistant says,
with {% generation %}, the marks count. Else a turn is what comes after the prompt that the template
makes of the messages before it, up to the token that ends the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from jlayer.errors import JlayerError, UsageError
from jlayer.sizes import counted
from jlayer.text.chat import select_template
from jlayer.text.conventions import convention_of
from jlayer.text.marks import Rendered
from jlayer.text.renderer import Renderer
from jlayer.text.tokenizer import Tokenizer
from jlayer.text.tools import messages_for_template

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SHOWN = 40  # characters of a text in a message
# The chat that shows what a template writes at the end of every chat.
_ANSWER = "answer"
_PROBE = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "question"},
)
_MARKED = "give a chat template that has {% generation %} around what the assistant says"

Weighted = tuple[list[int], list[float]]  # ids, and of each how much its prediction counts


@dataclass(frozen=True)
class Span:
    """Characters of a text, and how much the prediction of each of their tokens counts."""

    begin: int
    end: int
    weight: float


def weights_of(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[float]:
    """Of each token, by the (begin, end) of its characters: the weight of the first of `spans` that
    it has a character of, else 0. Tokens and spans are in the order of the text."""
    found, at = [], 0
    for begin, end in offsets:
        while at < len(spans) and begin >= spans[at].end:
            at += 1
        is_inside = at < len(spans) and end > spans[at].begin
        found.append(spans[at].weight if is_inside else 0.0)
    return found


class Turns:
    """Chats as tokens, by one tokenizer and chat template; close it.

    `chat_template`: its name or source, in place of the usual one. `apart`: a chat whose template
    writes a turn in another way once others follow becomes a text for each turn; without it, such
    a chat is refused.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, chat_template: str | None = None, apart: bool = False
    ):
        self._tokenizer, self._chat_template, self._apart = tokenizer, chat_template, apart
        self._renderer = Renderer()
        self._closings: dict[tuple, str] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._renderer.close()

    def texts(
        self,
        messages: Sequence[Mapping],
        weights: Sequence[float],
        *,
        tools: Sequence[Mapping] | None = None,
        variables: Mapping | None = None,
    ) -> list[Weighted]:
        """The texts of a chat, which is one if no turn is apart.

        `weights`: of each message; 0 where it is not the assistant's. `variables`: further ones of
        the template. A template that has no token at the end of the assistant's turns (GLM 4's)
        teaches none. Raises what `Tokenizer.encode_chat` does, and UsageError where the template
        does not tell what the assistant says.
        """
        source = select_template(
            self._tokenizer.chat_templates, self._chat_template, has_tools=tools is not None
        )
        ready = messages_for_template(messages, convention_of(source))
        render = partial(self._render, source, tools, variables or {})
        if _GENERATION.search(source):
            whole = render(ready, finds_generated=True)
            return [self._weighted(whole, _generated(whole, messages, weights))]
        closing = self._closing(source, variables or {})
        if not any(weights):
            return [self._weighted(render(ready), [])]
        return self._by_prompts(render, ready, weights, closing)

    def _render(self, source, tools, variables, messages, *, prompts=False, finds_generated=False):
        return self._tokenizer.rendered_chat(
            messages,
            render=self._renderer.render,
            finds_generated=finds_generated,
            add_generation_prompt=prompts,
            tools=tools,
            chat_template=source if "{" in source else self._chat_template,
            **variables,
        )

    def _by_prompts(self, render, messages, weights, closing):
        whole, last = render(messages), len(messages) - 1
        together, apart, changed = [], [], None
        for at, weight in enumerate(weights):
            if not weight:
                continue
            if at == 0:
                raise UsageError(
                    "messages[0]: the assistant's, so no prompt is before it; give it weight 0, or "
                    "put a message before it"
                )
            prompt = render(messages[:at], prompts=True).text
            through = whole if at == last else render(messages[: at + 1])
            if not through.text.startswith(prompt):
                raise UsageError(_unlike(at, "begins this turn in another way", prompt, through))
            span = Span(len(prompt), _end_of_turn(through, closing), weight)
            if changed is None and not whole.text.startswith(through.text[: span.end]):
                changed = at, through.text[: span.end]
            together.append(span)
            apart.append((through, [span]))
        if changed is None:
            return [self._weighted(whole, together)]
        if self._apart:
            return [self._weighted(*each) for each in apart]
        at, text = changed
        words = _unlike(at, "writes this turn in another way once others follow", text, whole)
        lines = "give each turn a line of its own that ends with it, with weight 0 on those before"
        raise UsageError(
            f"{words}; or {lines} (turns_apart)",
            command_line=f"{words}; or {lines} (--turns-apart does)",
        )

    def _weighted(self, rendered, spans):
        ids, offsets = self._tokenizer.spell_chat(rendered)
        return ids, weights_of(offsets, spans)

    def _closing(self, source, variables):
        """What a template writes after the last turn's end whoever said it, mostly nothing: older
        ones of Llama 3 write the beginning of an answer, those of Phi 3 the end of the text."""
        key = source, json.dumps(variables, sort_keys=True, default=str)
        if key not in self._closings:
            render = partial(self._render, source, None, variables)
            try:
                shorter, longer = render(_PROBE[:2]), render(_PROBE)
            except JlayerError:  # not of such chats; what is wrong with the user's shows there
                self._closings[key] = ""
            else:
                self._closings[key] = _closing_of(shorter, longer.text)
        return self._closings[key]


def _generated(whole, messages, weights) -> list[Span]:
    """The spans that the template marks, each with the weight of its message."""
    said = [w for message, w in zip(messages, weights, strict=True) if _is_assistants(message)]
    blocks = whole.generated
    if not blocks:
        raise UsageError(
            "messages: the chat template has {% generation %}, but marks nothing in this chat; "
            "correct the template"
        )
    if len(set(said)) == 1:
        said = said[:1] * len(blocks)
    if len(said) != len(blocks):
        raise UsageError(
            f"messages: the chat template marks {counted(len(blocks), 'part')} as the assistant's, "
            f"of {counted(len(said), 'message')} with different weights; give these one weight"
        )
    return [Span(*block, weight) for block, weight in zip(blocks, said, strict=True)]


def _is_assistants(message):
    return message.get("role") == "assistant"


def _end_of_turn(through: Rendered, closing: str) -> int:
    """Where the last turn ends in its chat: with the template's control token, if it has one there,
    and not with the white space that separates it from the next turn."""
    end = len(through.text)
    if closing and through.text.endswith(closing):
        end -= len(closing)
    stripped = len(through.text[:end].rstrip())
    return stripped if any(e == stripped for _, e in through.control_spans()) else end


def _closing_of(shorter: Rendered, longer: str) -> str:
    """What stands at the end of a chat that ends with an answer and not after the answer in a
    longer chat, where both have the answer and the control token after it alike."""
    if longer.startswith(shorter.text):
        return ""
    said = shorter.text.rfind(_ANSWER) + len(_ANSWER)
    for begin, end in shorter.control_spans():
        if begin >= said and not shorter.text[said:begin].strip():
            return shorter.text[end:] if longer.startswith(shorter.text[:end]) else ""
    return ""


def _unlike(at, what, expected, rendered):
    n = next(
        (n for n, (a, b) in enumerate(zip(expected, rendered.text, strict=False)) if a != b),
        min(len(expected), len(rendered.text)),
    )
    begin = max(n - _SHOWN // 4, 0)
    here, there = (text[begin:][:_SHOWN] for text in (expected, rendered.text))
    return f"messages[{at}]: the chat template {what}: {here!a} became {there!a}; {_MARKED}"
