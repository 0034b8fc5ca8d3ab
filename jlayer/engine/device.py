"""Chooses the devices and limits JAX's allocator to the budget. JAX is started here, not earlier.

The limit must be in the environment before JAX starts. If JAX was started before with a larger
limit, the budget cannot be guaranteed and is refused.
"""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import contextmanager

import numpy as np

from jlayer.engine.gpu import DEFAULT_DEVICE_MEMORY, gpu_memories
from jlayer.engine.hosts import Hosts
from jlayer.errors import DoesNotFitError, StorageError, UsageError
from jlayer.plan.machine import CACHE_PINNED, PINNED_PAGE_TABLES, PLATFORMS
from jlayer.sizes import human
from jlayer.streaming import exchange
from jlayer.streaming.devices import LAUNCHES, MESH_AXES, ROWS, Devices
from jlayer.streaming.guard import first_line
from jlayer.streaming.slots import HostMemory

COMPILED_BYTES = 512 << 20  # of compiled programs in the user's cache folder; the oldest go first
LINK_PROBE_BYTES = 16 << 20
MEETING = 1 << 16  # numbers that each device sends the others when they meet
HEARTBEAT_S = 3600  # of JAX's own look at other processes: `engine.hosts` sees sooner what is lost
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Lets JAX launch programs in a thread of its own, so that the host goes on meanwhile: the launches
# of a program take 0.1 to 0.3 ms.
_ASYNC = "PJRT_GPU_ENABLE_ASYNC_DISPATCH"
# NCCL takes device memory for each of its channels, of which it opens 24 between two H100s. Fewer
# and smaller ones take 416 MiB less: what 128 tokens of a 70B layer give crosses as fast, that of
# 512 tokens in 0.67 ms instead of 0.19.
NCCL_SETTINGS = {
    "NCCL_MAX_NCHANNELS": "4",
    "NCCL_BUFFSIZE": str(1 << 20),
}


def choose(
    device: str | None,
    device_memory: int | None,
    *,
    n_devices: int | None = 1,
    hosts: Hosts | None = None,
    pinned_bytes: int = 0,
    host_memory: int = 0,
) -> tuple[Devices, int, int]:
    """Chooses the first `n_devices` (None: all) for `device`: "cpu", "gpu" or None (GPUs if there
    are some). With several `hosts` so many of each, in order of the process; JAX joins them.

    Returns (devices, budget of each in bytes, bytes of the driver's context). `pinned_bytes`: the
    most host memory that will be pinned for weights; its page tables take device memory, and those
    of pools in the rest of `host_memory`. Limits the allocator so that the whole process stays
    within the budget. Raises UsageError (no GPU, too few or unlike devices, or JAX was started with
    a larger limit) or DoesNotFitError (the budget exceeds the free memory, or is smaller than the
    driver's context).
    """
    import jax

    there = [] if device == "cpu" else gpu_memories()
    before = _of_each(there[:n_devices])
    started = _is_started()
    free = DEFAULT_DEVICE_MEMORY if before is None else min(DEFAULT_DEVICE_MEMORY, before[1])
    pools = CACHE_PINNED * (device_memory or free)
    pinned_bytes = max(pinned_bytes, min(host_memory, pinned_bytes + pools))
    tables = pinned_bytes // PINNED_PAGE_TABLES
    if not started and device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif not started and before is not None:
        os.environ.setdefault(_ASYNC, "1")
        if n_devices is not None and n_devices < len(there):  # JAX would take memory of all
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, range(n_devices))))
        collectives = by_collectives(n_devices or len(there), hosts)
        for name, value in NCCL_SETTINGS.items() if collectives else ():
            os.environ.setdefault(name, value)
        context = PLATFORMS["gpu"].context_of(collectives=collectives)
        device_memory = _cap(before, device_memory, context + tables)
    if hosts is not None:
        _join(jax, hosts, on_cpu=device == "cpu" or before is None)
    found = _devices(jax, "cpu" if device == "cpu" else None)
    if device == "gpu" and found[0].platform != "gpu":
        raise UsageError(
            "device: gpu was asked for, but JAX finds none; "
            'install the GPU build (pip install -e ".[cuda]"), or ask for --device cpu'
        )
    of_hosts = [
        [one for one in found if one.process_index == number]
        for number in range(hosts.n if hosts else 1)
    ]
    found = of_hosts[hosts.number if hosts else 0]
    if n_devices is not None and n_devices > len(found):
        raise UsageError(
            f"devices: {n_devices} asked for, but JAX finds {len(found)} {found[0].platform} here; "
            f"ask for at most {len(found)}, or for all"
        )
    if hosts is not None:
        hosts.agree({"devices": len(found[:n_devices]), "platform": found[0].platform})
    devices = Devices([one for of_host in of_hosts for one in of_host[:n_devices]])
    if len(devices) > 1 and (hosts is not None or devices.has_link):
        _meet(jax, devices)
    budget = device_memory or DEFAULT_DEVICE_MEMORY
    if devices.platform != "gpu":
        return devices, budget, 0
    _keep_compiled(jax)
    limit = max(_check_cap(one, budget) for one in devices.own)
    context = PLATFORMS["gpu"].context_of(collectives=devices.collectives)
    if not started:
        taken = _taken_bytes(before, _of_each(gpu_memories()[:n_devices]), limit)
        context = max(context, taken)
    return devices, budget, context + tables


