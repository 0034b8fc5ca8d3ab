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
        raise _unreadable(value, error) from None


def as_floats(value, *, name: str) -> np.ndarray:
    """An array of any library as numpy's on the host, in its own dtype: no copy where it lies there
    already. Raises UsageError where it is none or cannot be read. `name`: what it is."""
    if not is_array(value):
        raise UsageError(f"{name}: found {type(value).__name__}, expected an array")
    library = _library(value)
    try:
        if library == "torch":
            value = value.detach().cpu()
            if value.dtype is not sys.modules["torch"].bfloat16:
                return value.numpy()
            bits = value.contiguous().view(sys.modules["torch"].int16)  # numpy has no bfloat16
            return bits.numpy().view("bfloat16")
        if library == "cupy":
            return value.get()
        if hasattr(value, "__array__"):
            return np.asarray(value)
        return _exchanged(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise _unreadable(value, error) from None


def _exchanged(value):
    try:
        return np.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError):  # bfloat16, which it has not
        import jax.numpy as jnp

        return np.asarray(jnp.from_dlpack(value))


def as_kind(given, value: np.ndarray | tuple, *, like_ids: bool = False):
    """Arrays of numpy, or a tuple of them, as the kind that `given` was. `like_ids`: in its dtype
    too. numpy where that was no array, or one of a library that has no `from_dlpack`."""
    if isinstance(value, tuple):
        return tuple(as_kind(given, one, like_ids=like_ids) for one in value)
    if not is_array(given):
        return value
    library, dtype = _library(given), None
    if like_ids:
        dtype = getattr(given, "dtype", None)
    if library == "numpy":
        return value if dtype is None else value.astype(dtype)
    if library == "torch":
        found = sys.modules["torch"].from_numpy(np.array(value))
        return found.to(device=given.device, dtype=dtype or found.dtype)
    if library in ("jax", "jaxlib"):
        import jax.numpy as jnp

        return jnp.asarray(value, dtype=dtype)  # int64 becomes int32, unless JAX is told otherwise
    if library == "tensorflow":
        return sys.modules["tensorflow"].convert_to_tensor(value, dtype=dtype)
    if library == "cupy":
        return sys.modules["cupy"].asarray(value, dtype=dtype)
    if hasattr(given, "__array_namespace__"):  # of the standard of array libraries
        found = given.__array_namespace__().from_dlpack(np.array(value))
        return found if dtype is None else given.__array_namespace__().astype(found, dtype)
    return value


def _library(value):
    return type(value).__module__.partition(".")[0]


def _unreadable(value, error):
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    why = str(error).partition("\n")[0]
    return UsageError(
        f"{kind}: an array that cannot be read on the host ({why}); copy it there, or call this "
        "outside of tf.function or jax.jit, inside of which arrays have no numbers"
    )
