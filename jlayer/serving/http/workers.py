"""Threads for what takes the processor long: reading bodies, templates, tokenising, schemas.

On the loop it would hold up everybody, /health too. How much of it may wait is limited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jlayer.serving.wire.errors import unavailable

Result = TypeVar("Result")
THREADS = 4
MOST_WAITING = 256


class Workers:
    def __init__(self, threads: int = THREADS, most_waiting: int = MOST_WAITING):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jlayer-worker")
        self._most, self._count = most_waiting, 0

    async def run(self, work: Callable[..., Result], *arguments) -> Result:
        """What `work` returns or raises. Raises Refused where too much waits already."""
        if self._count >= self._most:
            raise unavailable(
                f"{self._count} requests are being read already; try again", code="busy"
            )
        return await self.run_later(work, *arguments)

    async def run_later(self, work: Callable[..., Result], *arguments) -> Result:
        """The same, however much waits: for what was accepted before."""
        self._count += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        future.add_done_callback(self._on_done)
        return await future

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _on_done(self, _):
        self._count -= 1
