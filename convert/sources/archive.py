"""The table of contents of a zip archive that torch.save wrote, checked strictly.

Zip libraries tolerate different errors. An archive that two of them read in two ways can carry a
payload past a scanner, so no error is tolerated here. Nothing is unpacked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from jlayer.checkpoint.safetensors import MAX_TENSORS
from jlayer.convert.sources.files import read_bytes
from jlayer.errors import CheckpointError
from jlayer.strict import is_relative_path

MAX_ENTRIES = MAX_TENSORS + 16
MAX_DIRECTORY_BYTES = 64 << 20
_END = struct.Struct("<4s4H2LH")  # the last 22 bytes
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED = 0
_FLAGS = 0x808  # names in UTF-8; sizes also after the data. Encryption and the rest: refused
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "the value is in the 64-bit field"
_ADVICE = "fetch it again, or take the model's safetensors"


@dataclass(frozen=True)
class Entry:
    """The place of one entry's data in the archive; `crc` is its CRC-32."""

    offset: int
    n_bytes: int
    crc: int


@dataclass(frozen=True)
class _Listed:
    """An entry as the table of contents lists it."""

    name: str
    flags: int
    crc: int
    n_bytes: int
    header_offset: int


def read_archive(fd: int, n_bytes: int, *, where: str) -> dict[str, Entry]:
    """The entries by name, without the folder that torch puts all of them in.

    Raises CheckpointError (cut off, compressed, overlapping, doubled or path-like names, more than
    one folder) or StorageError.
    """
    start, size, count = _directory(fd, n_bytes, where)
    listed = _list_entries(read_bytes(fd, start, size, where), count, where)
    _check_names(listed, where)
    entries, data_end = {}, 0
    for item in sorted(listed, key=lambda item: item.header_offset):
        offset = _data_offset(fd, item, start, where)
        if item.header_offset < data_end:
            raise _refusal(where, f"archive bomb: entry {item.name!a} overlaps another")
        data_end = offset + item.n_bytes
        if data_end > start:
            raise _refusal(where, f"entry {item.name!a} leads beyond the data: {data_end} bytes")
        entries[item.name.partition("/")[2]] = Entry(offset, item.n_bytes, item.crc)
    return entries


def _directory(fd, n_bytes, where):
    """Offset, bytes and number of entries of the table of contents, at the end of the file."""
    end_at = n_bytes - _END.size
    raw = read_bytes(fd, end_at, _END.size, where) if end_at >= 0 else bytes(_END.size)
    magic, disk, start_disk, here, count, size, start, comment = _END.unpack(raw)
    if magic != b"PK\5\6" or comment:
        raise CheckpointError(
            f"{where}: cut off, or followed by other bytes: no table of contents at the end of its "
            f"{n_bytes} bytes; {_ADVICE}"
        )
    table = (start, size, count)
    directory_end = end_at
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at >= 0:
        raw = read_bytes(fd, locator_at, _END64_LOCATOR.size, where)
        if raw.startswith(b"PK\6\7"):
            directory_end, table = _directory64(fd, raw, locator_at, where)
            limits = (_FULL32, _FULL32, _FULL16)
            for short, long, full in zip((start, size, count), table, limits, strict=True):
                if short not in (long, full):
                    raise _refusal(where, "two tables of contents that differ")
    start, size, count = table
    if start + size != directory_end or disk or start_disk or (here not in (count, _FULL16)):
        raise _refusal(where, "a table of contents that is not where it says")
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{where}: archive bomb: {count} entries in {size} bytes, over the limit of "
            f"{MAX_ENTRIES} in {MAX_DIRECTORY_BYTES}; {_ADVICE}"
        )
    return table


def _directory64(fd, locator, locator_at, where):
    _, disk, at, disks = _END64_LOCATOR.unpack(locator)
    if at + _END64.size != locator_at or disk or disks != 1:
        raise _refusal(where, "a table of contents that is not where it says")
    magic, _, _, _, disk, start_disk, here, count, size, start = _END64.unpack(
        read_bytes(fd, at, _END64.size, where)
    )
    if magic != b"PK\6\6" or disk or start_disk or here != count:
        raise _refusal(where, "a table of contents that is not where it says")
    return at, (start, size, count)


