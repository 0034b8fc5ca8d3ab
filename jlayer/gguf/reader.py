"""Reads and checks the head of a GGUF file: its metadata, and where each tensor lies.

The layout is that of ggml's docs/gguf.md, versions 2 and 3. Every count, length and offset is held
against the size of the file and a limit before anything is allocated. Long arrays (the tokens)
are walked and stay in the file until they are asked for, so memory does not grow with them.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache

from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.strict import is_tensor_name, open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 10_000
MAX_TENSORS = 200_000
MAX_DIMS = 4
MAX_STRING = 4 << 20  # a chat template may have some 100 kB
MAX_TEXT = 32 << 20  # of all strings that are kept
MAX_ELEMENTS = 1 << 21  # of an array: a vocabulary of 262,144 has some 520,000 merges
MAX_KEPT = 1024  # elements of an array that is read at once
MAX_HEAD = 256 << 20
MAX_ALIGNMENT = 1 << 16
_WINDOW = 1 << 20
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class TensorType:
    """A type of ggml: `n_bytes` for each block of `weights` along a row."""

    name: str
    weights: int
    n_bytes: int


# The number of a type in a file -> the type. The names are those of our encodings where there is
# one; the others are known by their size alone, so that a file that has them can be checked.
TYPES = {
    0: TensorType("float32", 1, 4),
    1: TensorType("float16", 1, 2),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    10: TensorType("q2_k", 256, 84),
    11: TensorType("q3_k", 256, 110),
    12: TensorType("q4_k", 256, 144),
    13: TensorType("q5_k", 256, 176),
    14: TensorType("q6_k", 256, 210),
    16: TensorType("iq2_xxs", 256, 66),
    17: TensorType("iq2_xs", 256, 74),
    18: TensorType("iq3_xxs", 256, 98),
    19: TensorType("iq1_s", 256, 50),
    20: TensorType("iq4_nl", 32, 18),
    21: TensorType("iq3_s", 256, 110),
    22: TensorType("iq2_s", 256, 82),
    23: TensorType("iq4_xs", 256, 136),
    24: TensorType("int8", 1, 1),
    25: TensorType("int16", 1, 2),
    26: TensorType("int32", 1, 4),
    27: TensorType("int64", 1, 8),
    28: TensorType("float64", 1, 8),
    29: TensorType("iq1_m", 256, 56),
    30: TensorType("bfloat16", 1, 2),
    34: TensorType("tq1_0", 256, 54),
    35: TensorType("tq2_0", 256, 66),
    39: TensorType("gguf_mxfp4", 32, 17),
    40: TensorType("gguf_nvfp4", 64, 36),
    41: TensorType("q1_0", 128, 18),
}
# The number of a value's type -> its form in `struct`.
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class LongArray:
    """An array of `count` elements that was checked and left in the file, at `offset`."""

    type: int
    count: int
    offset: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type's name, its shape with the rows first, and where its bytes lie.

    `offset` counts from the start of the file at `path`.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Head:
    """A checked head. `values`: the metadata by key; a long array is a LongArray until `array`
    reads it. `tensors`: in the order of the file, which their bytes have too. `parts`: the paths of
    all files of a model, where it is split."""

    path: str
    values: dict[str, object]
    tensors: dict[str, GgufTensor]
    parts: tuple[str, ...] = ()

    def array(self, key: str) -> tuple:
        """All elements of an array. Raises CheckpointError where the key has none."""
        value = self.values.get(key)
        if isinstance(value, LongArray):
            with _Cursor(self.path) as cursor:
                cursor.at = value.offset
                return _elements(cursor, value.type, value.count, key)
        if not isinstance(value, tuple):
            raise CheckpointError(
                f"{self.path}: {key} is {short(value)}, expected an array; fetch the file again"
            )
        return value


def read_head(path: str | os.PathLike) -> Head:
    """The head of the GGUF file at `path`, without its tensors' bytes.

    Read once, as long as the file stays the same. Raises CheckpointError (missing, not a regular
    file, not GGUF, cut off, inconsistent, above a limit) or StorageError.
    """
    path = os.fspath(path)
    fd = open_regular(path)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return _read_head(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _read_head(path, identity):
    with _Cursor(path) as cursor:
        n_tensors, n_keys = _counts(cursor)
        values = _metadata(cursor, n_keys)
        infos = _infos(cursor, n_tensors)
        alignment = _alignment(values, path)
        start = -(-cursor.at // alignment) * alignment
        tensors = _placed(infos, start, alignment, cursor.size, path)
    return Head(path, values, tensors, (path,))


class _Cursor:
    """A file for reading by a cursor: a window of it is in memory, whatever is skipped."""

    def __init__(self, path: str):
        self.path, self.at = path, 0
        self._begin, self._window = 0, b""

    def __enter__(self):
        self._fd = open_regular(self.path)
        self.size = os.fstat(self._fd).st_size
        return self

    def __exit__(self, *_):
        os.close(self._fd)

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next bytes. Raises CheckpointError where the file ends before."""
        self.require(n_bytes, what)
        begin = self.at - self._begin
        if begin < 0 or begin + n_bytes > len(self._window):
            self._fill(n_bytes)
            begin = 0
        self.at += n_bytes
        return self._window[begin : begin + n_bytes]

    def skip(self, n_bytes: int, what: str) -> None:
        self.require(n_bytes, what)
        self.at += n_bytes

    def require(self, n_bytes: int, what: str) -> None:
        """Raises CheckpointError unless so many bytes follow, within the limit of a head."""
        if n_bytes > self.size - self.at:
            raise self.refusal(
                f"cut off in {what}: {short(n_bytes)} bytes are to follow byte {self.at}, and the "
                f"file has {self.size}; fetch it again"
            )
        if self.at + n_bytes > MAX_HEAD:
            raise self.refusal(f"a head of more than {MAX_HEAD} bytes, which is the limit")

    def number(self, form: str, what: str):
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))
        return value

    def string(self, what: str) -> str:
        length = self.length(what)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.refusal(f"{what} is not UTF-8; fetch the file again") from None

    def length(self, what: str) -> int:
        length = int.from_bytes(self.take(8, what), "little")
        if length > MAX_STRING:
            raise self.refusal(
                f"{what} is a string of {length} bytes, over the limit of {MAX_STRING}"
            )
        return length

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _fill(self, n_bytes):
        try:
            self._window = os.pread(self._fd, max(n_bytes, _WINDOW), self.at)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._begin = self.at
        if len(self._window) < n_bytes:
            raise self.refusal("it became shorter while it was being read; fetch it again")


