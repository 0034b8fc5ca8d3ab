"""Memory of the device in which tiles take turns: what a program reads is what was copied there for
it, however late the copy comes, and nothing is written that a program still reads."""

import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlayer.streaming.turns import KEPT_RUNS, Rooms
from tests.streaming.late import LateCopies, copied

SUM = jax.jit(
    lambda arrays: sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(arrays))
)


def tile(number, n=256):
    return np.full(n, number, np.float32)


@pytest.fixture
def rooms():
    copies = LateCopies()
    found = Rooms(copied, copies)
    found.copies = copies
    return found


def test_a_room_is_filled_again_and_a_program_waits_for_what_is_copied_there(rooms):
    first = rooms.fill(tile(1))
    (array,) = rooms.arrays_of([first])
    address = array.unsafe_buffer_pointer()
    rooms.ran([first], SUM(array))
    rooms.give_back(first)
    second = rooms.fill(tile(2))
    assert second is first
    assert not second.is_ready()  # the copy has not come
    (array,) = rooms.arrays_of([second])
    assert array.unsafe_buffer_pointer() == address
    assert SUM(array) == 2 * 256
    assert second.is_ready()


def test_the_last_copy_of_a_run_is_waited_for_and_the_first_ones_with_it(rooms):
    some = [rooms.fill(tile(number)) for number in range(4)]
    for room in some:
        rooms.give_back(room)
    some = [rooms.fill(tile(10 + number)) for number in range(4)]
    arrays = rooms.arrays_of(some[:3])
    assert rooms.copies.n_come == 3  # not the fourth
    assert [float(array[0]) for array in arrays] == [10, 11, 12]
    again = rooms.arrays_of(some[:2])
    assert [float(array[0]) for array in again] == [10, 11]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int8"])
def test_arrays_by_leaf_of_any_dtype(rooms, dtype):
    def leaves(number):
        whole = np.arange(12).reshape(3, 4) + number
        return {"q": whole.astype(np.dtype(dtype)), "scale": np.full(3, number, ml_dtypes.bfloat16)}

    rooms.give_back(rooms.fill(leaves(1)))
    room = rooms.fill(leaves(5))
    (found,) = rooms.arrays_of([room])
    for name, expected in leaves(5).items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), expected)


def test_rooms_of_other_shapes_are_apart(rooms):
    rooms.give_back(rooms.fill(tile(1)))
    other = rooms.fill(tile(2, n=128))
    assert other.arrays.shape == (128,)
    assert rooms.fill(tile(3)).arrays.shape == (256,)


def test_a_copy_waits_for_the_program_that_used_the_room_or_a_later_one(rooms):
    outputs, some = [], [rooms.fill(tile(number)) for number in range(KEPT_RUNS + 2)]
    asked = []
    rooms.copies.after = asked.append
    for room in some:
        outputs.append(jnp.float32(len(outputs)))
        rooms.ran([room], [None, outputs[-1]])  # a chunk that does not use it has no output
        rooms.give_back(room)
    for _ in some:
        rooms.fill(tile(9))
    # Of the first ones the outputs are not kept any more: the oldest that is stands for them.
    numbers = [next(n for n, output in enumerate(outputs) if output is array) for array in asked]
    assert numbers == [2, 2, 2, 3, 4, 5]


def test_after_all_have_run_a_copy_waits_for_none(rooms):
    room = rooms.fill(tile(1))
    rooms.ran([room], jnp.float32(0))
    rooms.give_back(room)
    rooms.note_end()
    rooms.fill(tile(2))
    assert rooms.copies.n_after == 0


def test_what_no_chunk_used_is_no_run(rooms):
    room = rooms.fill(tile(1))
    rooms.ran([room], [None])
    rooms.give_back(room)
    rooms.fill(tile(2))
    assert rooms.copies.n_after == 0


def test_memory_is_released_once_its_copies_have_come_and_events_are_used_again(rooms):
    rooms.give_back(rooms.fill(tile(1)))
    held = [rooms.fill(tile(2)), rooms.fill(tile(3))]
    output = jnp.zeros(3)
    rooms.ran(held, output)
    rooms.clear(held)
    gone = weakref.ref(output)
    del output
    assert gone() is None
    assert rooms.copies.n_come == rooms.copies.n_begun == 1
    n_events = rooms.copies.n_events
    fresh = [rooms.fill(tile(4)), rooms.fill(tile(5))]
    assert rooms.copies.n_events == n_events == 2
    assert not set(map(id, fresh)) & set(map(id, held))
    rooms.close()
    assert rooms.copies.is_closed
