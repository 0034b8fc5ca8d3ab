"""Conversations as files: a JSON object with `messages`, checked strictly, replaced only on demand.

What is wrong with a file is one line that names the message and what was expected.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress

from jlayer.app.chat.conversation import Conversation, Exchange
from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.strict import is_there, read_json_object

# role -> the keys that a message of it may have besides role and content
KEYS = {"system": (), "user": (), "assistant": ("reasoning_content", "finish_reason")}
REASONS = ("stop", "length", "interrupted")


def save(path: str, conversation: Conversation, *, replace: bool) -> None:
    """Writes the whole file or nothing of it. Raises UsageError (it exists, and `replace` is not
    set) or StorageError."""
    if not replace and is_there(path, follow=False):
        raise UsageError(f"{path} exists already; /save! {path} replaces it")
    text = json.dumps({"messages": conversation.as_dicts()}, ensure_ascii=False, indent=1)
    folder, name = os.path.split(os.path.abspath(path))
    part = None
    try:
        number, part = tempfile.mkstemp(prefix=f".{name[:100]}.", dir=folder)  # mode 0600
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(part, path, replace=replace)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if part is not None:
            with suppress(FileNotFoundError):
                os.unlink(part)


def _put_in_place(part, path, *, replace):
    if replace:
        os.replace(part, path)
        return
    try:
        os.link(part, path)  # unlike a rename, it refuses a file that came meanwhile
    except FileExistsError:
        raise UsageError(f"{path} exists already; /save! {path} replaces it") from None
    except OSError:  # a file system without links
        os.rename(part, path)


def load(path: str) -> Conversation:
    """Raises UsageError or StorageError."""
    try:
        body = read_json_object(path)
    except CheckpointError as error:  # worded for files of a model, which can be fetched again
        raise UsageError(str(error).partition("; fetch")[0]) from None
    messages = body.pop("messages", None)
    if body:
        raise UsageError(f"{path}: {unknown_name('key', next(iter(body)), ['messages'])}")
    if not isinstance(messages, list):
        raise UsageError(f'{path}: expected {{"messages": [...]}}, as /save writes it')
    return conversation_of(messages, where=path)


def conversation_of(messages: list, *, where: str) -> Conversation:
    """Raises UsageError unless messages of user and assistant take turns, after at most one of
    system."""
    found = Conversation()
    for at, message in enumerate(messages):
        role = _checked(message, f"{where}: messages[{at}]")
        last = found.exchanges[-1] if found.exchanges else None
        is_open = last is not None and last.answer is None
        if role != _expected(at, role, is_open=is_open):
            expected = "assistant" if is_open else "user"
            raise UsageError(
                f"{where}: messages[{at}]: found the role {role!r}, expected {expected!r}; those "
                "of user and assistant take turns, after at most one of system"
            )
        if role == "system":
            found.system = message["content"]
        elif role == "user":
            found.exchanges.append(Exchange(message["content"]))
        else:
            found.exchanges[-1] = Exchange(
                last.user,
                message["content"],
                message.get("reasoning_content", ""),
                message.get("finish_reason", "stop"),
            )
    return found


def _expected(at, role, *, is_open):
    if at == 0 and role == "system":
        return "system"
    return "assistant" if is_open else "user"


def _checked(message, where):
    """The role of a message. Raises UsageError."""
    if not isinstance(message, dict):
        raise UsageError(f"{where}: found a {type(message).__name__}, expected an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        raise UsageError(f"{where}: role is {role!r:.60}, expected {', '.join(KEYS)}")
    known = ("role", "content", *KEYS[role])
    for key, value in message.items():
        if key not in known:
            raise UsageError(f"{where}: {unknown_name('key', key, known)}")
        if not isinstance(value, str):
            raise UsageError(f"{where}: {key} is a {type(value).__name__}, expected text")
        if not _is_unicode(value):
            raise UsageError(f"{where}: {key} is not valid Unicode (a lone surrogate)")
    if "content" not in message:
        raise UsageError(f"{where}: has no content")
    if message.get("finish_reason", "stop") not in REASONS:
        found = message["finish_reason"]
        raise UsageError(f"{where}: finish_reason is {found!r:.60}, expected {', '.join(REASONS)}")
    return role


def _is_unicode(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
