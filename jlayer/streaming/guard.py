"""Sees that devices go on: a thread beside the one that waits for them.

Who waits for a device waits in JAX or the driver, where no exception reaches it, and for ever if
the device stands still. So this thread looks on. Where a device has failed while others wait for it
in an exchange, these are told to give up. Where one does not end what it is at, so are all; and if
that does not free who waits, the process ends, with a line that says which device and where.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable

import jax

from jlayer.errors import StorageError
from jlayer.plan.tiles import Tile
from jlayer.streaming import exchange

LOOK_S = 1.0
FAILED_S = 2.0  # a device that has failed is looked for after so long
GRACE_S = 10.0  # for who waits to be freed, before the process ends
# How long a device may take for one step: so many seconds, and what its bytes and products take at
# a tenth or less of the speed of the slowest card. A CPU may have XLA's slowest products to do.
LEAST_S = 60.0
LEAST_BYTES_PER_S = 100e6
LEAST_OPERATIONS_PER_S = {"gpu": 1e12, "cpu": 1e8}
# Other hosts may be slow to read or to compile, and who is lost is seen by `engine.hosts`.
TIMES_FOR_HOSTS = 10

# What may be under way: (what it is of, one of the next two, arrays that devices give).
WEIGHTS, PRODUCTS = "got {its} weights", "given {its} products"
UnderWay = Iterable[tuple[str, str, object]]


def patience_s(platform: str, n_bytes: int, n_rows: int, *, n_hosts: int = 1) -> float:
    """How long a device may take for tiles of so many bytes and a pass of so many rows."""
    operations = 4 * n_bytes * n_rows  # of weights of 4 bits
    found = LEAST_S + n_bytes / LEAST_BYTES_PER_S
    found += operations / LEAST_OPERATIONS_PER_S[platform]
    return found * (TIMES_FOR_HOSTS if n_hosts > 1 else 1)


class Guard:
    """Watches the steps of one thread, in which it may wait for a device: `with guard.step(..)`.

    `under_way`: gives what devices are at, in the order in which it was asked of them. `end`:
    called with a line, in the guard's thread, where nothing else helps. `is_excused`: whether a
    step does something else now than to wait for a device. `patience_s`: how long a step may take.
    `cause`: what was found to be wrong, since the last `restart`; None: nothing.
    """

    def __init__(
        self,
        under_way: Callable[[], UnderWay],
        end: Callable[[str], None],
        *,
        is_excused: Callable[[], bool] = lambda: False,
    ):
        self._under_way, self._end, self._is_excused = under_way, end, is_excused
        self.patience_s = LEAST_S
        self.cause: str | None = None
        self._at: Tile | str | None = None  # the step under way
        self._next: Tile | str = ""
        self._count = 0  # of steps
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, at: Tile | str) -> Guard:
        """To be entered for a step. `at`: its tile, or what it is in words. Leaving it raises
        StorageError where the device has failed, or was found not to go on."""
        self._next = at
        return self

    def __enter__(self) -> None:
        self._count += 1
        self._at = self._next
        if self._thread is None:
            who = weakref.ref(self), self._closed
            self._thread = threading.Thread(
                target=_look_on, args=who, name="jlayer-guard", daemon=True
            )
            self._thread.start()

    def __exit__(self, kind, error, _):
        at, self._at = self._at, None
        if error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
            return
        if self.cause is not None:  # and exchanges wait for nobody any more
            raise StorageError(self.cause) from error
        if error is not None:
            name = at.name if isinstance(at, Tile) else at
            raise StorageError(f"{name}: the device failed ({first_line(error)})") from error

    def go_on(self) -> None:
        """What the step waits for is no device, or is one that goes on."""
        self._count += 1

    def restart(self) -> None:
        """Before a new stream of steps."""
        self.cause = None
        exchange.take_heart()  # an exchange may have failed by itself

    def close(self) -> None:
        """Ends the thread, and lets go of what was watched."""
        self._closed.set()
        self._under_way = tuple
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LOOK_S)

    @property
    def number(self) -> int | None:
        """That of the step under way; None between two, and where it is excused."""
        return None if self._at is None or self._is_excused() else self._count

    def look(self, waited: float, told: float) -> bool:
        """Looks at a step that takes so long. `told`: how long it has taken since who waits was
        told to give up. Returns whether it has been."""
        if self.cause is not None:
            if told >= GRACE_S and not self._closed.is_set():
                self._end(self.cause)
            return True
        if waited < FAILED_S:
            return False
        self.cause = self._failure() or (self._stall(waited) if waited > self.patience_s else None)
        if self.cause is not None:
            exchange.give_up()
        return self.cause is not None

    def _failure(self):
        """In words, that a device has failed, and has left others waiting."""
        for name, _, held in list(self._under_way()):
            for shard in _shards(held):
                if (error := _error_of(shard.data)) is not None:
                    return (
                        f"{name}: {_device(shard)} failed ({first_line(error)}), and the others "
                        "wait for it; run it again"
                    )
        return None

    def _stall(self, waited):
        """In words, which device does not go on."""
        at, words = self._at, "the driver has not returned"
        name = at.name if isinstance(at, Tile) else at
        for of, asked, held in list(self._under_way()):
            late = [_device(shard) for shard in _shards(held) if not _is_done(shard.data)]
            if late := list(dict.fromkeys(late)):
                has, its = ("has", "its") if len(late) == 1 else ("have", "their")
                name, words = of, f"{' and '.join(late)} {has} not {asked.format(its=its)}"
                break
        return (
            f"{name}: {words} for {waited:.0f} s, where {self.patience_s:.0f} s are the most; run "
            "it again, and without that device if it comes again"
        )


def _look_on(guard_of: weakref.ref, closed: threading.Event):
    """The thread of a guard, which ends with it. Time in which this process was stopped does not
    count: of each look no more than of two."""
    seen, waited, told, before = None, 0.0, 0.0, time.monotonic()
    while not closed.wait(LOOK_S):
        guard = guard_of()
        if guard is None:
            return
        now, step = time.monotonic(), guard.number
        if step is None or step != seen:
            seen, waited, told = step, 0.0, 0.0
        else:
            passed = min(now - before, 2 * LOOK_S)
            waited += passed
            told = told + passed if guard.cause is not None else 0.0
            guard.look(waited, told)
        before = now
        del guard


def first_line(error: Exception) -> str:
    """What an error of the device says, without its details."""
    return str(error).strip().splitlines()[0]


def _shards(held):
    leaves = jax.tree.leaves(held)
    return [shard for leaf in leaves for shard in getattr(leaf, "addressable_shards", ())]


def _device(shard):
    return f"{shard.device.platform}:{shard.device.id}"


def _is_done(array):
    try:
        return array.is_ready()
    except RuntimeError:  # it has been deleted
        return True


def _error_of(array):
    """The error with which an array has come, if any; it is not waited for."""
    if not _is_done(array):
        return None
    try:
        array.block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        return error
    except RuntimeError:  # it has been deleted
        return None
    return None
