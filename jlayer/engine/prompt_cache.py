"""Prompts whose cache entries stay on disk, by content: a prompt that begins like one before costs
reading what they share.

Entries are kept in blocks of BLOCK tokens. The name of a block is a hash of its tokens, of the
block before it and of the model; so texts that begin alike have the same first blocks, whoever
computed them. What the next token sees of layers with a window, and the state of layers with one,
cannot be cut: they are kept beside a block as its end, and only where a forward pass has ended
there. For such models passes are made to end at the last whole block of a prompt, and where it
parts from those before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jlayer.checkpoint.store import Store
from jlayer.durable import LOCK, open_lock
from jlayer.engine import entries
from jlayer.engine.caches import Caches
from jlayer.engine.deciding import is_one_of_several
from jlayer.engine.identity import identity_of, key_of
from jlayer.engine.kept_blocks import (
    SUFFIX,
    NewBlock,
    Wanted,
    bytes_of_layer,
    opened,
    place_blocks,
    together,
    write_blocks,
)
from jlayer.engine.lane import Lane
from jlayer.engine.speculation import Speculation
from jlayer.engine.states import UNFINISHED
from jlayer.engine.taking import Fill, fills_of, places_of
from jlayer.errors import CheckpointError, JlayerError, StorageError, UsageError
from jlayer.run_config import RunConfig
from jlayer.sizes import human
from jlayer.strict import close

# A forward pass takes as long for so many tokens as for one, so that shorter blocks gain nothing.
BLOCK = 256
STEP_S = 1e-3  # between the times of use of a text's blocks
MOST_TOKEN = 999_999  # about the largest id that a vocabulary has
END = ".end"  # after the name of a block
_KEY, _NAME = re.compile(r"[0-9a-f]{32}"), re.compile(rf"[0-9a-f]{{32}}(\.end)?\{SUFFIX}")


class Home(Protocol):
    """What it needs of an engine."""

    run: RunConfig
    store: Store
    dtype: str
    caches: Caches
    speculation: Speculation


@dataclass
class Keeper:
    """Of a lane whose prompt is to be kept. `names`: of its blocks; `marks`: after so many blocks a
    forward pass ends."""

    cache: PromptCache
    names: list[str]
    marks: list[int] = field(default_factory=list)

    def most(self, first: int, n_tokens: int) -> int:
        """How many of the next tokens, from token `first` on, ride in one pass."""
        ends = [BLOCK * mark - first for mark in self.marks]
        return min([n_tokens, *(end for end in ends if end > 0)])

    def after_pass(self, lane: Lane) -> None:
        """Keeps what a pass has computed. An error is the lane's own: others ride on."""
        n_blocks, rest = divmod(len(lane.table), BLOCK)
        is_last = n_blocks >= len(self.names)
        if lane.table.is_closed or not (is_last or (not rest and n_blocks in self.marks)):
            return
        if is_last:
            lane.keeper = None
        try:
            self.cache.keep(self.names[:n_blocks], lane)
        except JlayerError as error:
            lane.fail(error)


