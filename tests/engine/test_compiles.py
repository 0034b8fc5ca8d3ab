"""Programs that are compiled several at a time are the same, are counted once, and fail as one."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from weakref import WeakValueDictionary

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jlayer.engine import compiles
from jlayer.engine.compiles import Compiler, backend_compiles
from jlayer.streaming.devices import LAUNCHES, Devices
from jlayer.streaming.watch import Watch

STRUCT = jax.ShapeDtypeStruct((3,), "float32")
MODEL = ("a model", "float32")
pytestmark = pytest.mark.usefixtures("compiled_anew")


def compiler_of(model, at_a_time=1):
    return Compiler(Devices(jax.devices("cpu")[:1]), Watch(), of=model, at_a_time=at_a_time)


@pytest.fixture(params=[1, 4])
def compiler(request):
    """One at a time, as on a CPU, and four."""
    return compiler_of(MODEL, request.param)


def times(factor):
    return lambda given: given * factor


def test_programs_asked_for_together_are_there_afterwards(compiler):
    before = backend_compiles()
    with compiler.together():
        for factor in (2, 3, 4, 2, 3):  # asked for again while they are compiled
            compiler.get(f"times {factor % 2}", factor, times(factor), (STRUCT,), reuses=False)
    assert backend_compiles() - before == 3
    assert compiler.compiles == {"times 0": 2, "times 1": 1}
    ones = jax.device_put(np.ones(3, np.float32))
    for factor in (2, 3, 4):
        program = compiler.get(f"times {factor % 2}", factor, None, None, reuses=False)
        assert (np.asarray(program(ones)) == factor).all()
    assert backend_compiles() - before == 3


@pytest.mark.parametrize("word", ["RESOURCE_EXHAUSTED", "INTERNAL"])
def test_one_that_has_no_room_beside_others_is_compiled_alone(monkeypatch, word):
    """Kernels are tried on the device while programs are compiled."""
    compiler, failed = compiler_of(MODEL, 4), []

    def compiled(lowered):
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(lowered)
            raise jax.errors.JaxRuntimeError(f"{word}: Failed to get configs")
        return whole(lowered)

    whole = compiles.compiled
    monkeypatch.setattr(compiles, "compiled", compiled)

    def ask():
        with compiler.together():
            for factor in (2, 3, 4):
                compiler.get("times", factor, times(factor), (STRUCT,), reuses=False)

    if word == "INTERNAL":
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            ask()
        return
    ask()
    assert len(failed) == 1
    assert compiler.compiles == {"times": 3}


def test_one_that_fails_fails_all_and_leaves_nothing_behind(compiler):
    def wrong(given):
        raise ValueError("no such program")

    def ask():
        with compiler.together():
            compiler.get("right", 0, times(2), (STRUCT,), reuses=False)
            compiler.get("wrong", 0, wrong, (STRUCT,), reuses=False)

    with pytest.raises(ValueError, match="no such program"):
        ask()
    with compiler.together():
        compiler.get("right", 0, times(2), (STRUCT,), reuses=False)
    program = compiler.get("right", 0, None, None, reuses=False)
    assert (np.asarray(program(np.ones(3, np.float32))) == 2).all()


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_models_that_are_alike_share_their_programs(monkeypatch, at_a_time):
    monkeypatch.setattr(compiles, "all_programs", WeakValueDictionary())
    first, second, other = (
        compiler_of(model, at_a_time) for model in (MODEL, MODEL, (*MODEL, "more"))
    )
    before, found = backend_compiles(), []
    for each in (first, second, other):
        with each.together():
            each.get("times", 2, times(2), (STRUCT,), reuses=False)
        found.append(each.get("times", 2, None, None, reuses=False))
    assert backend_compiles() - before == 2
    assert found[0] is found[1] is not found[2]
    assert first.compiles == second.compiles == other.compiles == {"times": 1}
    assert second.temporary_bytes == first.temporary_bytes
    del first, second, found
    gc.collect()
    assert len(compiles.all_programs) == 1  # those of models that were closed are gone


@pytest.mark.parametrize(
    "change",
    [
        {"label": "half"},
        {"key": 3},
        {"args": (jax.ShapeDtypeStruct((4,), "float32"),)},
        {"args": (jax.ShapeDtypeStruct((3,), "int32"),)},
        {"args": ([STRUCT],)},
        {"reuses": True},
        {"results": [SingleDeviceSharding(jax.devices("cpu")[0])]},
    ],
    ids=str,
)
def test_what_a_program_depends_on_is_not_shared(change):
    def twice(given):
        return jax.tree.leaves(given * 2 if hasattr(given, "shape") else given)

    asked = {"label": "times", "key": 2, "args": (STRUCT,), "reuses": False}
    for more in ({}, change):
        how = asked | more
        compiler_of(MODEL).get(how.pop("label"), how.pop("key"), twice, how.pop("args"), **how)
    assert len(compiles.all_programs) == 2


def test_models_that_are_open_at_once_are_compiled_for_once(tiny, monkeypatch):
    from jlayer import AutoModel

    with (
        AutoModel.from_pretrained(tiny, device="cpu") as first,
        AutoModel.from_pretrained(tiny, device="cpu") as second,
        AutoModel.from_pretrained(tiny, device="cpu", dtype="bfloat16") as other,
    ):
        expected, before = first.logits([[5, 17, 99]]), backend_compiles()
        np.testing.assert_array_equal(second.logits([[5, 17, 99]]), expected)
        assert backend_compiles() == before
        other.logits([[5, 17, 99]])
        assert backend_compiles() > before


@pytest.mark.parametrize("n_devices", [1, 2])
def test_programs_of_several_devices_are_launched_one_after_another(n_devices):
    """Or two threads would launch them in another order on each, and they wait for one another."""
    devices = Devices(jax.devices("cpu")[:n_devices])
    compiler = Compiler(devices, Watch(), of="in turn")
    program = compiler.get("double", 0, lambda x: x * 2, (STRUCT,), reuses=False)
    x = jax.device_put(np.ones(3, np.float32), devices.everywhere)
    with ThreadPoolExecutor(1) as other:
        with LAUNCHES:
            program(x)  # a finalizer may call one inside another
            called = other.submit(program, x)
            done, _ = wait([called], timeout=0.2 if n_devices > 1 else 60)
            assert bool(done) == (n_devices == 1)
        np.testing.assert_array_equal(called.result(), np.full(3, 2))
