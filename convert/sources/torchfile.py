"""A file that torch.save wrote (.bin, .pth) as a table of tensors.

Our own reader checks archive and pickle first. Then torch reads the same file with weights_only and
must find the same tensors. The weights are later read from the file, not from a mapping: if the
file is cut off, a mapping would kill the process.
"""

from __future__ import annotations

import mmap
import re
import zlib

from jlayer.checkpoint.source import SourceFile
from jlayer.convert.sources.archive import read_archive
from jlayer.convert.sources.files import Place, TensorInfo, open_unchanged, read_bytes
from jlayer.convert.sources.pickles import SAFER, asked_for, read_records, unsafe
from jlayer.errors import CheckpointError
from jlayer.interrupts import imported
from jlayer.strict import close

MAX_PICKLE_BYTES = 32 << 20  # 723 tensors take 0.1 MB
_PICKLE = "data.pkl"
# The entries that torch.save writes; an archive with any other entry is refused.
_ENTRIES = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|data/[0-9]{1,20}"
)
# Other formats that are found under the name of a pickle, by their first bytes.
_NOT_ARCHIVES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run: git lfs pull"),
    (b"<!doctype", "an HTML page, not a pickle; fetch the file again"),
    (b"<html", "an HTML page, not a pickle; fetch the file again"),
    (b"7z\xbc\xaf\x27\x1c", f"unsafe: a 7z archive, which torch.save never writes; {SAFER}"),
    (b"gguf", f"a GGUF file, not a pickle; {SAFER}"),
)

Table = dict[str, tuple[Place, TensorInfo]]


def read_table(file: SourceFile) -> Table:
    """Every tensor in a file that torch.save wrote: its place, shape, and dtype in torch's words.

    Raises CheckpointError (unsafe, an archive bomb, damaged, torch missing) or StorageError.
    """
    fd = open_unchanged(file)
    try:
        start = read_bytes(fd, 0, min(64, file.n_bytes), file.path)
        if not start.startswith(b"PK\3\4"):
            _refuse_other_formats(fd, start, file)
        entries = read_archive(fd, file.n_bytes, where=file.path)
        _check_entries(fd, entries, file.path)
        records = read_records(_read_pickle(fd, entries, file.path), entries, where=file.path)
        _compare_with_torch(fd, records, file)
    finally:
        close(fd)
    return {name: (record.place(name, file), record.info) for name, record in records.items()}


def _read_pickle(fd, entries, where):
    if _PICKLE not in entries:
        raise CheckpointError(f"{where}: no {_PICKLE} in it, so not saved by torch; {SAFER}")
    entry = entries[_PICKLE]
    if entry.n_bytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where}: pickle of {entry.n_bytes} bytes, over the limit of {MAX_PICKLE_BYTES}; "
            f"{SAFER}"
        )
    raw = read_bytes(fd, entry.offset, entry.n_bytes, where)
    if entry.crc and zlib.crc32(raw) != entry.crc:
        raise CheckpointError(
            f"{where}: {_PICKLE} is damaged (CRC-32 {zlib.crc32(raw):08x}, expected "
            f"{entry.crc:08x}); fetch it again"
        )
    return raw


def _check_entries(fd, entries, where):
    strange = sorted(name for name in entries if not _ENTRIES.fullmatch(name))
    if strange:
        program = any(name.startswith("code/") or name == "constants.pkl" for name in strange)
        what = "a TorchScript program" if program else "entries that torch.save does not write"
        names = ", ".join(ascii(name)[:80] for name in strange[:5])
        raise CheckpointError(f"{where}: unsafe archive: {what} ({names}); {SAFER}")
    order = entries.get("byteorder")
    if order and (
        order.n_bytes > 16 or read_bytes(fd, order.offset, order.n_bytes, where) != b"little"
    ):
        raise CheckpointError(f"{where}: byte order other than little-endian; {SAFER}")


def _refuse_other_formats(fd, start, file):
    for magic, advice in _NOT_ARCHIVES:
        if start.lstrip().lower().startswith(magic.lower()):
            raise CheckpointError(f"{file.path}: {advice}")
    if not start:
        raise CheckpointError(f"{file.path}: empty, 0 bytes; fetch the file again")
    if start[8:9] == b"{":
        raise CheckpointError(f"{file.path}: safetensors under another name; rename it to theirs")
    raw = read_bytes(fd, 0, min(file.n_bytes, 1 << 20), file.path)
    asked = ", ".join(list(asked_for(raw))[:5])
    if asked:
        raise unsafe(file.path, asked)
    raise CheckpointError(
        f"{file.path}: unsafe: not a zip archive, so saved before torch 1.6 or by something else; "
        f"{SAFER}, or save it again: "
        "torch.save(torch.load(FILE, weights_only=True, map_location='cpu'), FILE)"
    )


def _compare_with_torch(fd, records, file):
    """Refuses a file in which torch finds other tensors: it may be made to deceive one reader."""
    torch = _import_torch(file.path)
    try:
        loaded = torch.load(
            f"/proc/self/fd/{fd}",  # the file that was checked, even if another has its name
            map_location="meta",
            mmap=_can_be_mapped(fd, file.n_bytes),
            weights_only=True,
        )
        in_torch = {
            name: (str(t.dtype), tuple(t.shape), t.stride(), t.storage_offset())
            for name, t in loaded.items()
        }
    except Exception as error:  # torch has no error of its own for this
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file.path}: torch {torch.__version__} refuses it "
            f"({type(error).__name__}: {reason}); {SAFER}"
        ) from None
    here = {
        name: (f"torch.{record.dtype}", record.shape, record.strides, record.offset)
        for name, record in records.items()
    }
    for name in sorted(in_torch.keys() | here.keys(), key=str):
        if in_torch.get(name) != here.get(name):
            raise unsafe(
                file.path,
                f"tensor {name[:80]!a} is {in_torch.get(name)} to torch and {here.get(name)} here",
            )


def _import_torch(where):
    try:
        return imported("torch")
    except ImportError:
        raise CheckpointError(
            f"{where}: a pickle, which only torch reads, and torch is not installed: "
            f'pip install -e ".[torch]", or {SAFER}'
        ) from None


def _can_be_mapped(fd, n_bytes):
    """Whether the system maps the file as torch does; some refuse one larger than their memory.

    From a mapping torch lists the tensors without reading them; without one, some versions read
    all weights.
    """
    try:
        mapping = mmap.mmap(fd, n_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:
        return False
    mapping.close()
    return True
