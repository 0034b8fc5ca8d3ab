"""What Orbax and tensorstore say when arrays cannot be saved or read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_CODE = re.compile(r"os_error_code='([0-9]+)'")  # as tensorstore has the system's errors


def system_code(error: Exception) -> int | None:
    """The system's number of an error; None where it is none of the system's."""
    match = _CODE.search(str(error))
    return int(match[1]) if match else getattr(error, "errno", None)


def first_line(error: Exception) -> str:
    """The first of the many lines of an error, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax logs what it is about to raise, with its threads' tracebacks."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
