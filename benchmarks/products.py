"""What the host's cores reach: packed bytes a second of products with weights in memory, by form
and number of columns, beside the memory's own speed and XLA's product in bfloat16.

    python benchmarks/products.py
    python benchmarks/products.py --forms int4,int8 --columns 1,8 --threads 8 --repeats 9
    python benchmarks/products.py --dtype float32
    python benchmarks/products.py --pairs --forms q4_k,q8_0,nf4

The matrices are those of a 70B layer, at least `--gib` of each form, one after another, so that all
come from memory. With `--pairs` one core multiplies, and each product is followed by that of int4,
or of int8 for forms of 8 bits; the time is the thread's own, so others may use the machine. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import common
import jax
import ml_dtypes
import numpy as np

from jlayer.cores.cores import Cores, Matrix, missing
from jlayer.cores.topology import topology
from jlayer.encodings.registry import encoding
from jlayer.model.products import product

# Rows and inputs of attention's output, and of the MLP's two kinds, of a 70B layer.
SHAPES = ((8192, 8192), (28672, 8192), (8192, 28672))
# Random numbers that are repeated: drawing all would take longer than measuring.
N_RANDOM = 1_000_003
# What a thread adds up at a time when the memory's speed is measured.
READ_BYTES = 8 << 20


def matrices(form: str, least_bytes: int) -> list[Matrix]:
    """The shapes in turn until there are so many bytes, each in memory of its own."""
    found, n_bytes = [], 0
    while n_bytes < least_bytes:
        for rows, width in SHAPES:
            found.append(one_matrix(form, rows, width))
            n_bytes += found[-1].n_bytes
    return found


def filled(shape, dtype):
    rng = np.random.default_rng(0)
    if dtype.itemsize == 1:
        some = rng.integers(0, 256, N_RANDOM, dtype=np.uint8).view(dtype)
    else:
        some = (rng.standard_normal(N_RANDOM, dtype=np.float32) / 64).astype(dtype)
    return np.resize(some, shape)


def speeds(work, n_bytes: int, repeats: int) -> list[float]:
    """Bytes a second of `work()`, after one run that does not count."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(n_bytes / (time.perf_counter() - began))
    return found


def read_speeds(all_matrices, n_threads: int, repeats: int) -> list[float]:
    """Of adding up the bytes as 64-bit integers, by numpy on as many threads."""
    flat = [piece.reshape(-1).view(np.int64) for m in all_matrices for piece in m.pieces.values()]
    step = READ_BYTES // 8
    parts = [some[at : at + step] for some in flat for at in range(0, len(some), step)]
    with ThreadPoolExecutor(n_threads) as pool:
        return speeds(
            lambda: list(pool.map(np.sum, parts)), sum(part.nbytes for part in parts), repeats
        )


def xla_speeds(all_matrices, n_columns: int, repeats: int) -> list[float]:
    cpu = jax.devices("cpu")[0]  # where there is a GPU too, it is the default
    weights = [jax.device_put(m.pieces[""], cpu) for m in all_matrices]
    inputs = [columns(n_columns, m.width, "bfloat16") for m in all_matrices]
    inputs = [jax.device_put(x, cpu) for x in inputs]
    compiled = jax.jit(product)

    def work():
        for x, weight in zip(inputs, weights, strict=True):
            compiled(x, weight).block_until_ready()

    return speeds(work, sum(m.n_bytes for m in all_matrices), repeats)


def columns(n_columns, width, dtype):
    x = np.random.default_rng(1).standard_normal((n_columns, width), dtype=np.float32)
    return x.astype(getattr(ml_dtypes, dtype, dtype))


def line(name, n_columns, found, ceiling):
    share = statistics.median(found) / ceiling
    words = f"{name:>14} {n_columns:>4} columns {statistics.median(found) / 1e9:8.2f} GB/s"
    common.say(
        f"{words} ({min(found) / 1e9:.2f} to {max(found) / 1e9:.2f}), {share:.2f} of reading"
    )


