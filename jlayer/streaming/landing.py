"""Host memory that the device's programs read where it is: for the products of the host's cores.

A transfer of them would queue behind the tiles that are on their way over the link, for a
millisecond or more; a program that reads pinned memory itself does not. Unsafe as slots are: JAX
takes the array to be immutable, and it is written again. So write only when all programs that were
given the array have run.
"""

from __future__ import annotations

import ctypes

import jax
import numpy as np

from jlayer.plan.machine import PLATFORMS, platform_of
from jlayer.streaming.capsule import capsule
from jlayer.streaming.devices import Devices
from jlayer.streaming.slots import HostMemory


class Landings:
    """Memory for float32 arrays, one for each shape, kept until `close`."""

    def __init__(self, devices: Devices):
        self._devices, self._has_link = devices, devices.has_link
        self._memory = HostMemory([0], pin=self._has_link)
        self._kept: dict[tuple, Landing] = {}

    def of(self, key, n_rows: int, width: int) -> Landing:
        """The landing of this shape; `key` tells apart those that are in use at the same time."""
        key = (key, n_rows, width)
        if key not in self._kept:
            room = self._memory.room(key, 4 * n_rows * width)
            array = room[: 4 * n_rows * width].view(np.float32).reshape(n_rows, width)
            array[...] = 0
            seen = _view(array, self._devices.first) if len(self._devices) == 1 else None
            self._kept[key] = Landing(array, seen, self._devices)
        return self._kept[key]

    def fetch(self, key, array: jax.Array) -> np.ndarray:
        """What an array of the device holds, in memory that the next one of this key reuses."""
        if not self._has_link:
            return np.asarray(array)
        room = self._memory.room((key, "fetched", array.shape), array.nbytes)[: array.nbytes]
        self._memory.fetch(array.addressable_data(0), room)
        return room.view(array.dtype).reshape(array.shape)

    @property
    def n_bytes(self) -> int:
        return sum(landing.memory.nbytes for landing in self._kept.values())

    def close(self) -> None:
        self._kept.clear()
        self._memory.close()


class Landing:
    """`memory` float32 [rows, width], and the same memory as the device sees it."""

    def __init__(self, memory: np.ndarray, seen: jax.Array | None, devices: Devices):
        self.memory, self._seen, self._devices = memory, seen, devices

    def on_device(self) -> jax.Array:
        """What was written, for a program: the memory itself, or a copy where that cannot be."""
        return self._devices.put(self.memory) if self._seen is None else self._seen


def _view(array, device) -> jax.Array | None:
    """The array as one of the device, without a copy; None where the device cannot have it so."""
    try:
        seen = jax.dlpack.from_dlpack(_Capsule(array, device))
    except (RuntimeError, ValueError, TypeError):  # a driver or a JAX that refuses such memory
        return None
    return seen if seen.unsafe_buffer_pointer() == array.ctypes.data else None


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("number", ctypes.c_int32))


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor (https://dmlc.github.io/dlpack), of version 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("n_axes", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


CPU, CUDA, FLOAT = 1, 2, 2
# JAX calls a deleter when the array goes, perhaps as late as at exit, when no Python can run: this
# function of the C library changes nothing. The descriptions are read then, and are small.
_NOTHING = ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value
_KEPT = []


class _Capsule:
    """An array of the host that is said to be on the device: its kernels can read pinned memory by
    the same address."""

    def __init__(self, array: np.ndarray, device: jax.Device):
        kind = CUDA if PLATFORMS[platform_of(device.platform)].has_link else CPU
        self._device = (kind, device.local_hardware_id or 0)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor = _Tensor(
            data=array.ctypes.data,
            device=_Device(*self._device),
            n_axes=array.ndim,
            code=FLOAT,
            bits=32,
            lanes=1,
            shape=shape,
            deleter=_NOTHING,
        )
        _KEPT.append((tensor, shape))
        self._tensor = tensor

    def __dlpack_device__(self):
        return self._device

    def __dlpack__(self, **_):
        return capsule(ctypes.addressof(self._tensor), b"dltensor")
