"""List the models at hand: those in the hub's cache, and those in the folders that are given.

A FOLDER is a model, or has models in its folders. Says of each its form, its bytes on disk, whether
it runs as it is, whether it fits this machine, and the predicted time of a token. Nothing is
fetched, and weights are read only to measure the disk that a model would be streamed from. What is
damaged, or was not fetched to its end, is listed with the reason.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

from jlayer.app import options, table
from jlayer.app.fits import Bench, Fit
from jlayer.app.models import Model, State, bytes_in, look_at
from jlayer.app.progress import Phase
from jlayer.app.shelf import HUB, Entry, folder_entries, hub_entries
from jlayer.app.status import Status
from jlayer.app.streams import draws, tell
from jlayer.app.words import time_words
from jlayer.checkpoint.cache import cache_folder, is_being_fetched
from jlayer.errors import StorageError, UsageError
from jlayer.interrupts import check
from jlayer.run_config import RunConfig
from jlayer.sizes import human

HEAD = ("MODEL", "FORM", "TYPE", "ON DISK", "FITS", "A TOKEN", "STATE")
TO_THE_RIGHT = (3, 5)
NONE = "-"
WORDS = {
    State.RUNS: "runs",
    State.CONVERT: "to be converted",
    State.INCOMPLETE: "incomplete",
    State.UNSUPPORTED: "not supported",
    State.BROKEN: "broken",
}
PLANNED = (State.RUNS, State.CONVERT, State.INCOMPLETE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    line = "a model's folder, or one that has models in its folders"
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help=line)
    options.add_run(parser, ("device_memory", "host_memory", "device"))
    options.add_context(parser, default=512)
    options.add_speeds(parser)
    options.add_follow_links(parser)


def run(args: argparse.Namespace) -> dict:
    if "" in args.folders:
        raise UsageError("FOLDER: found an empty name, expected a folder")
    bench, cache = _bench(args), cache_folder()
    rows, inodes = [], {}
    with _shown() as phase:
        for entry in _entries(cache, args.folders):
            check()
            phase.begin(f"looking at {table.printable(entry.shown)}")
            on_disk = bytes_in(entry.folder)
            inodes |= on_disk
            model = _model(entry, cache, follow_links=args.follow_links)
            fit = None
            if model.state in PLANNED and model.weights is not None:
                fit = bench.fit(model.weights, model.files)
            rows.append(Row(entry, model, fit, sum(on_disk.values())))
    rows.sort(key=Row.order)
    looked_in = [cache, *args.folders]
    if not args.json:
        print(_text(rows, bench, sum(inodes.values()), looked_in))
    return {
        "models": [row.as_dict() for row in rows],
        "bytes": sum(inodes.values()),
        "looked_in": looked_in,
        "machine": bench.as_dict(),
    }


@dataclass(frozen=True)
class Row:
    """A model at hand. `n_bytes`: of its files on disk, whatever else they are a part of."""

    entry: Entry
    model: Model
    fit: Fit | None
    n_bytes: int

    def order(self):
        return self.entry.where != HUB, self.entry.name.casefold(), self.entry.name

    def as_dict(self) -> dict:
        entry, model, fit = self.entry, self.model, self.fit
        revision = entry.revision
        return {
            "name": entry.name,
            "where": entry.where,
            "folder": entry.folder,
            "revision": revision and revision.commit,
            "refs": list(revision.refs) if revision else [],
            "state": model.state.value,
            "reason": model.reason,
            "advice": model.advice,
            "form": model.form,
            "quantization": model.quantization,
            "dtype": model.dtype,
            "model_type": model.family,
            "parameters": model.n_parameters,
            "bytes": self.n_bytes,
            "fits": fit and fit.fits,
            "seconds_a_token": fit and fit.seconds_a_token,
            "plan": fit and fit.as_dict(),
        }

    def cells(self) -> tuple[str, ...]:
        model, fit = self.model, self.fit
        made_of = model.quantization or (model.form and model.dtype)
        form = ", ".join(filter(None, (model.form, made_of)))
        seconds = fit and fit.seconds_a_token
        return (
            self.entry.shown,
            form or NONE,
            model.family or NONE,
            human(self.n_bytes),
            NONE if fit is None else "yes" if fit.fits else "no",
            NONE if seconds is None else time_words(seconds),
            self._state(),
        )

    def _state(self):
        """The state in words, with the reason in short: without the folder's name and advice."""
        words = [WORDS[self.model.state]]
        if self.model.reason:
            folder = self.entry.folder
            reason = self.model.reason.replace(folder + os.sep, "").removeprefix(f"{folder}: ")
            words.append(reason.split("; ")[0].removesuffix(", which is not supported"))
        if self.fit is not None and self.fit.lacks:
            words.append(self.fit.lacks)
        return ": ".join(words)


def _entries(cache: str, folders: Sequence[str]) -> Iterator[Entry]:
    """Every model once, by its folder without links."""
    seen = set()

    def new(entries):
        for entry in entries:
            real = entry.folder
            with suppress(OSError):  # the working directory may be gone
                real = os.path.realpath(real)
            if real not in seen:
                seen.add(real)
                yield entry

    try:
        yield from new(hub_entries(cache))
    except StorageError as error:  # the folders count all the same
        tell(error.command_line)
    for folder in folders:
        found = list(folder_entries(folder))
        if not found:
            tell(f"{table.printable(folder)}: no model in it")
        yield from new(found)


def _model(entry: Entry, cache: str, *, follow_links: bool) -> Model:
    """What an entry has; of one in the hub's cache that lacks files, why and what to do."""
    if entry.problem is None:
        model = look_at(entry.folder, follow_links=follow_links)
    else:
        there = entry.repository is not None and entry.repository.problem is None
        model = Model(entry.folder, State.INCOMPLETE if there else State.BROKEN, entry.problem)
    if entry.where == HUB and model.state is State.INCOMPLETE:
        if is_being_fetched(cache, entry.repository.folder):
            model.reason = f"{entry.folder}: being fetched by another process"
        elif entry.name != entry.folder:
            model.advice = f"jlayer pull {entry.name}"
    if model.state is State.CONVERT:
        name = os.path.basename(os.path.normpath(entry.name)).split("@")[0]
        model.advice = shlex.join(["jlayer", "convert", entry.name, f"{name}-jlayer"])
    return model


def _bench(args):
    given = options.given(args, "device_memory", "host_memory", "device")
    return Bench(
        RunConfig.from_options(context=args.context, **given),
        disk_speed=options.speed(args.disk_speed, "--disk-speed"),
        link_speed=options.speed(args.link_speed, "--link-speed"),
    )


@contextmanager
def _shown():
    """Yields the phase that a terminal shows while the list takes long."""
    phase = Phase()
    with Status(phase.status) if draws() else nullcontext():
        yield phase


def _text(rows, bench, n_bytes, looked_in):
    if not rows:
        return (
            f"no models in {', '.join(map(table.printable, looked_in))}; "
            "get one: jlayer pull owner/name, or name a folder that has some"
        )
    lines = table.lines(
        HEAD, [row.cells() for row in rows], right=TO_THE_RIGHT, columns=table.width()
    )
    fits = [row.fit for row in rows if row.fit is not None]
    count = f"{len(rows)} model{'s' * (len(rows) > 1)}"
    return "\n".join([*lines, "", f"{count}, {human(n_bytes)} on disk", *_assumed(bench, fits)])


def _assumed(bench, fits):
    return [bench.describe(fits)] if fits else []
