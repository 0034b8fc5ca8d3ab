"""Arrays of any library in, and back in the kind that they were: by `tolist`, `__array__` or
DLPack, and by what of their library is imported already, as whoever made them has done.
"""

from __future__ import annotations

import sys

import numpy as np

from jlayer.errors import UsageError

READS = ("tolist", "__array__", "__dlpack__")  # what an array has one of, in order of preference


def is_array(value) -> bool:
    """Whether this is an array of some library: numpy, JAX, torch, TensorFlow, CuPy or another that
    exchanges arrays by DLPack."""
    return any(hasattr(value, name) for name in READS)


def as_lists(value):
    """An array as nested lists, copied to the host. Raises UsageError where it cannot be read."""
    if hasattr(value, "tolist"):
        return value.tolist()
    try:
        if hasattr(value, "__array__"):
            return np.asarray(value).tolist()
        return np.from_dlpack(value).tolist()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{_name(value)}: an array that cannot be read on the host ({error}); copy it there"
        ) from None


def as_kind(given, value: np.ndarray | tuple, *, like_ids: bool = False):
    """Arrays of numpy, or a tuple of them, as the kind that `given` was. `like_ids`: in its dtype
    too. numpy where that was no array, or one of a library that has no `from_dlpack`."""
    if isinstance(value, tuple):
        return tuple(as_kind(given, one, like_ids=like_ids) for one in value)
    if not is_array(given):
        return value
    library, dtype = type(given).__module__.partition(".")[0], None
    if like_ids:
        dtype = getattr(given, "dtype", None)
    if library == "numpy":
        return value if dtype is None else value.astype(dtype)
    if library == "torch":
        found = sys.modules["torch"].from_numpy(np.array(value))
        return found.to(device=given.device, dtype=dtype or found.dtype)
    if library in ("jax", "jaxlib"):
        import jax.numpy as jnp

        return jnp.asarray(value, dtype=dtype or value.dtype)
    if library == "tensorflow":
        return sys.modules["tensorflow"].convert_to_tensor(value, dtype=dtype)
    if library == "cupy":
        return sys.modules["cupy"].asarray(value, dtype=dtype)
    if hasattr(given, "__array_namespace__"):  # of the standard of array libraries
        found = given.__array_namespace__().from_dlpack(np.array(value))
        return found if dtype is None else given.__array_namespace__().astype(found, dtype)
    return value


def _name(value):
    return f"{type(value).__module__}.{type(value).__qualname__}"
