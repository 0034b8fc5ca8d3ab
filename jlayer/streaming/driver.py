"""The CUDA driver, for what JAX does not offer: memory of the host that is pinned, and copies that
wait for no program.

All goes on in the primary context, which JAX uses, and in a stream of its own. Unsafe: addresses
are taken as they are given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import contextmanager

import jax
import numpy as np

from jlayer.errors import DoesNotFitError, StorageError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it waits for no other stream
_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING: such an event costs less
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_HOST, _DEVICE, _SIZE, _HANDLE = (
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
# Of what is called often.
_ARGUMENTS = {
    "cuMemcpyDtoHAsync_v2": (_HOST, _DEVICE, _SIZE, _HANDLE),
    "cuMemcpyHtoDAsync_v2": (_DEVICE, _HOST, _SIZE, _HANDLE),
    "cuEventRecord": (_HANDLE, _HANDLE),
}


class Driver:
    """Pins memory, and copies between it and a device, of which `number` is JAX's number among
    those of this process. `close` releases everything."""

    def __init__(self, number: int = 0):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        self._device = number
        self._call("cuInit", 0)  # JAX has done it, where it has started
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        for name, kinds in _ARGUMENTS.items():
            getattr(self._cuda, name).argtypes = kinds
        self._registered: dict[int, np.ndarray] = {}  # by address
        self._stream: ctypes.c_void_p | None = None
        self._events: list[ctypes.c_void_p] = []

    @property
    def context(self) -> int:
        """The handle of the device's primary context."""
        return self._context.value

    def function(self, name: str) -> int:
        """The address of a function of the driver."""
        return ctypes.cast(getattr(self._cuda, name), ctypes.c_void_p).value

    def fetch(self, array: jax.Array, into: np.ndarray) -> None:
        """Copies an array of the device to pinned memory of the same bytes, and waits for it. JAX
        takes ten times as long for a small one."""
        with self._entered():
            stream = self._own_stream()
            # By the protocol of DLPack the stream waits for the array. So the host waits once, and
            # not for JAX to say that the array is there, which takes 0.1 ms more.
            held = array.__dlpack__(stream=stream.value)
            address = array.unsafe_buffer_pointer()
            self._call("cuMemcpyDtoHAsync_v2", into.ctypes.data, address, into.nbytes, stream)
            self._call("cuStreamSynchronize", stream)
            del held

    def event(self) -> ctypes.c_void_p:
        """A new event, for `begin`."""
        event = ctypes.c_void_p()
        with self._entered():
            self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_WITHOUT_TIME))
        self._events.append(event)
        return event

    def begin(
        self, addresses: Sequence[int], arrays: Sequence[np.ndarray], event: ctypes.c_void_p
    ) -> None:
        """Begins to copy pinned arrays to addresses of the device, after what began before; the
        event comes when all are there."""
        with self._entered():
            stream = self._own_stream()
            for address, array in zip(addresses, arrays, strict=True):
                source = array.__array_interface__["data"][0]
                self._call("cuMemcpyHtoDAsync_v2", address, source, array.nbytes, stream)
            self._call("cuEventRecord", event, stream)

    def after(self, array: jax.Array) -> None:
        """Has the copies that begin from now on wait for an array of the device, which a program
        gives."""
        with self._entered():
            array.__dlpack__(stream=self._own_stream().value)

    def have_stream_wait(self, stream: int, event: ctypes.c_void_p) -> None:
        """Has another stream of the device wait for an event."""
        with self._entered():
            self._call("cuStreamWaitEvent", ctypes.c_void_p(stream), event, ctypes.c_uint(0))

    def wait(self, event: ctypes.c_void_p) -> None:
        """Returns once the event has come. Any thread may wait."""
        with self._entered():
            self._call("cuEventSynchronize", event)

    def has_come(self, event: ctypes.c_void_p) -> bool:
        """Whether the event has come."""
        with self._entered():
            return self._call("cuEventQuery", event, also=_NOT_READY) == 0

    def register(self, memory: np.ndarray):
        address, n_bytes = memory.ctypes.data, memory.nbytes
        with self._entered():
            self._call(
                "cuMemHostRegister_v2",
                ctypes.c_void_p(address),
                ctypes.c_size_t(n_bytes),
                ctypes.c_uint(0),
            )
        self._registered[address] = memory

    def unregister(self, memory: np.ndarray):
        address = memory.ctypes.data
        with self._entered():
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))
        del self._registered[address]

    def close(self):
        if self._context:
            for memory in list(self._registered.values()):
                self.unregister(memory)
            with self._entered():
                for event in self._events:
                    self._call("cuEventDestroy_v2", event)
                if self._stream is not None:
                    self._call("cuStreamDestroy_v2", self._stream)
            self._events, self._stream = [], None
            self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)
            self._context = None

    def _own_stream(self):
        """Inside `_entered`."""
        if self._stream is None:
            self._stream = ctypes.c_void_p()
            self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(NON_BLOCKING))
        return self._stream

    @contextmanager
    def _entered(self):
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name, *arguments, also=0):
        """Calls a function of the driver -> its code: 0, or `also`."""
        code = getattr(self._cuda, name)(*arguments)
        if code in (0, also):
            return code
        if "Register" not in name:
            raise StorageError(f"the device failed ({name} gave {code}); run it again")
        found = f"host memory: the driver refused to pin it ({name} gave {code}); give less "
        limit = ", or raise the limit of locked memory (ulimit -l)"
        raise DoesNotFitError(
            f"{found}host_memory{limit}", command_line=f"{found}--host-memory{limit}"
        )
