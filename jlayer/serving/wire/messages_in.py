"""Messages as clients send them → messages of plain text, in the roles that a template knows.

Calls of tools in them are checked here, and made what templates read in `text.tools`.
"""

from __future__ import annotations

import re

from jlayer.serving.wire.errors import invalid

MOST_MESSAGES = 4096
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
# Templates of multimodal models go through the parts of a content, and take no text instead.
_READS_PARTS = re.compile(r"for\s+\w+\s+in\s+\w+(\.content|\[['\"]content['\"]\])")
_READS_TEXT = re.compile(r"content\s+is\s+(not\s+)?string|content['\"]\]\s+is\s+(not\s+)?string")


def messages_of(messages: list[dict] | None, *, template: str) -> list[dict]:
    """Content that is given in parts becomes text, or the other way where the template reads parts
    only. The role developer is system to a template that does not know it. Raises Refused."""
    if not messages:
        raise invalid("messages: none given, expected a non-empty list", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise invalid(
            f"messages: found {len(messages)}, at most {MOST_MESSAGES} are taken", param="messages"
        )
    wants_parts = bool(_READS_PARTS.search(template)) and not _READS_TEXT.search(template)
    return [
        _message(message, f"messages[{at}]", template=template, wants_parts=wants_parts)
        for at, message in enumerate(messages)
    ]


def _message(message, where, *, template, wants_parts):
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role: found {role!r:.60}, expected text", param=f"{where}.role")
    found = {**message, "role": role}
    if role == "developer" and "developer" not in template:
        found["role"] = "system"
    content = message.get("content")
    if content is not None:
        text = _text(content, f"{where}.content")
        found["content"] = [{"type": "text", "text": text}] if wants_parts else text
    for name in ("audio", "function_call"):
        if message.get(name) is not None:
            raise invalid(f"{where}.{name}: not supported", param=f"{where}.{name}")
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        found.setdefault("content", "")
        if found["content"] is None:
            found["content"] = ""
    elif content is None and role != "assistant":
        raise invalid(f"{where}.content: missing, expected text", param=f"{where}.content")
    elif content is None:
        found["content"] = ""
    return found


def _text(content, where):
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = type(content).__name__
        raise invalid(f"{where}: found a {found}, expected text or a list of parts", param=where)
    return "\n".join(_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _part(part, where):
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        found = type(part).__name__
        raise invalid(f"{where}: found a {found}, expected a part of text", param=where)
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise invalid(
            f"{where}: found a part of type {kind!r:.60}; this model reads text only",
            param=where,
            code="unsupported_content",
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        found = type(text).__name__
        raise invalid(f"{where}.text: found a {found}, expected text", param=f"{where}.text")
    return text


def _tool_calls(calls, where):
    if not isinstance(calls, list):
        raise invalid(f"{where}: found a {type(calls).__name__}, expected a list", param=where)
    return [_tool_call(call, f"{where}[{at}]") for at, call in enumerate(calls)]


def _tool_call(call, where):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(
            f"{where}: expected {{'type': 'function', 'function': {{'name': ..., 'arguments': "
            "...}}",
            param=where,
        )
    return call
