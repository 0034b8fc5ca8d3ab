"""Encodes prompts in all forms that users give: text, ids, messages, or a list of these."""

from __future__ import annotations

from collections.abc import Mapping

from jlayer.config import unknown_name
from jlayer.engine.ids import Row, as_rows, encoded, is_id_list, plain
from jlayer.errors import UsageError
from jlayer.text.chat import chat_messages
from jlayer.text.inputs import plain_variables
from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

# What is for the chat template; without messages nothing reads it.
TEMPLATE_OPTIONS = (
    *("chat_template", "tools", "documents", "continue_final_message", "chat_template_kwargs"),
)
CHAT_OPTIONS = ("messages", "chat", "system", *TEMPLATE_OPTIONS)


def encode_prompts(
    text: Tokenizer | None,
    prompt=None,
    *,
    folder: str,
    pad: int | None = None,
    messages=None,
    chat=False,
    system=None,
    **template,
) -> tuple[list[Row], bool]:
    """A str, ids, messages, or a list of these -> (a row for each, whether it was a single one).

    `text`: the tokenizer of the model in `folder`, if it has one. A flat list of ids is taken as it
    stands. Rows of ids, and what a tokenizer gives (a mapping with input_ids), lose their padding
    by the rule of `as_rows`.
    Messages ({"role": ..., "content": ...}) are put in the model's chat format; so is a str with
    `chat`, after a message of `system`. `template`: TEMPLATE_OPTIONS, as in transformers'
    apply_chat_template; its further variables (enable_thinking and so on) are a mapping,
    `chat_template_kwargs`. Raises UsageError, and what a chat template gives.
    """
    if (prompt is None) == (messages is None):
        raise UsageError("prompt: give a prompt or messages, and not both")
    prompt = messages if prompt is None else prompt
    form = {"chat": chat or system is not None, "system": system, "template": _given(template)}
    if isinstance(prompt, Mapping):
        _refuse_unread(form["template"])
        ids, mask = encoded(prompt)
        return as_rows(ids, mask, pad=pad), is_id_list(plain(ids))
    prompt = plain(prompt)
    if _is_one(prompt):
        return [_encode(text, folder, prompt, **form)], True
    if not isinstance(prompt, (list, tuple)):
        found = type(prompt).__name__
        raise UsageError(f"prompt: found {found}, expected a str, ids, messages, or a list of them")
    if not prompt:
        raise UsageError("prompt: an empty list; give at least one prompt")
    for one in prompt:
        if not _is_one(one):
            found = type(one).__name__
            raise UsageError(f"prompt: found {found} in a list of prompts, expected str or ids")
    if all(map(is_id_list, prompt)):
        _refuse_unread(form["template"])
        return as_rows(prompt, None, pad=pad), False
    return [_encode(text, folder, one, **form) for one in prompt], False


def _is_one(prompt):
    """Whether this is a single prompt: text, ids, or messages."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return is_id_list(prompt) or all(type(part) is dict for part in prompt)


def _given(template):
    """The options that are given, with the further variables among them."""
    for name in template:
        if name not in TEMPLATE_OPTIONS:
            raise UsageError(unknown_name("option", name, TEMPLATE_OPTIONS))
    given = {name: value for name, value in template.items() if value not in (None, False)}
    variables = plain_variables(given.pop("chat_template_kwargs", None))
    twice = sorted(given.keys() & variables.keys())
    if twice:
        raise UsageError(f"{twice[0]}: given twice, as an option and in chat_template_kwargs")
    return given | variables


def _encode(text, folder, prompt, *, chat, system, template):
    ids = _ids(text, folder, prompt, chat=chat, system=system, template=template)
    return Row(ids, ids)


def _ids(text, folder, prompt, *, chat, system, template):
    if not isinstance(prompt, str) and is_id_list(prompt):
        _refuse_unread(template)
        return [int(token) for token in prompt]
    if text is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    messages = chat_messages(prompt, chat=chat, system=system)
    if messages is None:
        _refuse_unread(template)
        return text.encode(prompt)
    return text.encode_chat(messages, **template)


def _refuse_unread(template):
    for name in template:
        found = f"{name}: is for chats, and this prompt is none; "
        raise UsageError(f"{found}give messages, or chat=True", command_line=f"{found}add --chat")
