"""How far a download is, by the bytes that the hub's library has written so far.

The library tells of a file at a time, and differently with each way of fetching; what it has
written lies beside the blobs in any case.
"""

from __future__ import annotations

import os
import threading

from jlayer.checkpoint.cache import partial_files

_EVERY_S = 0.2


class Download:
    """Reports to `progress` while it is entered: `start(bytes)` once, `file(name)` for each file,
    and `advance(bytes)` a few times a second; back where a file begins again."""

    def __init__(self, repo_folder: str, sizes: dict[str, int], progress):
        self._folder, self._sizes, self._progress = repo_folder, sizes, progress
        # What downloads before have left; some versions of the library go on with it.
        self._before = {path: _written(path) for path in partial_files(repo_folder)}
        self._whole = self._told = 0
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jlayer-download", daemon=True)

    def __enter__(self) -> Download:
        self._progress.start(sum(self._sizes.values()))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()
        self._thread.join()
        self._report()

    def file(self, name: str) -> None:
        """This file is fetched next."""
        self._progress.file(name)

    def done(self, name: str) -> None:
        """This file is whole and in its place."""
        with self._lock:
            self._whole += self._sizes[name]

    def _watch(self):
        while not self._is_over.wait(_EVERY_S):
            self._report()

    def _report(self):
        with self._lock:
            partial = partial_files(self._folder)
            now = self._whole + sum(_written(path) - self._before.get(path, 0) for path in partial)
            self._progress.advance(now - self._told)
            self._told = now


def _written(path):
    """Bytes of a file so far; of one that is written out of order, those that have a place."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:  # it is whole now
        return 0
    return min(status.st_size, status.st_blocks * 512)
