"""What is shown while a run takes long: phases, a counter, a stalled disk; text stays whole."""

import io
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from jlayer.api import AutoModel, generate
from jlayer.app import progress
from jlayer.streaming.steps import Free, Read, Run
from jlayer.streaming.watch import Watch


def tile(layer, *, n_bytes=1000):
    return SimpleNamespace(layer=layer, n_bytes=n_bytes, name=f"layer {layer}")


def model_of(watch=None):
    return SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=3),
        plan=SimpleNamespace(machine=SimpleNamespace(disk_speed=1000.0), sweep_seconds=9.0),
        engine=SimpleNamespace(watch=watch or Watch()),
    )


MODEL = model_of()


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.s)
    return now


@pytest.fixture
def view(clock):
    return progress.View(MODEL, words=progress.sweep_words)


def terminal(monkeypatch, *, is_terminal=True):
    """Puts a stream in the place of stderr. No fixture: pytest replaces stderr after those."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_a_slow_sweep_counts_its_layers_and_a_fast_one_shows_nothing(view, clock):
    view.on_step(Run(0), tile(0))
    assert view.status() == []
    clock.s += 2
    assert view.status() == ["prompt: 0 of 3 layers, 2 s"]
    view.on_step(Free(0, 0, after=0), tile(0))
    view.on_step(Run(1), tile(1))
    view.on_step(Run(2), tile(1))
    assert view.status() == ["prompt: 1 of 3 layers, 2.00 s a layer, 4 s left"]
    view.on_step(Run(3), tile(2))
    view.on_step(Run(4), tile(None))
    clock.s += 1
    assert view.status() == ["prompt: 3 of 3 layers, 1.00 s a layer, 0 s left"]
    view.on_step(Run(0), tile(0))
    assert view.status() == []  # the next sweep is fast so far
    clock.s += 1.5
    assert view.status() == ["token 2: 0 of 3 layers, 2 s"]


def sweep(view, clock, seconds, layers=3):
    view.on_step(Run(0), tile(0))
    clock.s += seconds
    for layer in range(1, layers):
        view.on_step(Run(layer), tile(layer))


def test_an_answer_s_line_stays_between_sweeps_with_what_one_takes_and_what_is_left(clock):
    left = [None]
    view = progress.AnswerView(MODEL, words=lambda: "token 7", n_sweeps_left=lambda: left[0])
    sweep(view, clock, 30.0)  # the prompt's counts in no time of a token
    assert view.status() == ["token 7: 2 of 3 layers, 15.00 s a layer, 15 s left"]
    left[0] = 50
    sweep(view, clock, 2.0)
    assert view.status() == ["token 7: 2 of 3 layers, 1.00 s a layer, 1 s left"]
    left[0] = 49
    view.on_step(Run(0), tile(0))
    assert view.status() == ["token 7: layer 0 of 3, 2.0 s a forward pass, at most 1:38 left"]
    clock.s += 0.5
    view.on_step(Run(1), tile(1))
    assert view.status() == ["token 7: layer 1 of 3, 2.0 s a forward pass, at most 1:38 left"]
    clock.s += 1.5
    for seconds in (2.0, 60.0, 2.0, 2.0):  # something was compiled
        left[0] -= 1
        sweep(view, clock, seconds)
    left[0] = 1
    view.on_step(Run(0), tile(0))
    clock.s += 1.0
    assert view.status() == ["token 7: layer 0 of 3, 2.0 s a forward pass, at most 1 s left"]


def test_an_answer_that_comes_fast_has_no_line(clock):
    view = progress.AnswerView(MODEL, words=lambda: "token 7", n_sweeps_left=lambda: 50)
    for _ in range(40):
        sweep(view, clock, 0.05)
        assert view.status() == []


def test_compiling_and_the_first_read_are_named_and_are_no_part_of_the_first_layer(view, clock):
    clock.s += 9  # the tokenizer, say
    assert view.status() == []
    for label in ("block 1x8", "head 1x8"):
        view.on_compile(label)
        clock.s += 7
        last = view.status()
        view.on_compile(None)
        assert view.status() == []
        clock.s += 0.5
    assert last == ["compiling, 14 s: program 2, head 1x8"]  # with what lies between the two
    view.on_step(Read(0, 0), tile(0))
    assert view.status() == []
    clock.s += 3
    assert view.status() == ["reading the first weights, 3 s"]
    view.on_step(Run(0), tile(0))
    clock.s += 1.3
    view.on_step(Read(2, 0), tile(2))
    view.on_step(Run(1), tile(1))
    assert view.status() == ["prompt: 1 of 3 layers, 1.30 s a layer, 3 s left"]


def test_a_stalled_disk_is_named_until_it_goes_on(view, clock):
    view.on_step(Run(0), tile(0))
    clock.s += 9
    view.wait("waiting for the disk: layer 1, 9 s so far")
    assert view.status()[1:] == ["waiting for the disk: layer 1, 9 s so far"]
    view.on_step(Read(2, 0), tile(2))
    assert len(view.status()) == 2
    view.on_step(Run(1), tile(1))
    assert len(view.status()) == 1


def test_a_stall_is_longer_than_the_disk_s_speed_explains_and_is_reported_ever_less_often():
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


@pytest.mark.parametrize(
    ("seconds", "shown"), [(9.4, "9 s"), (59.6, "1:00"), (65, "1:05"), (7384, "2:03:04")]
)
def test_time_left_is_shown_as_a_clock_does(seconds, shown):
    assert progress.duration(seconds) == shown


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_steps_are_watched_only_where_somebody_looks(monkeypatch, is_terminal):
    terminal(monkeypatch, is_terminal=is_terminal)
    watch = Watch()
    watched = []

    @contextmanager
    def also(on_step):
        watched.append((on_step, watch.on_compile))
        yield

    monkeypatch.setattr(watch, "also", also)
    pieces = []
    with progress.shown(model_of(watch), pieces.append) as write:
        write("text")
    assert pieces == ["text"]
    assert len(watched) == is_terminal
    assert all(all(callbacks) for callbacks in watched)
    assert watch.on_compile is None


def test_what_goes_to_a_file_still_does_while_a_terminal_counts(monkeypatch):
    stream, file = terminal(monkeypatch), io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    with progress.shown(model_of(), None):
        print("a result")
    assert file.getvalue() == "a result\n"
    assert "a result" not in stream.getvalue()


@pytest.mark.usefixtures("compiled_anew")
def test_a_run_on_a_terminal_names_what_opening_compiling_and_sweeping_do(fable, monkeypatch):
    """The hooks are called by the engine, and in this order."""
    terminal(monkeypatch)
    shown = []
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(progress.Phase, "line", noting(progress.Phase.line, shown))
    begin = progress.Phase.begin

    def begun(phase, *words):
        begin(phase, *words)
        phase.line()

    monkeypatch.setattr(progress.Phase, "begin", begun)
    with progress.opening() as watch:
        model = AutoModel.from_pretrained(fable, device="cpu", watch=watch, keeps_layers=False)
    with model, progress.shown(model, None):
        generate(model, [1, 2, 3], max_new_tokens=2)
    order = [
        "opening: starting JAX",
        "opening: reading headers",
        "opening: starting the device",
        "opening: measuring the disk and the link",
        "opening: reading norms and biases",
        "compiling",
        "reading the first weights",
    ]
    found = list(dict.fromkeys(line.split(",")[0] for line in shown if line))
    assert [words for words in found if words in order] == order


def noting(function, into):
    def noted(*args):
        into.append(function(*args))
        return into[-1]

    return noted
