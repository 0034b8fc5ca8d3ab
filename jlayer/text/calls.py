"""Calls of tools in what a model writes: text in pieces -> content, and calls as they come.

Whatever a model writes gives content or calls, never an error. What looks like a call and is none
(no valid JSON, a tool that nobody offered, one call too many) is content, as it was written.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jlayer.text.conventions import SPACE, Convention
from jlayer.text.decoders import overlap
from jlayer.text.elements import ELEMENTS, Found, NoCall, ObjectEnd

# After so many texts that looked like calls, the rest is content: each may be read again and again.
MOST_MISTAKEN = 16
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallBegun:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallBegun | Arguments


@dataclass(frozen=True)
class ToolCall:
    """arguments: a JSON object, as text."""

    id: str
    name: str
    arguments: str


class ToolParser:
    """Text in pieces -> events. `content` and `calls`: all that came so far.

    White space around calls is dropped, as templates put it there. The events, joined, do not
    depend on how the text is divided.
    """

    def __init__(
        self,
        convention: Convention,
        tools: Mapping[str, Mapping],
        *,
        most: int | None = None,
        streams: bool = False,
        new_id: Callable[[], str] | None = None,
    ):
        """`tools`: name -> the schema of its parameters. `most`: of calls. `streams`: gives
        arguments while they are written, which only a text that is held to the convention allows;
        without it a call is given when it is whole, since until then it may turn out to be none."""
        self.calls: list[ToolCall] = []
        self._content: list[str] = []
        self._convention, self._tools, self._most = convention, dict(tools), most
        self._streams = streams
        self._new_id = new_id or (lambda: new_call_id(convention))
        self._events: list[Event] = []
        self._held = ""  # what may become a call, or white space before one
        self._n_mistaken = 0
        self._region: _Region | None = None
        if convention.starts_text:
            self._region = _Region(0, 0, is_bare=True)

    @property
    def content(self) -> str:
        return "".join(self._content)

    def feed(self, text: str) -> list[Event]:
        """The events that are certain with `text`."""
        self._held += text
        return self._advance(is_final=False)

    def finish(self) -> list[Event]:
        """What was held back for more text."""
        return self._advance(is_final=True)

    def _advance(self, *, is_final):
        self._events = []
        while self._in_text(is_final) if self._region is None else self._in_calls(is_final):
            pass
        return self._events

    # Between calls. Each step says whether another one may follow.

    def _in_text(self, is_final):
        text, opening = self._held, self._convention.opening
        marks = [mark for mark in (opening, self._convention.unopened) if mark]
        found = [(text.find(mark), mark) for mark in marks if mark in text]
        if found:
            at, mark = min(found)
            n_content = len(text[:at].rstrip(SPACE))
            self._say(n_content)
            start = at - n_content
            at = start + len(mark) if mark == opening else start
            self._region = _Region(at, start + len(mark))
            return True
        if is_final:
            self._say(len(text) if not self.calls or text.strip(SPACE) else 0)
            self._held = ""
        else:
            n_open = max(overlap(text, mark) for mark in marks)
            self._say(len(text[: len(text) - n_open].rstrip(SPACE)))
        return False

    def _say(self, n):
        """The first characters that are held are content."""
        text, self._held = self._held[:n], self._held[n:]
        if not text:
            return
        self._content.append(text)
        if self._events and isinstance(self._events[-1], Content):
            text = self._events.pop().text + text
        self._events.append(Content(text))

    # Within calls

    def _in_calls(self, is_final):
        region = self._region
        try:
            if region.element is None and not self._find_element(region, is_final):
                return self._region is None
            self._stream(region)
            found = region.element.read(self._held)
        except NoCall:
            return self._mistaken(region)
        if found is not None:
            self._take(region, found)
            return True
        return self._mistaken(region) if is_final else False

    def _find_element(self, region, is_final):
        """Passes over what may stand before a call. -> whether one begins there."""
        text, convention = self._held, self._convention
        fillers = convention.fillers[region.n_calls > 0]
        while region.at < len(text) and text[region.at] in fillers:
            region.at += 1
        rest, closing = text[region.at :], convention.closing
        if closing and region.n_calls and rest.startswith(closing):
            self._held = rest[len(closing) :]
            self._region = None
            return False
        if not rest or (region.n_calls and closing.startswith(rest)):
            if not is_final:
                return False
            if not rest and region.n_calls:
                self._held, self._region = "", None
                return False
            raise NoCall
        if self._is_full:
            raise NoCall
        # A name without an object around it stands only right behind the mark.
        form = "json" if convention.form == "named" and region.n_calls else convention.form
        region.element = ELEMENTS[form](region.at, self._tools, is_bare=region.is_bare)
        return True

    @property
    def _is_full(self):
        """Whether no further call is taken."""
        is_enough = self._most is not None and len(self.calls) >= self._most
        return is_enough or self._n_mistaken >= MOST_MISTAKEN

    def _mistaken(self, region):
        """What is held is no call. What stands behind its mark may hold one. -> True"""
        if region.begun is not None:  # its arguments were given already; it broke off
            self._held = self._held[region.given :]
        elif region.n_calls == 0:
            self._n_mistaken += not region.is_bare
            self._say(region.n_mark)
        self._region = None
        return True

    def _take(self, region, found: Found):
        if region.begun is None:
            self._begin(found)
            self._give(found.arguments)
        self._held = self._held[found.end :]
        self._region = _Region(0, 0, n_calls=region.n_calls + 1, is_bare=region.is_bare)

    def _begin(self, found):
        own = found.id if self._is_usable(found.id) else self._new_id()
        self.calls.append(ToolCall(own, found.name, ""))
        self._events.append(CallBegun(len(self.calls) - 1, own, found.name))

    def _is_usable(self, given):
        """Whether the id that a model gave a call has the form of the convention's."""
        if given is None or len(given) != self._convention.n_id:
            return False
        return set(given) <= set(_LETTERS) and all(given != call.id for call in self.calls)

    def _give(self, text):
        if text:
            call = self.calls[-1]
            self.calls[-1] = ToolCall(call.id, call.name, call.arguments + text)
            self._events.append(Arguments(len(self.calls) - 1, text))

    def _stream(self, region):
        """Gives as much of the arguments as there is, where that is wanted."""
        if not self._streams:
            return
        if region.begun is None:
            head = region.element.head(self._held)
            if head is None or head[0] not in self._tools:
                return
            region.begun, region.given = ObjectEnd(head[1]), head[1]
            self._begin(Found(0, head[0], ""))
        if region.is_given:
            return
        end = region.begun.find(self._held)
        region.is_given = end is not None
        text = self._held[region.given : end]
        region.given += len(text)
        self._give(text)


class _Region:
    """A place in the held text where a call may begin.

    at: what was passed over so far. n_mark: the characters that are content if none comes. begun:
    finds the end of arguments that are given while they come; given: up to where.
    """

    def __init__(self, at, n_mark, *, n_calls=0, is_bare=False):
        self.at, self.n_mark, self.n_calls, self.is_bare = at, n_mark, n_calls, is_bare
        self.element = None
        self.begun: ObjectEnd | None = None
        self.given, self.is_given = 0, False


def new_call_id(convention: Convention) -> str:
    """A new id for a call, of the form that the convention's templates take."""
    if convention.n_id is None:
        return "call_" + secrets.token_hex(12)
    return "".join(secrets.choice(_LETTERS) for _ in range(convention.n_id))
