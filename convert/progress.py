"""What a long run reports on stderr: notes, and on a terminal a bar with file, bytes and rate.

The bar is rich's.
"""

from __future__ import annotations

import sys


class Progress:
    """Reports nothing; the base of what does. A run calls `start`, then the others."""

    def start(self, total_bytes: int) -> None:
        """A pass over `total_bytes` begins. May be called again for the next pass."""

    def file(self, name: str) -> None:
        """Work on this file begins."""

    def advance(self, n_bytes: int) -> None:
        """So many more bytes are done."""

    def note(self, line: str) -> None:
        """Something that the user should know and that is no error."""

    def close(self) -> None:
        """The run is over, successful or not."""


class StderrProgress(Progress):
    """Notes as lines on stderr, and a progress bar where stderr is a terminal."""

    def __init__(self):
        self._bar = self._task = None

    def start(self, total_bytes: int) -> None:
        self.close()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=total_bytes)
            self._bar.start()

    def file(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def advance(self, n_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, n_bytes)

    def note(self, line: str) -> None:
        if self._bar is None:
            print(f"jlayer: {line}", file=sys.stderr)
        else:  # above the bar, not folded to the terminal's width
            self._bar.console.print(
                f"jlayer: {line}", markup=False, emoji=False, highlight=False, soft_wrap=True
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar():
    from rich import progress  # 0.1 s, which --help does not need
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # results go to stdout, which may be a file
    )
