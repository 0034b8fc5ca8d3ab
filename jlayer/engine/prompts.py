"""Encodes prompts in all forms that users give: text, ids, messages, or a list of these."""

from __future__ import annotations

from jlayer.errors import UsageError
from jlayer.text.chat import chat_messages
from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

CHAT_OPTIONS = ("messages", "chat", "system", "chat_template")


def encode_prompts(
    text: Tokenizer | None,
    prompt=None,
    *,
    folder: str,
    messages=None,
    chat=False,
    system=None,
    chat_template=None,
) -> tuple[list[list[int]], bool]:
    """A str, ids, messages, or a list of these -> (ids of each prompt, whether it was a single
    one).

    `text`: the tokenizer of the model in `folder`, if it has one. Messages ({"role": ...,
    "content": ...}) are rendered in the model's chat format; with `chat` a str is too, after a
    `system` message. Raises UsageError, and the errors of a chat template.
    """
    if (prompt is None) == (messages is None):
        raise UsageError("prompt: give a prompt or messages, and not both")
    prompt = messages if prompt is None else prompt
    form = {"chat": chat or system is not None, "system": system, "chat_template": chat_template}
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
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
    return [_encode(text, folder, one, **form) for one in prompt], False


def _is_one(prompt):
    """Whether this is a single prompt: text, ids, or messages."""
    if isinstance(prompt, str):
        return True
    kinds = {type(part) for part in prompt} if isinstance(prompt, (list, tuple)) else set()
    return kinds in ({int}, {dict})


def _encode(text, folder, prompt, *, chat, system, chat_template):
    if not isinstance(prompt, str) and type(prompt[0]) is int:
        return list(prompt)
    if text is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    messages = chat_messages(prompt, chat=chat, system=system)
    if messages is None:
        return text.encode(prompt)
    return text.encode_chat(messages, chat_template=chat_template)
