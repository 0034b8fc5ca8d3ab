"""Who wrote what in a rendered chat: the template, or the user whose strings went into it.

The template runs a second time with the user's strings marked by two characters that occur nowhere
else. Where the text without the marks is the same, the marks show which parts are the user's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Rendered:
    """A chat as one text, and the same text in parts.

    parts: pairs of (a token of `control` that the template wrote, True) or (other text, False). No
    token of `control` may be recognised within other text, which may be the user's.
    generated: (begin, end) in the text of what the template has in {% generation %}, if asked for.
    """

    text: str
    parts: tuple[tuple[str, bool], ...]
    control: frozenset[str]
    generated: tuple[tuple[int, int], ...] = ()

    def written_control(self) -> list[str]:
        """The control tokens that the template itself wrote."""
        return [text for text, is_control in self.parts if is_control]

    def control_spans(self) -> list[tuple[int, int]]:
        """(begin, end) in the text of each control token that the template itself wrote."""
        found, at = [], 0
        for text, is_control in self.parts:
            if is_control:
                found.append((at, at + len(text)))
            at += len(text)
        return found

    def found_control(self) -> list[str]:
        """The control tokens that stand in the text, whoever wrote them."""
        return token_pattern(self.control).findall(self.text)


def token_pattern(tokens: Iterable[str]) -> re.Pattern:
    """Matches any of `tokens`, the longest where several begin at one place."""
    return _pattern_of(frozenset(tokens))


@lru_cache(16)
def _pattern_of(tokens):
    longest_first = sorted(sorted(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class ControlTokens:
    """Tokens to look for in a text: whole, or cut in two by its beginning or its end."""

    def __init__(self, tokens: Iterable[str]):
        tokens = frozenset(tokens)
        self.pattern = token_pattern(tokens)
        self._heads = {token[:n] for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def starts_inside(self, text: str) -> bool:
        return any(text[:n] in self._tails for n in self._lengths(text))

    def ends_inside(self, text: str) -> bool:
        return any(text[-n:] in self._heads for n in self._lengths(text))

    def found_in(self, text: str) -> bool:
        return bool(self.pattern.search(text) or self.starts_inside(text) or self.ends_inside(text))

    def _lengths(self, text):
        return range(1, min(self._longest, len(text) + 1))


@lru_cache(16)
def control_tokens(tokens: frozenset[str]) -> ControlTokens:
    """Those of Llama 3, which has 256, take 5 ms to make; a file of chats has the same in each."""
    return ControlTokens(tokens)


def mark_whole(text: str, marks: str) -> str:
    """Marks around a string, inside its outer white space, which templates often strip."""
    core = text.strip()
    before = text[: text.index(core)]
    after = text[len(before) + len(core) :]
    return f"{before}{marks[0]}{core}{marks[1]}{after}" if core else text


def mark_control_tokens(text: str, marks: str, tokens: ControlTokens) -> str:
    """Marks around each of `tokens` in a string, and at its ends if they may cut one in two.

    Weaker than `mark_whole`: most strings stay as they are, so a template that looks into the
    content does the same as without marks.
    """
    marked = tokens.pattern.sub(lambda match: marks[0] + match.group() + marks[1], text)
    seam = marks[0] + marks[1]
    before = seam if tokens.starts_inside(text) else ""
    return before + marked + (seam if tokens.ends_inside(text) else "")


def mapped(value, mark: Callable[[str], str]):
    """A JSON value with its strings marked, except roles and types, which templates compare."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, list):
        return [mapped(item, mark) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("role", "type") else mapped(item, mark)
            for key, item in value.items()
        }
    return value


def unused_characters(value) -> str:
    """Two private-use characters that no string of a JSON value holds, so that no user can write
    a mark.
    """
    used = set().union(*strings_of(value, keys=True))
    candidates = (chr(code) for code in range(0xF0000, 0xFFFFE))
    unused = (character for character in candidates if character not in used)
    return next(unused) + next(unused)


def strings_of(value, *, keys: bool = False) -> Iterator[str]:
    """Every string in a JSON value, and with `keys` the keys too.

    The recursion ends, since json.dumps has been through such a value.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item, keys=keys)
    elif isinstance(value, dict):
        for key, item in value.items():
            if keys:
                yield key
            yield from strings_of(item, keys=keys)


def keys_of(value) -> Iterator[str]:
    """Every key in a JSON value."""
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def user_parts(marked: str, marks: str) -> list[tuple[str, bool]]:
    """Pairs of (text, whether it stood inside marks)."""
    pieces = re.split(f"{marks[0]}([^{marks}]*){marks[1]}", marked)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces)]


def control_parts(
    pieces: Iterable[tuple[str, bool]], control: Iterable[str]
) -> tuple[tuple[str, bool], ...]:
    """The parts of `Rendered`: control tokens in text that is not the user's stand alone.

    `pieces`: pairs of (text, whether the user wrote it).
    """
    pattern = token_pattern(control)
    parts, text = [], []
    for piece, is_users in pieces:
        end = 0
        for match in () if is_users else pattern.finditer(piece):
            text.append(piece[end : match.start()])
            parts += [("".join(text), False), (match.group(), True)]
            text, end = [], match.end()
        text.append(piece[end:])
    parts.append(("".join(text), False))
    return tuple(part for part in parts if part[0])
