"""What process 0 decides for all processes of a model, and tells the others.

Prompts, lanes, tables and texts are known to process 0 alone. All run the same programs in the same
order, or they wait for each other for ever: so it tells each step ahead of it (`step`), and the
others do the same (`engine.following`). Inside a step it decides what follows from rounding
(`decided`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jlayer.engine.hosts import Hosts, Placement
from jlayer.errors import JlayerError, StorageError, UsageError
from jlayer.interrupts import uninterrupted
from jlayer.leaving import end_at_once

STEP = "what follows"  # the label of a step
END = "end"  # the step in which the model is closed
BUG = 1  # the exit code of what is no error of ours
BY_SIGNAL = 128  # and its number: the exit code after a signal

_hosts: Hosts | None = None  # as JAX, a process is in one group from its start to its end


def joined(placement: Placement | None) -> Hosts | None:
    """The group of processes of this one, which it joins where it is in none yet. Raises what
    `Hosts` raises, and UsageError where it is in another group."""
    global _hosts
    if _hosts is None and placement is not None:
        _hosts = Hosts(placement)
        weakref.finalize(_hosts, _finish)  # runs at exit, after the models that are closed there
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


def collected(label: str, value) -> list:
    """What each process gives here, in order of their numbers: in one process its own alone."""
    return [value] if _hosts is None else _hosts.collected(label, value)


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


def follows() -> bool:
    """Whether this process does what process 0 tells, and decides nothing."""
    return _hosts is not None and _hosts.number != 0


@contextmanager
def step(what: str, given: Callable[[], list] = list) -> Iterator[None]:
    """Inside, process 0 does what the others do as well, on the devices of all: it tells them
    before. Does nothing where there are no others, and in these. `given`: gives what they need to
    know for it, as JSON.

    No signal ends a step halfway, but a second one ends the process. Where an error does, the
    others cannot go on, and this process cannot either: they end, and it does with the error, at
    once if it is in another thread. Raises StorageError where the others have ended."""
    if _hosts is None or follows():
        yield
        return
    if _hosts.is_ending:
        raise StorageError("hosts: the other processes have ended; start all of them again")
    _hosts.sent(STEP, [what, *given()])
    try:
        with uninterrupted(_end_now):
            yield
    except BaseException as error:
        line = f"{error}" if isinstance(error, JlayerError) else f"{type(error).__name__}: {error}"
        leave(line, waits=isinstance(error, StorageError))
        if threading.current_thread() is not threading.main_thread():
            _hosts.end(line, getattr(error, "exit_code", BUG))
        raise


def _end_now(number):
    """Ends this process, by a second signal, in the middle of a step; the others end with it."""
    line = "stopped in the middle of a forward pass, by a second signal"
    leave(line)
    _hosts.end(line, BY_SIGNAL + number)


@contextmanager
def after_it(take: Callable) -> Iterator[Callable]:
    """A function for a step, in place of `take`, which only this process calls: the others go on
    with the step whatever it raises, so with others that is raised at the end of the `with`, and
    nobody has to end."""
    if _hosts is None:
        yield take
        return
    errors: list[Exception] = []

    def taking(*given):
        try:
            if not errors:
                take(*given)
        except Exception as error:
            errors.append(error)

    yield taking
    if errors:
        raise errors[0]


def end_others() -> None:
    """Process 0 closes the model: the others need not wait for another step."""
    if _hosts is not None and not follows() and not _hosts.is_ending:
        _hosts.sent(STEP, [END])


def told() -> list:
    """The next step, once process 0 tells it: [what, more that is given, ..]. Raises
    StorageError."""
    return _hosts.sent(STEP, None)


def _finish():
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        _hosts.finish()
    else:
        _hosts.leave(f"{type(error).__name__}: {error}")
        end_at_once(1)  # as Python ends after a traceback
