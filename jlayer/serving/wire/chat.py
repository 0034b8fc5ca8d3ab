"""/v1/chat/completions: messages → an order, and its texts → messages, whole or in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.engine.lane import Step
from jlayer.serving.wire.answers import Answer
from jlayer.serving.wire.asked import Asked, Identity, Teller, Usage, new_identity
from jlayer.serving.wire.conversation import Chat, chat_order
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import check_range, read_form, refuse_given
from jlayer.serving.wire.logprobs import TokenTexts, chat_entry
from jlayer.serving.wire.served import Served

MOST_TOP = 20
UNSUPPORTED = {
    "audio": "it answers with text",
    "functions": "give tools",
    "function_call": "give tool_choice",
    "web_search_options": "it has no network",
    "chat_template": "start it with --chat-template FILE",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "best_of": "use n",
    "suffix": "leave it out",
}


def read_chat(
    body: dict, served: Served, *, client: str = "", identity: Identity | None = None
) -> Asked:
    """`identity`: of the answer, where it has one already. Raises Refused, and what a chat template
    gives."""
    refuse_given(body, UNSUPPORTED)
    form = read_form(body, Chat)
    served = served.asked_for(form.model)
    form.check()
    if form.modalities not in (None, [], ["text"]):
        raise invalid("modalities: only text is supported", param="modalities")
    n_new = form.max_tokens
    if form.max_completion_tokens is not None:
        n_new = form.max_completion_tokens
        check_range(n_new, "max_completion_tokens", 0, (1 << 31) - 1)
    n_top = _n_top(form)
    chat = chat_order(form, served, client=client, n_new=n_new, n_top=n_top)
    streaming = form.stream_options
    own = Own(
        identity=identity or new_identity("chatcmpl"),
        model=served.name,
        n=len(chat.sequences),
        n_top=n_top,
        tells_usage=bool(streaming and streaming.include_usage),
    )
    return Asked(
        orders=(chat.order,),
        views=tuple((0, sequence) for sequence in chat.sequences),
        teller=lambda: ChatTeller(own, served.tokens, chat.new_answers(own.identity.id)),
        stream=bool(form.stream),
        progress=bool(streaming and streaming.jlayer_progress),
        identity=own.identity,
        model=served.name,
    )


def _n_top(form):
    """How many likeliest tokens are told beside each one; None: no log-probabilities."""
    check_range(form.top_logprobs, "top_logprobs", 0, MOST_TOP)
    if form.logprobs:
        return form.top_logprobs or 0
    if form.top_logprobs:
        raise invalid("top_logprobs: needs logprobs: true", param="top_logprobs")
    return None


@dataclass(frozen=True)
class Own:
    """What all chunks of an answer have, and how much is told."""

    identity: Identity
    model: str
    n: int
    n_top: int | None
    tells_usage: bool


class ChatTeller(Teller):
    def __init__(self, own: Own, tokens: TokenTexts, answers: list[Answer]):
        self._own, self._tokens = own, tokens
        self._answers = answers
        self._logprobs: list[list[dict]] = [[] for _ in range(own.n)]
        self._reasons: list[str | None] = [None] * own.n

    def begin(self):
        first = {"role": "assistant", "content": ""}
        return [self._chunk(choice, first) for choice in range(self._own.n)]

    def step(self, choice, step: Step):
        entries = self._entries(step)
        if entries is not None:
            self._logprobs[choice] += entries
        deltas = self._answers[choice].feed(step.text)
        return self._chunks(choice, deltas, entries)

    def finish(self, choice, reason):
        answer = self._answers[choice]
        deltas = answer.finish()
        if answer.calls and reason == "stop":
            reason = "tool_calls"
        self._reasons[choice] = reason
        return [*self._chunks(choice, deltas, None), self._chunk(choice, {}, reason=reason)]

    def end(self, usage: Usage):
        if not self._own.tells_usage:
            return []
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": usage.as_dict()}]

    def whole(self, usage: Usage):
        choices = [
            {
                "index": choice,
                "message": self._answers[choice].message(),
                "logprobs": self._told_logprobs(self._logprobs[choice]),
                "finish_reason": self._reasons[choice],
            }
            for choice in range(self._own.n)
        ]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage.as_dict(),
        }

    def _head(self, kind):
        own = self._own
        return {
            "id": own.identity.id,
            "object": kind,
            "created": own.identity.created,
            "model": own.model,
            "system_fingerprint": None,
        }

    def _entries(self, step):
        if self._own.n_top is None:
            return None
        return [chat_entry(self._tokens, choice, self._own.n_top) for choice in step.choices]

    def _told_logprobs(self, entries):
        if self._own.n_top is None or entries is None:
            return None
        return {"content": entries, "refusal": None}

    def _chunks(self, choice, deltas, entries):
        """One for each delta; log-probabilities go with the first, or by themselves where their
        tokens have no text yet."""
        if entries and not deltas:
            deltas = [{"content": ""}]
        found = []
        for delta in deltas:
            found.append(self._chunk(choice, delta, entries=entries))
            entries = None
        return found

    def _chunk(self, choice, delta, *, entries=None, reason=None):
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [
                {
                    "index": choice,
                    "delta": delta,
                    "logprobs": self._told_logprobs(entries) if entries else None,
                    "finish_reason": reason,
                }
            ],
        }
        if self._own.tells_usage:
            chunk["usage"] = None
        return chunk
