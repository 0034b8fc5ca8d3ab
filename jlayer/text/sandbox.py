"""Chat templates rendered in a process of their own, which opens no files and has hard limits.

A template is a program by whoever published the checkpoint, and Jinja's sandbox bounds neither time
nor memory. What comes back from the process is one line of JSON with text. What the text means is
left to `chat`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from jlayer.errors import CheckpointError, StorageError, UsageError

MAX_TEMPLATE_BYTES = 1 << 20  # the longest published ones have some 20,000 characters
MAX_TEXT_CHARS = 4 << 20  # plus ten times what the messages hold
MEMORY_BYTES = 256 << 20  # address space of the process; Python and Jinja take some 40 MB of it
CPU_S = 1  # beyond start and imports; a long conversation takes milliseconds
WALL_S = 30  # only for a machine that is stuck: a busy template meets CPU_S first

# With -I -S neither the environment nor site-packages' start-up code has a say, and the interpreter
# starts in half the time; `sys.path` is handed over as arguments.
_START = "import sys; sys.path[:] = sys.argv[1:]; from jlayer.text import {0}; {0}.child()"
_ROOT = Path(__file__).parents[2]

# (text, marked text or None, index of the marking)
Answer = tuple[str, str | None, int | None]


class Failed(CheckpointError):
    """The template met an error of its own; it may be that it was given what it does not take."""


_KINDS = {"refused": UsageError, "missing": UsageError, "failed": Failed}

# This process


def render(
    template: str,
    variants: Sequence[Mapping],
    marks: str,
    *,
    generation: bool = False,
    now: datetime | None = None,
) -> Answer:
    """The text of the first of `variants`, and of the next one that differs by its marks alone.

    `variants`: the template's variables, plain and then marked in several ways. `generation`: put
    the marks around what the template has in {% generation %}. `now`: in place of the clock. Raises
    UsageError (the template refuses the messages), CheckpointError (a template that is damaged,
    forbidden things or meets a limit) or StorageError (no process can be started).
    """
    payload = payload_of(template, variants, marks, generation=generation, now=now)
    done = run_apart("sandbox", json.dumps(payload).encode(), what="chat template")
    if done is None:
        raise CheckpointError(f"chat template: gave no text within {WALL_S} s")
    if done.returncode:
        raise CheckpointError(_how_it_ended(done))
    return read_answer(json.loads(done.stdout))


def payload_of(
    template: str,
    variants: Sequence[Mapping],
    marks: str,
    *,
    generation: bool,
    now: datetime | None,
) -> dict:
    """What the process is told. Raises CheckpointError (a template that is too long)."""
    if len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"chat template: {len(template)} characters, over the limit of {MAX_TEMPLATE_BYTES}"
        )
    return {
        "template": template,
        "variants": variants,
        "marks": marks,
        "generation": generation,
        # One clock reading for all variants, or they could differ by a second.
        "now": (now or datetime.now()).isoformat(),
        "cpu_s": CPU_S,
        "memory_bytes": MEMORY_BYTES,
    }


def run_apart(module: str, payload: bytes, *, what: str) -> subprocess.CompletedProcess | None:
    """A process of its own that calls `child` of a module of this room, with `payload` as its
    input; None where it took longer than WALL_S. `what`: its task, for the error.

    Raises StorageError (no process can be started).
    """
    try:
        return subprocess.run(
            command_of(module),
            input=payload,
            capture_output=True,
            timeout=WALL_S,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise StorageError(
            f"{what}: no process could be started for it ({error.strerror})"
        ) from None


def command_of(module: str) -> list[str]:
    """The command that calls `child` of a module of this room."""
    path = [str(_ROOT), *_absolute(sys.path)]
    return [sys.executable, "-I", "-S", "-c", _START.format(module), *path]


def environment() -> dict[str, str]:
    """The environment of such a process."""
    return {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ}


def _absolute(entries):
    """Where the working directory is gone, what is relative to it leads nowhere."""
    for entry in entries:
        with suppress(FileNotFoundError):
            yield os.path.abspath(entry)


def read_answer(found: Mapping) -> Answer:
    """What `render_variants` gave, or the error that it stands for."""
    if "error" in found:
        raise _KINDS.get(found["error"], CheckpointError)(f"chat template: {found['message']}")
    return found["text"], found["marked"], found["which"]


def _how_it_ended(done):
    if done.returncode < 0:
        return (
            f"chat template: stopped by signal {-done.returncode}; it takes more than {CPU_S} s of "
            f"computing or {MEMORY_BYTES >> 20} MB of memory"
        )
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"chat template: its process failed ({_one_line(last)})"


# The other process


def child() -> None:
    """What the process does: import Jinja, set the limits, write one line of JSON."""
    payload_bytes = sys.stdin.buffer.read()
    payload = json.loads(payload_bytes)
    try:
        from jlayer.text import jinja

        jinja.check_version()
    except ImportError as error:
        found = {"error": "missing", "message": f"{error}; install jinja2>=3.1.6"}
    else:
        # Room for what grows with the messages: ten copies, each four bytes a character at worst.
        memory_bytes = payload["memory_bytes"] + 40 * len(payload_bytes)
        limit_process(cpu_s=payload["cpu_s"] + len(payload_bytes) / 8e6, memory_bytes=memory_bytes)
        found = render_variants(payload, limit=MAX_TEXT_CHARS + 10 * len(payload_bytes))
    sys.stdout.write(json.dumps(found))


def limit_process(*, cpu_s: float, memory_bytes: int) -> None:
    """No files, processes or core dumps from here on, and hard limits on memory and computing."""
    import resource
    import signal
    import time

    time.tzset()  # reads the time zone's file, for strftime_now
    # The timer is exact, but code could stop it. RLIMIT_CPU counts whole seconds, and stays.
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    used = resource.getrusage(resource.RUSAGE_SELF)
    for name, most in (
        ("RLIMIT_CPU", int(used.ru_utime + used.ru_stime + cpu_s) + 1),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_NOFILE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (most, most))


def render_variants(payload: Mapping, *, limit: int, compiled: Callable | None = None) -> dict:
    """The text of the first variant, and of the first other one that equals it but for the marks.

    {"text", "marked", "which"} or {"error", "message"}. Runs the template in the calling process,
    so it is for `child`, and for tests with templates that are known. `compiled`: in place of
    `jinja.compile_template`.
    """
    from jlayer.text import jinja

    compiled = compiled or jinja.compile_template

    first, *marked = payload["variants"]
    unmark = str.maketrans("", "", payload["marks"])
    now = datetime.fromisoformat(payload["now"])
    generation = tuple(payload["marks"]) if payload.get("generation") else ("", "")
    try:
        template = compiled(payload["template"], now=now, generation=generation)
        text = jinja.render(template, first, limit=limit)
    except jinja.Refused as error:
        return {"error": "refused", "message": _one_line(str(error))}
    except jinja.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {_one_line(str(error))}"}
    except jinja.SecurityError as error:
        return {"error": "unsafe", "message": f"forbidden: {_one_line(str(error))}"}
    except (MemoryError, RecursionError, OverflowError, jinja.TooLong) as error:
        words = f"beyond the limits on work and memory ({type(error).__name__})"
        return {"error": "limit", "message": words}
    except Exception as error:
        return {"error": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    for which, variables in enumerate(marked):
        try:
            again = jinja.render(template, variables, limit=limit)
        except Exception:  # a template that checks content may refuse marks; the next are weaker
            continue
        if again.translate(unmark) == text and _are_balanced(again, payload["marks"]):
            return {"text": text, "marked": again, "which": which}
    return {"text": text, "marked": None, "which": None}


def _are_balanced(text, marks):
    """Whether opening and closing marks alternate; if not, part of a string was cut away."""
    order = [character for character in text if character in marks]
    return order == list(marks) * (len(order) // 2)


def _one_line(text):
    """White space as single spaces, what does not print escaped, 200 characters at most."""
    text = " ".join(text.split())[:200]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
