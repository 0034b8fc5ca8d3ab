"""The loop of a chat: reads, answers or obeys, and says in one line what went wrong.

Nothing is dropped without a word: a message whose turn fails comes back to be edited, and an answer
that is asked for again is replaced only once there is another one.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass

from jlayer.app.chat import files, room
from jlayer.app.chat.actions import ACTIONS, Leave, memory_of
from jlayer.app.chat.commands import as_typed, command_of, message_of
from jlayer.app.chat.conversation import Conversation, Exchange
from jlayer.app.chat.page import Page, has_colour
from jlayer.app.chat.reading import Cleared, Keyboard, Pipe, read
from jlayer.app.chat.turns import LENGTH_FROM, Answer, ContextFull, Speaker, Totals, follow
from jlayer.app.ending import Interrupted
from jlayer.app.status import DIM, PLAIN
from jlayer.app.streams import draws, tell
from jlayer.errors import DoesNotFitError, JlayerError
from jlayer.interrupts import STOPS, Terminated, check
from jlayer.sizes import counted

FULL = (ContextFull, DoesNotFitError)
# How an answer that is no whole one is marked, by its finish_reason.
MARKS = {
    "interrupted": "(stopped; what there is of the answer stays)",
    "length": "(cut at {limit} tokens, the most that -n and the room allow)",
}


class TurnsFailed(JlayerError):
    """Some lines of a pipe failed, which nobody may have seen. Its exit code is that of the
    first."""

    def __init__(self, failures: list[JlayerError], report: dict):
        first, count = failures[0], len(failures)
        which = "a turn" if count == 1 else f"{count} turns"
        super().__init__(f"{which} failed, the first with: {first.command_line}")
        self.exit_code, self.report = first.exit_code, report


@dataclass(frozen=True)
class Draft:
    """What stands at the next prompt. `at`: the number of the exchange that it takes the place of,
    from 0; None: a new one. `waits`: it comes back after a command that makes room."""

    text: str
    at: int | None = None
    waits: bool = False


class Session:
    def __init__(
        self,
        model,
        speaker: Speaker,
        source: Pipe | Keyboard,
        page: Page,
        *,
        system: str | None = None,
        last_path: str | None = None,
    ):
        """`last_path`: a file that always has the conversation as it is; None: there is none."""
        self.model, self.speaker, self.source, self.page = model, speaker, source, page
        self.conversation = Conversation(system)
        self.totals, self.last = Totals(), None
        self.last_path = last_path
        self.n_context: int | None = None  # tokens of the conversation; None: to be counted
        self.draft: Draft | None = None
        self._attempts = 0  # answers to the same messages before this one
        self._told: set[str] = set()
        self._is_stopping = False  # whether the last key was Ctrl-C
        self._failures: list[JlayerError] = []

    def run(self) -> dict:
        """Goes on until somebody leaves. Raises Interrupted after a signal at the prompt, and
        TurnsFailed where a pipe's turns did."""
        try:
            with suppress(EOFError, Leave):
                while True:
                    self._next()
        except STOPS as stop:
            raise Interrupted(stop, self.result()) from None
        if self._failures and not self.source.is_terminal:
            raise TurnsFailed(self._failures, self.result())
        return self.result()

    def result(self) -> dict:
        return {
            "messages": self.conversation.as_dicts(),
            "device": self.model.engine.device_name,
            "dtype": self.model.dtype,
            "stats": {
                **vars(self.totals),
                "context_tokens": self.count(),
                "context_limit": self.model.context_limit,
            },
            "memory": memory_of(self.model),
        }

    def count(self) -> int | None:
        """The tokens of the conversation so far; None where the template refuses it."""
        if not self.conversation.exchanges:
            return 0
        if self.n_context is None:
            messages = self.conversation.messages()
            with suppress(JlayerError):
                self.n_context = len(self.speaker.ids(messages, add_generation_prompt=False))
        return self.n_context

    def changed(self, *, n_dropped: int = 0) -> None:
        """The messages are others now, without the oldest `n_dropped`. One that waited for room
        comes back."""
        self.n_context, self._attempts = None, 0
        if self.draft is not None:
            at = self.draft.at
            is_there = at is not None and at >= n_dropped
            self.draft = Draft(self.draft.text, at - n_dropped if is_there else None)

    def edit(self, at: int) -> None:
        """Puts the message of an exchange at the next prompt."""
        self.draft = Draft(self.conversation.exchanges[at].user, at)

    def say(self, *lines: str) -> None:
        """Shows what somebody asked for. Results go to stdout, so this does not."""
        for line in lines:
            print(line, file=sys.stderr)

    def _next(self):
        """Reads a message or a command, and does what it says."""
        draft = self.draft or Draft("")
        label = "" if draft.at is None or draft.waits else f"edit {draft.at + 1} "
        try:
            said = read(
                self.source, label=label, before="" if draft.waits else as_typed(draft.text)
            )
            self._is_stopping = False
            if not said.text.strip():
                self._take_back(draft)
                return
            self.source.remember(said.text)
            command = command_of(said.text, is_literal=said.is_literal)
            if command is not None:
                ACTIONS[command.name](self, command)
                return
        except Cleared as cleared:
            self._stop_or_leave(is_last=not cleared.was_typed)
            self._take_back(draft)
            return
        except KeyboardInterrupt:
            self._stop_or_leave(is_last=True)
            return
        except JlayerError as error:
            self._fail(error)
            return
        self.draft = None
        message = said.text if said.is_literal else message_of(said.text)
        self.turn(message, None if draft.waits else draft.at)

    def _stop_or_leave(self, *, is_last):
        """After Ctrl-C at the prompt: a second in a row leaves. `is_last`: nothing was typed."""
        if not self.source.is_terminal or (self._is_stopping and is_last):
            raise KeyboardInterrupt
        self._is_stopping = True
        self.page.note("(Ctrl-C again leaves)")

    def _take_back(self, draft):
        """What stood at the prompt was taken away, or there was nothing."""
        if draft.waits:
            return
        self.draft = None
        if draft.at is not None:
            self.say("nothing was changed")

    def turn(self, message: str, at: int | None = None, *, again: bool = False) -> None:
        """Sends a message: a new one, or in the place of exchange `at` and of all that follow.
        `again`: the same as before, for another answer."""
        self._attempts = self._attempts + 1 if again else 0
        back = None if again else Draft(message, at)
        try:
            with self.source.silent():
                answer = self._answer(message, at)
        except KeyboardInterrupt:
            self._is_stopping = True
            self._give_back(back)
        except FULL as error:
            self._fail(error)
            self._offer(message, at)
        except JlayerError as error:
            self._fail(error)
            self._give_back(back)
        else:
            self._take(message, at, answer, back)

    def _answer(self, message, at):
        ids = self.speaker.ids(self.conversation.prompt(message, after=at))
        check()
        decoding = self.speaker.begin(ids, attempt=self._attempts)
        self._tell_once(decoding.notes)
        return follow(self.model, decoding, self.speaker.splitter(ids), self.page)

    def _take(self, message, at, answer: Answer, back):
        found = answer.found
        self.last = Totals.of(found)
        self.totals += self.last
        if found.token_ids:
            exchange = Exchange(message, answer.text, answer.reasoning, found.finish_reason)
            exchanges = self.conversation.exchanges
            exchanges[len(exchanges) if at is None else at :] = [exchange]
            self.n_context = answer.n_context
            self._write_down()
        if isinstance(answer.stop, Terminated) or (answer.stop and not self.source.is_terminal):
            raise answer.stop
        if answer.stop is not None:
            self._is_stopping = True
            self.source.forget()
        if not found.token_ids:
            self.page.note("(stopped before the first token)")
            self._give_back(back)
            return
        if found.finish_reason in MARKS:
            self.page.note(MARKS[found.finish_reason].format(limit=answer.limit))
        self._remark(summary(self.last, answer, self.model))

    def _remark(self, line):
        """A line about the answer, less to be seen than it."""
        if not draws():
            tell(line)
        else:
            self.say(f"{DIM}{line}{PLAIN}" if has_colour(sys.stderr) else line)

    def _give_back(self, draft):
        """A message that was not answered stands at the next prompt, where somebody can edit it."""
        self.draft = draft if self.source.is_terminal else None
        self.source.forget()  # what was typed for after the answer

    def _offer(self, message, at):
        """Says what can be dropped to make room for a message."""
        try:
            lines = room.offers(self.speaker, self.conversation, message, after=at)
            self.say(*(f"  {line}" for line in lines))
        except JlayerError as error:  # the template refuses a part of the conversation
            self._fail(error)
        waits = bool(self.conversation.exchanges[:at])
        if waits and self.source.is_terminal:
            self.say("  your message comes back after that")
        self._give_back(Draft(message, at, waits=waits))

    def _write_down(self):
        """An answer may have taken hours: it is not lost with the terminal."""
        if self.last_path is not None:
            try:
                files.save(self.last_path, self.conversation, replace=True)
            except JlayerError as error:
                self._tell_once([error.command_line])

    def _tell_once(self, notes):
        for note in notes:
            if not note.startswith(LENGTH_FROM) and note not in self._told:
                self._told.add(note)
                tell(note)

    def _fail(self, error):
        self._failures.append(error)
        print(f"jlayer: {' '.join(error.command_line.split())}", file=sys.stderr)


def summary(turn: Totals, answer: Answer, model) -> str:
    """A turn in one line."""
    found, n_new = answer.found, turn.prompt_tokens - turn.kept_tokens
    return (
        f"{counted(turn.new_tokens, 'token')} ({found.finish_reason}), "
        f"{found.stats['tokens_per_s']:.2f} tokens/s, "
        f"{counted(turn.forward_passes, 'forward pass', 'forward passes')}; prompt "
        f"{counted(turn.prompt_tokens, 'token')}, {n_new:,} computed; context "
        f"{answer.n_context:,} of {model.context_limit:,}"
    )
