"""How many threads should multiply: what the machine and its limits leave to this process."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jlayer.sizes import counted

# Up to so many cores all of them multiply; with more, one is left for whoever feeds them.
FEW_CORES = 4


@dataclass(frozen=True)
class Topology:
    """`threads`: how many should multiply. `reason`: one sentence for reports."""

    threads: int
    n_numa_nodes: int
    reason: str


def topology(
    root: Path = Path("/"), *, allowed: set[int] | None = None, group: str | None = None
) -> Topology:
    """What this process may use. `root`, `allowed` (processors) and `group` (the text of
    /proc/self/cgroup) are for tests."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    n_cores = len({_core(root, processor) for processor in allowed})
    words = [f"{n_cores} core{'s' * (n_cores > 1)}"]
    if n_cores < len(allowed):
        words.append(f"of {counted(len(allowed), 'hardware thread')}")
    quota = _quota(root, group)
    if quota < n_cores:
        words.append(f"and a quota of {quota:g} of them")
    threads = max(1, min(n_cores, math.floor(quota) if quota < n_cores else n_cores))
    if threads > FEW_CORES:
        threads -= 1
        words.append("less one for the readers")
    n_nodes = _numa_nodes(root, allowed)
    if n_nodes > 1:
        words.append(f"over {n_nodes} memory nodes")
    return Topology(threads, n_nodes, f"{threads} thread{'s' * (threads > 1)}: {' '.join(words)}")


def _core(root, processor) -> str:
    """What the hardware threads of one core have in common."""
    folder = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    return _text(folder / "thread_siblings_list") or str(processor)


def _numa_nodes(root, allowed) -> int:
    """The memory nodes that the allowed processors belong to; 1 where the system tells of none."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    return max(1, sum(bool(_numbers(_text(folder / "cpulist")) & allowed) for folder in folders))


def _quota(root, group) -> float:
    """The processors' worth of time that the control groups allow; infinite without a limit."""
    group = _text(root / "proc/self/cgroup") if group is None else group
    quotas = [math.inf]
    for line in group.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container sees its own group at the root of the tree, and the path of the host.
        inside = path.strip("/").split("/") if path.strip("/") else []
        for depth in range(len(inside) + 1):
            folder = base.joinpath(*inside[:depth])
            limit = _text(folder / "cpu.max").split()
            limit = limit or [_text(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period")]
            if all(re.fullmatch(r"\d+", word) for word in limit) and int(limit[1]):
                quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas)


def _numbers(text) -> set[int]:
    """ "0-2,5" as numbers."""
    found = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _text(path) -> str:
    """A small file of the system; empty where there is none, as in many sandboxes."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
