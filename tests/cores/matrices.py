"""Random matrices of every form, and what their products should be."""

import ml_dtypes
import numpy as np

from jlayer.cores.cores import Matrix
from jlayer.cores.decode import decoded, some_rows
from jlayer.encodings.registry import encoding

FORMS = ("int4", "int8", "bfloat16", "float16", "float32")
# Products are summed in float32 in a few dozen chains: the error against the sum of magnitudes.
TOLERANCE = 1e-6


def matrix(form, rows, width, *, seed=0, offset=0):
    """Every byte of it is random; pieces begin `offset` bytes into their memory, and are
    read-only."""
    rng, pieces = np.random.default_rng(seed), {}
    for name, (dtype, shape) in encoding(form).pieces((rows, width)).items():
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if dtype.itemsize == 1:
            pieces[name] = rng.integers(0, 256, shape, dtype=np.uint8).view(dtype)
        else:
            pieces[name] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    return placed(form, pieces, width, offset=offset)


def placed(form, pieces, width, *, offset=0):
    """A matrix whose pieces begin `offset` bytes into their memory, and are read-only."""
    found = {}
    for name, numbers in pieces.items():
        memory = np.zeros(numbers.nbytes + offset, np.uint8)
        memory[offset:] = numbers.reshape(-1).view(np.uint8)
        memory.flags.writeable = False
        found[name] = memory[offset:].view(numbers.dtype).reshape(numbers.shape)
    return Matrix(form, found, width)


def inputs(n_columns, width, seed=1):
    return np.random.default_rng(seed).standard_normal((n_columns, width), dtype=np.float32)


def assert_is_product(y, x, matrix, *, rounded=False):
    """`rounded`: each decoded weight is rounded to bfloat16."""
    pieces = some_rows(matrix.form, matrix.pieces, 0, matrix.n_rows)
    weights = decoded(matrix.form, pieces, matrix.width)
    weights = (weights.astype(ml_dtypes.bfloat16) if rounded else weights).astype(np.float64)
    x = x.astype(np.float64)
    assert y.dtype == np.float32
    assert y.shape == (len(x), matrix.n_rows)
    bound = np.abs(x) @ np.abs(weights).T
    assert (np.abs(y - x @ weights.T) <= TOLERANCE * bound).all()
