"""Kill, starve and damage conversions, and check that each ends as an undisturbed one does.

    python benchmarks/convert_torture.py [--short] [--only NAME ...] [--home FOLDER]

    kills    SIGKILL before every call that changes the disk, for several kinds of conversion
    strace   the same below Python, by strace's injection (where strace is installed)
    random   SIGKILL, SIGTERM and SIGINT at random moments of a larger conversion
    calls    every call to the system failing once (EIO, ENOSPC, EINTR), or falling short
    signals  the same for EINTR and short writes below Python, by strace
    power    power cuts, which lose all that was not synced; also with a writer that never syncs
    flips    random single-bit flips in a converted folder, which `jlayer verify` must find
    full     a file system that fills up, or has no inodes left (where a tmpfs may be mounted)

Figures go to stdout as one JSON object; a line for each thing that went wrong, and code 1, if any
did. `--short` takes samples, in under half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jlayer.checkpoint.layout import MANIFEST
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.target.disk import TEMPORARY
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.target.lock import LOCK
from jlayer.errors import CheckpointError, JlayerError
from tests.convert import faults
from tests.convert.checkpoints import files_of, random_checkpoint
from tests.convert.powercut import Recorder, materialise

REPOSITORY = Path(__file__).parent.parent
LARGER = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
FULL = {"killed": 100, "stopped": 40}  # midway, at random moments
_NUMBERS = {"killed": [signal.SIGKILL], "stopped": [signal.SIGTERM, signal.SIGINT]}
OURS = (JOURNAL, LOCK)
WAYS = {
    "plain": {},
    "cast": {"dtype": "float32"},
    "delete": {"delete_source": True},
    "overwrite": {"overwrite": True},
}


class Bench:
    """Small conversions in fresh folders, and what each must end as."""

    def __init__(self, home: Path, *, short: bool, seed: int):
        self.home, self.short = home, short
        self.rng = random.Random(seed)
        self.problems: list[str] = []
        self._n = 0
        self.source = random_checkpoint(home / "source")
        self.other = home / "other"
        convert_checkpoint(random_checkpoint(home / "other-source", seed=1), self.other)
        self.expected = {}
        for way, options in WAYS.items():
            root = self.fresh(way)
            convert_checkpoint(root / "source", root / "target", **options)
            self.expected[way] = contents(root)

    def fresh(self, way: str) -> Path:
        """A folder with a source and, where one is to be overwritten, a target."""
        self._n += 1
        root = self.home / f"run-{self._n}"
        root.mkdir()
        if way == "delete":
            shutil.copytree(self.source, root / "source")
        else:
            (root / "source").symlink_to(self.source)
        if way == "overwrite":
            shutil.copytree(self.other, root / "target")
        return root

    def work(self, root: Path, way: str):
        return lambda: convert_checkpoint(root / "source", root / "target", **WAYS[way])

    def check(self, root: Path, way: str, what: str) -> None:
        """The files so far must be sound, and the same command must finish the conversion."""
        target = root / "target"
        if (target / MANIFEST).exists():
            beside = [p.name for p in target.iterdir() if p.name.endswith((*OURS, TEMPORARY))]
            if not is_whole(target, beside=beside):
                self.problem(f"{what}: a manifest that lies")
        try:
            self.work(root, way)()
        except JlayerError as error:
            self.problem(f"{what}: does not resume: {error}")
        else:
            if contents(root) != self.expected[way]:
                found = {name for name, _ in contents(root).items() ^ self.expected[way].items()}
                self.problem(f"{what}: ends otherwise: {sorted(found)}")
        shutil.rmtree(root)

    def problem(self, line: str) -> None:
        self.problems.append(line)
        print(line[:400], file=sys.stderr)

    def sample(self, numbers, few: int):
        """All of them or, where it has to be short, a few."""
        numbers = list(numbers)
        if not self.short or len(numbers) <= few:
            return numbers
        return sorted(self.rng.sample(numbers, few))


def is_whole(target: Path, *, beside=()) -> bool:
    try:
        return not verify_folder(target, beside=beside).findings
    except CheckpointError:
        return False


def contents(root: Path) -> dict[str, bytes]:
    """The target's files, and the names of the source's."""
    found = {f"target/{name}": raw for name, raw in files_of(root / "target").items()}
    return found | {f"source/{path.name}": b"" for path in (root / "source").iterdir()}


def kills(bench: Bench) -> dict:
    found = {}
    for way in WAYS:
        root = bench.fresh(way)
        n_calls = len(faults.counted(bench.work(root, way), faults.CHANGES))
        shutil.rmtree(root)
        points = bench.sample(range(n_calls), 12)
        for nth in points:
            root = bench.fresh(way)
            if not faults.killed_before(nth, bench.work(root, way)):
                bench.problem(f"kills, {way}, call {nth}: was not reached")
            bench.check(root, way, f"kills, {way}, before call {nth}")
        found[way] = len(points)
    return found


# What strace counts by thread and path: so every call of every thread gets its turn.
_TRACED = ("pwrite64", "fsync", "fdatasync", "rename", "unlink", "mkdir", "openat", "flock")
_LINE = re.compile(r"^(?:\[pid\s+)?\d*\]?\s*(\w+)\((.*)$")


def _convert_command(root, way):
    options = {"cast": ["--dtype", "float32"], "delete": ["--delete-source", "--yes"]}
    return [
        *(sys.executable, "-m", "convert", str(root / "source"), str(root / "target")),
        *options.get(way, ["--overwrite"] if way == "overwrite" else []),
    ]


def _strace(root, way, *options, log="/dev/null"):
    done = subprocess.run(
        ["strace", "-f", "-qq", "-y", "-o", str(log), *options, *_convert_command(root, way)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stderr


def _traced_calls(bench, way):
    """(path below the root, call) -> how often, of one undisturbed conversion."""
    root, log = bench.fresh(way), bench.home / "trace"
    _strace(root, way, "-e", f"trace={','.join(_TRACED)}", log=log)
    found = Counter()
    for line in log.read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\((.*)", line)
        paths = re.findall(rf"{re.escape(str(root))}(/[^\"> ,]*)?", match[2]) if match else ()
        if paths and not (match[1] == "openat" and "O_CREAT" not in line):
            found[(paths[0].lstrip("/"), match[1])] += 1
    shutil.rmtree(root)
    return found


def _injections(bench, way):
    for (path, call), count in sorted(_traced_calls(bench, way).items()):
        for nth in range(1, count + 1):
            yield path, call, nth


def strace(bench: Bench) -> dict:
    if not shutil.which("strace"):
        return {"skipped": "strace is not installed"}
    found = {}
    for way in ["plain"] if bench.short else WAYS:
        points = bench.sample(_injections(bench, way), 3)
        for path, call, nth in points:
            root = bench.fresh(way)
            inject = f"inject={call}:signal=SIGKILL:when={nth}"
            code, _ = _strace(root, way, "-P", str(root / path), "-e", inject)
            if code != -signal.SIGKILL and code != 128 + signal.SIGKILL:
                bench.problem(f"strace, {way}, {call} {nth} of {path}: ended with {code}")
            bench.check(root, way, f"strace, {way}, before {call} {nth} of {path}")
        found[way] = len(points)
    return found


def signals(bench: Bench) -> dict:
    """EINTR must have no effect, and a short write must be continued."""
    if not shutil.which("strace"):
        return {"skipped": "strace is not installed"}
    points = bench.sample(_injections(bench, "plain"), 3)
    for path, call, nth in points:
        root = bench.fresh("plain")
        inject = f"inject={call}:error=EINTR:when={nth}"
        code, said = _strace(root, "plain", "-P", str(root / path), "-e", inject)
        if code != 0:
            bench.problem(f"signals, EINTR in {call} {nth} of {path}: {code}, {said.strip()[:300]}")
        bench.check(root, "plain", f"signals, EINTR in {call} {nth} of {path}")
    return {"EINTR": len(points)}


def calls(bench: Bench) -> dict:
    """One call fails, once: the right code, one line that says whether it can be resumed, and it
    can."""
    found = Counter()
    for way in ["plain"] if bench.short else ["plain", "delete"]:
        root = bench.fresh(way)
        names = faults.counted(bench.work(root, way))
        shutil.rmtree(root)
        for nth in bench.sample(range(len(names)), 25):
            for code in (errno.EIO, errno.ENOSPC):
                found[_fail_once(bench, way, names[nth], nth, code)] += 1
    root = bench.fresh("plain")
    names = faults.counted(bench.work(root, "plain"), ("preadv", "pwrite"))
    shutil.rmtree(root)
    for nth in bench.sample(range(len(names)), 10):
        root = bench.fresh("plain")
        with faults.cut_short(nth):
            bench.work(root, "plain")()
        bench.check(root, "plain", f"calls, {names[nth]} {nth} cut short")
        found["short reads and writes"] += 1
    return dict(found)


def _says_what_can_be_resumed(said, target):
    return ("resume" in said) == (target / JOURNAL).exists()


def _fail_once(bench, way, name, nth, code):
    root = bench.fresh(way)
    what = f"calls, {way}, {name} {nth} failing with {errno.errorcode[code]}"
    ended = "no harm"
    try:
        with faults.failing(nth, code):
            bench.work(root, way)()
    except JlayerError as error:
        ended = f"code {error.exit_code} for {errno.errorcode[code]}"
        changes = name in ("pwrite", "fsync", "fdatasync", "rename", "mkdir")
        codes = {6} if code == errno.EIO else {4} if changes else {4, 6}
        if error.exit_code not in codes:
            bench.problem(f"{what}: code {error.exit_code}, expected {codes}: {error}")
        if not _says_what_can_be_resumed(str(error), root / "target") or "\n" in str(error):
            bench.problem(f"{what}: not one line that says what can be resumed: {error}")
        left = [path for path in root.glob(f"target/*{TEMPORARY}") if name != "unlink"]
        if left:
            bench.problem(f"{what}: leaves {left[0].name}")
    except Exception as error:
        bench.problem(f"{what}: {type(error).__name__}: {error}")
    bench.check(root, way, what)
    return ended


def power(bench: Bench) -> dict:
    found = {}
    for way in WAYS:
        root = _own_folders(bench, way)
        with Recorder(root) as recorder:
            bench.work(root, way)()
        shutil.rmtree(root)
        n_points = min(60, len(recorder.log)) if not bench.short else 8
        points = [n * len(recorder.log) // (n_points - 1) for n in range(n_points)]
        for point, variant in itertools.product(points, range(2 if bench.short else 6)):
            state = recorder.disk_after(point).after_a_cut(bench.rng)
            root = bench.home / "cut"
            materialise(state, root)
            bench.check(root, way, f"power, {way}, after call {point}, variant {variant}")
        found[way] = {"points": len(points), "calls": len(recorder.log)}
    found["naive writer caught"] = _naive(bench)
    return found


def _own_folders(bench, way):
    """As `fresh`, with a source that lies in the folder itself, so that it is recorded too."""
    root = bench.fresh(way)
    if (root / "source").is_symlink():
        (root / "source").unlink()
        shutil.copytree(bench.source, root / "source")
    return root


def _naive(bench):
    """Checks the test itself with a writer that never syncs: how often its manifest names bytes
    that a power cut lost."""
    root = bench.fresh("plain")
    (root / "target").mkdir()
    expected = {
        name.partition("/")[2]: raw
        for name, raw in bench.expected["plain"].items()
        if name.startswith("target/")
    }
    with Recorder(root) as recorder:
        for name in sorted(expected, key=lambda name: name == MANIFEST):
            fd = os.open(root / "target" / name, os.O_WRONLY | os.O_CREAT)
            os.pwrite(fd, expected[name], 0)
            os.close(fd)
    shutil.rmtree(root)
    caught = n_states = 0
    for point in range(len(recorder.log) + 1):
        for _ in range(20):
            n_states += 1
            root = bench.home / "cut"
            materialise(recorder.disk_after(point).after_a_cut(bench.rng), root)
            target = root / "target"
            caught += (target / MANIFEST).exists() and not is_whole(target)
            shutil.rmtree(root)
    if not caught:
        bench.problem("power: the rig does not catch a naive writer")
    return f"{caught} of {n_states}"


def flips(bench: Bench) -> dict:
    """Half of them anywhere, half in the small files, which have few of all bits."""
    root = bench.fresh("plain")
    bench.work(root, "plain")()
    files = sorted((root / "target").iterdir())
    small = [path for path in files if path.stat().st_size < 100_000]
    sizes = [path.stat().st_size for path in files]
    n_flips = 60 if bench.short else 1000
    found = Counter()
    for n in range(n_flips):
        path = bench.rng.choice(small) if n % 2 else bench.rng.choices(files, sizes)[0]
        raw = path.read_bytes()
        at = bench.rng.randrange(8 * len(raw))
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        seen = not is_whole(root / "target")
        path.write_bytes(raw)
        found["found" if seen else "missed"] += 1
        found[path.name] += 1
        if not seen:
            bench.problem(f"flips: bit {at} of {path.name} was not found")
    if verify_folder(root / "target").findings:
        bench.problem("flips: the folder is not whole in the end")
    return dict(found)


def random_kills(bench: Bench) -> dict:
    """Stops conversions at random, once or several times each, and then finishes them, until enough
    were killed midway and enough were stopped by the other signals."""
    wanted, layers = ({"killed": 2, "stopped": 1}, 2) if bench.short else (FULL, 30)
    # A shell starts what goes to the background with SIGINT ignored, and so would what we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = random_checkpoint(
        bench.home / "larger", n_shards=4, **{**LARGER, "num_hidden_layers": layers}
    )
    target = bench.home / "larger-target"
    os.sync()  # or the syncs of the conversion wait for this
    lasts_s, writes_s = _undisturbed(source, target)
    expected = files_of(target)
    shutil.rmtree(target)
    found, stops_s = Counter(), []
    while missing := [kind for kind in wanted if found[f"{kind} midway"] < wanted[kind]]:
        again = True
        while again:
            kind = bench.rng.choice(missing)
            number = bench.rng.choice(_NUMBERS[kind])
            took_s = _stop_at_random(bench, source, target, number, lasts_s, writes_s)
            if took_s is None:
                break
            found[f"{kind} midway"] += target.exists() and not (target / MANIFEST).exists()
            found[number.name] += 1
            if number != signal.SIGKILL:
                stops_s.append(took_s)
            again = bench.rng.random() < 0.3
        subprocess.run(_words(source, target), check=True, cwd=REPOSITORY, capture_output=True)
        if files_of(target) != expected:
            bench.problem("random: ends otherwise")
        shutil.rmtree(target)
        found["conversions"] += 1
    return {
        **found,
        "source_bytes": sum(path.stat().st_size for path in source.iterdir()),
        "undisturbed_s": round(lasts_s, 2),
        "median_stop_s": round(statistics.median(stops_s), 2),
        "slowest_stop_s": round(max(stops_s), 2),
    }


def _undisturbed(source, target):
    """Seconds that a conversion lasts, and those of them in which it writes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        _words(source, target), cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    _await_writing(process, target)
    writing = time.perf_counter()
    assert process.wait() == 0
    ended = time.perf_counter()
    return ended - started, ended - writing


