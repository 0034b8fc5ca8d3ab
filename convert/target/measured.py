"""What a pruning has measured so far: a small file in the target, by which the same command goes
on.

Each change replaces it whole and syncs it. It stays until the conversion is finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jlayer.checkpoint.layout import seal
from jlayer.convert.target.disk import replace_file
from jlayer.convert.target.lock import TargetLock
from jlayer.convert.target.sealed import read_sealed
from jlayer.strict import is_there

MEASURED = ".jlayer-measured"
_VERSION = 1


class Measured:
    """`asked`: what is measured, of which model, as JSON has it. `found`: what was saved last; None
    where nothing was."""

    def __init__(self, target: str, asked: Mapping):
        self._path = os.path.join(target, MEASURED)
        self.asked = json.loads(json.dumps(asked))
        self.found: dict | None = None

    def there(self) -> dict | None:
        """What is asked for by the file that is there; None without one. Raises CheckpointError
        where it is damaged, or StorageError."""
        body = self._body()
        return None if body is None else body["asked"]

    def take(self) -> None:
        """Goes on from what the file has."""
        self.found = self._body()["found"]

    def save(self, found: Mapping) -> None:
        """Replaces the file: it is on the disk when this returns. Raises DoesNotFitError or
        StorageError."""
        self.found = json.loads(json.dumps(found))
        replace_file(
            self._path, seal({"version": _VERSION, "asked": self.asked, "found": self.found})
        )

    def _body(self):
        if not is_there(self._path):
            return None
        return read_sealed(self._path, version=_VERSION, what="what was measured so far")


@contextmanager
def measuring(target: str, asked: Mapping, *, note: Callable[[str], None]) -> Iterator[Measured]:
    """A target in which one process at a time measures. Raises LockedError, DoesNotFitError or
    StorageError."""
    with TargetLock(target, note=note):
        yield Measured(target, asked)
