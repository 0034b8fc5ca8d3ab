"""How a process ends at once, whatever its other threads wait for."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from os import _exit  # no clean-up, which would wait for what the other threads wait for

from jlayer.errors import StorageError


def end_process(line: str, code: int = StorageError.exit_code) -> None:
    """Ends this process at once, after a line on stderr: its other threads may wait for ever, for
    a host that is lost or a device that stands still."""
    with suppress(OSError):
        os.write(2, f"jlayer: {' '.join(line.split())}\n".encode())
    end_at_once(code)


def end_at_once(code: int) -> None:
    """Ends this process without the clean-up that JAX would do at its end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    _exit(code)
