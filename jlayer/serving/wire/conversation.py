"""Conversations as orders: messages → a prompt in the model's chat format, tools and reasoning.

The forms of /v1/chat/completions and of /v1/messages meet here.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.serving.job import Order
from jlayer.serving.wire.answers import Answer, Answers, answers_of
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.messages_in import messages_of
from jlayer.serving.wire.sampling import (
    Sampling,
    constraint_of,
    options_of,
    wanted_form,
    with_length,
    with_texts,
)
from jlayer.serving.wire.served import Served
from jlayer.text.conventions import Convention
from jlayer.text.tools import messages_for_template


class Chat(Sampling, kw_only=True):
    messages: list[dict] | None = None
    max_completion_tokens: int | None = None
    modalities: list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


@dataclass(frozen=True)
class ChatOrder:
    """`sequences`: of each choice, the sequence that it shows. `is_open`: the prompt ends within
    the reasoning."""

    order: Order
    sequences: tuple[int, ...]
    answers: Answers
    is_open: bool

    def new_answers(self, answer_id: str) -> list[Answer]:
        return [
            self.answers.new(answer_id, choice, is_open=self.is_open)
            for choice in range(len(self.sequences))
        ]


def chat_order(
    form: Chat,
    served: Served,
    *,
    client: str,
    n_new: int | None,
    n_top: int | None = None,
    cuts: bool = False,
) -> ChatOrder:
    """`n_new`: the most new tokens; `cuts`: to what the context leaves. `n_top`: likeliest tokens
    that are told. Raises Refused, and what a chat template gives."""
    options = options_of(form, served, logprobs=n_top, logprobs_param="top_logprobs")
    answers, wanted = answers_of(form, served), wanted_form(form)
    if wanted is not None and answers.choice.must_call:
        raise invalid(
            f"{wanted[2]}: tool_choice wants calls and no other text; keep one", param=wanted[2]
        )
    ids = chat_ids(form, served, tools=answers.rows, convention=answers.convention)
    if cuts and n_new is not None and len(ids) < served.context:
        n_new = min(n_new, served.context - len(ids))
    options = with_length(options, served, len(ids), n_new, param="messages")
    options, sequences = with_texts(options, 1 if form.n is None else form.n)
    is_open = answers.is_open(served, ids)
    constraint = answers.held(
        served,
        constraint_of(wanted, served, options.eos_token_id),
        eos_ids=options.eos_token_id,
        is_open=is_open,
    )
    order = Order(
        tuple(ids),
        options,
        constraint=constraint,
        shown=answers.shown(served),
        client=client_of(client, form.user),
        keeps=True,
    )
    return ChatOrder(order, sequences, answers, is_open)


def chat_ids(
    form: Chat,
    served: Served,
    *,
    tools: list[dict] | None,
    convention: Convention | None = None,
) -> list[int]:
    """The prompt of a chat. Raises Refused, and what its template gives."""
    source = served.template_source(has_tools=bool(tools))
    variables = dict(form.chat_template_kwargs or {})
    if form.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", form.reasoning_effort)
    for name in ("messages", "tools", "documents", "chat_template", "self"):
        if name in variables:
            raise invalid(
                f"chat_template_kwargs: {name} is no variable of a template",
                param="chat_template_kwargs",
            )
    if form.continue_final_message is not None:
        variables["continue_final_message"] = form.continue_final_message
    if form.add_generation_prompt is not None:
        variables["add_generation_prompt"] = form.add_generation_prompt
    said = messages_of(form.messages, template=source)
    served.check_text(sum(map(_length, said)), param="messages")
    messages = messages_for_template(said, convention)
    return served.encoded_chat(
        messages,
        tools=tools or None,
        documents=form.documents or None,
        **variables,
    )


def client_of(address: str, user: str | None) -> str:
    """Whom fairness counts a request for: people behind one address may name themselves."""
    return f"{address}/{user}" if user else address


def _length(message):
    content = message["content"]
    return len(content if isinstance(content, str) else content[0]["text"])
