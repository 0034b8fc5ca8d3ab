"""The picture of some sweeps, drawn by matplotlib: a lane each for read, put, run and free; and for
guessing tokens and for choosing experts, where that was done.

Whether it can be drawn and written is checked before the run, which may take long.
"""

from __future__ import annotations

import importlib.util
import io
import os
import stat
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

from jlayer.app.streams import tell
from jlayer.errors import StorageError, UsageError
from jlayer.plan.tiles import Tier
from jlayer.sizes import human

# The colour-blind safe palette of Okabe and Ito; the lighter colour marks every second layer.
COLOURS = {
    Tier.DISK: ("#D55E00", "#F0A36B"),
    Tier.HOST: ("#0072B2", "#6FB1DB"),
    Tier.DEVICE: ("#009E73", "#7FCFB8"),
}
EXPERTS, GUESSED = ("#E69F00", "#F5D08A"), "#8C510A"
LIGHT = {light for _, light in (*COLOURS.values(), EXPERTS)}
WAITING = "#D9D9D9"
WORDS = {
    Tier.DISK: "from disk, every pass",
    Tier.HOST: "kept in host memory",
    Tier.DEVICE: "kept on the device",
}
EXPERT_WORDS, GUESSED_WORDS = "experts, as they are chosen", "experts, by guess"
DRAFTING = "#CC79A7"
LANES = {
    "draft": "guess tokens",
    "read": "disk to host",
    "put": "host to device",
    "host": "multiply on the host",
    "run": "multiply",
    "decide": "wait for the choice",
    "free": "wait for the run, drop",
}
# Lane -> what is the limit where it is busy all the time.
LIMITS = {
    "read": "the disk",
    "put": "the link to the device",
    "host": "the host's cores",
    "run": "the arithmetic",
}
# A picture of more than CROWD tiles gets a second one below it that shows CLOSELY of them.
CROWD, CLOSELY = 90, 14
NAMELESS = ("draft", "decide")  # lanes whose spans are of no tile
BY_DEVICE = ("put", "run")  # lanes with a bar for each device
SOMETIMES = ("draft", "host", "decide")  # lanes that are drawn only where they were used
LIMITING = 0.8  # a lane that is busy for a smaller share of the time is not the limit


def add_option(parser) -> None:
    parser.add_argument(
        "--timeline", metavar="FILE.png", help="draw the steps of the last forward passes"
    )


