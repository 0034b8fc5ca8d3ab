"""What is shown while a sweep takes long: a counter, and a disk that stalls; text stays whole."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.live import Live

from jlayer.app import progress
from jlayer.streaming.schedule import Free, Read, Run


def tile(layer, *, ends=True, stage="down", n_bytes=1000):
    return SimpleNamespace(
        layer=layer, stage=stage, ends_stage=ends, n_bytes=n_bytes, name=f"layer {layer}"
    )


MODEL = SimpleNamespace(
    config=SimpleNamespace(num_hidden_layers=3),
    plan=SimpleNamespace(machine=SimpleNamespace(disk_speed=1000.0), sweep_seconds=9.0),
)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.s)
    return now


def test_a_slow_sweep_counts_its_layers_and_a_fast_one_says_nothing(clock):
    view = progress.View(MODEL, words=progress.sweep_words, writes=False)
    view.on_step(Run(0), tile(0))
    assert view.counter() == ""
    clock.s += 2
    view.on_step(Run(1), tile(1, ends=False))
    view.on_step(Free(1, 0), tile(1))
    assert "prompt:  33%" in view.counter()
    assert "1/3 [00:02<00:04,  2.00s/layer]" in view.counter()
    view.on_step(Run(2), tile(1))
    view.on_step(Run(3), tile(None, stage="head"))
    assert "2/3" in view.counter()
    view.on_step(Run(0), tile(0))
    assert view.counter() == ""  # the next sweep is fast so far
    clock.s += 1.5
    assert view.counter().startswith("token 2:  33%")


def test_a_stalled_disk_is_named_until_it_goes_on(clock):
    view = progress.View(MODEL, words=progress.sweep_words, writes=False)
    clock.s += 9
    view.wait("waiting for the disk: layer 1, 9 s so far")
    assert view.counter().endswith("\nwaiting for the disk: layer 1, 9 s so far")
    view.on_step(Read(2, 0), tile(2))
    assert "waiting" in view.counter()
    view.on_step(Run(1), tile(1))
    assert "waiting" not in view.counter()


def test_a_stall_is_what_the_disk_s_speed_does_not_explain_and_is_told_ever_less_often():
    told = []
    stalls = progress.Stalls(MODEL, told.append)
    for seconds in range(1, 20):
        stalls(tile(1, n_bytes=500), float(seconds))  # half a second at the disk's speed
    assert [words.split()[-4] for words in told] == ["2", "4", "8", "16"]
    assert told[0] == "waiting for the disk: layer 1, 2 s so far"
    told.clear()
    for seconds in range(1, 10):
        stalls(tile(2, n_bytes=2000), float(seconds))  # another one, which may take its two
    assert [words.split()[-4] for words in told] == ["8"]


def test_text_is_written_whole_around_the_counter(clock):
    screen = io.StringIO()
    view = progress.View(MODEL, words=progress.sweep_words, writes=True)
    view.console = Console(file=screen, force_terminal=False, width=40)
    with Live(view, console=view.console, auto_refresh=False) as live:
        view.live = live
        for piece in ("Once upon", " a time [bold]\nthere ", "was\n", "one"):
            view.write(piece)
            clock.s += 1
    view.end()
    assert "Once upon a time [bold]\nthere was\n" in screen.getvalue()
    assert screen.getvalue().endswith("one")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_steps_are_watched_only_where_somebody_looks(monkeypatch, is_terminal):
    class Watch:
        on_stall = None
        entered = 0

        def also(self, on_step):
            Watch.entered += 1
            return io.StringIO()  # any context

    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    model = SimpleNamespace(watch=Watch(), **vars(MODEL))
    pieces = []
    with progress.shown(model, pieces.append) as write:
        write("text")
    assert pieces == ["text"]
    assert Watch.entered == is_terminal


def test_what_goes_to_a_file_still_does_while_a_terminal_counts(monkeypatch, capsys):
    stream, file = io.StringIO(), io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    watch = SimpleNamespace(on_stall=None, also=lambda on_step: io.StringIO())
    model = SimpleNamespace(watch=watch, **vars(MODEL))
    with progress.shown(model, None):
        print("a result")
    assert file.getvalue() == "a result\n"
    assert "a result" not in stream.getvalue()
