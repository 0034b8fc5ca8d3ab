"""What the driver says of the GPU, without starting JAX or importing it."""

from __future__ import annotations

import os
import shutil
import subprocess

DEFAULT_DEVICE_MEMORY = 4 << 30  # the budget of a run that names none


def gpu_memory() -> tuple[int, int] | None:
    """(total, free) bytes of the first GPU, from the driver, without starting JAX; None without a
    GPU."""
    answer = _ask_driver("memory.total,memory.free")
    if answer is None:
        return None
    total, free = answer.split(",")
    return int(total) << 20, int(free) << 20


def gpu_name() -> str | None:
    """The name of the first GPU and the version of its driver; None without a GPU."""
    return _ask_driver("name,driver_version")


def _ask_driver(fields):
    program, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible == "":
        return None
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible is not None:  # JAX's first GPU is the first of these, not the machine's
        query += ["-i", visible.split(",")[0].strip()]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0 or not answer.stdout.strip():
        return None
    return answer.stdout.splitlines()[0]
