"""Whether a conversion fits on its disk, said before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from convert.target.disk import failure
from jlayer.errors import DoesNotFitError


def peak_of(sizes: Sequence[tuple[str, int]], *, freed: Mapping[str, int], block: int) -> int:
    """The most bytes that files take on disk when written in this order.

    `freed`: what goes from the same disk once the file of that name is finished. Each size is
    rounded up to whole blocks, as a file system does.
    """
    at = peak = 0
    for name, size in sizes:
        at += -(-size // block) * block
        peak = max(peak, at)
        at -= freed.get(name, 0)
    return peak


def check_space(
    target: str,
    sizes: Sequence[tuple[str, int]],
    *,
    freed: Mapping[str, int],
    replaced: Iterable[str] = (),
) -> None:
    """Raises DoesNotFitError where files of these names and sizes, written in this order, do not
    fit once the files `replaced` are gone."""
    try:
        status = os.statvfs(target)
        gone = [os.lstat(os.path.join(target, name)).st_blocks * 512 for name in replaced]
    except OSError as error:
        raise failure(target, error, "looked at") from None
    need = peak_of(sizes, freed=freed, block=status.f_frsize)
    have = status.f_bavail * status.f_frsize + sum(gone)
    if need > have:
        raise DoesNotFitError(
            f"{target}: need {need:,} bytes, have {have:,} free on its file system; free "
            f"{need - have:,} more, or name a folder elsewhere"
        )
    room = status.f_favail + len(gone)
    if status.f_files and len(sizes) > room:
        raise DoesNotFitError(
            f"{target}: need {len(sizes)} files, have room for {room} (inodes) on its file system; "
            "make room, or name a folder elsewhere"
        )
