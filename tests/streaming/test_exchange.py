"""What devices of one process give each other inside their programs, by copies of our own: all of
it, on each, as XLA's collectives do."""

import ctypes
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jlayer.cores import native
from jlayer.cores.exchange import offsets
from jlayer.plan.machine import PLATFORMS
from jlayer.streaming import exchange
from jlayer.streaming.devices import MESH_AXES, ROWS, Devices
from jlayer.streaming.landing import Landings

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=native.missing() or "")
AXIS = MESH_AXES[ROWS]


def on_each(function, n, x):
    """A function that each of `n` devices runs on its rows of an array -> what each of them gives,
    one after another."""
    devices = Devices(jax.devices()[:n])
    rows = PartitionSpec(AXIS)
    how = {"mesh": devices.mesh, "in_specs": rows, "out_specs": rows, "check_vma": False}
    put = jax.device_put(x, devices.over(ROWS))
    return np.asarray(jax.jit(jax.shard_map(function, **how))(put))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_each_has_all_of_it_in_order(n, dtype):
    assert exchange.begin(jax.devices()[:n], "cpu")
    x = np.arange(n * 2 * 5 * 3).reshape(n * 2, 5, 3).astype(jnp.dtype(dtype))
    found = on_each(lambda x: exchange.all_gather(x + x, n), n, x)
    expected = on_each(lambda x: jax.lax.all_gather(x + x, AXIS), n, x)
    assert found.shape == (n * n, 2, 5, 3)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[-n:], (x + x).reshape(n, 2, 5, 3))


def test_several_in_one_program_and_many_runs_of_it():
    """Each exchange is told from the others, and each run from the last."""
    exchange.begin(jax.devices()[:2], "cpu")

    def function(gather, x):
        for step in range(4):
            x = gather(x * (step + 1)).sum(0) - x
        return x

    for run in range(20):
        x = np.arange(8, dtype=np.float32).reshape(4, 2) + run
        found = on_each(lambda x: function(lambda x: exchange.all_gather(x, 2), x), 2, x)
        expected = on_each(lambda x: function(lambda x: jax.lax.all_gather(x, AXIS), x), 2, x)
        np.testing.assert_array_equal(found, expected)


def test_of_many_at_a_time():
    """As several experts are in one program."""
    exchange.begin(jax.devices()[:2], "cpu")
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    found = on_each(jax.vmap(lambda x: exchange.all_gather(x, 2)), 2, x)
    expected = on_each(jax.vmap(lambda x: jax.lax.all_gather(x, AXIS)), 2, x)
    np.testing.assert_array_equal(found, expected)


def test_one_that_does_not_come_fails_the_program_and_not_the_next():
    exchange.begin(jax.devices()[:3], "cpu", most_sleeps=100)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="did not meet"):
        on_each(lambda x: exchange.all_gather(x, 3), 2, x)  # of three only two run
    exchange.begin(jax.devices()[:2], "cpu")
    found = on_each(lambda x: exchange.all_gather(x, 2), 2, x)
    np.testing.assert_array_equal(found, np.ones((4, 1, 4)))


def test_devices_that_are_not_the_first_and_other_versions_of_xla_are_left_to_xla(tmp_path):
    assert not exchange.begin(jax.devices()[1:3], "cpu")
    assert exchange.hindrance(jax.devices()[:2]) is None
    assert offsets(tmp_path / "c_api.h") is None
    header = "#define XLA_FFI_API_MAJOR {}\n#define XLA_FFI_API_MINOR 0\n" + "".join(
        f"_XLA_FFI_API_STRUCT_FIELD(XLA_FFI_{name});\n"
        for name in ("Error_Create", "Other", "Stream_Get", "RunId_Get", "DeviceOrdinal_Get")
    )
    (tmp_path / "c_api.h").write_text(header.format(0))
    found = offsets(tmp_path / "c_api.h")
    assert found["Stream_Get"] - found["Error_Create"] == 16
    (tmp_path / "c_api.h").write_text(header.format(1))
    assert offsets(tmp_path / "c_api.h") is None


def test_devices_that_are_left_to_xla_are_told_why(monkeypatch):
    as_gpus = replace(PLATFORMS["cpu"], collective_bytes=1)
    monkeypatch.setitem(PLATFORMS, "cpu", as_gpus)
    (note,) = Devices(jax.devices()[1:3]).notes
    assert note.endswith("only the first GPUs in their order copy to each other, not [1, 2]")


def test_beside_memory_that_programs_read_where_it_is():
    """Both hand addresses to JAX, which sets the types of the one function for it."""
    jax.ffi.pycapsule(native_function())
    exchange.begin(jax.devices()[:2], "cpu")
    landings = Landings(Devices(jax.devices()[:1]))
    landing = landings.of("any", 2, 64)
    landing.memory[:] = 3
    assert np.asarray(landing.on_device()).sum() == 2 * 64 * 3
    landings.close()


def native_function():
    return ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: None)


BY_COPIES = """
import sys
from dataclasses import replace
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)  # XLA has few threads for CPUs
jax.config.update("jax_num_cpu_devices", 2)
from jlayer.plan import machine
machine.PLATFORMS["cpu"] = replace(machine.PLATFORMS["cpu"], collective_bytes=1)
import jlayer
how = {"device": "cpu", "dtype": "float32", "host_share": 0}
texts = []
for n in (1, 2):
    with jlayer.AutoModel.from_pretrained(sys.argv[1], devices=n, **how) as model:
        assert model.engine.devices.by_copies == (n == 2)
        texts.append(jlayer.generate(model, [5, 6, 7], max_new_tokens=24, temperature=0).token_ids)
assert texts[0] == texts[1], texts
print(len(texts[0]))
"""


def test_a_model_on_two_devices_gives_the_tokens_of_one(fable):
    words = [sys.executable, "-c", BY_COPIES, str(fable)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "24"), done.stderr[-2000:]
