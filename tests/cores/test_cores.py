"""Products by the host's cores against float64 numpy: forms, shapes, threads, ends."""

import platform
import subprocess
import sys
import threading

import numpy as np
import pytest

from jlayer.convert.transform.packed import dequantize
from jlayer.cores import decode, kernels
from jlayer.cores.cores import WORTH_WAKING, Cores
from jlayer.cores.native import missing
from jlayer.cores.sharing import SPIN_S
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import UsageError
from tests.cores.matrices import FORMS, assert_is_product, inputs, matrix

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
# A width of four parts, one between, and the least that has a kernel; rows are no multiples of 4.
SHAPES = ((1, 64), (7, 192), (131, 2112))
ODD_SHAPES = ((3, 1), (5, 33), (2, 130), (9, 48))
COLUMNS = (1, 2, 3, 7, 8, 16, 33)


@pytest.fixture(scope="module")
def cores():
    with Cores(2) as found:
        yield found


@pytest.fixture(scope="module")
def without_avx512():
    with Cores(2, features="-avx512f") as found:
        yield found


@pytest.mark.parametrize("n_columns", COLUMNS)
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_the_decoded_weights(cores, form, n_columns):
    for rows, width in (*SHAPES, *ODD_SHAPES):
        some, x = matrix(form, rows, width, offset=3), inputs(n_columns, width)
        (y,) = cores.multiply([some], x)
        assert_is_product(y, x, some)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 features")
@pytest.mark.parametrize("form", FORMS)
def test_processors_without_avx512_compute_the_same(without_avx512, form):
    for n_columns in (1, 2, 4, 8):
        some, x = matrix(form, 9, 2112), inputs(n_columns, 2112)
        (y,) = without_avx512.multiply([some], x)
        assert_is_product(y, x, some)


@pytest.mark.parametrize("form", SCHEMES)
def test_weights_are_what_the_converter_says(form):
    for rows, width in (*SHAPES, *ODD_SHAPES):
        some = matrix(form, rows, width)
        expected = dequantize(SCHEMES[form], *some.pieces.values(), width=width)
        np.testing.assert_array_equal(decode.decoded(form, some.pieces, width), expected)


@pytest.mark.parametrize("form", FORMS)
def test_numpy_alone_computes_the_same(form):
    cores, some, x = Cores(native=False), matrix(form, 37, 192), inputs(3, 192)
    assert not cores.is_native
    assert_is_product(cores.multiply([some], x)[0], x, some)


def test_numpy_decodes_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(decode, "BLOCK_BYTES", 4 * 33 * 5)
    some, x = matrix("int4", 13, 33), inputs(2, 33)
    assert_is_product(decode.product(x, "int4", some.pieces, 33), x, some)


def test_widths_with_a_kernel():
    assert [width for width in range(1, 200) if kernels.is_native("int4", width)] == [64, 128, 192]
    assert kernels.is_native("int8", 16)
    assert not kernels.is_native("bfloat16", 24)
    assert kernels.is_native("nvfp4", 48)
    assert not kernels.is_native("mxfp4", 24)
    assert not kernels.is_native("ordered_packed4_g32_bfloat16", 64)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_matrices_of_several_forms_in_one_call(n_threads):
    """Kernels and numpy, and one without rows, in any order."""
    some = [matrix(form, 64 * n + 1, 192, seed=n) for n, form in enumerate((*FORMS, *FORMS[::-1]))]
    some.insert(3, matrix("int8", 0, 192))
    x = inputs(3, 192)
    with Cores(n_threads) as cores:
        for y, one in zip(cores.multiply(some, x), some, strict=True):
            assert_is_product(y, x, one)


def test_columns_of_any_layout(cores):
    some = matrix("int8", 21, 192)
    every_second = inputs(1, 384)[:, ::2]
    whole = (inputs(192, 5).T, inputs(10, 192)[::2], inputs(4, 193)[:, 1:], inputs(0, 192))
    for x in (*whole, every_second):
        assert_is_product(cores.multiply([some], x)[0], x, some)