def by_collectives(n_devices: int, hosts: Hosts | None = None) -> bool:
    """Whether so many GPUs of each host exchange their products by NCCL."""
    return hosts is not None or (n_devices > 1 and exchange.missing() is not None)


def _join(jax, hosts, *, on_cpu):
    """Makes JAX see the devices of all processes. Raises UsageError where it was started before."""
    if jax.distributed.is_initialized():
        return
    if _is_started():
        raise UsageError(
            "processes: JAX was started before in this process, for it alone; load the model "
            "before other JAX work"
        )
    if on_cpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, and end the process by its own, much later.
    jax.config.update("jax_enable_preemption_service", False)
    address = hosts.placement.address
    where = f"[{address}]:{hosts.jax_port}" if ":" in address else f"{address}:{hosts.jax_port}"
    jax.distributed.initialize(
        where,
        hosts.n,
        hosts.number,
        cluster_detection_method="deactivate",
        coordinator_bind_address=where,
        heartbeat_timeout_seconds=HEARTBEAT_S,
    )


def _meet(jax, devices):
    """Has the devices of all processes exchange something for the first time: what NCCL takes of
    their memory is then taken. Raises StorageError where that fails, and where what arrives is not
    what was sent: on some boards copies from GPU to GPU do that (NCCL's guide, troubleshooting:
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html)."""
    sent = devices.put(np.arange(MEETING, dtype=np.int32))
    everywhere = devices.everywhere

    def each(sent):
        return devices.all_gather(sent + MEETING * jax.lax.axis_index(MESH_AXES[ROWS]))

    with _quiet():
        gather = devices.on_each(each, (sent,), everywhere)
        try:
            with LAUNCHES:
                came = jax.block_until_ready(jax.jit(gather, out_shardings=everywhere)(sent))
        except jax.errors.JaxRuntimeError as error:
            raise StorageError(
                f"{devices}: they cannot exchange what each has ({first_line(error)}); run with "
                "one device"
            ) from error
    expected = np.arange(len(devices) * MEETING).reshape(-1, MEETING)
    for shard in came.addressable_shards:
        if not np.array_equal(shard.data, expected):
            raise StorageError(
                f"{shard.device}: what other devices sent did not arrive as it was; run with one "
                "device, or switch off PCI access control (ACS) or the IOMMU of this machine"
            )


