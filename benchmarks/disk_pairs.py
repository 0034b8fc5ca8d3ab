"""What share of the disk's raw speed sweeps reach, on a disk whose speed drifts. Raw reads and
sweeps take turns and are compared pair by pair, and both are compared with the kernel's counters.

    python benchmarks/disk_pairs.py FOLDER [--device cpu] [--pairs 5] \\
        [--mixed-host-memory 9GiB [--mixed-pairs 9]]

The same files are read raw (O_DIRECT, 16 MiB requests, two in flight), and nothing else is read,
before and after three sweeps in a row: a single sweep begins and ends with tiles half read. The
figure is the median of the ratios. --mixed-host-memory repeats this with part of the layers in host
memory, compared with the longer of what disk and link take alone.
"""

from __future__ import annotations

import argparse
import time

import common

RAW_S = 2.0
SWEEPS = 3


def pairs(model, paths, n_pairs: int) -> list[dict]:
    """Measures raw reads and sweeps in turn; sweeps are compared with the mean of the raw speeds
    before and after.

    A disk behind a host's cache reads faster what was read just before, and slower after anything
    else: one side alone is 0.7 to 1.1 times the other. Raw reads continue where the last ended.
    """
    from jlayer.plan.shapes import RunShape

    forward = model.engine.start(RunShape(1, 1, 64))
    forward.compile(1)
    from jlayer.measure.machine import (
        RawDisk,  # which starts JAX: the model must have set its cap before
    )

    disk, kernel = RawDisk(paths), common.KernelDisk(paths[0])

    def raw():
        forward.settle()  # what is read ahead for the next sweep is read beside nothing
        found = {}
        counted = kernel.watch(lambda: found.update(speed=disk.speed(RAW_S)))
        return {**found, "kernel": counted}

    began = time.perf_counter()
    forward.sweep([[5]], [0])
    first_s = time.perf_counter() - began
    common.say(f"first sweep, every byte checked: {first_s:.2f} s")
    found, before = [], raw()
    for _ in range(n_pairs):
        forward.sweep([[5]], [0])  # finds its first tiles read already: only the next one is steady
        read, put = model.engine.totals.read_bytes, model.engine.totals.put_bytes
        began = time.perf_counter()
        counted = kernel.watch(lambda: [forward.sweep([[5]], [0]) for _ in range(SWEEPS)])
        seconds = (time.perf_counter() - began) / SWEEPS
        after = raw()
        found.append(
            {
                "raw_disk": (before["speed"] + after["speed"]) / 2,
                "raw_disk_sides": [before, after],
                "sweep_s": seconds,
                "read_bytes": (model.engine.totals.read_bytes - read) / SWEEPS,
                "put_bytes": (model.engine.totals.put_bytes - put) / SWEEPS,
                "kernel": counted,
            }
        )
        before = after
    disk.close()
    return found


def agreement(row: dict) -> float | None:
    """The disk's share of raw reads as we count it, over the same as the kernel counts it."""
    ours = row["read_bytes"] / row["sweep_s"] / row["raw_disk"]
    counted = [side["kernel"]["bytes_per_s"] for side in row["raw_disk_sides"]]
    if None in counted:
        return None
    return ours / (row["kernel"]["bytes_per_s"] / (sum(counted) / 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device")
    parser.add_argument("--device-memory", default="1536MiB")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mixed-host-memory")
    parser.add_argument("--mixed-pairs", type=int)
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args)}
    link = float("inf")
    if args.device != "cpu":
        result["raw_link"] = common.summary(common.raw_link_speed())
        link = result["raw_link"]["median"]

    from jlayer import AutoModel

    given = {"device": args.device, "device_memory": args.device_memory}
    kinds = {"disk": {"keeps_layers": False}}
    if args.mixed_host_memory:
        kinds["mixed"] = {"host_memory": args.mixed_host_memory}
    for kind, options in kinds.items():
        with AutoModel.from_pretrained(args.folder, **given, **options) as model:
            paths = [path for path in model.engine.store.files if "embed" not in path]
            mixed = kind == "mixed" and args.mixed_pairs
            rows = pairs(model, paths, mixed or args.pairs)
        for row in rows:
            ideal = max(row["read_bytes"] / row["raw_disk"], row["put_bytes"] / link)
            row["share"] = ideal / row["sweep_s"]
            row["agreement"] = agreement(row)
            busy = row["kernel"]["busy"]
            common.say(
                f"{kind}: raw disk {row['raw_disk'] / 1e9:.2f} GB/s, "
                f"{row['read_bytes'] / 1e9:.2f} GB read in a sweep of {row['sweep_s']:.2f} s; "
                f"share of the ceiling {row['share']:.3f}"
                + (f"; by the kernel: disk busy {busy:.3f} of the time" if busy is not None else "")
            )
        result[kind] = {"pairs": rows, "share": common.summary([row["share"] for row in rows])}
        common.say(f"{kind}: median share of the ceiling {result[kind]['share']['median']:.3f}")
        if rows[0]["agreement"] is not None:
            found = common.summary([row["agreement"] for row in rows])
            busy = common.summary([row["kernel"]["busy"] for row in rows])
            result[kind] |= {"agreement": found, "busy": busy}
            common.say(
                f"{kind}: that share over the same by the kernel's count {found['median']:.4f} "
                f"({found['min']:.4f}-{found['max']:.4f}); disk busy {busy['median']:.3f}"
            )
    common.last_line(result)


if __name__ == "__main__":
    main()
