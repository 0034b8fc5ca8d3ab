"""Measures the machine without the engine: its card, and the speed of disk, link, memory and
arithmetic.

These are the ceilings that `bench` compares the engine with. Nothing here uses the engine's readers
or slots, and every function releases what it allocates.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.engine.gpu import gpu_name
from jlayer.errors import DoesNotFitError
from jlayer.interrupts import check
from jlayer.model.ops import product
from jlayer.spec import ALIGNMENT

REQUEST_BYTES = 16 << 20
IN_FLIGHT = 2  # with one request the disk is idle between two
COPY_BYTES = 64 << 20  # longer copies are not faster (H200)
# Two speeds in a row that differ by less than STEADY are steady; tried MOST_TRIES times.
STEADY, MOST_TRIES = 0.04, 5
# Host memory that measuring takes besides the engine: the buffers for the disk.
HOST_BYTES = IN_FLIGHT * REQUEST_BYTES


def median(values: list[float]) -> float:
    return statistics.median(values)


def summary(values: list[float]) -> dict:
    """Median, smallest, largest and number of the values."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def card(folder: str) -> dict:
    """The hardware and versions of a measurement; `file_system`: that of `folder`."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu_name(),
        "file_system": _file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


class RawDisk:
    """Reads files past the page cache at full speed: two requests of 16 MiB in flight, into touched
    memory.

    Each measurement continues where the last one ended, through all files, then from the first
    again.
    """

    def __init__(self, paths: list[str]):
        self._fds, self.direct = {}, True
        for path in paths:
            self._fds[path] = self._open(path)
        self._places = itertools.cycle(
            (fd, offset, min(REQUEST_BYTES, -(-(size - offset) // ALIGNMENT) * ALIGNMENT))
            for size, fd in ((os.path.getsize(path), fd) for path, fd in self._fds.items())
            for offset in range(0, size, REQUEST_BYTES)
        )
        self._buffers = [_touched(REQUEST_BYTES) for _ in range(IN_FLIGHT)]
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self._lock = threading.Lock()

    def _open(self, path):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system without direct reads: use the cache, as the engine does
            self.direct = False
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def speed(self, seconds: float) -> float:
        """Bytes/s of reading for about `seconds`."""
        began = time.perf_counter()
        n_bytes = sum(
            self._pool.map(lambda buffer: self._read(buffer, began + seconds), self._buffers)
        )
        return n_bytes / (time.perf_counter() - began)

    def steady_speed(self, seconds: float) -> float:
        """The speed once it no longer changes, from measurements of about `seconds` each."""
        return steady(lambda: self.speed(seconds))

    def _read(self, buffer, until):
        done = 0
        while not done or time.perf_counter() < until:
            with self._lock:
                fd, offset, n_bytes = next(self._places)
            done += os.preadv(fd, [buffer[:n_bytes]], offset)
        return done

    def close(self):
        self._pool.shutdown()
        self._buffers.clear()
        for fd in self._fds.values():
            os.close(fd)


def steady(measure: Callable[[], float]) -> float:
    """The result of `measure` once it no longer changes: the mean of two in a row that agree.

    A virtual disk may be faster for a while after a rest, and slower after other reads.
    """
    last = measure()
    for _ in range(MOST_TRIES):
        check()
        before, last = last, measure()
        if abs(last - before) <= STEADY * last:
            return (last + before) / 2
    return last


def link_speeds(device: jax.Device, *, repeats: int = 7) -> list[float]:
    """Bytes/s from pinned host memory to a GPU, by copies of the driver, eight queued at a time,
    into memory from JAX's allocator."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        code = getattr(cuda, name)(*arguments)
        if code != 0:
            raise DoesNotFitError(
                f"raw link: the driver refused to measure it ({name} gave {code}); it takes "
                f"{COPY_BYTES >> 20} MiB of pinned memory: raise the limit of it (ulimit -l)"
            )

    target = jax.device_put(jnp.zeros(COPY_BYTES, jnp.uint8), device)
    target.block_until_ready()
    to = ctypes.c_uint64(target.unsafe_buffer_pointer())
    context, host, stream = (ctypes.c_void_p() for _ in range(3))
    n_bytes, speeds, queued = ctypes.c_size_t(COPY_BYTES), [], 8
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxPushCurrent_v2", context)
    call("cuMemHostAlloc", ctypes.byref(host), n_bytes, 0)
    ctypes.memset(host, 0, COPY_BYTES)
    call("cuStreamCreate", ctypes.byref(stream), 1)
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(queued):
            call("cuMemcpyHtoDAsync_v2", to, host, n_bytes, stream)
        call("cuStreamSynchronize", stream)
        speeds.append(queued * COPY_BYTES / (time.perf_counter() - began))
    call("cuStreamDestroy_v2", stream)
    call("cuMemFreeHost", host)
    call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    call("cuDevicePrimaryCtxRelease_v2", 0)
    return speeds[1:]


def memory_speeds(device: jax.Device, n_bytes: int, *, repeats: int = 5) -> list[float]:
    """Bytes/s of reading `n_bytes` of GPU memory or, on a CPU, of main memory (or of its cache, if
    they fit)."""
    numbers = jax.device_put(jnp.zeros(max(n_bytes // 4, 1), jnp.float32), device)
    return _rates(jax.jit(jnp.max), (numbers,), numbers.nbytes, repeats)


def arithmetic_speeds(device: jax.Device, dtype: str, *, repeats: int = 5) -> list[float]:
    """Floating-point operations/s of a large square product, summed in float32."""
    width = 1024 if device.platform == "cpu" else 4096
    square = jax.device_put(jnp.zeros((width, width), dtype), device)
    return _rates(jax.jit(product), (square, square), 2 * width**3, repeats)


def _rates(function, args, amount, repeats):
    """`amount` per second of a jitted function, eight calls queued at a time."""
    function(*args).block_until_ready()
    speeds, queued = [], 8
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(queued):
            last = function(*args)
        last.block_until_ready()
        speeds.append(queued * amount / (time.perf_counter() - began))
    return speeds


def _touched(n_bytes):
    """Touched uint8 memory in huge pages: a page fault costs more than what is measured."""
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[:: mmap.PAGESIZE] = 0
    return whole


def _cpu_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder):
    """Type and source of the mount that holds `folder`."""
    path, best, description = os.path.realpath(folder), "", "unknown"
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            source, point, kind = line.split()[:3]
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, description = point, f"{kind} on {source}"
    return description
