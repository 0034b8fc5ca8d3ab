"""Chats to learn from -> tokens, and where in them each answer of the assistant's stands.

An answer is learned with the token that ends its turn, and from the tokens that a chat template
writes before one that is to be generated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jlayer.errors import UsageError
from jlayer.text.chat import select_template
from jlayer.text.tokenizer import Tokenizer

WEIGHT = "weight"  # of a line, or of a message of the assistant's
# What a weight may be beside 0: all numbers that a step makes of two of them are float32's.
WEIGHTS = (1e-3, 1e3)


class Chats:
    """Encodes chats with one tokenizer. Errors do not name their place in a file."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None):
        self._tokenizer, self._template = tokenizer, chat_template
        self._special = set(tokenizer.special_tokens.values())

    def encoded(
        self, messages: Sequence[tuple[str, dict]], tools: object, *, first: int = 0
    ) -> tuple[list[int], list[float]]:
        """(ids, weights) of messages with their places, of which those of the assistant's are
        learned, from message `first` on. Raises UsageError."""
        own = _own_weights(messages, first)
        self._refuse_tools_unread(tools)
        chat = [{k: v for k, v in each.items() if k != WEIGHT} for _, each in messages]
        ids = self._rendered(chat, tools, opens=False)
        weights = [0.0] * len(ids)
        for number in (number for number in own if own[number]):
            try:
                begin, end = self._answer(chat, number, tools, ids)
            except _NoAnswer as error:
                raise UsageError(f"{messages[number][0]}: {error}") from None
            weights[begin:end] = [own[number]] * (end - begin)
        return ids, weights

    def _refuse_tools_unread(self, tools):
        if not tools:
            return
        templates = self._tokenizer.chat_templates
        if "tools" not in select_template(templates, self._template, has_tools=True):
            raise UsageError(
                "tools: this chat template does not read them; leave them out, or give one that "
                "does (--chat-template)"
            )

    def _rendered(self, chat, tools, *, opens):
        return self._tokenizer.encode_chat(
            chat, tools=tools, add_generation_prompt=opens, chat_template=self._template
        )

    def _answer(self, chat, number, tools, ids):
        """Where in the ids of a chat an answer begins and ends, with the token that ends a turn.

        Raises _NoAnswer where generating it would need other tokens than the chat has.
        """
        before = self._opened(chat, number, tools)
        is_last = number == len(chat) - 1
        through = ids if is_last else self._rendered(chat[: number + 1], tools, opens=False)
        if not self._begins_with(through, before):
            raise _NoAnswer(
                "this chat template opens an answer in another way than it writes one; give "
                "another (--chat-template), or prompt and completion as texts"
            )
        begin = common(before, through)
        through = self._closed(through, before, begin, chat[: number + 1], tools)
        end = self._end_of_turn(through, begin) or len(through)
        if ids[:end] == through[:end]:
            return begin, end
        n = common(through, ids)
        closed = self._end_of_turn(through[:n], begin)
        # Phi 3's template ends a chat, where no answer is opened, with one more special token.
        if closed and self._is_blank(through[closed:]):
            return begin, closed
        if self._begins_with(ids, through[:end]):
            return begin, max(n, begin)
        raise _NoAnswer(
            "this chat template writes this answer in another way once more follows; give each "
            "answer a line of its own, with what comes before it and weight 0 for earlier "
            "answers, or another template (--chat-template)"
        )

    def _opened(self, chat, number, tools):
        """The ids of a chat up to where an answer begins."""
        if number:
            return self._rendered(chat[:number], tools, opens=True)
        # No template opens a chat of no messages: how it opens an answer is seen after this one.
        closed, opened = (self._rendered(chat[:1], tools, opens=opens) for opens in (False, True))
        opening = opened[len(closed) :]
        for end in range(len(opening), len(closed) + 1 if opening else 0):
            if closed[end - len(opening) : end] == opening:
                return closed[:end]
        raise _NoAnswer(
            "is the assistant's, and where it begins cannot be seen in what this chat template "
            "makes of it; begin with a user's message"
        )

    def _closed(self, through, before, begin, chat, tools):
        """The ids of a chat that ends in an answer, without those that open another one, which some
        templates write whatever they are told."""
        n = min(common(before[::-1], through[::-1]), len(through) - begin)
        first = len(through) - n
        tail = through[first:]
        if self._is_blank(tail) and self._special.isdisjoint(tail):
            return through
        if through != self._rendered(chat, tools, opens=True):
            return through
        # The next answer is opened as this one was, perhaps after the same end of a message.
        if first > begin and through[first - 1] in self._special:
            return through[:first]
        ends = (at + 1 for at in range(first, len(through)) if through[at] in self._special)
        return through[: next(ends, first)]

    def _end_of_turn(self, ids, first):
        """Where an answer that begins at `first` ends: after its last special token. None where
        more than white space follows that, or there is none."""
        ends = (end for end in range(len(ids), first, -1) if ids[end - 1] in self._special)
        end = next(ends, None)
        return end if end is not None and self._is_blank(ids[end:]) else None

    def _begins_with(self, ids, start):
        """By their ids, or by their texts: a token may reach from one part into the next."""
        if ids[: len(start)] == start:
            return True
        texts = (self._tokenizer.decode(each, skip_special_tokens=False) for each in (ids, start))
        return next(texts).startswith(next(texts))

    def _is_blank(self, ids):
        """Whether the ids stand for nothing but white space and special tokens."""
        return not self._tokenizer.decode(ids, continues=True).strip()


class _NoAnswer(Exception):
    """What an answer is cannot be told, in words for its message."""


def messages_of(found: object, name: str) -> list[tuple[str, dict]]:
    """(the place of a message in `name`, the message). Raises UsageError."""
    if not isinstance(found, list):
        raise UsageError(f"{name}: found {kind_of(found)}, expected a list of messages")
    places = [f"{name}[{n}]" for n in range(len(found))]
    for place, message in zip(places, found, strict=True):
        if not isinstance(message, dict):
            raise UsageError(
                f'{place}: found {kind_of(message)}, expected {{"role": ..., "content": ...}}'
            )
    return list(zip(places, found, strict=True))


def _own_weights(messages, first) -> dict[int, float]:
    """Number of a message of the assistant's, from `first` on -> its weight."""
    own = {}
    for number, (place, message) in enumerate(messages):
        if number >= first and message.get("role") == "assistant":
            own[number] = weight_of(message.get(WEIGHT, 1), f"{place}: {WEIGHT}")
        elif WEIGHT in message:
            raise UsageError(
                f"{place}: {WEIGHT}: found in a message that is not learned, expected only in the "
                "answers; leave it out"
            )
    if not own:
        raise UsageError(
            'found no answer, expected a message of "role": "assistant" to learn; leave the line '
            "out"
        )
    return own


def kind_of(value: object) -> str:
    """What a value of JSON is, in words."""
    if value is None or value == "":
        return "null" if value is None else "an empty text"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return kinds.get(type(value), "a number")


def weight_of(value: object, name: str) -> float:
    """Raises UsageError where a value of JSON is none."""
    least, most = WEIGHTS
    if type(value) not in (int, float) or (value != 0 and not least <= value <= most):
        raise UsageError(
            f"{name}: found {json.dumps(value)[:40]}, expected 0, or a number from {least:g} to "
            f"{most:g}"
        )
    return float(value)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    return next(n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
