"""What every benchmark needs: the machine's card, its raw speeds measured without jlayer, and the
memory in use on the GPU."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata


def card() -> dict:
    """Hardware, versions and commit that a figure belongs to."""
    smi = _smi("name,driver_version")
    here = os.path.dirname(os.path.abspath(__file__))
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": smi.splitlines()[0] if smi else None,
        "python": platform.python_version(),
        "jax": _version("jax"),
        "jlayer": _version("jlayer"),
        "commit": _run(["git", "-C", here, "rev-parse", "--short", "HEAD"]) or None,
    }


class KernelDisk:
    """The kernel's own counters of the disk that a folder lies on. They count the reads of every
    program, so nothing else should read meanwhile. Where the folder has no disk of its own, there
    are none, and all is None."""

    def __init__(self, folder: str):
        device = os.stat(folder).st_dev
        self._path = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"

    def watch(self, work) -> dict:
        """Runs `work()` and returns the bytes that the disk read meanwhile, the bytes a second, and
        the share of the time in which it was busy."""
        before, began = self._counts(), time.perf_counter()
        work()
        seconds, after = time.perf_counter() - began, self._counts()
        if before is None:
            return {"bytes": None, "bytes_per_s": None, "busy": None}
        n_bytes = after[0] - before[0]
        busy = (after[1] - before[1]) / 1000 / seconds
        return {"bytes": n_bytes, "bytes_per_s": n_bytes / seconds, "busy": busy}

    def _counts(self):
        """(bytes read, milliseconds with a request under way) since the system started."""
        if not os.path.exists(self._path):
            return None
        with open(self._path) as file:
            fields = file.read().split()
        return int(fields[2]) * 512, int(fields[9])


class Neighbours:
    """The cores that everything but our children kept busy, on average: on a machine that others
    use too, the figures of a run are worth what this one is near 0."""

    def __init__(self):
        self._began, self._busy_s = time.perf_counter(), self._others_s()

    def cores(self) -> float:
        """From the start until now. Children count once they have been waited for."""
        seconds = time.perf_counter() - self._began
        return max(0.0, (self._others_s() - self._busy_s) / seconds)

    def _others_s(self):
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:9])
        busy_s = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return busy_s - children.ru_utime - children.ru_stime


def raw_disk_speed(
    paths: list[str], *, n_bytes: int = 12 << 30, request: int = 16 << 20, threads: int = 2
) -> float:
    """Bytes a second of O_DIRECT reads of files, a few in flight, into memory that was touched."""
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    places = [
        (fd, offset)
        for fd, path in zip(fds, paths, strict=True)
        for offset in range(0, os.path.getsize(path) // request * request, request)
    ][: n_bytes // request]
    buffers = threading.local()

    def read(place):
        fd, offset = place
        if not hasattr(buffers, "memory"):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            buffers.memory = mmap.mmap(-1, request, flags=private)
            buffers.memory.madvise(mmap.MADV_HUGEPAGE)
            buffers.memory.write(bytes(request))
        return os.preadv(fd, [buffers.memory], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, places[:threads]))
        began = time.perf_counter()
        done = sum(pool.map(read, places))
        seconds = time.perf_counter() - began
    for fd in fds:
        os.close(fd)
    return done / seconds


def raw_link_speed(*, n_bytes: int = 512 << 20, repeats: int = 12) -> list[float]:
    """Bytes a second of cuMemcpyHtoDAsync from pinned memory, without JAX: one figure for each
    repeat."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        code = getattr(cuda, name)(*arguments)
        assert code == 0, (name, code)

    context, device = ctypes.c_void_p(), ctypes.c_uint64()
    host, stream = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxPushCurrent_v2", context)
    call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(n_bytes))
    call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(n_bytes), 0)
    ctypes.memset(host, 1, n_bytes)
    call("cuStreamCreate", ctypes.byref(stream), 1)
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call("cuMemcpyHtoDAsync_v2", device, host, ctypes.c_size_t(n_bytes), stream)
        call("cuStreamSynchronize", stream)
        speeds.append(n_bytes / (time.perf_counter() - began))
    call("cuMemFreeHost", host)
    call("cuMemFree_v2", device)
    cuda.cuDevicePrimaryCtxRelease_v2(0)
    return speeds[2:]


class GpuWatch:
    """Samples what the fullest GPU holds in all (nvidia-smi, MiB), in a thread; `peak` is the
    largest seen."""

    def __init__(self, every_s: float = 0.2):
        self.before = self.peak = used_mib()
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._stop.wait(self._every_s):
            self.peak = max(self.peak, used_mib())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


class AnonymousWatch:
    """The largest anonymous resident memory of this process, read from /proc by another process."""

    CODE = """
import sys, time, select
peak = 0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for line in open(f"/proc/{sys.argv[1]}/status"):
        if line.startswith("RssAnon:"):
            peak = max(peak, int(line.split()[1]) << 10)
print(peak)
"""

    def __enter__(self):
        words = [sys.executable, "-c", self.CODE, str(os.getpid())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen(words, **pipes)
        return self

    def __exit__(self, *_):
        self.peak_bytes = int(self._child.communicate("stop")[0])


def used_mib() -> int:
    found = _smi("memory.used")
    return max(map(int, found.split()), default=0)


def summary(values: list[float]) -> dict:
    """Median and spread."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def say(line: str):
    print(line, flush=True)


def last_line(result: dict):
    """The machine-readable end of every script."""
    print(json.dumps(result), flush=True)


def _smi(fields):
    units = ["--format=csv,noheader,nounits"]
    return _run(["nvidia-smi", f"--query-gpu={fields}", *units])


def _run(words):
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextmanager
def opened(args, **more):
    """A model within the budgets that a benchmark's options name, and the seconds of opening it on
    stderr."""
    from jlayer import AutoModel

    began = time.perf_counter()
    model = AutoModel.from_pretrained(
        args.folder,
        device=args.device,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        **more,
    )
    say(f"opened in {time.perf_counter() - began:.1f} s")
    with model:
        yield model


def end(result: dict, watch: GpuWatch) -> None:
    """The card's memory, and the one JSON object."""
    result["smi_peak_mib"], result["smi_before_mib"] = watch.peak, watch.before
    say(f"nvidia-smi peak {watch.peak} MiB, before {watch.before}")
    last_line(result)
