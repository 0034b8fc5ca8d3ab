"""The promise for the device, before JAX starts: what the driver tells decides, not an allocation
that fails."""

import os

import pytest

from jlayer.engine import device
from jlayer.errors import DoesNotFitError, UsageError

GIB = 1 << 30


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(device._FRACTION, raising=False)


def test_the_allocator_gets_what_the_context_leaves():
    budget = device._cap((8 * GIB, 6 * GIB), 4 * GIB, GIB)
    assert budget == 4 * GIB
    assert float(os.environ[device._FRACTION]) == pytest.approx(3 / 8, abs=1e-6)


def test_without_a_promise_it_is_4_gib_or_what_is_free_if_less():
    assert device._cap((8 * GIB, 6 * GIB), None, GIB) == 4 * GIB
    assert device._cap((8 * GIB, 3 * GIB), None, GIB) == 3 * GIB


def test_a_busy_device_is_refused_with_what_is_free():
    with pytest.raises(DoesNotFitError, match=f"{GIB} free of {8 * GIB}"):
        device._cap((8 * GIB, GIB), 4 * GIB, GIB)


def test_less_than_the_drivers_own_context_is_refused():
    with pytest.raises(DoesNotFitError, match="context alone takes"):
        device._cap((8 * GIB, 8 * GIB), GIB // 2, GIB)


def test_jax_started_with_a_larger_allocator_breaks_the_promise():
    class Found:
        def memory_stats(self):
            return {"bytes_limit": 6 * GIB}

    with pytest.raises(UsageError, match="JAX was started before"):
        device._check_cap(Found(), 4 * GIB)
