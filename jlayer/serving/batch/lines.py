"""The lines of a batch's input: all of them are checked before any is run.

A line that is no request at all is refused with its number, and the whole file with it. What is
wrong with a request's own body is left to whoever answers it. Of a file of any size only a few
numbers a line are kept.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import xxhash

from jlayer.errors import CheckpointError, JlayerError, StorageError, UsageError
from jlayer.strict import open_regular, parse_json_object

URLS = ("/v1/chat/completions", "/v1/completions")
MOST_LINE_BYTES = 32 << 20
MOST_ID = 512  # characters
MOST_LISTED = 5  # problems in the message
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# field -> (its type, what that is called)
_FIELDS = {
    "custom_id": (str, "text"),
    "method": (str, "text"),
    "url": (str, "text"),
    "body": (dict, "an object"),
}
_WORDS = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True)
class Line:
    """A request of the file. `number`: of its line, from 1."""

    number: int
    custom_id: str
    url: str
    body: dict


@dataclass(frozen=True)
class Limits:
    """`url`: the only one that lines may name; None: any of URLS."""

    lines: int | None = None
    n_bytes: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line; `number` is None where it is the file."""

    number: int | None
    message: str

    def __str__(self) -> str:
        return self.message if self.number is None else f"line {self.number}: {self.message}"


class WrongLines(UsageError):
    """A file that is refused. `problems`: the first few of them."""

    def __init__(self, message: str, problems: list[Problem]):
        super().__init__(message)
        self.problems = problems


class Lines:
    """The requests of a file that was checked whole; close it. `digest`: SHA-256 of the file.
    `called`: what messages call it, if not by its path.

    Raises WrongLines, UsageError (there is no such file) or StorageError.
    """

    def __init__(
        self, path: str | os.PathLike, *, limits: Limits | None = None, called: str | None = None
    ):
        self.path = called or os.fspath(path)
        self._limits = limits or Limits()
        self._numbers, self._starts, self._lengths = array("Q"), array("Q"), array("Q")
        self._hashes = array("Q")  # of each line, to see that nobody changes it meanwhile
        self._file = self._opened(path)
        try:
            self.digest = self._check()
        except OSError as error:
            self._file.close()
            raise self._unreadable(error) from None
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Line]:
        """All lines in order. Raises StorageError where the file was changed meanwhile."""
        return (self[at] for at in range(len(self)))

    def __getitem__(self, at: int) -> Line:
        return line_of(self.raw(at), number=self._numbers[at])

    def raw(self, at: int) -> bytes:
        """The bytes of a line, in UTF-8. Raises what reading all of them does."""
        number = self._numbers[at]
        try:
            self._file.seek(self._starts[at])
            raw = self._file.read(self._lengths[at])
        except OSError as error:
            raise self._unreadable(error) from None
        if xxhash.xxh3_64_intdigest(raw) != self._hashes[at]:
            raise StorageError(
                f"{self.path}: line {number} was changed while the batch runs; put back what was "
                "there, and run the same command again"
            )
        return raw

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def is_file(self, status: os.stat_result) -> bool:
        """Whether a file is this one, under whatever name."""
        return os.path.samestat(os.fstat(self._file.fileno()), status)

    def _opened(self, path) -> BinaryIO:
        if not os.path.exists(path):
            raise UsageError(f"{self.path}: does not exist; name a file of requests, one a line")
        try:
            return os.fdopen(open_regular(path), "rb")
        except CheckpointError as error:
            raise UsageError(f"{error}; a batch is read more than once") from None

    def _unreadable(self, error):
        return StorageError(f"{self.path}: cannot be read ({error.strerror})")

    def _check(self):
        """Reads the whole file once; -> its digest."""
        whole, problems, n_wrong = hashlib.sha256(), [], 0
        seen: dict[bytes, int] = {}
        for number, start, raw in self._raw_lines(whole):
            message = self._add(number, start, raw, seen)
            if message is not None:
                n_wrong += 1
                if len(problems) < MOST_LISTED:
                    problems.append(Problem(number, message))
        problems = [*self._of_the_file(n_wrong), *problems]
        if problems:
            raise WrongLines(self._words(problems, n_wrong), problems)
        return whole.hexdigest()

    def _raw_lines(self, whole) -> Iterator[tuple[int, int, bytes | None]]:
        """(number, where it begins, its bytes) of each line that is not empty; None for the bytes
        of one that is too long."""
        start, number = 0, 1
        while raw := self._file.readline(MOST_LINE_BYTES + 1):
            whole.update(raw)
            n_bytes, rest = len(raw), raw
            while not rest.endswith(b"\n") and (rest := self._file.readline(1 << 20)):
                whole.update(rest)
                n_bytes += len(rest)
            skipped = len(_BYTE_ORDER_MARK) if number == 1 and _is_marked(raw) else 0
            if n_bytes > MOST_LINE_BYTES:
                yield number, start, None
            elif raw := raw[skipped:].rstrip():
                yield number, start + skipped, raw
            start, number = start + n_bytes, number + 1

    def _add(self, number, start, raw, seen):
        """Takes a line; -> what is wrong with it, or None."""
        if raw is None:
            return f"longer than {MOST_LINE_BYTES:,} bytes"
        try:
            line = line_of(raw, number=number, url=self._limits.url)
        except JlayerError as error:
            return str(error)
        key = xxhash.xxh3_128_digest(line.custom_id.encode())
        before = seen.setdefault(key, number)
        if before != number:
            return f"custom_id {line.custom_id!a:.80} stands in line {before} already"
        self._numbers.append(number)
        self._starts.append(start)
        self._lengths.append(len(raw))
        self._hashes.append(xxhash.xxh3_64_intdigest(raw))
        return None

    def _of_the_file(self, n_wrong):
        limits, n_bytes = self._limits, os.fstat(self._file.fileno()).st_size
        if limits.n_bytes is not None and n_bytes > limits.n_bytes:
            yield Problem(None, f"{n_bytes:,} bytes, at most {limits.n_bytes:,} are taken")
        if limits.lines is not None and len(self) > limits.lines:
            yield Problem(None, f"{len(self):,} lines, at most {limits.lines:,} are taken")
        if not len(self) and not n_wrong:
            yield Problem(None, "empty; expected requests, one a line")

    def _words(self, problems, n_wrong):
        n_more = n_wrong - sum(problem.number is not None for problem in problems)
        more = f"; and {n_more} more" if n_more else ""
        listed = "; ".join(map(str, problems))
        return f"{self.path}: {listed}{more}; nothing was run, correct the file first"


