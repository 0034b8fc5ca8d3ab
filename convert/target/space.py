"""Whether a conversion fits on its disk, checked before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from jlayer.convert.target.disk import failure
from jlayer.errors import DoesNotFitError
from jlayer.sizes import counted


def peak_of(sizes: Sequence[tuple[str, int]], *, freed: Mapping[str, int], block: int) -> int:
    """The peak bytes on disk when files of these names and sizes are written in this order.

    `freed`: bytes that the same disk gets back when the file of that name is finished. Sizes are
    rounded up to whole blocks.
    """
    used = peak = 0
    for name, size in sizes:
        used += -(-size // block) * block
        peak = max(peak, used)
        used -= freed.get(name, 0)
    return peak


def check_space(
    target: str,
    sizes: Sequence[tuple[str, int]],
    *,
    freed: Mapping[str, int],
    replaced: Iterable[str] = (),
) -> None:
    """Raises DoesNotFitError where the files, written in this order, do not fit.

    The files `replaced` are removed first.
    """
    try:
        status = os.statvfs(target)
        replaced_bytes = [os.lstat(os.path.join(target, name)).st_blocks * 512 for name in replaced]
    except OSError as error:
        raise failure(target, error, "looked at") from None
    need = peak_of(sizes, freed=freed, block=status.f_frsize)
    have = status.f_bavail * status.f_frsize + sum(replaced_bytes)
    if need > have:
        raise DoesNotFitError(
            f"{target}: need {need:,} bytes, have {have:,} free on its file system; free "
            f"{need - have:,} more, or name a folder elsewhere"
        )
    n_inodes = status.f_favail + len(replaced_bytes)
    if status.f_files and len(sizes) > n_inodes:
        raise DoesNotFitError(
            f"{target}: need {counted(len(sizes), 'file')}, have {counted(n_inodes, 'inode')} free "
            "on its file system; remove some files, or name a folder elsewhere"
        )
