"""What was typed in earlier sessions: a line of JSON text for each entry, which may have lines.

The file is the user's alone, and is made shorter when it is opened. A line that is damaged, by a
disk that was full say, is passed over. Where the file cannot be written, there is no history.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from contextlib import suppress

from jlayer.errors import JlayerError
from jlayer.strict import open_regular, regular_status

MOST_ENTRIES = 1000
MOST_BYTES = 1 << 20
OWNER_ONLY = 0o600


def state_path(name: str) -> str:
    """A file that outlives a session, by the rules of the XDG base directories: a relative path
    there counts as none."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "jlayer", name)


class History:
    """`entries`: those of earlier sessions, the newest last. `why_not`: why none are kept, None
    where they are."""

    def __init__(self, path: str):
        self._path, self.why_not = path, None
        self.entries: list[str] = []
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            if os.path.lexists(path):
                self._read()
        except (OSError, JlayerError) as error:
            self._give_up(error)

    def add(self, entry: str) -> None:
        """Writes it down at once: a session may end in any way."""
        if self.why_not is not None or (self.entries and self.entries[-1] == entry):
            return
        self.entries.append(entry)
        try:
            number = os.open(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY
            )
            with os.fdopen(number, "wb") as file:
                file.write(_line(entry))
        except OSError as error:
            self._give_up(error)

    def _read(self):
        status = regular_status(self._path)  # a FIFO would keep `add` waiting
        if status.st_mode & 0o777 != OWNER_ONLY:
            os.chmod(self._path, OWNER_ONLY)
        with os.fdopen(open_regular(self._path), "rb") as file:
            file.seek(max(0, status.st_size - 2 * MOST_BYTES))
            raw = file.read(2 * MOST_BYTES)
        found = [entry for line in raw.splitlines() if (entry := _entry(line)) is not None]
        self.entries = _newest(found)
        if len(self.entries) < len(found) or len(raw) > MOST_BYTES:
            self._rewrite()

    def _rewrite(self):
        number, part = tempfile.mkstemp(prefix=".chat_history.", dir=os.path.dirname(self._path))
        try:
            with os.fdopen(number, "wb") as file:
                file.writelines(map(_line, self.entries))
            os.replace(part, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise

    def _give_up(self, error):
        reason = getattr(error, "strerror", None) or str(error)
        self.why_not = f"{self._path}: {reason}; what is typed is not kept for other sessions"


def _newest(entries):
    kept, n_bytes = deque(), 0
    for entry in reversed(entries[-MOST_ENTRIES:]):
        n_bytes += len(_line(entry))
        if n_bytes > MOST_BYTES // 2:  # so that the next sessions only append
            break
        kept.appendleft(entry)
    return list(kept)


def _line(entry):
    return json.dumps(entry).encode("ascii") + b"\n"


def _entry(line):
    """The text of a line; None where it is damaged."""
    try:
        found = json.loads(line)
        found.encode("utf-8")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found