def test_results_are_fresh(cores):
    some, x = matrix("int8", 20, 192), inputs(2, 192)
    first = cores.multiply([some], x)[0]
    kept = first.copy()
    cores.multiply([some], 2 * x)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("n_threads", [2, 5])
def test_thousands_of_products_in_a_row(n_threads):
    """Each is cut into many blocks; every so often the threads have gone to sleep before."""
    some, x = matrix("int8", 400, 1024), inputs(1, 1024)
    pause = threading.Event()
    with Cores(n_threads) as cores:
        expected = cores.multiply([some], x)[0]
        assert_is_product(expected, x, some)
        for turn in range(4000):
            y = cores.multiply([some], x)[0]
            assert (y == expected).all(), turn
            if turn % 200 == 0:
                pause.wait(20 * SPIN_S)


def test_threads_that_sleep_are_woken_for_a_long_product():
    some, x = matrix("int8", 1300, 1024), inputs(1, 1024)
    assert some.n_bytes > WORTH_WAKING
    pause = threading.Event()
    with Cores(5) as cores:
        expected = cores.multiply([some], x)[0]
        assert_is_product(expected, x, some)
        for turn in range(100):
            pause.wait(20 * SPIN_S)
            assert (cores.multiply([some], x)[0] == expected).all(), turn


def test_two_callers_at_once(cores):
    x, wrong = inputs(2, 192), []

    def multiply(seed):
        some = matrix("int4", 300 + seed, 192, seed=seed)
        expected = cores.multiply([some], x)[0]
        assert_is_product(expected, x, some)
        wrong.extend(
            turn for turn in range(500) if (cores.multiply([some], x)[0] != expected).any()
        )

    threads = [threading.Thread(target=multiply, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closed_cores_refuse_and_leave_no_thread():
    before = threading.active_count()
    cores, some, x = Cores(3), matrix("int8", 9, 64), inputs(1, 64)
    cores.multiply([some], x)
    assert threading.active_count() == before + 2
    cores.close()
    cores.close()
    assert threading.active_count() == before
    with pytest.raises(UsageError, match="these cores are closed"):
        cores.multiply([some], x)


def test_forgotten_cores_leave_no_thread():
    before = threading.active_count()
    cores = Cores(3)
    cores.multiply([matrix("int8", 9, 64)], inputs(1, 64))
    del cores
    assert threading.active_count() == before


def run(code):
    """Another interpreter that has `cores`, with one product behind them."""
    start = """
import os, sys
from jlayer.cores.cores import WORTH_WAKING, Cores
from tests.cores.matrices import assert_is_product, inputs, matrix
cores, some, x = Cores(3), matrix("int4", 99, 192), inputs(1, 192)
def product():
    assert_is_product(cores.multiply([some], x)[0], x, some)
product()
"""
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60, check=True
    )


def test_an_interpreter_ends_with_threads_awake():
    assert run("product()").stderr == ""


def test_the_child_of_a_fork_has_threads_of_its_own():
    done = run("""
child = os.fork()
product()
if child:
    assert os.waitpid(child, 0)[1] == 0
    product()
print("done")
""")
    assert done.stdout.split() == ["done", "done"]


def test_the_child_of_a_fork_ends_without_a_product():
    done = run("""
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    product()
else:
    cores.close()
print("done")
""")
    assert done.stdout.split() == ["done", "done"]


def test_without_llvmlite_the_advice_says_what_to_install():
    code = """
import sys
sys.modules["llvmlite"] = None
from jlayer.cores.cores import Cores, missing
from tests.cores.matrices import assert_is_product, inputs, matrix
some, x = matrix("int4", 9, 192), inputs(1, 192)
with Cores() as cores:
    assert not cores.is_native
    assert_is_product(cores.multiply([some], x)[0], x, some)
print(missing())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'llvmlite is not installed: pip install "llvmlite>=0.45"\n'