def check_file(path: str | None, *, option: str = "--timeline") -> None:
    """Raises UsageError or StorageError where a picture cannot be drawn or written to `path` (None:
    no picture), which was given as `option`. Leaves `path` as it was."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f'{option}: needs matplotlib; pip install -e ".[timeline]", or leave it out'
        )
    if not path.endswith(".png"):
        raise UsageError(f"{option}: found {path!r}, expected a name that ends in .png")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"{option}: {folder} is no folder; make it, or name another")
    is_there = os.path.lexists(path)
    if is_there and not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{option}: {path} is not a regular file; name another")
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise StorageError(f"{option}: {path}: {error.strerror}; name another") from None
    if not is_there:
        os.remove(path)


@contextmanager
def recorded(model, path: str | None, name: str):
    """Draws the last sweeps of the run inside it, also where that ends early.

    With no `path` nothing is recorded. `name` is the model's.
    """
    if path is None:
        yield
        return
    from jlayer.streaming.record import Recorder

    recorder = Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers)
    try:
        with recorder:
            yield
    finally:
        timeline = recorder.timeline()
        if timeline is not None:
            write(timeline, path, what=f"{name} on {model.engine.device_name}")
            tell(f"timeline in {path}")


def write(timeline, path: str, *, what: str) -> None:
    """Draws a `jlayer.streaming.record.Timeline` into a PNG file. Raises StorageError."""
    picture = io.BytesIO()
    draw(timeline, what=what).savefig(picture, format="png", dpi=150)
    try:
        with open(path, "wb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise StorageError(f"--timeline: {path}: {error.strerror}") from None


def draw(timeline, *, what: str):
    """The figure: the whole timeline and, where it has many tiles, a close look at a few."""
    from matplotlib.figure import Figure

    begin, end = timeline.starts[0], timeline.end
    crowded = len(_runs(timeline)) > CROWD
    figure = Figure(figsize=(13, 8.2 if crowded else 4.6), layout="constrained")
    axes = figure.subplots(2 if crowded else 1, squeeze=False)[:, 0]
    _draw_window(axes[0], timeline, begin, end, closely=not crowded)
    _tell_busy(axes[0], timeline)
    if crowded:
        near = _close_look(timeline)
        _draw_window(axes[1], timeline, *near, closely=True)
        axes[0].axvspan(*[(at - begin) * 1e3 for at in near], color="black", alpha=0.15, lw=0)
        axes[1].set_title("a close look at what is shaded above", fontsize=10, loc="left")
    axes[-1].set_xlabel("milliseconds")
    words = {"x": 0.01, "ha": "left", "fontsize": 12, "fontweight": "bold"}
    figure.suptitle(title(timeline, what), **words, parse_math=False)  # a name may have two $
    figure.legend(
        handles=_legend(timeline), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def title(timeline, what: str) -> str:
    """The model, the sweeps and the busiest lane."""
    n_sweeps, starts = len(timeline.starts), timeline.starts
    each, guesses = (timeline.end - starts[0]) / n_sweeps, ""
    if n_sweeps > 1 and timeline.lane("draft"):  # the guesses for the first one came before it
        each, guesses = (starts[-1] - starts[0]) / (n_sweeps - 1), " with its guesses"
    n_bytes = sum(timeline.tiles[span.tile].n_bytes for span in _runs(timeline)) // n_sweeps
    busy = {lane: timeline.busy(lane) for lane in LIMITS}
    most = max(busy, key=busy.get)
    limit = LIMITS[most]
    verdict = (
        f"{limit} is the busiest, {busy[most]:.0%} of the time"
        if busy[most] >= LIMITING
        else f"nothing is busy all the time, {limit} most: {busy[most]:.0%}"
    )
    return (
        f"{what}: {n_sweeps} forward pass{'es' * (n_sweeps > 1)} of {human(n_bytes)}, "
        f"{each * 1e3:,.4g} ms each{guesses}; {verdict}"
    )


def _close_look(timeline):
    """(begin, end) of a few tiles in the middle of the last sweep."""
    runs = [span for span in _runs(timeline) if span.begin >= timeline.starts[-1]]
    middle = len(runs) // 2
    chosen = runs[middle : middle + CLOSELY]
    return chosen[0].begin, chosen[-1].end


def _draw_window(axes, timeline, begin, end, *, closely):
    """The lanes from `begin` to `end`; `closely`: with the names of the tiles."""
    zero, heights, lanes = timeline.starts[0], _rows(timeline), _lanes(timeline)

    def place(span):
        """(left, width) in milliseconds of its visible part."""
        left, right = max(span.begin, begin), min(span.end, end)
        return (left - zero) * 1e3, (right - left) * 1e3

    for (lane, row, shade), spans in _by_shade(timeline, begin, end).items():
        lowest, height = heights[lane, row]
        where = [place(span) for span in spans]
        if lane == "free":
            axes.broken_barh(where, (lowest, height), color=WAITING, lw=0, zorder=1)
            drops = [left + width for left, width in where]
            axes.vlines(drops, lowest, lowest + height, color=shade, lw=1.5 if closely else 0.5)
            continue
        # Closely, a white edge separates neighbours; else a thin one keeps bars under a pixel.
        edge = {"edgecolor": "white", "lw": 0.8} if closely else {"edgecolor": shade, "lw": 0.2}
        axes.broken_barh(where, (lowest, height), facecolor=shade, **edge)
        if closely and lane not in NAMELESS:
            _name(axes, timeline, spans, where, lowest + height / 2, end - begin, shade)
    _draw_layers(axes, timeline, begin, end, place)
    for start in timeline.starts:
        if begin <= start <= end:
            axes.axvline((start - zero) * 1e3, color="black", lw=1, ls=":")
            words = {"fontsize": 8, "style": "italic"}
            axes.text((start - zero) * 1e3, len(lanes) + 0.72, " forward pass", **words)
    _frame(axes, timeline, (begin - zero) * 1e3, (end - zero) * 1e3)


def _by_shade(timeline, begin, end):
    """(lane, row, colour) -> the spans of a window that are drawn alike."""
    found = {}
    for span in timeline.spans:
        if span.end > begin and span.begin < end:
            found.setdefault((span.lane, span.row, _shade(timeline, span)), []).append(span)
    return found


def _shade(timeline, span):
    if span.lane in NAMELESS:
        return DRAFTING if span.tile is None else WAITING
    if span.guessed:
        return GUESSED
    tile, tier = timeline.tiles[span.tile], timeline.tiers[span.tile]
    colours = COLOURS[tier] if tile.expert is None else EXPERTS
    return colours[(tile.layer or 0) % 2]


def _name(axes, timeline, spans, where, height, width, shade):
    """Writes the tiles' names into their bars, where there is room."""
    for span, (left, own) in zip(spans, where, strict=True):
        words = timeline.tiles[span.tile].name.removeprefix("layer ").split(" ")
        lines = [word for word in words[-2:] if word]
        if own / (width * 1e3) > 0.0075 * max(map(len, lines)):
            middle, text = left + own / 2, "\n".join(lines)
            colour = "black" if shade in LIGHT else "white"
            options = {"ha": "center", "va": "center", "fontsize": 7, "clip_on": True}
            axes.text(middle, height, text, color=colour, **options)


