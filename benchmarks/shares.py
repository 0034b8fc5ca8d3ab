"""Forward passes whose rows are divided between the host's cores and the device, beside what cores
and link move when both are kept busy, in one run.

    python benchmarks/shares.py FOLDER --device-memory 1536MiB --shares auto,0 --tokens 1,2,8,16,64

`--form` names the encoding that the cores' own speed is measured with. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import threading
import time
from statistics import median

import common
import numpy as np

MATRIX_BYTES = 64 << 20
MEASURED_S = 0.7


def matrices(form: str, count: int, width: int = 8192):
    """Matrices in memory of their own, of small numbers."""
    from jlayer.cores.cores import Matrix
    from jlayer.encodings.registry import encoding
    from jlayer.streaming.slots import HostMemory

    n_rows = MATRIX_BYTES // encoding(form).n_bytes((1, width))
    found, memory = [], HostMemory([0], pin=False)  # as weights lie, in large pages
    noise = np.random.default_rng(0).integers(16, 32, MATRIX_BYTES, np.uint8)
    for number in range(count):
        pieces, at, room = {}, 0, memory.room(number, MATRIX_BYTES)
        room[:] = noise
        for name, (dtype, shape) in encoding(form).pieces((n_rows, width)).items():
            n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            pieces[name] = room[at : at + n_bytes].view(dtype).reshape(shape)
            at += n_bytes
        found.append(Matrix(form, pieces, width))
    return found


def ceilings(form: str, columns: list[int], devices, *, n_threads: int, dtype: str) -> dict:
    """Bytes a second of the cores alone, the link alone, and of both at the same time. `dtype`: of
    the columns."""
    import jax.numpy as jnp

    from jlayer.cores.cores import Cores
    from jlayer.streaming.slots import HostMemory

    some, found = matrices(form, 24), {"columns": {}}
    has_link = devices.has_link
    pinned = HostMemory([128 << 20], pin=True) if has_link else None

    def move(ends, moved):
        before = None
        while not ends.is_set():
            now = devices.put(pinned.slot(0))
            if before is not None:
                before.block_until_ready()
            before = now
            moved.append(time.perf_counter())

    def link_speed(moved):
        return (len(moved) - 3) * (128 << 20) / (moved[-1] - moved[2])

    def with_link(work):
        ends, moved = threading.Event(), []
        thread = threading.Thread(target=move, args=(ends, moved))
        thread.start()
        result = work()
        ends.set()
        thread.join()
        return result, link_speed(moved)

    if has_link:
        _, found["link_alone"] = with_link(lambda: time.sleep(MEASURED_S))
    with Cores(n_threads) as cores:
        found["threads"] = cores.n_threads

        def cores_speed(n):
            kind, n_bytes = jnp.bfloat16 if dtype == "bfloat16" else np.float32, 0
            x = np.ones((n, some[0].width), kind)
            cores.multiply(some[:1], x)
            began = time.perf_counter()
            while time.perf_counter() - began < MEASURED_S:
                for matrix in some:
                    cores.multiply([matrix], x)
                    n_bytes += matrix.n_bytes
            return n_bytes / (time.perf_counter() - began)

        for n in columns:
            row = {"cores_alone": cores_speed(n)}
            if has_link:
                row["cores_beside"], row["link_beside"] = with_link(lambda n=n: cores_speed(n))
                row["both"] = row["cores_beside"] + row["link_beside"]
            found["columns"][n] = row
            common.say(
                f"{form}, {n} columns: "
                + ", ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in row.items())
            )
    if pinned:
        pinned.close()
    return found


def passes(model, n_tokens: int, count: int) -> dict:
    """Seconds of forward passes of `n_tokens` tokens, after two that are not timed."""
    from jlayer.plan.shapes import RunShape

    forward = model.engine.start(RunShape(1, n_tokens, max(64, n_tokens), sweeps=count))
    forward.compile(n_tokens)
    ids = [(7 * i) % model.config.vocab_size for i in range(n_tokens)]
    began = time.perf_counter()
    for _ in range(2):
        forward.sweep([ids], [0])
    first_s = time.perf_counter() - began
    before, seconds = model.engine.totals.host_product_bytes, []
    for _ in range(count):
        began = time.perf_counter()
        forward.sweep([ids], [0])
        seconds.append(time.perf_counter() - began)
    hosted = (model.engine.totals.host_product_bytes - before) / count
    plan = model.plan
    forward.close()
    return {
        "tokens": n_tokens,
        "first_two_s": first_s,
        "pass_s": common.summary(seconds),
        "bytes": plan.tiling.n_bytes,
        "host_product_bytes": hosted,
        "bytes_per_s": plan.tiling.n_bytes / median(seconds),
        "predicted_s": plan.decode_seconds if n_tokens == 1 else plan.sweep_seconds,
        "tile_bytes": plan.tile_bytes,
        "tiers": plan.as_dict()["tiers"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="1536MiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--shares", default="0,auto")
    parser.add_argument("--tokens", default="1,2,8,16,64")
    parser.add_argument("--form", help="bfloat16, int4, ...: measure the ceiling with it")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, help="of all shares in turn")
    parser.add_argument("--disk", action="store_true", help="keep nothing: all from disk")
    args = parser.parse_args()
    tokens = [int(n) for n in args.tokens.split(",")]
    result = {"card": common.card(), "options": vars(args), "shares": []}
    with common.GpuWatch() as watch, common.AnonymousWatch() as anonymous:
        from jlayer import AutoModel

        for share in args.shares.split(",") * args.rounds:
            began = time.perf_counter()
            with AutoModel.from_pretrained(
                args.folder,
                device=args.device,
                device_memory=args.device_memory,
                host_memory=args.host_memory,
                host_share=share,
                keeps_layers=not args.disk,
            ) as model:
                open_s = time.perf_counter() - began
                host = model.engine.host
                if args.form and host and "ceiling" not in result:
                    result["ceiling"] = ceilings(
                        args.form,
                        tokens,
                        model.engine.devices,
                        n_threads=host.cores.n_threads,
                        dtype=model.dtype,
                    )
                own = {"share": share, "open_s": open_s, "passes": []}
                own["speeds"] = str(model.plan.machine.host)
                common.say(f"share {share}: opened in {open_s:.1f} s, {own['speeds']}")
                for n in tokens:
                    row = passes(model, n, args.count)
                    own["passes"].append(row)
                    common.say(_line(row, result))
                own["plan"], own["memory"] = model.plan.as_dict(), model.engine.memory()
                own["compiles"] = len(model.engine.compiles)
                result["shares"].append(own)
    result["to_first"] = to_first(result["shares"])
    common.say(f"seconds to those of the first share, by tokens: {result['to_first']}")
    result["anonymous_peak_bytes"] = anonymous.peak_bytes
    result["smi_peak_mib"], result["smi_before_mib"] = watch.peak, watch.before
    common.say(
        f"nvidia-smi peak {watch.peak} MiB (before: {watch.before}); anonymous peak "
        f"{anonymous.peak_bytes >> 20} MiB"
    )
    common.last_line(result)


def to_first(shares: list[dict]) -> dict:
    """Share -> tokens -> the median of its rounds over that of the first share."""
    seconds: dict = {}
    for own in shares:
        for row in own["passes"]:
            of_share = seconds.setdefault(own["share"], {})
            of_share.setdefault(row["tokens"], []).append(row["pass_s"]["median"])
    first = next(iter(seconds.values()))
    return {
        share: {n: round(median(found[n]) / median(first[n]), 3) for n in first}
        for share, found in list(seconds.items())[1:]
    }


def _line(row, result):
    ceiling = result.get("ceiling", {}).get("columns", {}).get(row["tokens"], {})
    of = ceiling.get("both") or ceiling.get("cores_alone")
    share = f" = {row['bytes_per_s'] / of:.3f} of the ceiling" if of else ""
    return (
        f"{row['tokens']:4} tokens {row['pass_s']['median']:8.4f} s "
        f"({row['pass_s']['min']:.4f}-{row['pass_s']['max']:.4f}), predicted "
        f"{row['predicted_s']:.4f}; {row['bytes_per_s'] / 1e9:6.1f} GB/s{share}; "
        f"{row['host_product_bytes'] / row['bytes']:.2f} by the host; tiles of "
        f"{row['tile_bytes'] >> 20} MiB"
    )


if __name__ == "__main__":
    main()
