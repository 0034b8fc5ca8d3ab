"""Rooms filled by the real driver, beside programs that read them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.engine.gpu import gpu_name
from jlayer.streaming.devices import Devices
from jlayer.streaming.driver import Driver
from jlayer.streaming.slots import HostMemory
from jlayer.streaming.turns import Rooms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_name() is None, reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        os.environ["JAX_PLATFORMS"] == "cpu",
        reason="JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda",
    ),
]

N = 4 << 20
ROUNDS = 100


@pytest.fixture
def pinned():
    """Eight arrays of pinned memory: the first number, and as many more, counted up."""
    memory = HostMemory([0], pin=True)
    arrays = [memory.room(number, 4 * N)[: 4 * N].view(np.int32) for number in range(8)]
    for number, array in enumerate(arrays):
        array[:] = np.arange(N) % 1000 + 1000 * number
    yield arrays
    memory.close()


def test_programs_read_what_was_copied_for_them(pinned):
    (device,) = jax.devices("gpu")[:1]
    rooms = Rooms(Devices([device]).put, Driver())
    expected = [int(array.astype(np.int64).sum()) % 2**31 for array in pinned]
    long = jnp.ones((2048, 2048), jnp.bfloat16)

    @jax.jit
    def used(arrays, long):
        """Reads the arrays after work that takes a while."""
        for _ in range(8):
            long = (long @ long) * jnp.bfloat16(1 / 2048)
        late = (long[0, 0] * 0).astype(jnp.int32)
        return [(array + late).sum() & 0x7FFFFFFF for array in arrays], long

    found, wanted = [], []
    for turn in range(ROUNDS):
        numbers = [turn % 8, (3 * turn + 1) % 8]
        some = [rooms.fill(pinned[number]) for number in numbers]
        sums, long = used(rooms.arrays_of(some), long)
        rooms.ran(some, long)
        for room in some:
            rooms.give_back(room)
        found.append(sums)
        wanted.append([expected[number] for number in numbers])
    assert [[int(each) for each in some] for some in found] == wanted
    rooms.clear(())
    rooms.close()


def test_what_a_program_gives_is_fetched_once_it_is_there():
    memory = HostMemory([0], pin=True)
    into = memory.room("fetched", 4096)[:4096].view(np.float32)
    long = jnp.ones((2048, 2048), jnp.bfloat16)

    @jax.jit
    def made(long, number):
        for _ in range(8):
            long = (long @ long) * jnp.bfloat16(1 / 2048)
        return long, long[0, :1024].astype(jnp.float32) * 0 + number

    for number in range(50):
        long, given = made(long, np.float32(number))
        memory.fetch(given, into.view(np.uint8))
        assert (into == number).all()
    memory.close()
