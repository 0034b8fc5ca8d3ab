"""A few threads that wait inside native code, so that sharing out a product takes microseconds.

Handing work to threads through the interpreter costs each of them 20 to 50 us. These enter one
native call and stay in it, without the interpreter's lock; `sharing` says how they work together.
"""

from __future__ import annotations

import threading
from ctypes import CFUNCTYPE, c_int32, c_int64, c_void_p
from functools import cache

import numpy as np

from jlayer.cores import sharing
from jlayer.cores.jobs import address, aligned
from jlayer.cores.native import Compiler

NAME = "jlayer-cores"
ALL = 1 << 30
WOKEN = 2  # by the caller; each of them wakes two more
# A generation's low half is the word that threads sleep on: it must never be CLOSED.
GENERATIONS = (1 << 31) - 2
STOPPED = -1


class Crew:
    """`n_threads`, the caller among them; the others start with the first product.

    `spin_s`: how long a thread without work watches for some before it sleeps.
    """

    def __init__(self, n_threads: int, spin_s: float):
        self.n_threads = n_threads
        self._control = aligned(sharing.CONTROL_BYTES)
        self._control[:] = 0
        self._write(sharing.SPIN, round(spin_s * 1e9))
        self._generation = 0
        self._threads = []

    def begin(self, jobs: np.ndarray, n_blocks: int, *, is_short: bool = False) -> None:
        """Has the others begin with a list of jobs, which stays as it is until `finish`. One list
        at a time. `is_short`: threads that sleep are left asleep."""
        if len(self._threads) < self.n_threads - 1:
            self._start()
        self._write(sharing.N_BLOCKS, n_blocks)
        self._write(sharing.JOBS, address(jobs))
        self._generation = self._generation % GENERATIONS + 1
        n_woken = 0 if is_short else WOKEN
        _functions()["open"](address(self._control), self._generation, n_woken)

    def finish(self) -> None:
        """Works too, until all blocks are done."""
        _functions()["finish"](address(self._control))

    def wake(self) -> None:
        """Tells the threads that a product is about to come."""
        _functions()["wake"](address(self._control), ALL)

    def stop(self) -> None:
        """Ends the threads. Not while a product runs."""
        self._write(sharing.STOPPING, 1)
        self._write(sharing.OPEN, STOPPED)
        if self._threads:
            self.wake()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []

    def _start(self):
        serve, control = _functions()["serve"], self._control

        def live():  # holds the control block, not the crew: that may be collected meanwhile
            serve(address(control))

        while len(self._threads) < self.n_threads - 1:
            thread = threading.Thread(target=live, name=NAME, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _write(self, word, value):
        self._control[word : word + 8].view(np.int64)[0] = value


@cache
def _functions():
    """The native functions by name; calls give up the interpreter's lock."""
    compiler, module = Compiler(), sharing.module()
    kinds = {
        "serve": [c_void_p],
        "open": [c_void_p, c_int64, c_int32],
        "finish": [c_void_p],
        "wake": [c_void_p, c_int32],
    }
    addresses = compiler.compiled(module, *kinds)
    return {
        name: CFUNCTYPE(None, *kind)(found)
        for (name, kind), found in zip(kinds.items(), addresses, strict=True)
    }