class PromptCache:
    """The prompts of one model in a folder, which holds those of others as well; in all at most
    `most_bytes`: what was used longest ago goes first. Several processes may share it.

    Raises UsageError or StorageError.
    """

    def __init__(self, folder: str, most_bytes: int, home: Home):
        self.folder, self.most_bytes, self._home = folder, most_bytes, home
        self._identity = identity_of(home.store, home.dtype)
        self._root = os.path.join(os.path.abspath(folder), key_of(self._identity))
        specs = home.caches.specs
        self.has_ends = any(spec.kind == "state" or spec.window is not None for spec in specs)
        self._check()

    @classmethod
    def of(cls, home: Home) -> PromptCache | None:
        """That of the run's options; None without one."""
        if home.run.prompt_cache is None:
            return None
        if is_one_of_several():
            raise UsageError(
                "prompt_cache: each of several processes has its own part of the cache, and they "
                "cannot keep prompts yet; leave it out"
            )
        return cls(home.run.prompt_cache, home.run.prompt_cache_size, home)

    def _check(self):
        facts = self._facts("0" * 32, [MOST_TOKEN] * BLOCK)
        where = entries.growing(np.zeros(BLOCK, np.int32))
        block_bytes = NewBlock("", facts, where, self._home.caches).n_bytes
        if block_bytes > self.most_bytes:
            raise UsageError(
                f"prompt_cache_size: found {human(self.most_bytes)}, and {BLOCK} tokens of this "
                f"model take {human(block_bytes)}; give more"
            )
        with self._writable():
            os.makedirs(self._root, exist_ok=True)

    # Ahead of a run's first pass; within a turn.

    def admit(self, lanes: Sequence[Lane], beside: Sequence[Lane] = ()) -> int:
        """Gives these lanes, of one run, the entries of their first tokens that are kept, where
        these are more than each has; those that begin alike share them, as they are planned to.
        Has the prompts of all kept, once they are computed. `beside`: lanes that are there already,
        whose entries are shared rather than read. -> how many tokens were read. Raises
        CheckpointError or StorageError."""
        # The name of a block is made of ids, which a prompt of embeddings has none of.
        there = [lane for lane in lanes if _is_there(lane) and not lane.n_embedded]
        if not there:
            return 0
        names = [self._names(lane) for lane in there]
        own = set(map(id, there))
        others = [lane for lane in beside if _is_there(lane) and id(lane) not in own]
        others = [lane for lane in others if not lane.n_embedded]
        n_read = self._fill(there, names, others)
        for lane, its_names in zip(there, names, strict=True):
            self._watch(lane, its_names[: (lane.n_prompt - 1) // BLOCK])
        return n_read

    def _fill(self, lanes, names, beside):
        n_before = sum(len(lane.table) for lane in lanes)
        with self._locked(fcntl.LOCK_SH):
            of_lane = {
                id(lane): its_names[: self._n_loadable(its_names[: lane.n_shareable // BLOCK])]
                for lane, its_names in zip(lanes, names, strict=True)
            }
            fills = self._fills(lanes, [BLOCK * len(of_lane[id(lane)]) for lane in lanes], beside)
            if fills:
                self._load(fills, [of_lane[id(fill.lane)] for fill in fills])
        for lane in lanes:
            lane.board(lane.table, lane.capacity)  # with entries from now on, or without
        n_shared = sum(fill.n_shared for fill in fills)
        return sum(len(lane.table) for lane in lanes) - n_shared - n_before

    def _fills(self, lanes, n_kept, beside):
        if not self.has_ends:
            return fills_of(lanes, n_kept, beside)
        # Of another lane's entries a window may have moved on, and a state is at its end.
        pairs = [pair for pair in zip(lanes, n_kept, strict=True) if pair[1] > len(pair[0].table)]
        for lane, _ in pairs:
            lane.table.cut(0)
        return [Fill(lane, n_tokens) for lane, n_tokens in pairs]

    def _watch(self, lane, names):
        n_there = self._n_there(names)
        n_known = len(lane.table) // BLOCK
        if not self.has_ends:
            if n_there < len(names):
                lane.keeper = Keeper(self, names)
            return
        marks = sorted(
            mark
            for mark in {n_there, len(names)}
            if mark > n_known and not self._is_there(names[mark - 1] + END)
        )
        if marks:
            lane.keeper = Keeper(self, names[: marks[-1]], marks)

    def _names(self, lane) -> list[str]:
        """Of the blocks of a lane's text."""
        # Entries of a text beyond the switch of its rotary embedding are others, and those of each
        # of several adapters.
        own = key_of(self._identity), lane.has_switched, lane.adapter
        digest = hashlib.sha256(repr(own).encode())
        names, tokens = [], np.array(lane.history, np.int32)
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            digest.update(tokens[first : first + BLOCK].tobytes())
            names.append(digest.hexdigest()[:32])
        return names

    def _facts(self, name, tokens):
        """What is said of a block. `name`: with it what comes before these tokens, of which others
        have other entries."""
        return {"of": "prompt", "name": name, "model": self._identity, "tokens": list(tokens)}

    def _is_there(self, name):
        return os.path.isfile(self._path(name))

    def _path(self, name):
        return os.path.join(self._root, name + SUFFIX)

    def _n_there(self, names):
        """How many of the first blocks are there."""
        return next((n for n, name in enumerate(names) if not self._is_there(name)), len(names))

    def _n_loadable(self, names):
        count = self._n_there(names)
        while self.has_ends and count and not self._is_there(names[count - 1] + END):
            count -= 1
        return count

    def _load(self, fills: Sequence[Fill], names: Sequence[Sequence[str]]):
        """`names`: for each fill, of its blocks."""
        caches = self._home.caches
        caches.ready()
        caches.make_room()
        places, given = places_of(fills)
        tables = [fill.lane.table for fill in fills]
        with entries.placing(caches.pool, tables, places, given) as new:
            self._home.speculation.forget(new.rows[: len(new.rows) - len(given)])
            wanted: dict[str, list] = {}  # of each block: (lane, its tokens, how many are there)
            for number, (fill, its_names) in enumerate(zip(fills, names, strict=True)):
                for block in range(fill.n_shared // BLOCK, len(its_names)):
                    own = slice(BLOCK * block, BLOCK * (block + 1))
                    n_there = max(0, fill.n_shared - own.start)
                    where = entries.growing(new.rows[places[number][own][n_there:]])
                    tokens = fill.lane.history[own]
                    wanted.setdefault(its_names[block], []).append((tokens, where, n_there))
                if self.has_ends:
                    one = (tokens, entries.ending(new.of(number)), 0)
                    wanted.setdefault(its_names[-1] + END, []).append(one)
            layer_bytes = [bytes_of_layer(caches, *own[0][1:]) for own in wanted.values()]
            for some in together(list(wanted), layer_bytes):
                self._place({name: wanted[name] for name in some})
        for its_names in names:
            self._touch(its_names)

    def _place(self, wanted):
        """Reads blocks, each once, for all that want it."""
        with opened(map(self._path, wanted)) as blocks:
            for block, (name, targets) in zip(blocks, wanted.items(), strict=True):
                if any(block.facts != self._facts(name, tokens) for tokens, _, _ in targets):
                    raise CheckpointError(
                        f"{block.path}: a kept prompt of another model or text; remove it"
                    )
            place_blocks(
                self._home.caches,
                [
                    Wanted(block, [target[1:] for target in targets])
                    for block, targets in zip(blocks, wanted.values(), strict=True)
                ],
            )

    def _touch(self, names):
        """They were used just now, the last blocks of a text a little before its first ones: these
        go last, since no others are of use without them."""
        now = time.time()
        for place, name in enumerate(reversed(names)):
            used = now + place * STEP_S
            for path in map(self._path, (name, name + END)):
                # It has no end, or another user has written it.
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    os.utime(path, (used, used))

    # After a pass; within its turn.

    def keep(self, names: Sequence[str], lane: Lane) -> None:
        """Writes the blocks of a lane's first tokens that are not there yet, and their end where
        they are all that its table has: with entries of another lane, which has longer ones, a pass
        ends where no mark is. Raises StorageError."""
        history = lane.history
        has_end = self.has_ends and len(lane.table) == BLOCK * len(names)
        in_order = entries.in_order(self._home.caches.pool, lane.table)  # as they are placed again
        rows = in_order.rows
        with self._locked(fcntl.LOCK_EX):
            self._touch(names)
            own_paths = {self._path(name + end) for name in names for end in ("", END)}
            held = Held(os.path.dirname(self._root), self.most_bytes, stays=own_paths)
            new: list[NewBlock] = []

            def has_room(name, own, where):
                if self._is_there(name):
                    return True
                facts = self._facts(name, history[own])
                block = NewBlock(self._path(name), facts, where, self._home.caches)
                if is_held := held.add(block.n_bytes):
                    new.append(block)
                return is_held

            for number, name in enumerate(names):
                own = slice(BLOCK * number, BLOCK * (number + 1))
                if not has_room(name, own, entries.growing(rows[own])):
                    break
            else:
                if has_end:
                    has_room(names[-1] + END, own, entries.ending(in_order))
            layer_bytes = [block.layer_bytes for block in new]
            for some in together(new, layer_bytes):
                write_blocks(some)
            self._touch(names)

    @contextmanager
    def _locked(self, how) -> Iterator[None]:
        """Nothing is removed while another process reads. Raises StorageError, for what is done
        inside as well."""
        with self._writable():
            os.makedirs(self._root, exist_ok=True)  # the user may have removed it meanwhile
            fd = open_lock(os.path.join(os.path.dirname(self._root), LOCK))
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(fd, how)
                yield
            finally:
                close(fd)

    @contextmanager
    def _writable(self):
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise StorageError(
                f"prompt_cache: {self.folder} cannot be written ({error.strerror}{where}); name "
                "another folder"
            ) from None


def _is_there(lane):
    return lane.table is not None and not lane.table.is_closed


class Held:
    """The blocks of all models in a folder, while some are added: in all at most `most_bytes`.
    `stays`: the paths of those that may not go. Raises OSError."""

    def __init__(self, folder: str, most_bytes: int, *, stays: Collection[str]):
        self._most_bytes = most_bytes
        there = list(_blocks_in(folder))
        self._n_bytes = sum(size for _, _, size in there)
        self._oldest = deque(sorted(one for one in there if one[1] not in stays))

    def add(self, n_bytes: int) -> bool:
        """A block of so many bytes is to be written: the oldest ones go until all is within the
        bound. False where that is not enough."""
        while self._n_bytes + n_bytes > self._most_bytes and self._oldest:
            _, oldest, its_bytes = self._oldest.popleft()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(oldest)
            self._n_bytes -= its_bytes
        if self._n_bytes + n_bytes > self._most_bytes:
            return False
        self._n_bytes += n_bytes
        return True


def _blocks_in(folder):
    """(when it was used last, its path, its bytes) of each block of all models; what a killed
    process has left counts as the oldest."""
    for key in filter(_KEY.fullmatch, os.listdir(folder)):
        for name in _names_in(os.path.join(folder, key)):
            path = os.path.join(folder, key, name)
            if not _NAME.fullmatch(name.removesuffix(UNFINISHED)):
                continue
            with contextlib.suppress(FileNotFoundError):  # where nothing is locked
                found = os.lstat(path)
                if not stat.S_ISDIR(found.st_mode):  # one is told of where its place is needed
                    used = 0.0 if name.endswith(UNFINISHED) else found.st_mtime
                    yield used, path, found.st_size


def _names_in(folder):
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