def measured(args) -> dict:
    card = common.card() | {"topology": topology().reason}
    for key, value in card.items():
        common.say(f"{key:>10}   {value}")
    common.say(missing() or "kernels compiled by llvmlite")
    results = {}
    with Cores(args.threads) as cores:
        common.say(f"{cores.n_threads} threads; at least {args.gib} GiB of each form")
        for form in ("bfloat16", *(form for form in args.forms.split(",") if form != "bfloat16")):
            some = matrices(form, int(args.gib * 2**30))
            total = sum(m.n_bytes for m in some)
            reading = read_speeds(some, cores.n_threads, args.repeats)
            ceiling = max(reading)
            line(f"read {form}", 0, reading, ceiling)
            results[form] = {"read": common.summary(reading)}
            for n_columns in map(int, args.columns.split(",")):
                xs = {width: columns(n_columns, width, args.dtype) for _, width in SHAPES}

                def work(some=some, xs=xs):
                    for matrix in some:
                        cores.multiply([matrix], xs[matrix.width])

                found = speeds(work, total, args.repeats)
                line(form, n_columns, found, ceiling)
                results[form][n_columns] = common.summary(found)
                if form == "bfloat16":
                    found = xla_speeds(some, n_columns, args.repeats)
                    line("XLA bfloat16", n_columns, found, ceiling)
                    results.setdefault("xla_bfloat16", {})[n_columns] = common.summary(found)
        gains(results, args)
        return {
            "card": card,
            "threads": cores.n_threads,
            "dtype": args.dtype,
            "bytes_per_s": results,
        }


def of_pairs(args) -> dict:
    """Packed bytes a second of each form over those of the form it is held against, by columns: the
    median of pairs, and the fastest of each."""
    card = common.card()
    rows, width = SHAPES[0]
    results: dict[str, dict] = {}
    with Cores(1) as cores:

        def speed(matrix, x):
            began = time.thread_time()
            cores.multiply([matrix], x)
            return matrix.n_bytes / (time.thread_time() - began)

        peers = {name: one_matrix(name, rows, width) for name in ("int4", "int8")}
        for form in args.forms.split(","):
            matrix = one_matrix(form, rows, width)
            peer = "int8" if matrix.n_bytes > 7 / 8 * rows * width else "int4"
            results[form] = {"against": peer}
            for n_columns in map(int, args.columns.split(",")):
                x = columns(n_columns, width, args.dtype)
                both = (matrix, peers[peer])
                [speed(one, x) for one in both]  # the first of each does not count: it compiles
                found = [[speed(one, x) for one in both] for _ in range(args.repeats)]
                fastest = max(own for own, _ in found) / max(other for _, other in found)
                median = statistics.median(own / other for own, other in found)
                results[form][n_columns] = {"pairs": round(median, 2), "fastest": round(fastest, 2)}
                words = f"{form:>26} {n_columns:>3} columns: {median:.2f} of {peer}"
                common.say(f"{words} (of the fastest {fastest:.2f})")
    shape = {"rows": rows, "inputs": width, "repeats": args.repeats}
    about = {"card": card, "threads": 1, "dtype": args.dtype} | shape
    return about | {"of_packed_bytes_per_s": results}


def one_matrix(form, rows, width):
    pieces = {
        name: filled(shape, np.dtype(getattr(ml_dtypes, dtype, dtype)))
        for name, (dtype, shape) in encoding(form).pieces((rows, width)).items()
    }
    return Matrix(form, pieces, width)


def gains(results, args):
    """How much sooner a form is done than XLA's bfloat16, against how many fewer bytes it has."""
    for form in (form for form in args.forms.split(",") if form not in ("bfloat16", "float32")):
        ratios = {
            n: round(results[form][n]["median"] / results["xla_bfloat16"][n]["median"], 2)
            for n in map(int, args.columns.split(","))
        }
        common.say(f"{form}: of the cut in bytes against XLA's bfloat16, by columns: {ratios}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forms", default="bfloat16,int8,int4")
    parser.add_argument("--columns", default="1,2,4,8,16,64")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the columns"
    )
    parser.add_argument("--threads", type=int, default=None, help="default: as the machine has")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", action="store_true", help="against int4 or int8, in turn")
    args = parser.parse_args()
    common.last_line(of_pairs(args) if args.pairs else measured(args))


if __name__ == "__main__":
    main()
