"""The small files of a model, beside its weights: those of a folder, or made from a GGUF file.

A GGUF file has the same facts inside. They are made into the files that a folder would have, so
that everything that reads such files reads both.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

from jlayer.errors import CheckpointError
from jlayer.gguf.config import config_of, encoded
from jlayer.gguf.parts import is_gguf, open_head
from jlayer.gguf.tokenizer import generation_config, tokenizer_files
from jlayer.strict import MAX_JSON_BYTES, parse_json_object, read_small_file

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# Those of them that need no tokenizer, and what makes them of the head of a GGUF file.
_OF_MODEL = {CONFIG: config_of, GENERATION_CONFIG: generation_config}


class SmallFiles(ABC):
    """Files by name; "/" stands before those of a folder inside."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def where(self, name: str) -> str:
        """What messages call it."""

    @abstractmethod
    def read(self, name: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
        """Its content. Raises CheckpointError (missing, above the limit) or StorageError."""

    @abstractmethod
    def inside(self, folder: str) -> list[str]:
        """The names of the files in a folder inside, without it, sorted."""

    def json(self, name: str) -> dict:
        """Its content as a JSON object, read strictly. Raises what `read` does."""
        return parse_json_object(self.read(name), what=self.where(name))


class FolderFiles(SmallFiles):
    """Those of a folder."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = os.fspath(folder)

    def has(self, name):
        return os.path.exists(self.where(name))

    def where(self, name):
        return os.path.join(self._folder, name)

    def read(self, name, *, limit=MAX_JSON_BYTES):
        return read_small_file(self.where(name), limit=limit)

    def inside(self, folder):
        home = self.where(folder)
        return sorted(os.listdir(home)) if os.path.isdir(home) else []


class MadeFiles(SmallFiles):
    """Those made from the GGUF file at `path`. Its tokenizer, which may be of a kind that is not
    known, is looked at when a file of a tokenizer is asked for."""

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._head = open_head(path)

    @cached_property
    def _of_tokenizer(self):
        return tokenizer_files(self._head)

    def all(self) -> dict[str, bytes]:
        """Name -> content."""
        return {name: self.read(name) for name in (*_OF_MODEL, *self._of_tokenizer)}

    def has(self, name):
        return name in _OF_MODEL or name in self._of_tokenizer

    def where(self, name):
        return f"{self._path} (as {name})"

    def read(self, name, *, limit=MAX_JSON_BYTES):
        if name in _OF_MODEL:
            return encoded(_OF_MODEL[name](self._head))
        if name not in self._of_tokenizer:
            raise CheckpointError(f"{self._path}: has nothing that is published as {name}")
        content = self._of_tokenizer[name]
        if len(content) > limit:
            raise CheckpointError(
                f"{self.where(name)}: {len(content)} bytes, over the limit of {limit}"
            )
        return content

    def inside(self, folder):
        return []


def files_of(ref: str | os.PathLike) -> SmallFiles:
    """The small files of a folder or a GGUF file.

    Raises, of a GGUF file, CheckpointError, UnsupportedModelError or StorageError.
    """
    return MadeFiles(ref) if is_gguf(ref) else FolderFiles(ref)


@contextlib.contextmanager
def as_folder(ref: str | os.PathLike) -> Iterator[str]:
    """A folder with the small files of `ref`, for programs that read folders alone: itself, or one
    for the time being with those made from a GGUF file."""
    if not is_gguf(ref):
        yield os.fspath(ref)
        return
    with tempfile.TemporaryDirectory(prefix="jlayer-") as home:
        for name, content in MadeFiles(ref).all().items():
            with open(os.path.join(home, name), "wb") as file:
                file.write(content)
        yield home
