"""The exchange as XLA calls it, between threads that stand for devices: one whose driver refuses
something, and devices that are sooner at the next exchange than others have left the last."""

import ctypes
import threading

import numpy as np
import pytest

from jlayer.cores import native
from jlayer.cores.exchange import (
    CALLED,
    CONTROL_BYTES,
    COPY,
    HAS_STREAMS,
    POP,
    PUSH,
    RECORD,
    SLEEPS,
    WAIT,
    module,
)
from jlayer.cores.jobs import address, aligned

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=native.missing() or "")
N_BYTES = 8
PLACES = {name: 48 + 8 * number for number, name in enumerate(CALLED)}
FAILED = 1234  # what stands for an error of XLA's
POINTER, INT = ctypes.c_void_p, ctypes.c_int
ANSWER, DRIVER = ctypes.CFUNCTYPE(POINTER, POINTER), ctypes.CFUNCTYPE(INT, *[POINTER] * 6)
own = threading.local()  # what a device is at: its number, its run, the calls of its driver


def words(*values):
    return (ctypes.c_int64 * len(values))(
        *(ctypes.addressof(v) if not isinstance(v, int) else v for v in values)
    )


class Machine:
    """Some devices of one process; `calls`: before each call of a device's driver this is asked
    (device, name, how many of this name before in its run) -> the driver's code."""

    def __init__(self, calls=lambda *_: 0):
        self._calls, self._control = calls, aligned(CONTROL_BYTES)
        self._control[:] = 0
        compiler = native.Compiler()
        text = module(address(self._control), {**PLACES, "MAJOR": 0, "MINOR": 3})
        (found,) = compiler.compiled(text, "all_gather")
        self._function, self._kept = ANSWER(found), [compiler]
        self._write(HAS_STREAMS, 1)
        self.take_heart()
        for place in (RECORD, WAIT, COPY, PUSH, POP):
            self._write(place, self._address(DRIVER, self._driver(place)))
        answers = {"RunId_Get": lambda: own.run, "DeviceOrdinal_Get": lambda: own.device,
                   "Stream_Get": lambda: 5}  # fmt: skip
        self._api = (ctypes.c_int64 * (6 + len(CALLED)))()
        for name, answer in answers.items():
            self._api[PLACES[name] // 8] = self._address(ANSWER, self._answering(answer))
        self._api[PLACES["Error_Create"] // 8] = self._address(ANSWER, lambda _: FAILED)

    def take_heart(self, sleeps=3000):
        """How long a device waits for others."""
        self._write(SLEEPS, sleeps)

    def all_gather(self, run, device, n_devices):
        """What a device gets, and whether without an error."""
        own.run, own.device, own.count = run, device, {}
        part, result = words(100 * run + device), words(*[0] * n_devices)
        buffers = [words(0, 0, 0, array) for array in (part, result)]
        lists = [words(buffer) for buffer in buffers]
        numbers = [words(value) for value in (N_BYTES, n_devices)]
        scalars = [words(0, number) for number in numbers]
        attributes = words(*scalars)
        frame = words(
            *(0, 0, self._api, 0, 0),
            *(0, 0, 1, 0, lists[0]),
            *(0, 0, 1, 0, lists[1]),
            *(0, 0, 2, 0, 0, attributes, 0),
        )
        error = self._function(ctypes.addressof(frame))
        return list(result), error is None

    def _driver(self, place):
        def call(to, _, source, *others):
            count = own.count[place] = own.count.get(place, 0) + 1
            if place == COPY:
                ctypes.memmove(to, source, N_BYTES)
            return self._calls(own.device, place, count)

        return call

    def _answering(self, answer):
        def answering(question):
            ctypes.c_int32.from_address(question + 24).value = answer()

        return answering

    def _address(self, kind, function):
        self._kept.append(kind(function))
        return ctypes.cast(self._kept[-1], POINTER).value

    def _write(self, place, value):
        self._control[place : place + 8].view(np.int64)[0] = value


def at_once(machine, *runs):
    """What the devices of each (run, how many) get, each a thread that does one after another."""
    found = {}

    def device(number):
        for run, n in runs:
            if number < n:
                found[run, number] = machine.all_gather(run, number, n)

    numbers = range(max(n for _, n in runs))
    threads = [threading.Thread(target=device, args=(n,), daemon=True) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "one waits for ever"
    return found


def expected(run, n):
    return [100 * run + device for device in range(n)]


def test_each_gets_what_all_have():
    found = at_once(Machine(), (7, 3), (8, 3), (9, 2), (10, 3))
    assert len(found) == 11
    for (run, _), (values, is_well) in found.items():
        assert (values, is_well) == (expected(run, 2 if run == 9 else 3), True)


def test_devices_at_the_next_exchange_do_not_fail_one_that_has_yet_to_leave_the_last():
    """The third has seen that the first is done, and not yet that the second is."""
    at_the_next = threading.Event()

    def calls(device, place, count):
        if own.run == 1 and (device, place, count) == (2, WAIT, 4):
            assert at_the_next.wait(10)
        if own.run == 2 and (device, place, count) == (1, POP, 1):
            at_the_next.set()
        return 0

    found = at_once(Machine(calls), (1, 3), (2, 2))
    assert found[1, 2] == (expected(1, 3), True)
    assert found[2, 0] == found[2, 1] == (expected(2, 2), True)


@pytest.mark.parametrize(
    ("place", "count"), [(PUSH, 1), (RECORD, 1), (WAIT, 2), (COPY, 2), (RECORD, 2)]
)
def test_where_the_driver_of_one_refuses_all_fail_at_once_and_not_the_next(place, count):
    """Who reads the result of another device only would take a wrong one for right. The others wait
    for hours, if they are not told; what was called already (run 2) waits for nobody."""
    refused = (1, place, count)
    machine = Machine(lambda device, *call: own.run == 1 and (device, *call) == refused)
    machine.take_heart(1 << 40)
    found = at_once(machine, (1, 3), (2, 2))
    assert [found[1, device][1] for device in range(3)] == [False] * 3
    assert {(run, device) for run, device in found} == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)}
    machine.take_heart()
    found = at_once(machine, (3, 3))
    assert [found[3, device] for device in range(3)] == [(expected(3, 3), True)] * 3
