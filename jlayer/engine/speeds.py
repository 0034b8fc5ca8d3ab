"""How fast the host's own cores multiply weights, measured beside a busy link."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import accumulate, cycle
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.cores.cores import Cores, Matrix
from jlayer.encodings.linear import ORDER
from jlayer.encodings.registry import encoding
from jlayer.interrupts import check
from jlayer.plan.machine import PLATFORMS, HostSpeeds
from jlayer.streaming.devices import Devices
from jlayer.streaming.slots import HostMemory

COLUMNS = (1, 4, 16, 64)
ENOUGH_S, LEAST = 0.03, 5  # of measuring one number of columns
# Of few columns half of the matrices are multiplied at once, as many bytes as a stage may have; of
# so many, one.
MANY_COLUMNS = 64
WIDTH = 4096  # inputs of a row: as many as a model's
MATRIX_BYTES = 16 << 20
MATRICES = 8  # together larger than a cache
LINK_BYTES = 64 << 20
PATTERN = 0x11  # small numbers in every form, none of them zero or subnormal


def host_speeds(
    cores: Cores,
    forms: Sequence[str],
    devices: Devices,
    *,
    dtype: str,
    link_is_busy: bool = True,
) -> HostSpeeds:
    """Measures bytes/s of the products, by form and columns, and of the link meanwhile. `dtype`: of
    the columns. `link_is_busy`: whether it moves bytes all the time; else the cores are alone."""
    with _BusyLink(devices, moves=link_is_busy) as link:
        measured = tuple((form, _by_columns(cores, form, dtype)) for form in forms)
    return HostSpeeds(measured, link.speed)


def _by_columns(cores, form, dtype):
    memory = HostMemory([0], pin=False)  # as weights lie, in large pages
    matrices = [_matrix(form, memory.room(n, MATRIX_BYTES)) for n in range(MATRICES)]
    return no_slower_than_more(
        [(columns, _speed(cores, matrices, columns, dtype)) for columns in COLUMNS]
    )


def no_slower_than_more(speeds: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """(columns, bytes/s), from few to many, where few are no slower than more: they could be
    multiplied as those are, so something else was in the way of what was measured."""
    best = list(accumulate((speed for _, speed in reversed(speeds)), max))[::-1]
    return tuple((columns, speed) for (columns, _), speed in zip(speeds, best, strict=True))


def _matrix(form, room):
    room[:] = PATTERN
    n_rows = MATRIX_BYTES // encoding(form).n_bytes((1, WIDTH))
    pieces, at = {}, 0
    for name, (dtype, shape) in encoding(form).pieces((n_rows, WIDTH)).items():
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pieces[name] = room[at : at + n_bytes].view(dtype).reshape(shape)
        at += n_bytes
        if name == ORDER:
            pieces[name][:] = np.arange(WIDTH)
    return Matrix(form, pieces, WIDTH)


def _speed(cores, matrices, columns, dtype):
    """Bytes/s of products of several matrices at once, as those of a stage are: the median. The
    first product is left out: it compiles."""
    x = np.ones((columns, WIDTH), jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    cores.multiply(matrices[:1], x)
    found, began = [], time.perf_counter()
    at_once = 1 if columns >= MANY_COLUMNS else len(matrices) // 2
    some = cycle(_batches(matrices, at_once))
    while len(found) < LEAST or time.perf_counter() - began < ENOUGH_S:
        check()
        now, at = next(some), time.perf_counter()
        cores.multiply(now, x)
        found.append(sum(m.n_bytes for m in now) / (time.perf_counter() - at))
    return median(found)


def _batches(matrices, size):
    return [matrices[at : at + size] for at in range(0, len(matrices), size)]


class _BusyLink:
    """Moves bytes to all devices inside the `with`, where there are links; then `speed` is how fast
    these are together. `moves=False`: nothing moves."""

    def __init__(self, devices: Devices, *, moves: bool):
        self.speed: float | None = None
        self._devices = devices
        self._has_link = moves and PLATFORMS[devices.platform].has_link
        self._ends = threading.Event()

    def __enter__(self):
        if self._has_link:
            self._thread = threading.Thread(target=self._move, name="jlayer-link")
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        if self._has_link:
            self._thread.join()

    def _move(self):
        pinned = HostMemory([LINK_BYTES], pin=True)
        count, began, before = 0, time.perf_counter(), None
        try:
            while not self._ends.is_set():
                moved = self._devices.put(pinned.slot(0))
                if before is not None:
                    before.block_until_ready()  # two are on their way at a time
                before, count = moved, count + 1
            jax.block_until_ready(before)
            self.speed = count * len(self._devices) * LINK_BYTES / (time.perf_counter() - began)
        finally:
            pinned.close()