def _frame(axes, timeline, left, right):
    lanes = _lanes(timeline)
    axes.set_xlim(left, right)
    axes.set_ylim(0, len(lanes) + 0.9)
    words = [f"{lane}: {LANES[lane]}{_on(timeline, lane)}" for lane in reversed(lanes)]
    axes.set_yticks([*(place + 0.5 for place in range(len(lanes))), len(lanes) + 0.4])
    axes.set_yticklabels([*words, "layer"])
    axes.xaxis.set_major_formatter(lambda at, _: f"{at:,.5g}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)


def _on(timeline, lane):
    """Words for a lane of several devices, whose bars lie one above another."""
    n = len({span.row for span in timeline.lane(lane)})
    return f",\neach of {n} devices" if lane in BY_DEVICE and n > 1 else ""


def _draw_layers(axes, timeline, begin, end, place):
    """Above the lanes, which layer runs when; with its number where there is room."""
    above = len(_lanes(timeline))
    runs = [span for span in _runs(timeline) if span.end > begin and span.begin < end]
    for layer, own in groupby(runs, key=lambda span: timeline.tiles[span.tile].layer):
        own = list(own)
        left, width = place(replace(own[0], end=own[-1].end))
        grey = "#CCCCCC" if layer is not None and layer % 2 else "#E6E6E6"
        axes.broken_barh([(left, width)], (above + 0.2, 0.4), color=grey, lw=0)
        words = "head" if layer is None else str(layer)
        if width / (end - begin) / 1e3 > 0.008 * len(words):
            middle = left + width / 2
            options = {"ha": "center", "va": "center", "fontsize": 8, "clip_on": True}
            axes.text(middle, above + 0.38, words, **options)


def _tell_busy(axes, timeline):
    """Writes the share of the time that each lane is busy to its right."""
    lanes = _lanes(timeline)
    for place, lane in enumerate(reversed(lanes)):
        if lane != "free":
            words, height = f"busy {timeline.busy(lane):.0%}", (place + 0.5) / (len(lanes) + 0.9)
            axes.text(1.005, height, words, transform=axes.transAxes, va="center")


def _runs(timeline):
    """The spans in which tiles are multiplied, wherever, in order; of several devices those of the
    first."""
    spans = [span for span in timeline.lane("run") if span.row == 0] + timeline.lane("host")
    return sorted(spans, key=lambda span: span.end)


def _lanes(timeline):
    """The lanes that are drawn, from above."""
    return [lane for lane in LANES if lane not in SOMETIMES or timeline.lane(lane)]


def _rows(timeline):
    """(lane, row) -> (lowest, height). A lane has height 1, divided among its workers."""
    found = {}
    for place, lane in enumerate(reversed(_lanes(timeline))):
        rows = sorted({span.row for span in timeline.lane(lane)}) or [0]
        for index, row in enumerate(rows):
            height = 0.8 / len(rows)
            found[lane, row] = (place + 0.1 + index * height, height * 0.94)
    return found


def _legend(timeline):
    from matplotlib.patches import Patch

    certain = {
        tier
        for tile, tier in zip(timeline.tiles, timeline.tiers, strict=True)
        if tile.expert is None
    }
    handles = [
        Patch(color=COLOURS[tier][0], label=WORDS[tier]) for tier in WORDS if tier in certain
    ]
    if any(tile.expert is not None for tile in timeline.tiles):
        handles.append(Patch(color=EXPERTS[0], label=EXPERT_WORDS))
    if any(span.guessed for span in timeline.spans):
        handles.append(Patch(color=GUESSED, label=GUESSED_WORDS))
    return [*handles, Patch(color=WAITING, label="waiting for the output")]
