"""What a command reads before it runs: a text from a file or from stdin, a model's folder."""

from __future__ import annotations

import codecs
import os
import sys

from jlayer.app import streams
from jlayer.checkpoint.hub import Weights, local_folder
from jlayer.errors import StorageError, UsageError
from jlayer.interrupts import released

BYTE_ORDER_MARK = "\ufeff"
# Of encodings that are not ours. UTF-32's begins as UTF-16's does, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def folder_of(
    ref: str, *, offline: bool, weights: Weights = Weights.RUN, option: str | None = None
) -> str:
    """The folder of REF, downloaded where it is a hub id. Raises what `local_folder` does."""
    with released():
        return local_folder(ref, weights=weights, offline=offline, note=streams.tell, option=option)


def name_of(ref: str | os.PathLike) -> str:
    """A short name of a model: the last part of its folder's path."""
    return os.path.basename(os.path.normpath(ref))


def read_text(path: str, *, option: str) -> str:
    """A UTF-8 text: a file, or stdin where `path` is "-". A byte-order mark is not part of it.

    Raises UsageError (missing, not UTF-8) or StorageError, which name `option`.
    """
    if path == "-":
        return read_stdin(missing=f"{option} -: stdin is {{found}}; pipe the text in")
    try:
        with released(), open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise UsageError(f"{option}: {path} does not exist; name a file, or - for stdin") from None
    except OSError as error:
        raise StorageError(f"{option}: {path}: {error.strerror}") from None
    return _decoded(raw, f"{option}: {path}")


def read_stdin(*, missing: str) -> str:
    """UTF-8 text from stdin, as `read_text` gives it. Raises UsageError: not UTF-8, or `missing`
    where there is none; {found} in it becomes what stdin is instead."""
    if streams.is_terminal(sys.stdin):
        raise UsageError(missing.format(found="a terminal"))
    with released():
        raw = streams.read_all()
    if raw is None:
        raise UsageError(missing.format(found="closed"))
    return _decoded(raw, "stdin")


def without_line_end(text: str) -> str:
    """A prompt without the newline that ends the last line of a file, which its writer did not
    mean as part of it: `echo` and editors add one. One is taken; more were meant."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def argument_text(value: str, *, option: str) -> str:
    """A text given as an argument. Where the locale is not the one that it was typed in, Python
    holds its bytes as surrogates. Raises UsageError: not UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return _decoded(os.fsencode(value), option)
    return value.removeprefix(BYTE_ORDER_MARK)


def _decoded(raw, where):
    for mark, form in _MARKS.items():
        if raw.startswith(mark):
            raise UsageError(
                f"{where}: begins with a {form} byte-order mark; convert the text to UTF-8"
            )
    try:
        return raw.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 at byte {error.start}; convert the text to UTF-8"
        ) from None
