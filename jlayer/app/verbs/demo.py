"""Stream the bundled model (fable-3m, 6 MB, trained for this project) and watch it tell a story.

The model is converted to a temporary folder and streamed from there with two slots, so that its
layers really come and go. The story is sampled with a fixed seed.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jlayer
from jlayer.app.verbs.generate import follow, write_text
from jlayer.config import human
from jlayer.streaming.schedule import Free, Put, Read, Run

PROMPT = "Once upon a time there was a little girl who"
OPTIONS = {"max_new_tokens": 160, "temperature": 0.7, "top_p": 0.9, "seed": 37}
BUNDLED = Path(jlayer.__file__).parent / "data" / "fable-3m"


def add_arguments(parser):
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: the accelerator that is there"
    )


def run(args) -> dict:
    from convert import convert_checkpoint
    from jlayer.api import AutoModel, sampling_options
    from jlayer.engine.decoding import Decoding
    from jlayer.engine.prompts import encode_prompts

    with tempfile.TemporaryDirectory(prefix="jlayer-demo-") as folder:
        layered = Path(folder) / "fable-3m"
        print("jlayer: converting the bundled fable-3m to one file a layer", file=sys.stderr)
        convert_checkpoint(BUNDLED, layered)
        with AutoModel.from_pretrained(layered, device=args.device, keeps_layers=False) as model:
            prompts, _ = encode_prompts(model, PROMPT)
            decoding = Decoding(model, prompts, sampling_options(model, OPTIONS), text=model.text)
            live = sys.stdout.isatty() and not args.json
            with live_view(model) if live else nullcontext(write_text) as show:
                if not args.json:
                    show(PROMPT)
                found = follow(model, decoding, None if args.json else show, counts=not live)
            if not args.json:
                print(table(model, found))
    return found


def table(model, found) -> str:
    """What came and went, for a person."""
    stats, memory = found["stats"], found["memory"]
    layers = model.config.num_hidden_layers * stats["sweeps"]
    moved, times = human(stats["put_bytes"]), stats["put_bytes"] / model.model_bytes
    rows = [
        (
            "layers streamed",
            f"{layers} ({model.config.num_hidden_layers} layers, {stats['sweeps']} sweeps)",
        ),
        ("bytes moved", f"{moved} = {times:.0f} times the model's {human(model.model_bytes)}"),
        ("most layers at a time", f"{model.totals.most_live_tiles}"),
        ("peak held by JAX", f"{human(memory['device_peak_bytes'])} ({memory['device_peak_how']})"),
        ("tokens per second", f"{stats['tokens_per_s']:.1f}"),
    ]
    return "\n" + "\n".join(f"{name:<24}{value}" for name, value in rows)


class Places:
    """Where each tile is now, told by the executor's steps; drawn as one line."""

    def __init__(self, n_tiles: int):
        self._places = [" "] * n_tiles

    def note(self, step):
        marks = {Read: "r", Put: "D", Run: "#", Free: " "}
        self._places[step.tile] = marks[type(step)]

    def __str__(self):
        tiles = "".join(f"[{mark}]" for mark in self._places)
        return f"{tiles}  r read from disk   D on the device   # running   others: on disk"


@contextmanager
def live_view(model):
    """Shows the text as it grows, and under it where each layer is; yields what takes the text's
    pieces."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    story, places = Text(), Places(len(model.plan.tiles))

    class View:
        def __rich__(self):
            return Group(story, Text(f"\n{places}", style="dim"))

    console = Console()
    watched = model.watch.also(lambda step, tile: places.note(step))
    with Live(View(), console=console, refresh_per_second=20), watched:
        yield story.append
