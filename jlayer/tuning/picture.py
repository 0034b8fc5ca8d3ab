"""The picture of a run: its loss, step by step, and the held-out perplexity."""

from __future__ import annotations

import io
import math

from jlayer.errors import StorageError
from jlayer.tuning.run import History

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"
SMOOTH = 0.9  # of a running mean, the part of what was before


def draw_losses(history: History, path: str, *, what: str) -> None:
    """Draws the losses into a PNG file. Raises StorageError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(title=what, xlabel="step", ylabel="nats a token")
    steps = [step["step"] for step in history.steps]
    losses = [step["loss"] for step in history.steps]
    axes.plot(steps, losses, color=GREY, linewidth=1, label="loss")
    axes.plot(steps, smoothed(losses), color=BLUE, label="running mean")
    held = [(0, history.before)] if history.before is not None else []
    held += [(s["step"], s["perplexity"]) for s in history.steps if "perplexity" in s]
    if held:
        numbers, found = zip(*held, strict=True)
        axes.plot(numbers, list(map(math.log, found)), "o-", color=ORANGE, label="held-out text")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    try:
        with open(path, "wb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise StorageError(f"--picture: {path}: {error.strerror}; name another") from None


def smoothed(numbers: list[float]) -> list[float]:
    """The running mean of some numbers; the first ones count as much as later ones."""
    found, total, weight = [], 0.0, 0.0
    for number in numbers:
        total, weight = SMOOTH * total + number, SMOOTH * weight + 1
        found.append(total / weight)
    return found
