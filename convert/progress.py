"""What a long run says while it lasts: nothing, or bytes, rate and current file on stderr."""

from __future__ import annotations

import sys


class Progress:
    """Says nothing; the base of what does. A run calls `start` once, then the others."""

    def start(self, total_bytes: int) -> None:
        """The run begins and will pass `total_bytes` through."""

    def file(self, name: str) -> None:
        """Work on this file begins."""

    def advance(self, n_bytes: int) -> None:
        """So many more bytes are through."""

    def note(self, line: str) -> None:
        """Something that the user should know and that is no error."""

    def close(self) -> None:
        """The run is over, well or not."""


class StderrProgress(Progress):
    """Notes as lines; a bar where stderr is a terminal, and none where it is not."""

    def __init__(self):
        self._bar = None

    def start(self, total_bytes: int) -> None:
        self.close()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_bytes, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def file(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description(name)

    def advance(self, n_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(n_bytes)

    def note(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(f"jlayer: {line}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
