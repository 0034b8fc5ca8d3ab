"""Whether the ceilings that `jlayer bench` measures are the machine's: against dd and a plain copy,
in turn.

    python benchmarks/raw_agreement.py FOLDER [--pairs 9] [--device cpu]

Disk: two `dd iflag=direct bs=16M` at once, each over its half of the layer files, before and after
each raw read of ours, each until it no longer changes. They are given huge pages as ours has them:
a request over small ones is cut into pieces of 1 MiB on its way to many a disk. Link:
`cuMemcpyHtoDAsync` into memory of the driver's own, in another process. The figure is the median
of the ratios.
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

TIMES = 4


def dd_speed(paths: list[str]) -> float:
    """Bytes a second of two dd at once, over their files TIMES times, so that little time is left
    where one has ended and the other goes on alone."""
    through = 'for f; do dd if="$f" of=/dev/null bs=16M iflag=direct status=none; done; '
    words = TIMES * through
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    shell = ["sh", "-c", words, "sh"]
    began = time.perf_counter()
    running = [subprocess.Popen([*shell, *paths[half::2]], env=env) for half in (0, 1)]
    assert [one.wait() for one in running] == [0, 0]
    return TIMES * sum(map(os.path.getsize, paths)) / (time.perf_counter() - began)


def disk_pairs(folder: str, n_pairs: int) -> list[dict]:
    from jlayer.run.raw import RawDisk, steady

    paths = sorted(glob.glob(os.path.join(folder, "layer-*.safetensors")))
    paths = paths[: len(paths) // 2 * 2]
    disk = RawDisk(paths)
    rows, before = [], steady(lambda: dd_speed(paths))
    for _ in range(n_pairs):
        ours = disk.steady_speed(1.0)
        after = steady(lambda: dd_speed(paths))
        rows.append({"ours": ours, "dd": (before + after) / 2})
        before = after
        common.say(f"disk: ours {ours / 1e9:.3f} GB/s, dd around it {rows[-1]['dd'] / 1e9:.3f}")
    disk.close()
    return rows


def link_pairs(n_pairs: int) -> list[dict]:
    import jax

    from jlayer.run.raw import link_speeds, median

    code = "import common, json; print(json.dumps(common.raw_link_speed()))"
    here, rows = os.path.dirname(os.path.abspath(__file__)), []
    for _ in range(n_pairs):
        ours = median(link_speeds(jax.devices()[0]))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here
        )
        rows.append({"ours": ours, "copy": median(json.loads(done.stdout))})
        common.say(f"link: ours {ours / 1e9:.2f} GB/s, copy {rows[-1]['copy'] / 1e9:.2f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    result = {"card": common.card(), "options": vars(args)}
    kinds = {"disk": (disk_pairs(args.folder, args.pairs), "dd")}
    if args.device != "cpu":
        kinds["link"] = (link_pairs(3), "copy")
    for kind, (rows, other) in kinds.items():
        ratio = common.summary([row["ours"] / row[other] for row in rows])
        result[kind] = {"pairs": rows, "ratio": ratio}
        common.say(f"{kind}: ours / {other}, median of {ratio['n']}: {ratio['median']:.3f}")
    common.last_line(result)


if __name__ == "__main__":
    main()
