"""The commands of a chat: what each is called, takes and does. A line that begins with / is one."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from jlayer.errors import UsageError

# command -> (what follows it, its line in /help)
COMMANDS = {
    "help": ("", "show these lines"),
    "system": ("[TEXT]", 'show the system message, or set it; "" is none'),
    "clear": ("", "drop all messages; the system message stays"),
    "drop": ("N", "drop the oldest N messages with their answers"),
    "retry": ("", "answer the last message again"),
    "edit": ("[N]", "change the last message, or message N, and send it again"),
    "save": (
        "F",
        "write the conversation to a new file, or with its cache to a folder F/; /save! replaces",
    ),
    "load": ("[F]", "go on with a saved conversation; without F, with the last one"),
    "stats": ("", "show tokens, passes, seconds, context and memory"),
    "exit": ("", "leave; so do Ctrl-D, and Ctrl-C twice"),
}
ALIASES = {"quit": "exit", "bye": "exit", "?": "help"}
NOTES = (
    'A line that ends in \\ goes on in the next one; lines between two of """ are one message.',
    "Ctrl-C stops an answer. A message that begins with / is written with //.",
)
_FORM = re.compile(r"/(?P<name>\S*?)(?P<bang>!?)(?:\s+(?P<rest>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """`insists`: it was written with an exclamation mark."""

    name: str
    rest: str = ""
    insists: bool = False


def command_of(text: str, *, is_literal: bool = False) -> Command | None:
    """None where this is a message. `is_literal`: it has several lines or stood between quotes; a
    path or a comment may begin it, so it is only a command if it begins with the name of one that
    takes text. Raises UsageError for a name that there is not, with the closest one."""
    if not text.startswith("/") or text.startswith("//"):
        return None
    match = _FORM.fullmatch(text)
    name, rest = match["name"], (match["rest"] or "").strip()
    name = ALIASES.get(name, name)
    if is_literal and name != "system":
        return None
    if name not in COMMANDS or (match["bang"] and name != "save"):
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{close[0]}? " if close else ""
        raise UsageError(
            f"/{name}: no such command; {hint}/help shows them, and a message that begins with / "
            "is written with //"
        )
    usage, _ = COMMANDS[name]
    if rest and not usage:
        raise UsageError(f"/{name}: found {rest!r:.60}, but nothing follows it")
    if not rest and usage and not usage.startswith("["):
        raise UsageError(f"/{name}: expected /{name} {usage}")
    return Command(name, rest, bool(match["bang"]))


def message_of(text: str) -> str:
    """The message that is meant: with // at its beginning, one that begins with /."""
    return text[1:] if text.startswith("//") else text


def as_typed(message: str) -> str:
    """What gives this message when it is typed."""
    return f"/{message}" if message.startswith("/") else message


def help_lines() -> list[str]:
    rows = [(f"/{name} {usage}", line) for name, (usage, line) in COMMANDS.items()]
    width = max(len(row[0]) for row in rows) + 2
    return [*(f"{name:<{width}}{line}" for name, line in rows), *NOTES]


def number_of(command: Command, *, most: int) -> int:
    """The number that follows a command. Raises UsageError unless it is from 1 to `most`."""
    rest = command.rest
    if not rest.isascii() or not rest.isdigit() or not 1 <= int(rest[:9]) <= most:
        raise UsageError(
            f"/{command.name}: found {rest!r:.60}, expected a number from 1 to {most}"
            if most
            else f"/{command.name}: nothing was said yet"
        )
    return int(rest)
