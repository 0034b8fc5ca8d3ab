"""Encodes prompts in all forms that users give: text, ids, messages, or a list of these."""

from __future__ import annotations

from collections.abc import Mapping

from jlayer.engine.ids import Row, as_rows, encoded, is_id_list, plain
from jlayer.errors import UsageError
from jlayer.text.chat import chat_messages
from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

CHAT_OPTIONS = ("messages", "chat", "system", "chat_template")


def encode_prompts(
    text: Tokenizer | None,
    prompt=None,
    *,
    folder: str,
    pad: int | None = None,
    messages=None,
    chat=False,
    system=None,
    chat_template=None,
) -> tuple[list[Row], bool]:
    """A str, ids, messages, or a list of these -> (a row for each, whether it was a single one).

    `text`: the tokenizer of the model in `folder`, if it has one. A flat list of ids is taken as it
    stands. Rows of ids, and what a tokenizer gives (a mapping with input_ids), lose their padding
    by the rule of `as_rows`.
    Messages ({"role": ..., "content": ...}) are put in the model's chat format; so is a str with
    `chat`, after a message of `system`. Raises UsageError, and what a chat template gives.
    """
    if (prompt is None) == (messages is None):
        raise UsageError("prompt: give a prompt or messages, and not both")
    prompt = messages if prompt is None else prompt
    form = {"chat": chat or system is not None, "system": system, "chat_template": chat_template}
    if isinstance(prompt, Mapping):
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
        return as_rows(prompt, None, pad=pad), False
    return [_encode(text, folder, one, **form) for one in prompt], False


def _is_one(prompt):
    """Whether this is a single prompt: text, ids, or messages."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return is_id_list(prompt) or all(type(part) is dict for part in prompt)


def _encode(text, folder, prompt, *, chat, system, chat_template):
    ids = _ids(text, folder, prompt, chat=chat, system=system, chat_template=chat_template)
    return Row(ids, ids)


def _ids(text, folder, prompt, *, chat, system, chat_template):
    if not isinstance(prompt, str) and is_id_list(prompt):
        return [int(token) for token in prompt]
    if text is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    messages = chat_messages(prompt, chat=chat, system=system)
    if messages is None:
        return text.encode(prompt)
    return text.encode_chat(messages, chat_template=chat_template)
