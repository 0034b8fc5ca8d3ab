"""Which device a run uses, and the promise that its allocator is held to. JAX is started here, and
nowhere before.

An allocator's cap must be in the environment before JAX starts. Where JAX was started earlier with
another one, the promise can no longer be made, and is refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from jlayer.errors import DoesNotFitError, UsageError
from jlayer.plan.machine import CONTEXT_BYTES
from jlayer.streaming.slots import HostMemory

DEFAULT_DEVICE_MEMORY = 4 << 30
COMPILED_BYTES = 512 << 20  # of programs kept in the user's cache folder; the oldest go first
LINK_PROBE_BYTES = 16 << 20
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def platform_of(device) -> str:
    """The kind of device in a plan's words: "cpu" or "gpu"."""
    return "cpu" if device.platform == "cpu" else "gpu"


def gpu_memory() -> tuple[int, int] | None:
    """(total, free) bytes of the first GPU as the driver tells without starting JAX, or None where
    there is none."""
    answer = _ask_driver("memory.total,memory.free")
    if answer is None:
        return None
    total, free = answer.split(",")
    return int(total) << 20, int(free) << 20


def gpu_name() -> str | None:
    """The first GPU's name and its driver's version, or None where there is none."""
    return _ask_driver("name,driver_version")


def _ask_driver(fields):
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0 or not answer.stdout.strip():
        return None
    return answer.stdout.splitlines()[0]


# The GPU's own page tables for pinned host memory: 8 bytes for each page of 4 KiB (measured: 68 MiB
# for 36 GB).
PINNED_PAGE_TABLES = 512


def choose(device: str | None, device_memory: int | None, *, pinned_bytes: int = 0):
    """(device, budget, context bytes): the JAX device for `device` ("cpu", "gpu" or None: the
    accelerator if there is one) and the budget in bytes.

    `pinned_bytes`: the most host memory that will be pinned, which costs the device page tables.
    Caps the allocator so that the whole process stays within the budget. Raises UsageError (asked
    for and absent, or JAX already started in a way that breaks the promise) or DoesNotFitError
    (less than the driver's own context).
    """
    import jax

    before = None if device == "cpu" else gpu_memory()
    tables = pinned_bytes // PINNED_PAGE_TABLES
    started = _is_started()
    if not started and device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif not started and before is not None:
        device_memory = _cap(before, device_memory, CONTEXT_BYTES["gpu"] + tables)
    found = _first_device(jax, "cpu" if device == "cpu" else None)
    if device == "gpu" and found.platform != "gpu":
        raise UsageError(
            "device: gpu was asked for, but JAX finds none; "
            'install the GPU build (pip install -e ".[cuda]"), or ask for --device cpu'
        )
    budget = device_memory or DEFAULT_DEVICE_MEMORY
    if found.platform != "gpu":
        return found, budget, 0
    _keep_compiled(jax)
    limit = _check_cap(found, budget)
    context = CONTEXT_BYTES["gpu"] if started else _context_bytes(before, limit)
    return found, budget, context + tables


def _first_device(jax, platform):
    """Raises UsageError where JAX starts none: it was told to use what is not here, say."""
    try:
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError) as error:
        told = jax.config.jax_platforms
        cause = f" ({str(error).splitlines()[0]})" if str(error) else ""
        what = f"JAX_PLATFORMS: found {told!r}, but JAX starts" if told else "device: JAX starts"
        raise UsageError(
            f"{what} no device with it here{cause}; unset JAX_PLATFORMS, or set it to cpu"
        ) from None


def _is_started():
    """Whether JAX has a backend already. There is no public question for it, and `jax.devices`
    would start one."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _keep_compiled(jax):
    """A GPU's programs, which take seconds to compile and tune, are found again by later runs.

    Not so a CPU's: loading one, XLA says at length which features of the machine it may lack.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jlayer", "compiled"))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _context_bytes(before, limit):
    """What the driver took beside the allocator's pool when JAX started, as far as it tells."""
    after = gpu_memory()
    if before is None or after is None:
        return CONTEXT_BYTES["gpu"]
    return max(CONTEXT_BYTES["gpu"], before[1] - after[1] - limit)


def _cap(memory, device_memory, context_bytes):
    total, free = memory
    budget = device_memory or min(DEFAULT_DEVICE_MEMORY, free)
    if budget > free:
        raise DoesNotFitError(
            f"device_memory: {budget} bytes asked for, the GPU has {free} free of {total}; "
            "ask for less, or end what else runs there"
        )
    if budget <= context_bytes:
        raise DoesNotFitError(
            f"device_memory: {budget} bytes, but the driver's context alone takes {context_bytes}"
        )
    os.environ.setdefault(_FRACTION, f"{(budget - context_bytes) / total:.6f}")
    return budget


def _check_cap(found, budget):
    stats = found.memory_stats() or {}
    limit = stats.get("bytes_limit", 0)
    if limit > budget:
        raise UsageError(
            f"device_memory: JAX was started before with an allocator of {limit} bytes, "
            f"more than the {budget} promised; load the model before other JAX work, "
            f"or set {_FRACTION} before starting Python"
        )
    return limit


def link_speed(device) -> float | None:
    """Bytes a second of transfers from pinned memory to the device, the best of a few; None where
    there is no link to cross.

    What several in a row take beyond what one takes: the way there and back is not the link's.
    """
    import jax

    if device.platform == "cpu":
        return None
    pinned = HostMemory(1, LINK_PROBE_BYTES, pin=True)

    def seconds(count):
        began = time.perf_counter()
        jax.block_until_ready([jax.device_put(pinned.slot(0), device) for _ in range(count)])
        return time.perf_counter() - began

    try:
        one, several = (min(seconds(count) for _ in range(5)) for count in (1, 5))
    finally:
        pinned.close()
    return 4 * LINK_PROBE_BYTES / max(several - one, 1e-9)
