"""How devices of one process give each other what each has, inside their programs, by the driver's
copies: NCCL takes 450 MiB of each GPU, which is a third of a small budget (two H100s).

XLA calls a function of ours at the place of the exchange (`cores.exchange`), which llvmlite
compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.cores import native
from jlayer.cores.exchange import (
    CONTEXT,
    CONTROL_BYTES,
    COPY,
    DONE_EVENT,
    HAS_STREAMS,
    MOST_DEVICES,
    POP,
    PUSH,
    READY_EVENT,
    RECORD,
    SLEEPS,
    WAIT,
    module,
    offsets,
    place_of,
)
from jlayer.cores.jobs import address, aligned
from jlayer.plan.machine import PLATFORMS
from jlayer.streaming.capsule import capsule
from jlayer.streaming.driver import Driver

TARGET = "jlayer_all_gather"
# How often one that waits for others sleeps for 20 us (of which Linux makes 70) before it gives up.
MOST_SLEEPS = 1_000_000
_HEADER = Path("xla", "ffi", "api", "c_api.h")
_DRIVER = {
    RECORD: "cuEventRecord",
    WAIT: "cuStreamWaitEvent",
    COPY: "cuMemcpyPeerAsync",
    PUSH: "cuCtxPushCurrent_v2",
    POP: "cuCtxPopCurrent_v2",
}
# What stands for them on a CPU, where there are no streams: all is done at once.
_AT_ONCE = {place: "copy_now" if place == COPY else "nothing" for place in _DRIVER}
_NAMES = {"gpu": "CUDA", "cpu": "cpu"}  # of platforms, as XLA has them


def missing() -> str | None:
    """What to do so that this is possible, in one line; None where it is. Starts no device."""
    if (why := native.missing()) is not None:
        return why
    return None if _offsets() else "this version of jaxlib has no interface for it that is known"


def hindrance(devices: Sequence[jax.Device]) -> str | None:
    """Why these devices of this process cannot exchange so, in one line; None where they can."""
    if (why := missing()) is not None:
        return why
    numbers = [device.local_hardware_id for device in devices]
    if numbers != list(range(len(numbers))):
        return f"only the first GPUs in their order copy to each other, not {numbers}"
    if len(numbers) > MOST_DEVICES:
        return f"at most {MOST_DEVICES} copy to each other"
    return None


def begin(devices: Sequence[jax.Device], platform: str, *, most_sleeps: int = MOST_SLEEPS) -> bool:
    """Prepares the exchange between the first devices of this process; false where that cannot
    be."""
    if hindrance(devices):
        return False
    _meeting(platform).admit(len(devices), most_sleeps)
    return True


def all_gather(x: jax.Array, n_devices: int) -> jax.Array:
    """Inside a program that every device runs: what each has -> [devices, *x.shape] on each, as
    `jax.lax.all_gather`; after `begin`. If one of them does not come, the program fails after a
    minute or two, or with `give_up`; so do all others then, until `take_heart`: who waited for each
    of the programs that are called would wait as often."""
    numbers = {"n_bytes": np.int64(x.size * x.dtype.itemsize), "n_devices": np.int64(n_devices)}
    result = jax.ShapeDtypeStruct((n_devices, *x.shape), x.dtype)
    call = jax.custom_batching.custom_vmap(lambda x: jax.ffi.ffi_call(TARGET, result)(x, **numbers))

    @call.def_vmap
    def together(_, __, x):
        return jnp.moveaxis(all_gather(x, n_devices), 1, 0), True

    return call(x)


def give_up() -> None:
    """Who waits in an exchange for another device waits no longer, and its program fails."""
    for meeting in _meetings:
        meeting.be_patient(0)


def take_heart() -> None:
    """Exchanges wait again."""
    for meeting in _meetings:
        meeting.be_patient()


class _Meeting:
    """The control block of a platform's devices, and the function that meets there. Kept for the
    life of the process, as programs are that call it."""

    def __init__(self, platform: str):
        self._control = aligned(CONTROL_BYTES)
        self._control[:] = 0
        names = ("all_gather", "nothing", "copy_now")
        text = module(address(self._control), _offsets())
        found = dict(zip(names, native.Compiler().compiled(text, *names), strict=True))
        self._drivers: list[Driver] = []
        self._admitted: set[int] = set()  # numbers of devices
        self._has_streams = PLATFORMS[platform].has_link
        self._most_sleeps = MOST_SLEEPS
        _meetings.append(self)
        self._write(HAS_STREAMS, int(self._has_streams))
        for place, name in _AT_ONCE.items():
            self._write(place, found[name])
        function = capsule(found["all_gather"])
        jax.ffi.register_ffi_target(TARGET, function, platform=_NAMES[platform])

    def admit(self, n_devices, most_sleeps):
        """Notes what belongs to the first devices."""
        self._most_sleeps = most_sleeps
        self.be_patient()
        if not self._has_streams or n_devices in self._admitted:
            return
        while len(self._drivers) < n_devices:
            self._drivers.append(Driver(len(self._drivers)))
        for place, name in _DRIVER.items():
            self._write(place, self._drivers[0].function(name))
        for device, driver in enumerate(self._drivers[:n_devices]):
            own = place_of(device, n_devices)
            self._write(own + CONTEXT, driver.context)
            for place in (READY_EVENT, DONE_EVENT):
                self._write(own + place, driver.event().value)
        self._admitted.add(n_devices)

    def be_patient(self, most_sleeps=None):
        """`most_sleeps`: as it was admitted where it is None."""
        self._write(SLEEPS, self._most_sleeps if most_sleeps is None else most_sleeps)

    def _write(self, place, value):
        self._control[place : place + 8].view(np.int64)[0] = value


_meetings: list[_Meeting] = []
_meeting = cache(_Meeting)


@cache
def _offsets():
    return offsets(Path(jax.ffi.include_dir()) / _HEADER)
