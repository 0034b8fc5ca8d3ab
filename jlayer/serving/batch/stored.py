"""Files that clients of a server have sent, and those that batches made for them.

Each is two files in a folder: the content, and beside it a small one that says what it is. That one
is written last, so a file is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from jlayer.errors import StorageError
from jlayer.serving.disk import TEMPORARY, remove, write_file
from jlayer.serving.wire.errors import Refused, invalid

MOST_FILES = 2000
MOST_NAME = 200
_ID = re.compile(r"file-[0-9a-f]{24}")
_RECORD = ".json"


class Files:
    """The files in a folder, which is made if need be and is this process's alone. Any thread may
    use it. Raises StorageError, and Refused where a client asks for what is not there."""

    def __init__(self, folder: str):
        self._folder, self._lock = folder, threading.Lock()
        self._records = read_records(folder)
        for name in _names_in(folder):
            stem = name.removesuffix(_RECORD)
            if name.endswith(TEMPORARY) or (_ID.fullmatch(stem) and stem not in self._records):
                remove(os.path.join(folder, name))

    def add(
        self,
        write: Callable[[BinaryIO], None],
        *,
        filename: str,
        purpose: str,
        file_id: str | None = None,
    ) -> dict:
        """Keeps what `write(file)` writes. `file_id`: in place of a new one; what has it already is
        replaced by the same."""
        file_id = file_id or f"file-{secrets.token_hex(12)}"
        with self._lock:
            if len(self._records) >= MOST_FILES and purpose == "batch":
                raise invalid(
                    f"file: {len(self._records)} files are kept already; delete some",
                    param="file",
                    code="too_many_files",
                )
        path = self._path(file_id)
        write_file(path, write)
        record = {
            "id": file_id,
            "object": "file",
            "bytes": os.path.getsize(path),
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename[:MOST_NAME],
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        write_record(path + _RECORD, record)
        with self._lock:
            self._records[file_id] = record
        return record

    def all(self) -> list[dict]:
        """The newest first."""
        with self._lock:
            return list(reversed(self._records.values()))

    def get(self, file_id: str) -> dict:
        with self._lock:
            found = self._records.get(file_id)
        if found is None:
            raise missing("File", file_id, param="file_id")
        return found

    def path(self, file_id: str) -> str:
        self.get(file_id)
        return self._path(file_id)

    def open(self, file_id: str) -> BinaryIO:
        try:
            return open(self.path(file_id), "rb")
        except OSError as error:
            raise StorageError(f"{file_id}: cannot be read ({error.strerror})") from None

    def delete(self, file_id: str) -> None:
        self.get(file_id)
        with self._lock:
            self._records.pop(file_id, None)
        path = self._path(file_id)
        remove(path + _RECORD)  # first: without it the content is none
        remove(path)

    def _path(self, file_id):
        assert _ID.fullmatch(file_id)
        return os.path.join(self._folder, file_id)


def missing(kind: str, found: str, *, param: str) -> Refused:
    return Refused(404, f"No such {kind} object: {found[:100]}", param=param, code="not_found")


# Records: small JSON files, of which a folder is read in the order in which they were made.


def write_record(path: str, record: dict) -> None:
    raw = json.dumps({"written": time.time_ns(), **record}).encode()
    write_file(path, lambda file: file.write(raw))


def read_records(folder: str) -> dict[str, dict]:
    """id -> record, the oldest first. Raises StorageError."""
    found = []
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        for name in _names_in(folder):
            if name.endswith(_RECORD):
                with open(os.path.join(folder, name), "rb") as file:
                    found.append(json.load(file))
    except (OSError, ValueError) as error:
        raise StorageError(f"--state: {folder}: cannot be read ({error})") from None
    found.sort(key=lambda record: (record["created_at"], record.pop("written")))
    return {record["id"]: record for record in found}


def _names_in(folder):
    return sorted(os.listdir(folder))