@contextmanager
def _quiet():
    """Gloo, which CPUs of several hosts exchange by, says on descriptor 1 that it has connected;
    results go there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _of_each(memories):
    """(total, free) bytes that each GPU has at least; None without one. Raises UsageError where
    they are not alike: each gets as many rows as the others."""
    if not memories:
        return None
    totals, free = zip(*memories, strict=True)
    if len(set(totals)) > 1:
        sizes = ", ".join(human(total) for total in totals)
        raise UsageError(
            f"devices: the GPUs have {sizes}; expected GPUs alike, since each gets as many rows as "
            "the others: name those that are with CUDA_VISIBLE_DEVICES, or ask for one"
        )
    return totals[0], min(free)


def _devices(jax, platform):
    """Raises UsageError where JAX starts none: it was told to use what is not here, say."""
    try:
        return jax.devices(platform)
    except (RuntimeError, AssertionError) as error:
        told = jax.config.jax_platforms
        cause = f" ({str(error).splitlines()[0]})" if str(error) else ""
        what = f"JAX_PLATFORMS: found {told!r}, but JAX starts" if told else "device: JAX starts"
        raise UsageError(
            f"{what} no device with it here{cause}; unset JAX_PLATFORMS, or set it to cpu"
        ) from None


def _is_started():
    """Whether JAX has started a backend. No public function tells, and `jax.devices` would start
    one."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _keep_compiled(jax):
    """Keeps compiled GPU programs on disk for later processes: compiling and tuning takes seconds.

    CPU programs are not kept: when XLA loads one, it prints long warnings about CPU features.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jlayer", "compiled"))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


# cuDNN's flash attention as JAX calls it: the dtypes, the largest head that all cards take, the
# first compute capability, and the first version that knows the cards of 2025.
FLASH_DTYPES = ("bfloat16", "float16")
FLASH_HEAD = 128
FLASH_CAPABILITY = (8, 0)
FLASH_CUDNN = 91100


def has_flash(device, *, head_dim: int, dtype: str) -> bool:
    """Whether the device has flash attention for heads of this size and dtype."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if capability is None or dtype not in FLASH_DTYPES or head_dim % 8 or head_dim > FLASH_HEAD:
        return False
    # No public function tells which cuDNN JAX found.
    from jax._src.lib import cuda_versions

    return (
        tuple(map(int, capability.groups())) >= FLASH_CAPABILITY
        and cuda_versions is not None
        and cuda_versions.cudnn_get_version() >= FLASH_CUDNN
    )


def _taken_bytes(before, after, limit):
    """Device memory that the driver took besides the allocator's pool when JAX started; 0 where it
    does not tell."""
    return 0 if before is None or after is None else before[1] - after[1] - limit


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
            f"device_memory: {budget} bytes, but the driver's context alone takes {context_bytes}; "
            "give more"
        )
    os.environ.setdefault(_FRACTION, f"{(budget - context_bytes) / total:.6f}")
    return budget


def _check_cap(found, budget):
    stats = found.memory_stats() or {}
    limit = stats.get("bytes_limit", 0)
    if limit > budget:
        found = f"an allocator of {limit} bytes, more than the {budget} promised; "
        raise UsageError(
            f"device_memory: JAX was started before with {found}load the model before other JAX "
            f"work, or set {_FRACTION} before starting Python",
            command_line=f"--device-memory: JAX was started with {found}unset {_FRACTION}, which "
            "the environment sets, or give more",
        )
    return limit


def link_speed(devices: Devices) -> float | None:
    """Bytes/s from pinned memory to all devices of this host together, the best of five; None for
    a CPU.

    Five transfers minus one transfer: so the latency of a call does not count.
    """
    import jax

    if not devices.has_link:
        return None
    pinned = HostMemory([LINK_PROBE_BYTES], pin=True)

    def seconds(count):
        began = time.perf_counter()
        jax.block_until_ready([devices.put(pinned.slot(0)) for _ in range(count)])
        return time.perf_counter() - began

    try:
        one, several = (min(seconds(count) for _ in range(5)) for count in (1, 5))
    finally:
        pinned.close()
    return 4 * len(devices.own) * LINK_PROBE_BYTES / max(several - one, 1e-9)