def line_of(raw: bytes, *, number: int, url: str | None = None) -> Line:
    """The request of a line. `url`: the only one that it may name; None: any of URLS. Raises
    UsageError where it is none."""
    found = _parsed(raw)
    problem = _problem_in(found, url)
    if problem is not None:
        raise UsageError(problem)
    return Line(number, found["custom_id"], found["url"], found["body"])


def _is_marked(raw):
    return raw.startswith(_BYTE_ORDER_MARK)


def _parsed(raw):
    try:
        return parse_json_object(raw, what="", advice="")
    except CheckpointError as error:
        raise UsageError(str(error).removeprefix(": ").removesuffix("; ")) from None


def _problem_in(found, url):
    """What is wrong with a line's fields, or None."""
    for name, (kind, word) in _FIELDS.items():
        if name not in found:
            return f"no {name}; expected custom_id, method, url and body"
        if not isinstance(found[name], kind):
            other = _WORDS.get(type(found[name]), "a number")
            return f"{name}: found {other}, expected {word}"
    custom_id = found["custom_id"]
    if not 0 < len(custom_id) <= MOST_ID:
        return f"custom_id: found {len(custom_id)} characters, expected 1 to {MOST_ID}"
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        return "custom_id: holds half of a surrogate pair, which is no character"
    if found["method"] != "POST":
        return f"method: found {found['method']!a:.40}, expected 'POST'"
    expected = URLS if url is None else (url,)
    if found["url"] not in expected:
        return f"url: found {found['url']!a:.80}, expected {' or '.join(expected)}"
    return None
