"""Many chats rendered by one process after another: starting one takes a tenth of a second, and a
file that a model is tuned on has many thousand chats.

Each process has the limits of `sandbox`, and is left after some hundred chats.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from jlayer.text import sandbox

MOST_CHATS = 500  # of one process
MOST_BYTES = 1 << 20  # of one chat; a longer one gets a process of its own
_CPU_S = 60.0  # of one process; each chat has the limit of `sandbox`


class Renderer:
    """Renders as `sandbox.render` does; close it. All chats have one reading of the clock."""

    def __init__(self):
        self._now = datetime.now()
        self._process: subprocess.Popen | None = None
        self._n_left = 0

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # closing flushes what the process did not read
                pipe.close()

    def render(
        self, template: str, variants: Sequence[Mapping], marks: str, *, generation: bool = False
    ) -> sandbox.Answer:
        """Raises what `sandbox.render` does."""
        told = {"generation": generation, "now": self._now}
        payload = json.dumps(sandbox.payload_of(template, variants, marks, **told)).encode()
        answer = self._answer(payload) if len(payload) <= MOST_BYTES else None
        if answer is None:  # by itself it meets the limit again, or tells what is wrong
            return sandbox.render(template, variants, marks, **told)
        return sandbox.read_answer(json.loads(answer))

    def _answer(self, payload):
        """A line of JSON, or None where the process ended or gave nothing in time."""
        if self._n_left == 0 or self._process is None:
            self.close()
            if not self._start():
                return None
        self._n_left -= 1
        answer = None
        try:
            self._process.stdin.write(payload + b"\n")
            self._process.stdin.flush()
            answer = _line(self._process.stdout, limit_s=sandbox.WALL_S)
        except OSError:  # it has ended
            return None
        finally:
            if answer is None:
                self.close()
        return answer

    def _start(self):
        """Whether a process could be started."""
        try:
            self._process = subprocess.Popen(
                sandbox.command_of("renderer"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=sandbox.environment(),
            )
        except OSError:
            return False
        self._n_left = MOST_CHATS
        return True


def _line(pipe, *, limit_s):
    """The next line of a pipe, or None where it ends or takes longer."""
    until, chunks = time.monotonic() + limit_s, []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0 and selector.select(left):
            chunk = os.read(pipe.fileno(), 1 << 16)
            chunks.append(chunk)
            if not chunk:
                return None
            if chunk.endswith(b"\n"):
                return b"".join(chunks)
    return None


# The other process


def child() -> None:
    """What the process does: for each line of its input, which is a payload of `sandbox`, a line
    with what `render_variants` gives."""
    import functools
    import signal

    from jlayer.text import jinja

    compiled = functools.lru_cache(8)(jinja.compile_template)
    jinja.check_version()
    sandbox.limit_process(cpu_s=_CPU_S, memory_bytes=sandbox.MEMORY_BYTES + 40 * MOST_BYTES)
    for line in iter(sys.stdin.buffer.readline, b""):
        payload = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, payload["cpu_s"] + len(line) / 8e6)
        limit = sandbox.MAX_TEXT_CHARS + 10 * len(line)
        found = sandbox.render_variants(payload, limit=limit, compiled=compiled)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
