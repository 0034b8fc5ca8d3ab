"""The speed of a conversion, compared with `cp --reflink=never` and a sync of the copies.

    python benchmarks/convert_speed.py [--shape 8b] [--layers 4] [--pairs 5] [--cold] [--home
    FOLDER]

Both write the same bytes to the same disk, each to a new folder. They take turns, and which of them
goes first changes from pair to pair. The conversion also looks at every number, hashes every byte
and syncs every file; its time is that of the whole program. Its peak memory is what the system
counted. "Others" is the share of all processors that other programs used meanwhile: where that is
large, the ratio means little. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import make_model

from tests.convert.checkpoints import random_checkpoint


class Run(NamedTuple):
    """Seconds of a program, those of processors that it used, and that others did meanwhile; its
    peak resident bytes."""

    took_s: float
    processor_s: float
    others_s: float
    peak_bytes: int


def timed(*words) -> Run:
    started, busy = time.perf_counter(), busy_s()
    pid = os.posix_spawnp(words[0], [str(word) for word in words], os.environ)
    peaks, watch = [0], threading.Event()
    watcher = threading.Thread(target=follow, args=(pid, peaks, watch))
    watcher.start()
    _, status, usage = os.wait4(pid, 0)
    took_s = time.perf_counter() - started
    watch.set()
    watcher.join()
    if status:
        raise SystemExit(f"{words[0]} ended with {os.waitstatus_to_exitcode(status)}")
    used_s = usage.ru_utime + usage.ru_stime
    others_s = max(0.0, busy_s() - busy - used_s)
    return Run(took_s, used_s, others_s, max(peaks))


def follow(pid: int, peaks: list[int], ended: threading.Event) -> None:
    """Notes a process's peak from time to time. Not ru_maxrss, which it inherits from this one."""
    with contextlib.suppress(OSError):  # it may end at any time
        while not ended.wait(0.02):
            status = Path(f"/proc/{pid}/status").read_text()
            peaks += [int(line.split()[1]) << 10 for line in status.split("\n") if "VmHWM" in line]


def busy_s() -> float:
    """Seconds that all processors have worked since the start of the system."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def copy(source: Path, target: Path) -> Run:
    script = 'cp -r --reflink=never "$1" "$2" && sync "$2"/* "$2"'
    return timed("sh", "-c", script, "sh", source, target)


def convert(source: Path, target: Path) -> Run:
    return timed(sys.executable, "-m", "convert", source, target, "--json")


def settle(source: Path, target: Path, *, cold: bool) -> None:
    """Nothing written before is still on its way, and the source is in memory, or not."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(16 << 20):
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=make_model.SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the source from memory first")
    parser.add_argument("--home", help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    common.say(str(common.card()))
    with tempfile.TemporaryDirectory(dir=args.home) as home:
        source, target = Path(home) / "source", Path(home) / "target"
        config = make_model.config(args.shape, args.layers)
        random_checkpoint(source, n_shards=max(2, args.layers // 2), **config)
        n_bytes = sum(path.stat().st_size for path in source.iterdir())
        runs: dict = {copy: [], convert: []}
        for n in range(args.pairs):
            for work in (copy, convert) if n % 2 == 0 else (convert, copy):
                settle(source, target, cold=args.cold)
                runs[work].append(work(source, target))
                common.say(f"{work.__name__}: {runs[work][-1]}")
    copies, conversions = [[run.took_s for run in runs[work]] for work in (copy, convert)]
    ratios = [a / b for a, b in zip(copies, conversions, strict=True)]
    common.last_line(
        {
            "card": common.card(),
            "shape": args.shape,
            "layers": args.layers,
            "cold": args.cold,
            "bytes": n_bytes,
            "cp_s": common.summary(copies),
            "convert_s": common.summary(conversions),
            "convert_bytes_per_s": n_bytes / statistics.median(conversions),
            "share_of_cp": common.summary(ratios),
            "processor_s": common.summary([run.processor_s for run in runs[convert]]),
            "others": common.summary(
                [run.others_s / run.took_s / os.cpu_count() for run in runs[copy] + runs[convert]]
            ),
            "peak_bytes": max(run.peak_bytes for run in runs[convert]),
        }
    )


if __name__ == "__main__":
    main()
