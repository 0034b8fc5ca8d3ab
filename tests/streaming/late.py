"""Copies as the driver may make them at the worst: each comes only when something waits for it, and
what was there before is gone as soon as it may be."""

import ctypes
from collections import deque
from typing import ClassVar

import jax
import numpy as np

from jlayer.streaming import devices, executor, slots

POISON = 0xFF  # of floating-point numbers: not a number


class LateCopies:
    """Takes the place of `driver.Driver`, on a CPU. `made`: all of them."""

    made: ClassVar[list] = []

    def __init__(self):
        self.begun, self.n_come, self.n_after = deque(), 0, 0
        self.n_events = self.n_begun = 0
        self.is_closed = False
        LateCopies.made.append(self)

    def register(self, memory):
        pass

    def unregister(self, memory):
        pass

    def event(self):
        self.n_events += 1
        return {"number": 0}

    def begin(self, addresses, arrays, event):
        self.n_begun += 1
        event["number"] = self.n_begun
        pairs = [
            (memory(address, array.nbytes), array)
            for address, array in zip(addresses, arrays, strict=True)
        ]
        for place, _ in pairs:
            place[:] = POISON
        self.begun.append(pairs)

    def after(self, array):
        self.n_after += 1
        jax.block_until_ready(array)

    def have_stream_wait(self, stream, event):
        self.wait(event)

    def wait(self, event):
        while self.n_come < event["number"]:
            for place, array in self.begun.popleft():
                place[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.n_come += 1

    def has_come(self, event):
        return self.n_come >= event["number"]

    def close(self):
        self.is_closed = True


def memory(address, n_bytes):
    """The bytes at an address, to write to."""
    return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)


def copied(views):
    """Arrays of the device that are no views of the host's memory."""
    return jax.tree.map(lambda array: jax.device_put(np.array(array)), views)


def with_late_copies(monkeypatch):
    """Has executors on a CPU stream as over a link, with `LateCopies`."""
    LateCopies.made.clear()
    row = executor.PLATFORMS["cpu"]
    linked = {"cpu": type(row)(**{**vars(row), "has_link": True})}
    monkeypatch.setattr(executor, "PLATFORMS", linked)
    monkeypatch.setattr(executor, "Driver", LateCopies)
    monkeypatch.setattr(slots, "Driver", LateCopies)
    monkeypatch.setattr(devices, "putter", lambda *_, has_link, n_hosts: copied)
