"""What process 0 decides for all processes of a model: what follows from rounding, clocks, chance
or the machine, which may differ from host to host.

All run the same programs in the same order, or they wait for each other for ever. So each place
where the host takes such a decision asks here.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping

from jlayer.engine.hosts import Hosts, Placement, end_at_once
from jlayer.errors import UsageError

_hosts: Hosts | None = None  # as JAX, a process is in one group from its start to its end


def joined(placement: Placement | None) -> Hosts | None:
    """The group of processes of this one, which it joins where it is in none yet. Raises what
    `Hosts` raises, and UsageError where it is in another group."""
    global _hosts
    if _hosts is None and placement is not None:
        _hosts = Hosts(placement)
        atexit.register(_finish)
    if _hosts is not None and _hosts.placement != placement:
        raise UsageError(
            f"processes: this process is number {_hosts.number} of {_hosts.n} until it ends; open "
            "every model in it with the same coordinator, processes and process_id"
        )
    return _hosts


def decided(label: str, value):
    """`value`, which may be a function without arguments that gives it: with several processes
    that of process 0, and the others do not call theirs. Numbers, words and lists of them. `label`:
    what is decided, the same on all."""
    if _hosts is None or _hosts.number == 0:
        value = value() if callable(value) else value
    return value if _hosts is None else _hosts.sent(label, value)


def least(label: str, values: Mapping[str, float | None]) -> dict:
    """Of each of these the least of all processes; None where it is None on one."""
    if _hosts is None:
        return dict(values)
    names = list(values)
    found = _hosts.collected(label, list(values.values()))
    columns = zip(*found, strict=True)
    return {
        name: None if None in column else min(column)
        for name, column in zip(names, columns, strict=True)
    }


def agree(facts: Mapping[str, object]) -> None:
    """Raises UsageError in every process where these differ in one."""
    if _hosts is not None:
        _hosts.agree(facts)


def leave(line: str, *, waits: bool = False) -> None:
    """This process ends early, and says why: so do the others. `waits`: the reason may be that
    another is lost, which is then said instead."""
    if _hosts is not None:
        _hosts.leave(line, waits=waits)


def end(code: int) -> None:
    """Ends this process at once, where it has left early; else returns. At its end JAX waits for
    the others, and aborts."""
    if _hosts is not None and _hosts.is_ending:
        end_at_once(code)


def is_one_of_several() -> bool:
    """Whether other processes run the same model."""
    return _hosts is not None


def _finish():
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        _hosts.finish()
    else:
        _hosts.leave(f"{type(error).__name__}: {error}")
        end_at_once(1)  # as Python ends after a traceback