def _list_entries(raw, count, where):
    listed, at = [], 0
    while at < len(raw):
        if len(listed) == count or at + _ENTRY.size > len(raw):
            raise _refusal(where, f"other entries than the {count} that it counts")
        fields = _ENTRY.unpack_from(raw, at)
        magic, _, _, flags, method, _, _, crc, packed, n_bytes, name_len, extra_len = fields[:12]
        comment_len, disk, _, _, header_offset = fields[12:]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_len
        name = raw[name_at:extra_at].decode("utf-8", "backslashreplace")
        at = extra_at + extra_len + comment_len
        if magic != b"PK\1\2" or at > len(raw) or disk:
            raise _refusal(where, f"other entries than the {count} that it counts")
        if flags & ~_FLAGS:
            raise _refusal(where, f"entry {name!a} encrypted or in another unknown way (flags)")
        n_bytes, packed, header_offset = _long_sizes(
            raw[extra_at : extra_at + extra_len], (n_bytes, packed, header_offset), where
        )
        if method != _STORED or packed != n_bytes:
            raise CheckpointError(
                f"{where}: archive bomb: entry {name!a} unpacks {packed} bytes to {n_bytes} "
                f"(method {method}), over the limit of 1 to 1, as torch.save stores; {_ADVICE}"
            )
        listed.append(_Listed(name, flags, crc, n_bytes, header_offset))
    if len(listed) != count:
        raise _refusal(where, f"{len(listed)} entries, though it counts {count}")
    return listed


def _long_sizes(extra, sizes, where):
    """The sizes and offset of an entry; those with all 32 bits set are in its zip64 field."""
    fields, at = {}, 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind in fields or at + 4 + length > len(extra):
            raise _refusal(where, "an entry with a broken extra field")
        fields[kind] = extra[at + 4 : at + 4 + length]
        at += 4 + length
    longs = fields.get(1, b"")
    n_full = sizes.count(_FULL32)
    if len(longs) < 8 * n_full:
        raise _refusal(where, "an entry without its 64-bit sizes")
    values = iter(struct.unpack_from(f"<{n_full}Q", longs))
    return tuple(next(values) if size == _FULL32 else size for size in sizes)


def _check_names(listed, where):
    """Refuses names that are no paths below one folder, and two that differ only in case."""
    folders, seen = set(), set()
    for item in listed:
        folder, slash, _ = item.name.partition("/")
        if not slash or not is_relative_path(item.name):
            raise _refusal(where, f"an entry named {item.name!a}, expected FOLDER/NAME")
        if item.name.casefold() in seen:
            raise _refusal(where, f"two entries named {item.name!a}")
        seen.add(item.name.casefold())
        folders.add(folder)
    if len(folders) != 1:
        names = ", ".join(ascii(name) for name in sorted(folders)[:5])
        raise _refusal(where, f"{len(folders)} folders ({names}), expected one")


def _data_offset(fd, item, limit, where):
    """Where an entry's data begins; its local header must agree with the table of contents."""
    at = item.header_offset
    if at + _LOCAL.size > limit:
        raise _refusal(where, f"entry {item.name!a} leads beyond the data")
    fields = _LOCAL.unpack(read_bytes(fd, at, _LOCAL.size, where))
    magic, _, flags, method, _, _, _, packed, n_bytes, name_len, extra_len = fields
    name = read_bytes(fd, at + _LOCAL.size, name_len, where).decode("utf-8", "backslashreplace")
    sizes = {packed, n_bytes} - {0, _FULL32, item.n_bytes}
    if magic != b"PK\3\4" or (name, flags, method) != (item.name, item.flags, _STORED) or sizes:
        raise _refusal(where, f"entry {item.name!a} is another one than its table says")
    return at + _LOCAL.size + name_len + extra_len


def _refusal(where, what):
    return CheckpointError(f"{where}: unsafe archive: {what}; {_ADVICE}")
