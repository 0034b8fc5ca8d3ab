"""Sizes in bytes, read from text and written as text; and counts of things."""

from __future__ import annotations

import re
import reprlib

from jlayer.errors import UsageError

MAX_BYTES = 1 << 63  # above every size that a system call takes
_UNITS = "kmgt"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE)


def parse_bytes(value: int | str, *, option: str) -> int:
    """A number of bytes: an int, or a str such as "4GiB", "3.5 GB", "512MiB". Raises UsageError."""
    number = value if type(value) is int else _bytes_in(str(value))
    if not 1 <= number < MAX_BYTES:
        raise UsageError(
            f"{option}: found {reprlib.repr(value)}, expected a size such as 4GiB, 3500MB or a "
            "number of bytes"
        )
    return int(number)


def human(n_bytes: int) -> str:
    """A number of bytes as text, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """So many of a thing: "1 text", "1,204 texts", "2 matrices". `plural`: where it is no "s"
    more."""
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"


def _bytes_in(text):
    """The number of bytes that a text gives, perhaps infinite; 0 if it is not a size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return 0
    number, unit, is_binary = match.groups()
    power = _UNITS.index(unit.lower()) + 1 if unit else 0
    return float(number) * (1024 if is_binary else 1000) ** power
