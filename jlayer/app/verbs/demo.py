"""Stream the bundled model (fable-3m, 6 MB, trained for this project) and watch it tell a story.

The model is converted to a temporary folder and read from there in every forward pass: no layer
stays in memory. The story is sampled with a fixed seed.
"""

from __future__ import annotations

from typing import ClassVar

from jlayer.app import options
from jlayer.app.bundled import converted_bundled
from jlayer.app.running import follow, opened, write_text
from jlayer.interrupts import check
from jlayer.sizes import human
from jlayer.streaming.steps import Free, Put, Read, Run

PROMPT = "Once upon a time there was a little girl who"
OPTIONS = {"max_new_tokens": 160, "temperature": 0.7, "top_p": 0.9, "seed": 37}


def add_arguments(parser):
    options.add_run(parser, ("device",))


def run(args) -> dict:
    with (
        converted_bundled() as folder,
        opened(folder, device=args.device, keeps_layers=False) as model,
    ):
        check()
        decoding, _ = model.decoding(PROMPT, options=OPTIONS)
        show = None if args.json else write_text
        found = follow(model, decoding, show, view=Places(model.plan.n_tiles), before=PROMPT)
        if not args.json:
            print(table(model, found))
    return found


def table(model, found) -> str:
    """The figures of the run, one a line."""
    stats, memory = found["stats"], found["memory"]
    layers = model.config.num_hidden_layers * stats["sweeps"]
    whole = model.engine.store.weight_bytes
    moved, times = human(stats["put_bytes"]), stats["put_bytes"] / whole
    rows = [
        (
            "layers streamed",
            f"{layers} ({model.config.num_hidden_layers} layers, {stats['sweeps']} forward passes)",
        ),
        (
            "bytes moved",
            f"{moved} = {times:.0f} times the model's {human(whole)}",
        ),
        ("most layers at a time", f"{model.engine.totals.most_live_tiles}"),
        ("peak held by JAX", f"{human(memory['device_peak_bytes'])} ({memory['device_peak_how']})"),
        ("tokens per second", f"{stats['tokens_per_s']:.1f}"),
    ]
    return "\n" + "\n".join(f"{name:<24}{value}" for name, value in rows)


class Places:
    """Where each tile is now, by the executor's steps: a view that `progress.shown` draws."""

    MARKS: ClassVar = {Read: "r", Put: "D", Run: "#", Free: " "}
    refresh_s = 0.04  # a sweep takes a few milliseconds
    LEGEND = "r read from disk   D on the device   # running   others: on disk"

    def __init__(self, n_tiles: int):
        self._places = [" "] * n_tiles

    def on_step(self, step, tile):
        self._places[step.tile] = self.MARKS[type(step)]

    def on_compile(self, label):
        pass

    def wait(self, words):
        pass

    def status(self) -> list[str]:
        return ["", "".join(f"[{mark}]" for mark in self._places), self.LEGEND]
