"""A run within the limits of a small board: 2 GiB of memory, some cores, a slow disk.

    python benchmarks/edge.py FOLDER [--memory 2GiB] [--cores 2] [--disk 90MB/s] [--tokens 3]

Runs `jlayer generate FOLDER --preset board-2gb` in control groups of its own (version 1 or 2),
below those that this process is in, with its memory, its cores and its reads limited, and removes
them afterwards. Where none can be made, the run is measured without limits, which the result says.
The page cache counts in a group as well, but gives way; the model's files are taken out of it
before. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import common

from jlayer.sizes import parse_bytes

ROOT = Path("/sys/fs/cgroup")
NAME = f"jlayer-edge-{os.getpid()}"
PERIOD_US = 100_000


def homes() -> dict[str, Path]:
    """controller -> the folder of the group that this process is in; "" is that of version 2."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            folder = (ROOT / name if name else ROOT) / path.lstrip("/")
            if folder.is_dir():
                found[name] = folder
    return found


def disk_of(folder: str) -> str | None:
    """MAJOR:MINOR of the whole disk that a folder lies on."""
    device = os.stat(folder).st_dev
    here = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not here.exists():
        return None
    here = here.resolve()
    whole = here.parent if (here / "partition").exists() else here
    return (whole / "dev").read_text().strip()


def limits(memory: int, cores: float, speed: int, disk: str | None) -> list[tuple]:
    """(controller, file of version 1, its text, file of version 2, its text)."""
    quota = int(cores * PERIOD_US)
    found = [
        *[("memory", "memory.limit_in_bytes", str(memory), "memory.max", str(memory))],
        *[("cpu", "cpu.cfs_quota_us", str(quota), "cpu.max", f"{quota} {PERIOD_US}")],
    ]
    if disk is not None:
        v1 = ("blkio.throttle.read_bps_device", f"{disk} {speed}")
        found.append(("blkio", *v1, "io.max", f"{disk} rbps={speed}"))
    return found


def groups(wanted) -> tuple[dict[str, Path], list[str]]:
    """(group by controller, what of the limits holds)."""
    own, made, held = homes(), {}, []
    for controller, v1, text, v2, text2 in wanted:
        home, file, words = own.get(controller), v1, text
        if home is None:
            home, file, words = own.get(""), v2, text2
        if home is None:
            continue
        group = home / NAME
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            made[controller] = group
            (group / file).write_text(words)
            held.append(f"{file} {words}")
    return made, held


def forget(folder: str) -> None:
    """Takes the files of a folder out of the page cache, which would hide the disk."""
    os.sync()
    for path in Path(folder).iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def peak(group: Path | None) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if group is not None and (group / name).exists():
            return int((group / name).read_text())
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--cores", type=float, default=4)
    parser.add_argument("--disk", default="90MB/s")
    parser.add_argument("--tokens", type=int, default=3)
    args = parser.parse_args()
    memory, speed = parse_bytes(args.memory, option="--memory"), args.disk.removesuffix("/s")
    speed = parse_bytes(speed, option="--disk")
    forget(args.folder)
    made, held = groups(limits(memory, args.cores, speed, disk_of(args.folder)))

    def enter():
        for group in made.values():
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "jlayer", "generate", args.folder, "--preset", "board-2gb"]
    command += ["--prompt-ids", "1,2,3,4", "-n", str(args.tokens), "--json"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        group_peak = peak(made.get("memory"))
    finally:
        for group in set(made.values()):
            with suppress(OSError):
                group.rmdir()
    found = json.loads(done.stdout) if done.stdout else {}
    print(
        json.dumps(
            {
                "limits_held": held,
                "exit_code": done.returncode,
                "seconds": time.perf_counter() - began,
                "peak_rss_bytes": used,
                "group_peak_bytes": group_peak,
                "memory": found.get("memory"),
                "stats": found.get("stats"),
                "token_ids": found.get("token_ids"),
                "planned": found.get("plan", {}).get("sweep"),
                "card": common.card(),
            }
        )
    )


if __name__ == "__main__":
    main()