def _counts(cursor):
    """(tensors, keys of the metadata), after the checks of the first 24 bytes."""
    start = cursor.take(min(4, cursor.size), "its magic")
    if start != MAGIC:
        raise cursor.refusal(f"begins with {start!r}, expected {MAGIC!r} of a GGUF file")
    version = cursor.number("I", "the version")
    if version not in VERSIONS and version.to_bytes(4, "big")[0] in VERSIONS:
        raise UnsupportedModelError(
            f"{cursor.path}: a GGUF file of big-endian numbers, which is not supported; take the "
            "little-endian one"
        )
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{cursor.path}: version {version} of GGUF is not supported, expected 2 or 3; fetch a "
            "newer file"
        )
    n_tensors, n_keys = cursor.number("Q", "its counts"), cursor.number("Q", "its counts")
    # The least that one takes: a name of one letter, and what must follow.
    for count, what, most, least in (
        (n_tensors, "tensors", MAX_TENSORS, 33),
        (n_keys, "keys", MAX_KEYS, 14),
    ):
        if count > most:
            raise cursor.refusal(f"{count} {what}, over the limit of {most}")
        cursor.require(count * least, f"its {count} {what}")
    return n_tensors, n_keys


def _metadata(cursor, n_keys):
    values, n_text = {}, 0
    for _ in range(n_keys):
        key = cursor.string("the name of a key")
        if not is_tensor_name(key):
            raise cursor.refusal(f"key {short(key)} is not a name that a key may have")
        if key in values:
            raise cursor.refusal(f"key {key} stands twice; which is meant cannot be known")
        value, length = _value(cursor, cursor.number("I", key), key)
        n_text += length
        if n_text > MAX_TEXT:
            raise cursor.refusal(f"strings of more than {MAX_TEXT} bytes, which is the limit")
        values[key] = value
    return values


