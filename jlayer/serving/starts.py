"""How often what outlives the server was begun and has not ended, on disk.

What brings the whole process down would be begun again by every server that follows, for ever. So
each start is written down and synced before the first forward pass. A start counts until there is
an answer, or the server is stopped in order; what has MOST of them is given up.

One thread writes: nobody waits for the disk but what is to begin, and starts that come together are
synced together. Names are "OWNER", or "OWNER PART" for a part of it, such as a line of a batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

from jlayer.errors import JlayerError, StorageError
from jlayer.serving.disk import Log

FILE = "starts.jsonl"
# Many enough that what merely ran while a server was killed a few times is not given up for it.
MOST = 10
MOST_DEAD = 20_000  # names in lines that stand for nothing any more

Done = Callable[[JlayerError | None], None]


class GivenUp(JlayerError):
    """It was begun too often, and is not begun again."""


class NotNoted(StorageError):
    """A start cannot be written down, most likely on a full disk; later it may be."""


@dataclass(frozen=True)
class Start:
    """What an order has to do before it begins. `note(done)`: writes it down, and waits for
    nothing; `done` is called, in another thread, with None or the reason why it may not begin, and
    not at all where the server is stopping. `is_last`: if the server ends once more, it is given
    up; so of these one runs at a time, and none is given up for another one's fault. `is_open`:
    whether it has been written down, and no answer is on the disk."""

    name: str
    note: Callable[[Done], None]
    is_last: bool
    is_open: Callable[[], bool]


class Starts:
    """The starts in a file that is this process's alone. Any thread may use it.

    Raises StorageError, or CheckpointError where the file is damaged.
    """

    def __init__(self, path: str):
        self._log, self._n_dead = Log(path), 0
        self._counts: Counter[str] = Counter()
        self._log.read(self._apply)
        self._rewrite()
        self._before = dict(self._counts)  # of earlier servers
        self._begun: set[str] = set()  # by this one, and not ended
        self._pending: deque[tuple[str, Done]] = deque()
        self._is_stopping = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jlayer-starts")

    def check(self, name: str) -> None:
        """Raises GivenUp."""
        n = self._before.get(name, 0)
        if n >= MOST:
            raise GivenUp(
                f"the request was begun {n} times, and each time the server ended without an "
                "answer and without being stopped in order; it is not begun again: see the "
                "server's log, and send it anew to have it tried again"
            )

    def of(self, name: str) -> Start:
        """For an order of this name, or for each of several."""
        return Start(
            name,
            note=lambda done: self._begin(name, done),
            is_last=self._before.get(name, 0) == MOST - 1,
            is_open=lambda: name in self._begun,
        )

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """While a request is read, which may bring the process down too, it counts as begun. The
        machine goes on then, so this is not synced; where the disk is full it does not count."""
        is_new = self._submit(self._add, {name}).result()
        try:
            yield
        finally:
            if is_new:
                self._submit(self._put_back, {name})

    def end(self, names: Collection[str]) -> None:
        """They have their answers, on the disk."""
        self._submit(self._end, lambda name: name in names)

    def end_of(self, owners: Collection[str]) -> None:
        """The same of all parts of these."""
        self._submit(self._end, lambda name: _owner(name) in owners)

    def put_back(self, owner: str) -> None:
        """What runs of it was ended in order, and will be begun again."""
        self._submit(self._put_back, None, owner)

    def stop(self, *, in_order: bool) -> None:
        """Nothing begins from now on. `in_order`: what runs is not why the server ends."""
        self._submit(self._stop, in_order).result()

    def close(self) -> None:
        self._thread.shutdown()
        self._log.close()

    def _begin(self, name, done):
        self._pending.append((name, done))
        self._submit(self._note)

    def _submit(self, work, *arguments) -> Future:
        try:
            return self._thread.submit(work, *arguments)
        except RuntimeError:  # it is closed: what is not written counts as after a crash
            over: Future = Future()
            over.set_result(None)
            return over

    # In the thread.

    def _note(self):
        """All that wait by now, in one line."""
        pending = []
        while self._pending:
            pending.append(self._pending.popleft())
        if self._is_stopping:
            return
        error = None
        try:
            self._add({name for name, _ in pending}, sync=True)
        except StorageError as found:
            error = NotNoted(str(found))
        for _, done in pending:
            done(error)

    def _add(self, names, *, sync=False):
        """Whether one of them was not begun yet."""
        fresh = names - self._begun
        try:
            if fresh:
                self._change(fresh, 1, sync=sync)
                self._begun |= fresh
        except StorageError:
            if sync:
                raise
            return False
        return bool(fresh)

    def _put_back(self, names, owner=None, *, sync=False):
        if names is None:
            names = {name for name in self._begun if owner is None or _owner(name) == owner}
        names = names & self._begun
        if names:
            with suppress(StorageError):  # it counts as after a crash, then
                self._change(names, -1, sync=sync)
        self._begun -= names

    def _end(self, is_one):
        names = [name for name in self._counts if is_one(name)]
        if names:
            entry = {"ended": names}
            with suppress(StorageError):  # what has its answer is not begun again, whatever counts
                self._log.append(entry, sync=False)
            self._took(entry, len(names))
        self._begun.difference_update(names)

    def _stop(self, in_order):
        self._is_stopping = True
        if in_order:
            self._put_back(None, sync=True)

    def _change(self, names, by, *, sync):
        entry = {"begun": dict.fromkeys(sorted(names), by)}
        self._log.append(entry, sync=sync)
        self._took(entry, len(names))

    def _took(self, entry, n_names):
        self._apply(entry)
        self._n_dead += n_names
        if self._n_dead > MOST_DEAD + len(self._counts):
            with suppress(StorageError):  # the longer file is as good
                self._rewrite()

    def _apply(self, entry):
        for name in entry.get("ended", ()):
            self._counts.pop(name, None)
        for name, by in entry.get("begun", {}).items():
            self._counts[name] += by
            if self._counts[name] <= 0:
                del self._counts[name]

    def _rewrite(self):
        self._log.rewrite([{"begun": dict(self._counts)}] if self._counts else [])
        self._n_dead = 0


class PartStarts:
    """Of the parts of one owner, by number; where there are no `starts`, nothing is written."""

    def __init__(self, starts: Starts | None = None, owner: str = ""):
        self._starts, self._owner = starts, owner

    def check(self, number: int) -> None:
        """Raises GivenUp."""
        if self._starts is not None:
            self._starts.check(self._name(number))

    def of(self, number: int) -> Start | None:
        return None if self._starts is None else self._starts.of(self._name(number))

    def reading(self, number: int):
        return nullcontext() if self._starts is None else self._starts.reading(self._name(number))

    def end(self, numbers: Iterable[int]) -> None:
        if self._starts is not None:
            self._starts.end(set(map(self._name, numbers)))

    def _name(self, number):
        return f"{self._owner} {number}"


def _owner(name):
    return name.partition(" ")[0]
