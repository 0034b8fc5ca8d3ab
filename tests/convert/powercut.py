"""What a disk may hold after the power went: a model of what is written and what is durable.

Records what a run does to a folder. For any moment of it it gives folders as a crash may leave
them: bytes that no sync has followed are there, missing, zero or mixed; names that no sync of their
folder has followed are old or new, each by itself. Only a rename is one step, as in every journal.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = -1  # stands where a file has the number of its inode


@dataclass
class Inode:
    durable: bytes = b""
    changed_ns: int = 0
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # since the last sync

    def with_writes(self, writes) -> bytes:
        content = bytearray(self.durable)
        for offset, data in writes:
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        return bytes(content)

    def sync(self) -> None:
        self.durable, self.writes = self.with_writes(self.writes), []

    def after_a_cut(self, rng: random.Random) -> bytes:
        """One of the contents it may have. A file system makes size and bytes durable apart."""
        whole = self.with_writes(self.writes)
        some = self.with_writes([write for write in self.writes if rng.random() < 0.5])
        return rng.choice(
            (
                self.durable,
                whole,
                whole[: rng.randrange(len(whole) + 1)] if self.writes else whole,
                self.durable.ljust(len(whole), b"\0"),
                some.ljust(len(whole), b"\0"),
            )
        )


@dataclass
class Disk:
    """`names`: what is durable, path -> inode; `pending`: changes of names that are not yet, each
    with its folder; None there: the name goes."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, dict[str, int | None]]] = field(default_factory=list)

    def after_a_cut(self, rng: random.Random) -> dict[str, tuple[bytes, int] | None]:
        """Path -> content and time of change, or None for a folder."""
        names, kept = dict(self.names), rng.choice((0.0, 0.5, 0.5, 1.0))
        for _, change in self.pending:
            if rng.random() < kept:
                names.update(change)
        found = {}
        for path, number in sorted(names.items()):
            parent = os.path.dirname(path)
            if number is None or (parent and parent not in found):
                continue
            inode = self.inodes.get(number)
            found[path] = inode and (inode.after_a_cut(rng), inode.changed_ns)
        return found


class Recorder:
    """What is done to all below `root` while it is entered, call by call."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._real: dict[str, Callable] = {}
        self._fds: dict[int, int | str] = {}
        self._start, self._now = Disk(), {}
        self.log: list[tuple] = []
        for where, folders, files in os.walk(root):
            for name in folders:
                self._start.names[self._path(os.path.join(where, name))] = FOLDER
            for name in files:
                path = os.path.join(where, name)
                inode = Inode(Path(path).read_bytes(), os.stat(path).st_mtime_ns)
                self._start.inodes[len(self._start.inodes)] = inode
                self._start.names[self._path(path)] = len(self._start.inodes) - 1
        self._now, self._n_inodes = dict(self._start.names), len(self._start.inodes)

    def __enter__(self) -> Recorder:
        for name in ("open", "pwrite", "fsync", "fdatasync", "rename", "unlink", "mkdir", "rmdir"):
            self._real[name] = getattr(os, name)
            setattr(os, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *_) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def disk_after(self, n_calls: int) -> Disk:
        """The model once so many of the calls are done."""
        disk = Disk(
            {n: Inode(inode.durable, inode.changed_ns) for n, inode in self._start.inodes.items()},
            dict(self._start.names),
        )
        for kind, *call in self.log[:n_calls]:
            if kind == "write":
                number, offset, data = call
                disk.inodes.setdefault(number, Inode()).writes.append((offset, data))
            elif kind == "sync":
                disk.inodes.setdefault(call[0], Inode()).sync()
            elif kind == "names":
                folder, change = call
                disk.pending.append((folder, change))
                for number in change.values():
                    if number not in (None, FOLDER):
                        disk.inodes.setdefault(number, Inode())
            else:
                for _, change in [item for item in disk.pending if item[0] == call[0]]:
                    disk.names.update(change)
                disk.names = {p: n for p, n in disk.names.items() if n is not None}
                disk.pending = [item for item in disk.pending if item[0] != call[0]]
        return disk

    def _path(self, path):
        """The path below the root; None for what is elsewhere."""
        if path == self._root:
            return ""
        return path[len(self._root) + 1 :] if path.startswith(self._root + os.sep) else None

    def _change(self, path, change):
        if path is None:
            return
        self._now.update(change)
        self.log.append(("names", os.path.dirname(path), change))

    def _open(self, path, flags, *mode, **options):
        fd = self._real["open"](path, flags, *mode, **options)
        below = self._path(os.fspath(path))
        self._fds.pop(fd, None)
        if below is None:
            return fd
        number = FOLDER if below == "" else self._now.get(below)
        if number == FOLDER:
            self._fds[fd] = below
        else:
            if number is None:
                number, self._n_inodes = self._n_inodes, self._n_inodes + 1
                self._change(below, {below: number})
            self._fds[fd] = number
        return fd

    def _pwrite(self, fd, data, offset):
        count = self._real["pwrite"](fd, data, offset)
        if isinstance(self._fds.get(fd), int):
            self.log.append(("write", self._fds[fd], offset, bytes(data[:count])))
        return count

    def _fsync(self, fd):
        self._real["fsync"](fd)
        if fd in self._fds:
            of = self._fds[fd]
            self.log.append(("sync" if isinstance(of, int) else "sync folder", of))

    def _fdatasync(self, fd):
        self._fsync(fd)

    def _rename(self, before, after):
        self._real["rename"](before, after)
        old, new = self._path(os.fspath(before)), self._path(os.fspath(after))
        self._change(new, {old: None, new: self._now[old]})

    def _unlink(self, path):
        self._real["unlink"](path)
        below = self._path(os.fspath(path))
        self._change(below, {below: None})

    def _mkdir(self, path, *mode):
        self._real["mkdir"](path, *mode)
        below = self._path(os.fspath(path))
        self._change(below, {below: FOLDER})

    def _rmdir(self, path):
        self._real["rmdir"](path)
        below = self._path(os.fspath(path))
        self._change(below, {below: None})


def materialise(found: dict[str, tuple[bytes, int] | None], root: Path) -> None:
    """Writes one state of a disk into a new folder."""
    root.mkdir()
    for path, file in found.items():
        if file is None:
            (root / path).mkdir()
        else:
            content, changed_ns = file
            (root / path).write_bytes(content)
            os.utime(root / path, ns=(changed_ns, changed_ns))
