"""Arrays are put as jax.device_put puts them, by the shorter way where there is one."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax._src.interpreters import pxla

from jlayer.streaming.putting import TRIAL, putter

(DEVICE,) = jax.devices("cpu")[:1]
ALONE = jax.sharding.SingleDeviceSharding(DEVICE)

ARRAYS = {
    "q": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "scale": np.linspace(0, 1, 7, dtype=np.float32).astype(ml_dtypes.bfloat16),
}


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.sharding == expected.sharding
    assert found.committed == expected.committed
    assert (np.asarray(found) == np.asarray(expected)).all()


@pytest.mark.parametrize("has_link", [True, False])
def test_what_is_put_is_as_device_put_has_it(has_link):
    put = putter([DEVICE], ALONE, has_link=has_link)
    found, expected = put(ARRAYS), jax.device_put(ARRAYS, DEVICE)
    for name in ARRAYS:
        same(found[name], expected[name])
    same(put(ARRAYS["q"]), expected["q"])


def zeros(aval, sharding, arrays, devices):
    return pxla_put(aval, sharding, [0 * array for array in arrays], devices)


pxla_put = pxla.batched_device_put
WRONG = {
    "other arguments": lambda everything: None,
    "another kind of result": lambda aval, sharding, arrays, devices: arrays[0],
    "other values": zeros,
}


@pytest.mark.parametrize("way", ["right", "missing", *WRONG])
def test_the_shorter_way_is_taken_if_it_is_as_expected(monkeypatch, way):
    with monkeypatch.context() as patch:
        if way == "missing":
            patch.delattr(pxla, "batched_device_put")
        elif way != "right":
            patch.setattr(pxla, "batched_device_put", WRONG[way])
            # It is what device_put ends in, too.
            patch.setattr(jax, "device_put", lambda array, device: DEVICE_PUT_OF_TRIAL)
        put = putter([DEVICE], ALONE, has_link=True)
    monkeypatch.setattr(jax, "device_put", lambda arrays, device: PUBLIC)
    assert (put(ARRAYS["q"]) is PUBLIC) == (way != "right")


PUBLIC = object()
DEVICE_PUT_OF_TRIAL = jax.device_put(TRIAL, DEVICE)
