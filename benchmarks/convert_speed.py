"""A conversion against `cp --reflink=never` plus a sync of what it copied, side by side.

    python benchmarks/convert_speed.py [--shape 8b] [--layers 4] [--pairs 5] [--cold] [--home
    FOLDER]

Both write the same bytes to the same disk, in turn, each to a folder that is not there before. The
conversion also looks at every number, hashes every byte, and syncs every file on its own; its time
is that of the whole program. Its peak memory is what the system counted. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import make_model

from tests.convert.checkpoints import random_checkpoint


def timed(*words) -> tuple[float, int]:
    """Seconds and peak resident bytes of a program."""
    started = time.perf_counter()
    pid = os.posix_spawnp(words[0], [str(word) for word in words], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{words[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def copy(source: Path, target: Path) -> float:
    script = 'cp -r --reflink=never "$1" "$2" && sync "$2"/* "$2"'
    return timed("sh", "-c", script, "sh", source, target)[0]


def convert(source: Path, target: Path) -> tuple[float, int]:
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
        copies, conversions, peaks = [], [], []
        for _ in range(args.pairs):
            settle(source, target, cold=args.cold)
            copies.append(copy(source, target))
            settle(source, target, cold=args.cold)
            took_s, peak = convert(source, target)
            conversions.append(took_s)
            peaks.append(peak)
            common.say(f"cp {copies[-1]:.2f} s, convert {took_s:.2f} s, {peak / 1e6:.0f} MB")
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
            "peak_bytes": max(peaks),
        }
    )


if __name__ == "__main__":
    main()
