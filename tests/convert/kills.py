"""Kills a conversion, a sealing or an export before each of the last calls that change the disk.

A process of its own: a fork copies one thread alone, and a test's process has several.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jlayer.checkpoint.layout import MANIFEST
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.convert.target.seal import seal_folder
from jlayer.convert.transform.pruned import Pruning
from jlayer.durable import LOCK
from tests.conftest import REPOSITORY
from tests.convert.checkpoints import files_of
from tests.convert.faults import CHANGES, counted, killed_before


def killed(verb: str, source: Path, expected: Path, *, n_last: int = 1000) -> list[str]:
    """The manifest after each kill, of an export the target: "none", "old", "new" or "other"; after
    the same command again, "differs" where the folder or file is not `expected`.

    "convert" converts `source`, "convert 0/2" the rows of that host alone; "prune 0/2" leaves out
    layer 0 of 2; "seal" seals a copy of it; "export FORMAT" exports it.
    """
    command = [sys.executable, "-m", "tests.convert.kills", verb, source, expected, str(n_last)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _states(verb, of, source, expected, n_last):
    numbers = tuple(map(int, of.split("/"))) if of else None
    options = {"rows": numbers}
    if verb == "prune":
        options = {"prune": Pruning(numbers[1], numbers[:1], {}, {})}
    with tempfile.TemporaryDirectory(dir=expected.parent) as home:
        folder, whole = Path(home) / "folder", files_of(expected)
        before = files_of(source).get(MANIFEST)

        def start():
            shutil.rmtree(folder, ignore_errors=True)
            if verb == "seal":
                shutil.copytree(source, folder)

        def work():
            if verb == "seal":
                seal_folder(folder)
            else:
                convert_checkpoint(source, folder, **options)

        start()
        n_calls = len(counted(work, CHANGES))
        for nth in range(max(0, n_calls - n_last), n_calls):
            start()
            assert killed_before(nth, work)
            path = folder / MANIFEST
            manifest = path.read_bytes() if path.exists() else None
            known = {before: "old", None: "none", whole[MANIFEST]: "new"}
            yield known.get(manifest, "other")
            work()
            if files_of(folder) != whole:
                yield "differs"


def _states_of_export(format, source, expected, n_last):
    with tempfile.TemporaryDirectory(dir=expected.parent) as home:
        target, whole = Path(home) / f"target{expected.suffix}", _content(expected)

        def start():
            for path in Path(home).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def work():
            export_checkpoint(source, target, format=format)

        n_calls = len(counted(work, CHANGES))
        for nth in range(max(0, n_calls - n_last), n_calls):
            start()
            assert killed_before(nth, work)
            yield {None: "none", whole: "new"}.get(_content(target), "other")
            if not target.exists():
                work()
            if _content(target) != whole:
                yield "differs"


def _content(path):
    """All bytes of a file, or of the files in a folder without a lock; None: it is not there."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    return tuple(sorted((n, raw) for n, raw in files_of(path).items() if n != LOCK))


if __name__ == "__main__":
    verb, source, expected, n_last = sys.argv[1:]
    verb, _, of = verb.partition(" ")
    rest = (of, Path(source), Path(expected), int(n_last))
    states = _states_of_export(*rest) if verb == "export" else _states(verb, *rest)
    print(json.dumps(list(states)))
