"""/v1/messages: an answer in blocks, whole or as named events."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from jlayer.engine.lane import Step
from jlayer.serving.wire.answers import Answer, answers_of
from jlayer.serving.wire.asked import Asked, Identity, Teller, Usage, encode, new_identity
from jlayer.serving.wire.blocks_in import Messages, as_chat
from jlayer.serving.wire.conversation import chat_ids, chat_order
from jlayer.serving.wire.errors import Refused, invalid, messages_error
from jlayer.serving.wire.fields import read_form
from jlayer.serving.wire.served import Served
from jlayer.text.stream import StopWatcher, TextStream

_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}
_EMPTY = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}


def read_messages(
    body: dict, served: Served, *, client: str = "", identity: Identity | None = None
) -> Asked:
    """Raises Refused, and what a chat template gives. More new tokens than the context leaves are
    cut to that: coding agents ask for as many as there may be."""
    form = read_form(body, Messages)
    served = served.asked_for(form.model)
    if form.max_tokens is None:
        raise invalid("max_tokens: none given, expected the most new tokens", param="max_tokens")
    chat_form = as_chat(body, form)
    chat_form.check()
    chat = chat_order(chat_form, served, client=client, n_new=form.max_tokens, cuts=True)
    own = Own(
        identity=identity or new_identity("msg"),
        model=served.name,
        ids=chat.order.ids,
        stops=tuple(chat_form.stops),
        ends=chat.order.options.eos_token_id,
    )
    return Asked(
        orders=(chat.order,),
        views=((0, 0),),
        teller=lambda: MessagesTeller(own, served, *chat.new_answers(own.identity.id)),
        stream=bool(form.stream),
        identity=own.identity,
        model=served.name,
    )


def count_tokens(body: dict, served: Served) -> dict:
    """/v1/messages/count_tokens."""
    form = read_form(body, Messages)
    served = served.asked_for(form.model)
    chat_form = as_chat(body, form)
    answers = answers_of(chat_form, served)
    ids = chat_ids(chat_form, served, tools=answers.rows, convention=answers.convention)
    return {"input_tokens": len(ids)}


@dataclass(frozen=True)
class Own:
    identity: Identity
    model: str
    ids: tuple[int, ...]
    stops: tuple[str, ...]
    ends: tuple[int, ...]


class MessagesTeller(Teller):
    last = b""

    def __init__(self, own: Own, served: Served, answer: Answer):
        self._own, self._served, self._answer = own, served, answer
        self._tokens: list[int] = []
        self._block: str | None = None  # the kind of the one that is open
        self._n_blocks = 0
        self._reason = self._stop = None

    def begin(self):
        usage = {"input_tokens": len(self._own.ids), "output_tokens": 0}
        return [{"type": "message_start", "message": self._message([], usage)}]

    def step(self, choice, step: Step):
        self._tokens += step.token_ids
        return self._events(self._answer.feed(step.text))

    def finish(self, choice, reason):
        events = self._events(self._answer.finish()) + self._closed()
        self._stop = self._stopped_by() if reason == "stop" else None
        if self._answer.calls and reason == "stop":
            self._reason = "tool_use"
        else:
            self._reason = "stop_sequence" if self._stop is not None else _REASONS.get(reason)
        return events

    def end(self, usage: Usage):
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        return [
            {"type": "message_delta", "delta": delta, "usage": _usage(usage)},
            {"type": "message_stop"},
        ]

    def whole(self, usage: Usage):
        said = self._answer.message()
        blocks = []
        if said.get("reasoning_content"):
            blocks.append(
                {"type": "thinking", "thinking": said["reasoning_content"], "signature": ""}
            )
        if said["content"]:
            blocks.append({"type": "text", "text": said["content"]})
        for call in said.get("tool_calls", ()):
            function = call["function"]
            given = {}
            with suppress(ValueError):  # cut off by the limit of tokens
                given = json.loads(function["arguments"] or "{}")
            blocks.append(
                {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}
            )
        return self._message(blocks, _usage(usage))

    def framed(self, event):
        kind = event.get("type")
        name = b"" if kind is None else f"event: {kind}\n".encode()
        return name + b"data: " + encode(event) + b"\n\n"

    def framed_error(self, error: Refused):
        return self.framed(self.body_error(error))

    def body_error(self, error: Refused):
        return messages_error(error)

    def _message(self, blocks, usage):
        return {
            "id": self._own.identity.id,
            "type": "message",
            "role": "assistant",
            "model": self._own.model,
            "content": blocks,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": usage,
        }

    def _events(self, deltas):
        return [event for delta in deltas for event in self._event(delta)]

    def _event(self, delta):
        if "tool_calls" in delta:
            (part,) = delta["tool_calls"]
            begun = []
            if "id" in part:
                block = {"id": part["id"], "name": part["function"]["name"], "input": {}}
                begun = self._opened("tool_use", block)
            text = part["function"]["arguments"]
            told = {"type": "input_json_delta", "partial_json": text}
            return begun + ([self._delta(told)] if text else [])
        kind = "thinking" if "reasoning_content" in delta else "text"
        text = delta.get("reasoning_content") or delta.get("content")
        if not text:
            return []
        begun = [] if self._block == kind else self._opened(kind, _EMPTY[kind])
        return [*begun, self._delta({"type": _DELTAS[kind], kind: text})]

    def _opened(self, kind, block):
        events = self._closed()
        self._block = kind
        self._n_blocks += 1
        start = {"type": "content_block_start", "index": self._n_blocks - 1}
        return [*events, {**start, "content_block": {"type": kind, **block}}]

    def _closed(self):
        if self._block is None:
            return []
        self._block = None
        return [{"type": "content_block_stop", "index": self._n_blocks - 1}]

    def _delta(self, delta):
        return {"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta}

    def _stopped_by(self):
        """Which of the client's texts has ended this one; None: the model has."""
        text = self._served.text
        if not self._own.stops or text is None or not self._tokens:
            return None
        last = self._served.tokens.text_of(self._tokens[-1])
        if last in self._own.stops and self._tokens[-1] in text.special_tokens.values():
            return last
        watcher = StopWatcher(self._own.stops)
        stream = TextStream(text, continues=bool(text.decode(self._own.ids)))
        for token in self._tokens:
            watcher.feed(stream.step(token))
        watcher.feed(stream.finish())
        return watcher.stopped


def _usage(usage):
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,  # those are told below
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }
