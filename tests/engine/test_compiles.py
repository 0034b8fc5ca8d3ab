"""Programs that are compiled several at a time are the same, are counted once, and fail as one."""

import threading

import jax
import numpy as np
import pytest

from jlayer.engine import compiles
from jlayer.engine.compiles import Compiler, backend_compiles
from jlayer.streaming.devices import Devices
from jlayer.streaming.watch import Watch

STRUCT = jax.ShapeDtypeStruct((3,), "float32")


@pytest.fixture(params=[1, 4])
def compiler(request):
    """One at a time, as on a CPU, and four."""
    return Compiler(Devices(jax.devices("cpu")[:1]), Watch(), at_a_time=request.param)


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
    (device,) = jax.devices("cpu")[:1]
    compiler, failed = Compiler(Devices([device]), Watch(), at_a_time=4), []

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
