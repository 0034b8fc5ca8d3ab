"""Seconds from starting jlayer to the first token, in fresh processes: cold, with the model's files
out of the page cache, and warm, with all of them in it.

    python benchmarks/opening.py MODEL --device-memory 1536MiB --rounds 3 --json OUT

Cold and warm take turns. `first_token_s`: from opening the model, as jlayer's own figures say;
`process_s`: of the whole process, with Python, the imports, and closing. `left_bytes`: what of the
files lies in the page cache after a start, for the next one to find. `touch`: bytes a second of
touching fresh memory, before each start. A virtual machine whose host takes back free memory and
gives it again slowly (0.5 GB/s were seen) measures its host here. `--other FOLDER` starts the
jlayer of another folder in turn with this one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import glob
import json
import mmap
import os
import subprocess
import sys
import time

import common

FIGURES = ("first_token_s", "load_s", "prefill_s", "stall_s")
CHUNK = 16 << 20
TOUCHED = 512 << 20
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    args = arguments()
    sources = [HERE, *([args.other] if args.other else [])]
    rows = {(source, state): [] for source in sources for state in ("cold", "warm")}
    for number in range(args.rounds):
        for (source, state), found in rows.items():
            prepare(args.model, state)
            speed = touch_speed()
            found.append(one := {**start(args, source), "touch": speed})
            one["left_bytes"] = cached_bytes(args.model)
            common.say(
                f"{name_of(source)}{state} {number + 1}: first token after "
                f"{one['first_token_s']:.2f} s (process {one['process_s']:.2f} s), "
                f"{one['read_bytes'] / 1e9:.2f} GB read, {one['cached_bytes'] / 1e9:.2f} of them "
                f"from the page cache, {one['left_bytes'] / 1e9:.2f} there now"
            )
    result = {**common.card(), "model": os.path.basename(os.path.normpath(args.model))}
    for (source, state), found in rows.items():
        summed = {name: common.summary([one[name] for one in found]) for name in found[0]}
        result[f"{name_of(source)}{state}"] = summed
        seconds = summed["first_token_s"]
        common.say(
            f"{name_of(source)}{state}: {seconds['median']:.2f} s to the first token "
            f"({seconds['min']:.2f} to {seconds['max']:.2f}, {seconds['n']} starts)"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    common.last_line(result)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share")
    parser.add_argument("--other", metavar="FOLDER", help="of another jlayer, to compare with")
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    return parser.parse_args()


def name_of(source: str) -> str:
    return "" if source == HERE else f"{os.path.basename(os.path.normpath(source))} "


def files_of(folder: str) -> list[str]:
    paths = glob.glob(os.path.join(glob.escape(folder), "*"))
    return [path for path in paths if os.path.isfile(path)]


def prepare(folder: str, state: str) -> None:
    """Reads the files of a folder into the page cache, or drops them from it."""
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            if state == "cold":
                os.fsync(file.fileno())  # what is not written yet stays
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(CHUNK):
                    pass


def cached_bytes(folder: str) -> int:
    """How much of a folder's files lies in the page cache: from asking for one byte of each MiB."""
    found, step = 0, 1 << 20
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            size = os.path.getsize(path)
            for offset in range(0, size, step):
                try:
                    os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                except OSError:
                    continue
                found += min(step, size - offset)
    return found


def touch_speed() -> float:
    """Bytes a second at which fresh memory can be written to for the first time."""
    memory = mmap.mmap(-1, TOUCHED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    began = time.perf_counter()
    for at in range(0, TOUCHED, mmap.PAGESIZE):
        memory[at] = 0
    seconds = time.perf_counter() - began
    memory.close()
    return TOUCHED / seconds


def start(args, source: str) -> dict:
    """The figures of one process that says one token."""
    words = [sys.executable, "-m", "jlayer", "generate", args.model, "--json", "--quiet"]
    words += ["--prompt-ids", "5,6,7", "--max-new-tokens", "1", "--temperature", "0"]
    for name in ("device", "device_memory", "host_memory", "host_share"):
        if getattr(args, name):
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    words[words.index(args.model)] = os.path.abspath(args.model)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.perf_counter()
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        cwd=source,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    process_s = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}")
    stats = json.loads(done.stdout)["stats"]
    found = {"process_s": process_s}
    found["first_token_s"] = stats["load_s"] + stats["prefill_s"]
    found |= {name: stats[name] for name in FIGURES[1:]}
    for name in ("read_bytes", "cached_bytes"):
        found[name] = stats.get(f"load_{name}", 0) + stats.get(name, 0)
    return found


if __name__ == "__main__":
    main()
