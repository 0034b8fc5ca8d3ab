"""A device that stands still, or fails while others wait for it, ends a run and is named."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jlayer import AutoModel
from jlayer.cores import native
from jlayer.errors import StorageError
from jlayer.streaming import exchange, guard
from jlayer.streaming.devices import MESH_AXES, ROWS, Devices
from jlayer.streaming.guard import (
    FAILED_S,
    GRACE_S,
    LEAST_S,
    PRODUCTS,
    WEIGHTS,
    Guard,
    patience_s,
)
from jlayer.streaming.steps import Run
from tests.streaming.test_exchange import on_each


class Part:
    """What a device has of an array: it has come, or not, or failed."""

    def __init__(self, number, *, is_there=True, error=None):
        self.device, self.data = jax.devices()[number], self
        self.is_ready, self._error = (lambda: is_there), error

    def block_until_ready(self):
        if self._error:
            raise jax.errors.JaxRuntimeError(self._error)


class Parts:
    def __init__(self, *parts):
        self.addressable_shards = parts


def unmet(most_sleeps):
    """What two devices give that wait for a third."""
    exchange.begin(jax.devices()[:3], "cpu", most_sleeps=most_sleeps)
    devices, rows = Devices(jax.devices()[:2]), PartitionSpec(MESH_AXES[ROWS])
    how = {"mesh": devices.mesh, "in_specs": rows, "out_specs": rows, "check_vma": False}
    put = jax.device_put(np.ones((2, 4), np.float32), devices.over(ROWS))
    return jax.jit(jax.shard_map(lambda x: exchange.all_gather(x, 3), **how))(put)


def watching(*under_way):
    """A guard that finds these under way, and the lines with which it ended the process."""
    ended = []
    return Guard(lambda: under_way, ended.append), ended


def late_is(number):
    return Parts(Part(1 - number), Part(number, is_there=False))


def test_a_device_that_stands_still_is_named_with_its_tile_and_ends_the_run():
    found, ended = watching(
        ("layer 1", WEIGHTS, {"q": jnp.ones(3), "k": jnp.ones(3)}),
        ("layer 2", PRODUCTS, late_is(1)),
        ("layer 3", WEIGHTS, late_is(0)),
    )

    def step():
        with found.step("layer 3"):
            assert not found.look(LEAST_S - 1, 0)
            assert found.look(LEAST_S + 1, 0)
            assert not ended  # who waits may be freed
            assert found.look(LEAST_S + 2, GRACE_S)

    words = "layer 2: cpu:1 has not given its products for 61 s, where 60 s are the most"
    with pytest.raises(StorageError, match=words):
        step()
    assert ended[0].startswith(words)
    found.restart()
    with found.step("layer 1"):
        pass


def test_where_no_device_is_late_the_driver_is():
    found, _ = watching(("layer 1", WEIGHTS, jnp.ones(3)))

    def step():
        with found.step("the logits"):
            found.look(99, 0)

    with pytest.raises(StorageError, match="the logits: the driver has not returned for 99 s"):
        step()


def test_a_device_that_fails_alone_is_seen_within_seconds():
    failed = Parts(Part(0, is_there=False), Part(1, error="INTERNAL: no memory"))
    found, _ = watching(("layer 1", PRODUCTS, late_is(0)), ("layer 2", PRODUCTS, failed))

    def step():
        with found.step("layer 1"):
            assert not found.look(FAILED_S - 1, 0)
            assert found.look(FAILED_S, 0)

    words = r"layer 2: cpu:1 failed \(INTERNAL: no memory\), and the others wait"
    with pytest.raises(StorageError, match=words):
        step()


def test_a_failure_in_a_step_is_an_error_of_its_tile():
    found, _ = watching()

    def fail(error):
        with found.step("layer 4"):
            raise error

    with pytest.raises(StorageError, match=r"layer 4: the device failed \(INTERNAL: gone\)"):
        fail(jax.errors.JaxRuntimeError("INTERNAL: gone\nand more"))
    with pytest.raises(ValueError, match="other"):
        fail(ValueError("other"))


def test_a_step_that_waits_for_the_disk_begins_anew():
    found, _ = watching()
    assert found.number is None
    with found.step("layer 1"):
        before = found.number
        found.go_on()
        assert found.number not in (None, before)
    assert found.number is None


def test_a_step_that_compiles_a_program_may_take_as_long_as_that(fable):
    """XLA tries kernels of a program on the device, for a minute at times."""
    numbers = []

    def on_step(step, tile):
        model.engine.watch.n_compiling = int(isinstance(step, Run))

    def on_taken(step, result):
        with model.engine.turn() as executor:
            numbers.append((isinstance(step, Run), executor.guard.number is None))

    with AutoModel.from_pretrained(fable, device="cpu") as model:
        model.engine.watch.on_step, model.engine.watch.on_taken = on_step, on_taken
        model.logits([1, 2])
        model.engine.watch.n_compiling = 0
    assert set(numbers) == {(True, True), (False, False)}


def test_more_to_do_may_take_longer():
    assert patience_s("gpu", 0, 1) == LEAST_S
    assert patience_s("gpu", 1 << 30, 512) < 2 * LEAST_S
    assert patience_s("cpu", 1 << 30, 512) > patience_s("cpu", 1 << 30, 1) > 1.5 * LEAST_S
    assert patience_s("gpu", 0, 1, n_hosts=2) == guard.TIMES_FOR_HOSTS * LEAST_S


@pytest.mark.skipif(native.missing() is not None, reason=native.missing() or "")
def test_who_waits_in_an_exchange_is_freed():
    """Without that it would wait for hours, for each program that was called."""
    late = [unmet(1 << 40), unmet(1 << 40)]
    found, ended = watching(*(("layer 1", PRODUCTS, each) for each in late))

    def step():
        with found.step("layer 1"):
            assert not found.look(LEAST_S - 1, 0)
            assert found.look(LEAST_S + 1, 0)
            jax.block_until_ready(late)

    with pytest.raises(StorageError, match="cpu:0 and cpu:1 have not given their products"):
        step()
    for each in late:
        with pytest.raises(jax.errors.JaxRuntimeError, match="did not meet"):
            np.asarray(each)
    assert not ended
    found, _ = watching(("layer 1", PRODUCTS, late[0]))
    assert found.look(FAILED_S, 0)
    assert "layer 1: cpu:0 failed (INTERNAL: the devices did not meet" in found.cause
    watching()[0].restart()  # as before every pass: an exchange may have failed by itself
    gathered = on_each(lambda x: exchange.all_gather(x, 2), 2, np.ones((2, 4), np.float32))
    assert gathered.sum() == 16
    exchange.begin(jax.devices()[:2], "cpu")


STANDING = """
import sys, threading, types
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jlayer.app.cli import main
from jlayer.engine.sweep import Sweeper
from jlayer.streaming import guard
guard.LOOK_S, guard.LEAST_S, guard.GRACE_S = 0.05, 0.5, 0.2
guard.LEAST_OPERATIONS_PER_S = {"cpu": 1e15}
real, never = Sweeper.advance, threading.Event()

def advance(self, tile, arrays, passing):
    if tile.layer == 1:
        never.wait()
    return real(self, tile, arrays, passing)

Sweeper.advance = advance
main(sys.argv[1:])
"""


def test_the_command_ends_with_one_line_and_its_code(fable):
    words = ["generate", str(fable), "-p", "Once", "--device", "cpu", "--devices", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", STANDING, *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 6, done.stderr[-2000:]
    line = done.stderr.splitlines()[-1]
    assert re.match(r"jlayer: layer 1 .*: the driver has not returned for \d+ s, where", line)
    assert json.loads(done.stdout) == {"error": line.removeprefix("jlayer: "), "exit_code": 6}
