"""Check the figures of `jlayer bench` against the kernel's counters, against plain copies in
another process, and against dd.

    python benchmarks/raw_agreement.py FOLDER [--pairs 9] [--device cpu] [--device-memory 1536MiB]

Share: the disk's share of its ceiling in sweeps from disk, as bench has it, and the same from the
kernel's count of the disk's bytes in the same windows. Disk: a plain loop over the same files with
as many requests in flight, before and after raw reads of ours. Link: `cuMemcpyHtoDAsync` into
memory of the driver's own. dd (`iflag=direct bs=16M`, file after file) has one request in flight
and a buffer mostly in small pages, though huge ones are asked for, so that each request is cut into
many. It reads more slowly; the ratio shows by how much. All figures are medians of ratios.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import time

import common

RAW_S = 3.0
HERE = os.path.dirname(os.path.abspath(__file__))


def in_another_process(call: str):
    """What a call of something in `common` gives there."""
    code = f"import common, json; print(json.dumps(common.{call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE
    )
    return json.loads(done.stdout)


def dd_speed(paths: list[str]) -> float:
    """Bytes a second of dd over files, one after another."""
    words = 'for f; do dd if="$f" of=/dev/null bs=16M iflag=direct status=none; done'
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    began = time.perf_counter()
    subprocess.run(["sh", "-c", words, "sh", *paths], env=env, check=True)
    return sum(map(os.path.getsize, paths)) / (time.perf_counter() - began)


def disk_pairs(folder: str, n_pairs: int) -> list[dict]:
    from jlayer.measure.machine import RawDisk

    paths = sorted(glob.glob(os.path.join(os.path.abspath(folder), "layer-*.safetensors")))
    disk = RawDisk(paths)
    disk.speed(RAW_S)

    def others():
        return in_another_process(f"raw_disk_speed({paths!r})"), dd_speed(paths)

    rows, before = [], others()
    for _ in range(n_pairs):
        ours, after = disk.speed(RAW_S), others()
        loop, dd = ((first + second) / 2 for first, second in zip(before, after, strict=True))
        rows.append({"ours": ours, "loop": loop, "dd": dd})
        before = after
        common.say("disk: {ours:.3e} bytes/s, a loop {loop:.3e}, dd {dd:.3e}".format(**rows[-1]))
    disk.close()
    return rows


def share_pairs(folder: str, **options) -> list[dict]:
    """The disk's share of its ceiling, window by window, as bench has it and by the kernel."""
    from jlayer import AutoModel
    from jlayer.measure.bench import Bench

    kernel, raws, sweeps = common.KernelDisk(folder), [], []

    def watched(windows, work):
        counted = kernel.watch(lambda: windows.append({"ours": work()}))
        windows[-1]["kernel"] = counted
        return windows[-1]["ours"]

    class Watched(Bench):
        def read_raw(self, disk):
            self.forward.settle()
            return watched(raws, lambda: Bench.read_raw(self, disk))

        def time_in_a_row(self, n_tokens, count):
            return watched(sweeps, lambda: Bench.time_in_a_row(self, n_tokens, count))

    with AutoModel.from_pretrained(folder, keeps_layers=False, **options) as model:
        bench = Watched(model)
        bench.sizes = (1,)
        bench.measure_machine()
        bench.first_sweep()
        bench.measure_sweeps()
        n_bytes = bench.disk_bytes
    rows = []
    for before, sweep, after in zip(raws, sweeps, raws[1:], strict=False):
        ours = n_bytes / sweep["ours"] / ((before["ours"] + after["ours"]) / 2)
        sides = [side["kernel"]["bytes_per_s"] for side in (before, after)]
        counted = None if None in sides else sweep["kernel"]["bytes_per_s"] / (sum(sides) / 2)
        rows.append({"ours": ours, "kernel": counted, "busy": sweep["kernel"]["busy"]})
        common.say(f"share: bench {ours:.4f}, kernel {counted and round(counted, 4)}")
    return rows


def link_pairs(n_pairs: int) -> list[dict]:
    import jax

    from jlayer.measure.machine import link_speeds, median

    rows = []
    for _ in range(n_pairs):
        ours = median(link_speeds(jax.devices()[0]))
        rows.append({"ours": ours, "copy": median(in_another_process("raw_link_speed()"))})
        common.say(f"link: ours {ours / 1e9:.2f} GB/s, copy {rows[-1]['copy'] / 1e9:.2f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    result = {"card": common.card(), "options": vars(args)}
    options = {"device": args.device, "device_memory": args.device_memory}
    kinds = {
        "share": (share_pairs(args.folder, **options), ("kernel",)),
        "disk": (disk_pairs(args.folder, args.pairs), ("loop", "dd")),
    }
    if args.device != "cpu":
        kinds["link"] = (link_pairs(3), ("copy",))
    for kind, (rows, others) in kinds.items():
        result[kind] = {"pairs": rows}
        for other in others:
            if rows[0][other] is None:
                common.say(f"{kind}: not compared: the kernel has no counters of this disk")
                continue
            ratio = common.summary([row["ours"] / row[other] for row in rows])
            result[kind][f"ours / {other}"] = ratio
            common.say(f"{kind}: ours / {other}, median of {ratio['n']}: {ratio['median']:.3f}")
    common.last_line(result)


if __name__ == "__main__":
    main()
