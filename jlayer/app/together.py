"""A verb in one of several processes: process 0 runs it, and the others do on their own devices
what process 0 does with the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jlayer.app.options import flag
from jlayer.app.running import opened, write_text
from jlayer.app.streams import quiet
from jlayer.engine.hosts import placement_of
from jlayer.errors import StorageError
from jlayer.leaving import end_process
from jlayer.run_config import RunConfig

# Arguments that a process has for itself: where its weights are and what it has of the machine,
# what process 0 alone reads, writes, listens at and shows, and what is secret.
OWN = frozenset(
    (
        *("ref", "draft", "adapter", "follow_links", "offline", "host_memory"),
        *("coordinator", "processes", "process_id"),
        *("input", "output", "prompt_file", "state", "timeline"),
        *("host", "port", "api_key", "api_key_file"),
        *("json", "quiet", "debug", "verbose"),
    )
)


def followed(
    args: argparse.Namespace,
    run_options: Mapping,
    *,
    refs: Sequence[str] | None = None,
    own: Collection[str] = (),
) -> bool:
    """Whether this is another process than process 0, which has now done with the model what
    process 0 did, until that had ended. `refs`: of the models that process 0 opens, one after
    another, where that is not `args.ref`. `own`: further arguments that process 0 alone uses.
    Raises UsageError, and what opening and a forward pass raise."""
    placement = placement_of(RunConfig.from_options(**run_options))
    if placement is None or placement.number == 0:
        return False
    for ref in (args.ref,) if refs is None else refs:
        with quiet(), opened_for(args, run_options, ref=ref, own=own) as model:
            model.follow()
    return True


@contextmanager
def opened_for(
    args: argparse.Namespace,
    run_options: Mapping,
    *,
    ref: str | None = None,
    own: Collection[str] = (),
) -> Iterator:
    """As `running.opened`, for the verb of a command line that all processes were started with.
    `ref`, `own`: as in `followed`. Raises UsageError in each of them where the arguments differ in
    one."""
    ref, left_out = args.ref if ref is None else ref, OWN | set(own)
    same = {flag(name): value for name, value in vars(args).items() if name not in left_out}
    with opened(ref, offline=args.offline, compared=same, **run_options) as model:
        if args.json:
            model.engine.watch.end = print_loss
            if model.engine.hosts is not None:
                model.engine.hosts.end = print_loss
        yield model


def print_loss(line: str, code: int = StorageError.exit_code) -> None:
    """Ends the process where another host is lost, or a device stands still, with the object that
    --json asks for."""
    write_text(f"{json.dumps({'error': line, 'exit_code': code})}\n")
    end_process(line, code)
