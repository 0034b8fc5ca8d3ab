"""Models in a hub's cache, made by hand as its library lays them out: blobs, and links to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

FIRST, SECOND, THIRD = (digit * 40 for digit in "abc")


def cached(
    cache: Path,
    repo: str,
    files: Mapping[str, bytes],
    *,
    commit: str = FIRST,
    refs: tuple[str, ...] = ("main",),
) -> Path:
    """Adds a revision of a model to a cache, and returns its folder."""
    home = cache / f"models--{repo.replace('/', '--')}"
    folder = home / "snapshots" / commit
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (home / part).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        blob = home / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return folder


def share(cache: Path, blob: Path) -> Path:
    """Moves a blob to the store that all models of the cache share, and returns where it is now; a
    blob with the same bytes that is there already is taken."""
    store = cache / "blobs"
    store.mkdir(exist_ok=True)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    digest = hashlib.sha256(b"xet" + blob.read_bytes()).hexdigest()
    place = store / digest[:2] / digest
    place.parent.mkdir(exist_ok=True)
    blob.replace(place)
    blob.symlink_to(os.path.relpath(place, blob.parent))
    with open(f"{place}.refs", "a") as refs:
        refs.write(f"{blob.relative_to(cache)}\n")
    return place


def everything(folder: Path) -> dict[str, object]:
    """All that is below a folder: bytes of files, where links lead, None for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found
