"""Addresses as Python's capsules, as which libraries take them."""

from __future__ import annotations

import ctypes

# A function object of our own: who sets the types of `ctypes.pythonapi.PyCapsule_New` sets them for
# everybody, and `jax.ffi.pycapsule` does.
_TYPES = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_new = _TYPES(("PyCapsule_New", ctypes.pythonapi))


def capsule(address: int, name: bytes | None = None):
    """A capsule of this name; what is at the address must outlive it."""
    return _new(address, name, None)
