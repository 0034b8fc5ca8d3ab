"""What each command does to a session. `session` reads and answers, `commands` knows the names."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Protocol

from jlayer.app.chat import commands, files, folders
from jlayer.app.chat.commands import Command, number_of
from jlayer.app.chat.conversation import Conversation
from jlayer.app.chat.reading import Cleared, Keyboard, Pipe
from jlayer.app.chat.turns import Speaker, Totals
from jlayer.app.words import time_words
from jlayer.errors import UsageError
from jlayer.sizes import counted, human
from jlayer.strict import is_there

NO_SYSTEM = ('""', "''")  # how an empty system message is written
# What is shown of a turn: of one, and of others.
SHOWN = {
    "turns": ("answer", "answers"),
    "prompt_tokens": ("token of prompts", "tokens of prompts"),
    "kept_tokens": ("of them kept from the turn before",) * 2,
    "new_tokens": ("new token", "new tokens"),
    "rows": ("token computed", "tokens computed"),
    "forward_passes": ("forward pass", "forward passes"),
}


class Leave(Exception):
    """The end of the chat."""


class Home(Protocol):
    """What a command needs of a session."""

    model: object
    speaker: Speaker
    source: Pipe | Keyboard
    conversation: Conversation
    totals: Totals
    last: Totals | None
    last_path: str | None

    def say(self, *lines: str) -> None: ...

    def count(self) -> int | None: ...

    def changed(self, *, n_dropped: int = 0) -> None: ...

    def edit(self, at: int) -> None: ...

    def turn(self, message: str, at: int | None = None, *, again: bool = False) -> None: ...


def memory_of(model) -> dict:
    """As `generate --json` prints it."""
    return model.engine.memory()


def show_help(session: Home, command: Command) -> None:
    session.say(*commands.help_lines())


def system(session: Home, command: Command) -> None:
    conversation = session.conversation
    if not command.rest:
        none = "there is no system message; /system TEXT sets one"
        session.say(none if conversation.system is None else conversation.system)
        return
    conversation.system = None if command.rest in NO_SYSTEM else command.rest
    session.changed()
    computed = "; the next turn computes all messages anew" if conversation.exchanges else ""
    session.say(f"the system message is {_state(conversation.system)}{computed}")


def _state(text):
    return "gone" if text is None else "set"


def clear(session: Home, command: Command) -> None:
    _drop(session, len(session.conversation.exchanges))


def drop(session: Home, command: Command) -> None:
    _drop(session, number_of(command, most=len(session.conversation.exchanges)))


def _drop(session, number):
    exchanges = session.conversation.exchanges
    del exchanges[:number]
    session.changed(n_dropped=number)
    if not exchanges:
        session.model.engine.kept.clear()
    session.say(f"{_exchanges(number)} dropped, {len(exchanges)} left")


def _exchanges(number):
    """So many messages, in words."""
    return "1 message and its answer" if number == 1 else f"{number} messages and their answers"


def retry(session: Home, command: Command) -> None:
    exchanges = session.conversation.exchanges
    if not exchanges:
        raise UsageError("/retry: nothing was said yet")
    if session.speaker.repeats_itself and exchanges[-1].finish_reason == "stop":
        session.say("without a --temperature the answer will be the same")
    session.turn(exchanges[-1].user, len(exchanges) - 1, again=True)


def edit(session: Home, command: Command) -> None:
    n_exchanges = len(session.conversation.exchanges)
    number = number_of(
        command if command.rest else replace(command, rest=str(max(1, n_exchanges))),
        most=n_exchanges,
    )
    more = n_exchanges - number
    if more:
        session.say(
            f"once it is sent, its answer goes, and {_exchanges(more)} after it; an empty line "
            "keeps all"
        )
    session.edit(number - 1)


def save(session: Home, command: Command) -> None:
    path = os.path.expanduser(command.rest)
    if not session.conversation.exchanges:
        raise UsageError("/save: nothing was said yet")
    is_folder = path.endswith("/") or os.path.isdir(path)
    is_replacing = folders.holds_one(path) if is_folder else is_there(path, follow=False)
    replaces = command.insists
    if not replaces and session.source.is_terminal and is_replacing:
        if not _agreed(session, f"{path} exists; replace it? [y/N] "):
            session.say("nothing was saved")
            return
        replaces = True
    if is_folder:
        n_tokens = folders.save(path, session.model, session.conversation, replace=replaces)
        session.say(f"saved to {path}, with the cache of {n_tokens:,} tokens")
        return
    files.save(path, session.conversation, replace=replaces)
    session.say(f"saved to {path}")


def _agreed(session, question):
    try:
        return session.source.line(question).strip().lower() in ("y", "yes")
    except (Cleared, KeyboardInterrupt, EOFError):
        return False


def load(session: Home, command: Command) -> None:
    path = os.path.expanduser(command.rest) or session.last_path
    if path is None:
        raise UsageError("/load: expected /load F")
    if os.path.isdir(path):
        found = folders.load(path, session.model, say=session.say)
    else:
        found = files.load(path)
    before = len(session.conversation.exchanges)
    session.conversation.system = found.system
    session.conversation.exchanges[:] = found.exchanges
    session.changed(n_dropped=before)
    dropped = f"; {_exchanges(before)} before it dropped" if before else ""
    session.say(f"{_exchanges(len(found.exchanges))} loaded{dropped}")
    if found.exchanges and found.exchanges[-1].answer is None:
        session.say("the last message has no answer yet; /retry gives one")


def stats(session: Home, command: Command) -> None:
    if session.last is not None:
        session.say(f"last turn  {_sum(session.last, skip=('turns',))}")
    session.say(f"all        {_sum(session.totals)}")
    used, limit = session.count(), session.model.context_limit
    session.say(f"context    {'unknown' if used is None else f'{used:,}'} of {limit:,} tokens")
    memory = memory_of(session.model)
    for side in ("device", "host"):
        held, most = memory[f"{side}_peak_bytes"], memory[f"{side}_budget_bytes"]
        session.say(f"{side:<11}at most {human(held)} of {human(most)}")


def _sum(totals, skip=()):
    shown = {name: nouns for name, nouns in SHOWN.items() if name not in skip}
    words = [counted(getattr(totals, name), *nouns) for name, nouns in shown.items()]
    return ", ".join([*words, time_words(totals.seconds) if totals.seconds else "0 s"])


def leave(session: Home, command: Command) -> None:
    raise Leave


ACTIONS = {
    "help": show_help,
    "system": system,
    "clear": clear,
    "drop": drop,
    "retry": retry,
    "edit": edit,
    "save": save,
    "load": load,
    "stats": stats,
    "exit": leave,
}
