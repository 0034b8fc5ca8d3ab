"""Puts arrays of host memory on devices.

`jax.device_put` takes any tree of any values, and looks at each: 90 to 250 µs an array beside an
H100, as long as 5 to 13 MB take to cross the link. What it ends in takes 30 µs; that is not public,
so it is tried once and compared, and where it is missing or differs public functions do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

TRIAL = np.arange(3, dtype=np.uint8)


def putter(
    devices: Sequence[jax.Device], sharding, *, has_link: bool, n_hosts: int = 1
) -> Callable:
    """A function (an array, or arrays by name) -> the same on each of the devices, on their way.
    Given a list, one for each device, the array of which these are the rows. `sharding`: of the
    array. With several hosts these are the devices of one; the others put their part of the array
    to theirs.

    Without a link an aligned array may be the host's memory itself, as `jax.device_put` has it.
    """
    if n_hosts > 1:
        put = _part(devices, sharding, n_hosts)
    else:
        put = (_direct(devices, sharding) if has_link else None) or _public(devices, sharding)

    def put_all(arrays):
        if isinstance(arrays, dict):
            return {name: put(array) for name, array in arrays.items()}
        return put(arrays)

    return put_all


def _public(devices, sharding):
    def put(array):
        if not isinstance(array, list):
            return jax.device_put(array, sharding)
        own = [jax.device_put(*pair) for pair in zip(array, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(_shape(array), sharding, own)

    return put


def _part(devices, sharding, n_hosts):
    """`jax.device_put` would first ask the other hosts whether they put the same."""

    def put(array):
        is_dealt = isinstance(array, list)
        shape, each = _shape(array), array if is_dealt else [array] * len(devices)
        if is_dealt:
            shape = (n_hosts * shape[0], *shape[1:])
        own = [jax.device_put(*pair) for pair in zip(each, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, own)

    return put


def _direct(devices, sharding):
    """How one array is put; None where that is not as expected."""
    types, devices = {}, list(devices)
    try:
        from jax._src.interpreters.pxla import batched_device_put

        def put(array):
            each = array if isinstance(array, list) else [array] * len(devices)
            key = _shape(array), each[0].dtype
            if key not in types:
                types[key] = jax.typeof(jax.ShapeDtypeStruct(*key))
            return batched_device_put(types[key], sharding, each, devices)

        is_dealt = not sharding.is_fully_replicated
        trial = [TRIAL] * len(devices) if is_dealt else TRIAL
        found, expected = put(trial), _public(devices, sharding)(trial)
        is_same = (np.asarray(found) == np.asarray(expected)).all()
        is_same = is_same and found.sharding == expected.sharding
        return put if is_same and found.committed == expected.committed else None
    except (ImportError, AttributeError, TypeError):
        return None


def _shape(array):
    if not isinstance(array, list):
        return array.shape
    return (sum(each.shape[0] for each in array), *array[0].shape[1:])