def _await_writing(process, target):
    """Until the target is there, or the conversion has ended."""
    while not target.exists() and process.poll() is None:
        time.sleep(0.001)


def _stop_at_random(bench, source, target, number, lasts_s, writes_s):
    """Starts the conversion and stops it; returns the seconds, or None where it ended first.

    A short conversion writes for a few percent of its time: it is stopped while it does.
    """
    process = subprocess.Popen(
        _words(source, target), cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    if bench.short:
        _await_writing(process, target)
    moment = (0, writes_s) if bench.short else (0.2, lasts_s)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(bench.rng.uniform(*moment))
    ended = process.poll() is not None
    process.send_signal(number)
    sent = time.perf_counter()
    _, said = process.communicate()
    took_s = time.perf_counter() - sent
    if not ended:
        _judge_stop(bench, process.returncode, number, said.decode(), took_s, target)
        return took_s
    if process.returncode != 0:
        bench.problem(f"random: ended with {process.returncode}: {said.decode()}")
    return None


def _words(source, target):
    return [sys.executable, "-m", "convert", str(source), str(target)]


def _judge_stop(bench, code, number, said, took_s, target):
    begun = "jlayer: " in said or "verbs/convert.py" in said
    if number == signal.SIGKILL or (code in (-number, 1) and not begun):
        return  # the interpreter was still starting, and nothing of ours was there to answer
    if "bytes of weights in" in said and "Traceback" not in said:
        return  # it was done already, and had said so
    # Where `python -m` was interrupted in an exec of an import, it ends by the signal whatever we
    # return: a shell sees the same 130.
    if code not in (0, 128 + number, -number):
        bench.problem(f"random: {number.name} ended with {code}: {said}")
    elif code and (not _says_what_can_be_resumed(said, target) or "Traceback" in said):
        bench.problem(f"random: {number.name} said: {said}")
    if took_s > 2:
        bench.problem(f"random: {number.name} took {took_s:.1f} s")


def full(bench: Bench) -> dict:
    """A file system of every size from too small to just enough."""
    place = bench.home / "mounted"
    place.mkdir()
    need = sum(len(raw) for name, raw in bench.expected["plain"].items() if "target/" in name)
    sizes = range(0, need + (64 << 10), 4096)
    outcomes = Counter()
    for size in bench.sample(sizes, 6):
        for kind in ("size", "filler"):
            if not _mount(
                place, f"size={max(4096, need + (256 << 10) if kind == 'filler' else size)}"
            ):
                return {"skipped": "no tmpfs may be mounted here"}
            try:
                outcomes[_fill_up(bench, place, size, kind)] += 1
            finally:
                subprocess.run(["umount", str(place)], check=True)
    for inodes in range(2, 20):
        _mount(place, f"nr_inodes={inodes}")
        try:
            outcomes[_starve(bench, place, f"full, {inodes} inodes")] += 1
        finally:
            subprocess.run(["umount", str(place)], check=True)
    _mount(place, "ro")
    try:
        outcomes[_read_only(bench, place)] += 1
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return dict(outcomes)


def _read_only(bench, place):
    """A read-only target is refused before the source is read: here there is none."""
    try:
        convert_checkpoint(place / "no-source", place / "target")
    except JlayerError as error:
        if error.exit_code == 6 and "read-only" in str(error):
            return "refused as read-only"
        bench.problem(f"full, read-only: code {error.exit_code}: {error}")
    return "not refused"


def _mount(place, option):
    words = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _starve(bench, place, what):
    try:
        convert_checkpoint(bench.source, place / "target")
    except JlayerError as error:
        if error.exit_code != 4 or not _says_what_can_be_resumed(str(error), place / "target"):
            bench.problem(f"{what}: code {error.exit_code}: {error}")
        if list(place.glob(f"target/*{TEMPORARY}")) or list(place.glob(f"target/{MANIFEST}")):
            bench.problem(f"{what}: leaves {os.listdir(place / 'target')}")
        return "refused at the start" if "need " in str(error) else "stopped midway"
    return "fits"


def _fill_up(bench, place, size, kind):
    """A disk that is too small from the start, or is filled after the conversion has begun."""
    if kind == "size":
        return _starve(bench, place, f"full, {size} bytes")
    real, calls = os.pwrite, itertools.count()

    def pwrite(fd, data, offset):
        if next(calls) == size // 4096 % 20:
            with contextlib.suppress(OSError), open(place / "filler", "wb") as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
        return real(fd, data, offset)

    os.pwrite = pwrite
    try:
        ended = _starve(bench, place, f"full, filled up at write {size // 4096 % 20}")
    finally:
        os.pwrite = real
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place / "filler")
    convert_checkpoint(bench.source, place / "target")
    names = {f"target/{name}": raw for name, raw in files_of(place / "target").items()}
    if names != {n: raw for n, raw in bench.expected["plain"].items() if "target/" in n}:
        bench.problem("full: ends otherwise once there is room")
    return f"{ended}, resumed"


CAMPAIGNS = {
    "kills": kills,
    "strace": strace,
    "random": random_kills,
    "calls": calls,
    "signals": signals,
    "power": power,
    "flips": flips,
    "full": full,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="samples, for the tests")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--home", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(dir=args.home) as home:
        bench = Bench(Path(home).resolve(), short=args.short, seed=args.seed)
        for name in args.only:
            started = time.perf_counter()
            found = CAMPAIGNS[name](bench)
            figures[name] = {**found, "took_s": round(time.perf_counter() - started, 1)}
            print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    print(json.dumps({"figures": figures, "problems": bench.problems}))
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