def _value(cursor, type_number, key):
    """(a value, the bytes of its text)."""
    if type_number == _STRING:
        text = cursor.string(key)
        return text, len(text)
    if type_number != _ARRAY:
        return _scalar(cursor, type_number, key), 0
    element, count = cursor.number("I", key), cursor.number("Q", key)
    if element == _ARRAY:
        raise cursor.refusal(f"{key} is an array of arrays, which is not supported")
    least = 8 if element == _STRING else struct.calcsize("<" + _form(cursor, element, key))
    if count > MAX_ELEMENTS:
        raise cursor.refusal(f"{key} has {count} elements, over the limit of {MAX_ELEMENTS}")
    cursor.require(count * least, key)
    if count > MAX_KEPT:
        long = LongArray(element, count, cursor.at)
        _skip(cursor, element, count, key)
        return long, 0
    begin = cursor.at
    return _elements(cursor, element, count, key), cursor.at - begin


def _form(cursor, type_number, key):
    if type_number not in _SCALARS:
        raise cursor.refusal(
            f"{key} is of type {type_number}, which GGUF does not have; fetch the file again"
        )
    return _SCALARS[type_number]


def _scalar(cursor, type_number, key):
    form = _form(cursor, type_number, key)
    if type_number == _BOOL:
        byte = cursor.number("B", key)
        if byte > 1:
            raise cursor.refusal(f"{key} is the byte {byte}, expected 0 or 1")
        return bool(byte)
    return cursor.number(form, key)


def _elements(cursor, type_number, count, key):
    if type_number == _STRING:
        return tuple(cursor.string(key) for _ in range(count))
    if type_number == _BOOL:
        return tuple(_scalar(cursor, type_number, key) for _ in range(count))
    form = f"<{count}{_form(cursor, type_number, key)}"
    return struct.unpack(form, cursor.take(struct.calcsize(form), key))


def _skip(cursor, type_number, count, key):
    if type_number != _STRING:
        cursor.skip(count * struct.calcsize("<" + _form(cursor, type_number, key)), key)
        return
    for _ in range(count):
        cursor.skip(cursor.length(key), key)


def _alignment(values, path):
    found = values.get(_ALIGNMENT, 32)
    if type(found) is not int or not 8 <= found <= MAX_ALIGNMENT or found & (found - 1):
        raise CheckpointError(
            f"{path}: {_ALIGNMENT} is {short(found)}, expected a power of 2 from 8 to "
            f"{MAX_ALIGNMENT}"
        )
    return found


def _infos(cursor, n_tensors):
    """Name -> (type, shape, offset after the head, bytes), in the order of the file."""
    infos = {}
    for _ in range(n_tensors):
        name = cursor.string("the name of a tensor")
        if not is_tensor_name(name):
            raise cursor.refusal(f"tensor {short(name)}: not a name that a tensor may have")
        if name in infos:
            raise cursor.refusal(f"tensor {name} stands twice; which is meant cannot be known")
        n_dims = cursor.number("I", name)
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.refusal(f"tensor {name} has {n_dims} axes, expected 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, name))
        number, offset = cursor.number("I", name), cursor.number("Q", name)
        if number not in TYPES:
            raise UnsupportedModelError(
                f"{cursor.path}: tensor {name} is of ggml's type {number}, which is not known here"
            )
        kind = TYPES[number]
        if not all(dims) or math.prod(dims) >= 1 << 62:
            raise cursor.refusal(f"tensor {name} has the shape {short(list(dims[::-1]))}")
        if dims[0] % kind.weights:
            raise cursor.refusal(
                f"tensor {name} has rows of {dims[0]}, expected a multiple of {kind.weights}, the "
                f"block of {kind.name}"
            )
        n_bytes = math.prod(dims) // kind.weights * kind.n_bytes
        infos[name] = (kind.name, dims[::-1], offset, n_bytes)
    return infos


def _placed(infos, start, alignment, size, path):
    """The tensors, which lie in their order, each at the next multiple of the alignment."""
    tensors, at, end = {}, 0, 0
    for name, (kind, shape, offset, n_bytes) in infos.items():
        if offset != at:
            fault = "overlaps the one before it" if offset < end else "does not follow it"
            raise CheckpointError(
                f"{path}: tensor {name} lies at {offset} of the data, expected {at}: it {fault}; "
                "fetch the file again"
            )
        end = offset + n_bytes
        at = -(-end // alignment) * alignment
        if start + end > size:
            raise CheckpointError(
                f"{path}: cut off in tensor {name}: expected {start + end} bytes in the file, "
                f"found {size}; fetch it again"
            )
        tensors[name] = GgufTensor(path, kind, shape, start + offset, n_bytes)
    if tensors and size > start + at:
        raise CheckpointError(f"{path}: {size - start - at} trailing bytes after the last tensor")
    return tensors


def short(value: object) -> str:
    """A value from outside, shortened for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
