"""What the driver says of the GPU, without starting JAX or importing it."""

from __future__ import annotations

import os
import shutil
import subprocess

DEFAULT_DEVICE_MEMORY = 4 << 30  # the budget of a run that names none


def gpu_memory() -> tuple[int, int] | None:
    """(total, free) bytes of the first GPU, from the driver, without starting JAX; None without a
    GPU."""
    return next(_memories(), None)


def gpu_memories() -> list[tuple[int, int]]:
    """The same of each GPU that JAX would see, in its order."""
    return list(_memories())


def gpu_name() -> str | None:
    """The name of the first GPU and the version of its driver; None without a GPU."""
    return next(_ask_driver("name,driver_version"), None)


def _memories():
    for line in _ask_driver("memory.total,memory.free"):
        yield tuple(int(word) << 20 for word in line.split(","))


def _ask_driver(fields):
    """Yields what the driver says of each GPU, a line each."""
    program, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible == "":
        return
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible is None:
        yield from _lines(query)
        return
    for one in visible.split(","):  # JAX's first GPU is the first of these, not the machine's
        yield from _lines([*query, "-i", one.strip()])


def _lines(query):
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []
