"""Chats: which template a model has, what goes into it, and the text that comes out.

A template is a program by whoever published the checkpoint. `sandbox` runs it. Which control tokens
of its text are real is decided with `marks`. Ids are left to `tokenizer`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, UsageError
from jlayer.strict import read_json_object, read_small_file
from jlayer.text import sandbox
from jlayer.text.marks import (
    ControlTokens,
    Rendered,
    control_parts,
    keys_of,
    mapped,
    mark_control_tokens,
    mark_whole,
    strings_of,
    unused_characters,
    user_parts,
)

_ROLE = re.compile(r"[\w .:@/-]{1,64}")
# Names under which a message's reasoning is passed; templates read the first (transformers).
_REASONING = ("reasoning_content", "thinking", "reasoning")


def chat_messages(prompt, *, chat: bool, system: str | None) -> list[dict] | None:
    """The messages that a prompt stands for, or None where it is plain text."""
    if isinstance(prompt, str):
        if not chat:
            return None
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt] if system is not None else list(prompt)


# Which template


def read_templates(folder: str | os.PathLike, tokenizer_config: Mapping) -> dict[str, str]:
    """Name → source of every chat template in `folder`, the usual one under "default".

    chat_template.jinja (with additional_chat_templates/*.jinja) goes before tokenizer_config.json
    and this before chat_template.json, as in transformers.
    Raises CheckpointError where one is not text.
    """
    folder = Path(folder)
    found = {}
    if (folder / "chat_template.jinja").exists():
        found["default"] = _read_text(folder / "chat_template.jinja")
    more = folder / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")) if more.is_dir() else ():
        found[path.stem] = _read_text(path)
    raw, where = tokenizer_config.get("chat_template"), "tokenizer_config.json"
    if not found and raw is None and (folder / "chat_template.json").exists():
        where = "chat_template.json"
        raw = read_json_object(folder / where).get("chat_template")
    return found or _named_templates(raw, f"{folder / where}: chat_template")


def select_template(templates: Mapping[str, str], wanted: str | None, *, has_tools: bool) -> str:
    """The source of the template `wanted` (a name, or a source itself), or of the usual one.

    Raises UsageError where there is none of that name, or none at all.
    """
    if wanted is not None:
        if wanted in templates or "{" in wanted:
            return templates.get(wanted, wanted)
        raise UsageError(unknown_name("chat template", wanted, templates))
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        found = f"this model has several chat templates, {', '.join(templates)}; "
        raise UsageError(
            f"{found}name one (chat_template)",
            command_line=f"{found}give a file with the one that is meant (--chat-template F)",
        )
    found = "this model has no chat template; use a plain prompt, or give a template "
    raise UsageError(
        f"{found}(chat_template)", command_line=f"{found}in a file (--chat-template F)"
    )


def _read_text(path):
    raw = read_small_file(path, limit=sandbox.MAX_TEMPLATE_BYTES)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 (byte {error.start})") from None


def _named_templates(raw, where):
    """One template, or a list of {"name", "template"}."""
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"default": raw}
    try:
        found = {row["name"]: row["template"] for row in raw}
        "".join([*found, *found.values()])
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{where}: found a {type(raw).__name__}, expected text or a list of name and template"
        ) from None
    return found


# Messages → text


def render_chat(
    template: str,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    tokens: Mapping[str, str] | None = None,
    special: Iterable[str] = (),
    added: Iterable[str] = (),
    options: Mapping | None = None,
) -> Rendered:
    """The text of `messages`, and which of its control tokens the template wrote.

    `tokens`: the tokenizer's named tokens (bos_token and so on). Control tokens are all `special`
    tokens, and those of the `added` tokens that stand in the template's source. `options`: further
    variables. Where a template looks into the content, marks can change its text; weaker marks are
    tried then, and without any that work, text that holds a special token is refused.
    Raises UsageError (messages that are none, or that the template refuses) or CheckpointError (a
    template that is damaged, forbidden things, or without end).
    """
    plain = _plain_inputs(messages, tools=tools, documents=documents)
    options = _plain(dict(options or {}), "template options")
    special = frozenset(special)
    control = special | {token for token in added if token in template and not token.isspace()}
    _refuse_control_tokens([*strings_of(options, keys=True), *keys_of(plain)], special)
    marks = unused_characters((template, plain, options))
    rest = {"add_generation_prompt": add_generation_prompt, **(tokens or {}), **options}
    markings = _markings(marks, control, special)
    variants = [plain | rest, *(mapped(plain, mark) | rest for mark, _ in markings)]
    text, marked, which = sandbox.render(template, variants, marks)
    if marked is not None:
        known = markings[which][1]
        return Rendered(text, control_parts(user_parts(marked, marks), known), known)
    _refuse_parts_of_control_tokens(plain, special)
    return Rendered(text, control_parts([(text, False)], control), control)


def _markings(marks, control, special):
    """(how a string is marked, the control tokens it tells apart), the strongest way first."""
    of_control, of_special = ControlTokens(control), ControlTokens(special)
    return (
        (lambda text: mark_whole(text, marks), control),
        (lambda text: mark_control_tokens(text, marks, of_control), control),
        (lambda text: mark_control_tokens(text, marks, of_special), special),
    )


def _refuse_control_tokens(names, special):
    """Keys and options carry no marks, so a token in them would count as the template's."""
    pattern = ControlTokens(special).pattern
    for name in names:
        if pattern.search(name):
            raise UsageError(f"{name[:60]!r} holds a special token; only message text may")


def _refuse_parts_of_control_tokens(plain, special):
    tokens = ControlTokens(special)
    for string in strings_of(plain):
        if tokens.found_in(string):
            raise UsageError(
                f"message text {string[:60]!r} holds (part of) a special token, and this template "
                "changes text so that it cannot be kept apart; take it out"
            )


# Inputs become plain JSON values, since a template could call the methods of anything else.


def _plain_inputs(messages, *, tools, documents):
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError("messages: expected a non-empty list of {'role': ..., 'content': ...}")
    return {
        "messages": [_message(found, f"messages[{i}]") for i, found in enumerate(messages)],
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
    }


def _message(message, where):
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: found a {type(message).__name__}, expected a mapping")
    # None is dropped, as transformers does: APIs send it, and templates print it as "None".
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UsageError(f"{where}: role is {role!r}, expected a plain word such as 'user'")
    message = _plain(message, where)
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value, where):
    """`value` as JSON holds it; raises UsageError where it cannot."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
        for string in strings_of(plain, keys=True):
            string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: not valid Unicode ({error.reason})") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}; expected text, numbers, lists and mappings") from None
    return plain
