"""What a terminal shows at the end is the text and the lines about it, each once."""

import re
from itertools import islice

import pytest

import jlayer
from tests.app.screen import PYTHON, Screen, on_terminal
from tests.conftest import BUNDLED
from tests.programs import all_shapes

# Pieces that a renderer of markup, of emoji codes or of tabs would change, a line longer than the
# terminal, and one that ends in its last column.
PIECES = ["Good [:dog:] :smile:", "\tand [bold]tabs[/bold]\t.", "\n\n  ", 9 * "wrapped text ", "\n"]
PIECES += ["x" * 79, "y", "z", "\n", "end"]
TEXT = "".join(PIECES)
# Sweeps that are slow, as `progress` sees them: two lines under the text.
SLOW = f"""
import sys, time
from types import SimpleNamespace
from jlayer.app import progress, status
from jlayer.app.running import write_text
from jlayer.streaming.watch import Watch
from jlayer.streaming.steps import Run

progress.PATIENCE_S = progress.View.refresh_s = 0.001
model = SimpleNamespace(
    config=SimpleNamespace(num_hidden_layers=3),
    plan=SimpleNamespace(machine=SimpleNamespace(disk_speed=1000.0)),
    engine=SimpleNamespace(watch=Watch()),
)
with progress.shown(model, write_text) as write:
    for piece in {PIECES!r}:
        for tile in range(3):
            model.engine.watch.on_step and model.engine.watch.on_step(
                Run(tile), SimpleNamespace(layer=tile)
            )
            time.sleep(0.01)
        model.engine.watch.on_stall(SimpleNamespace(n_bytes=1, name="a tile"), 5.0)
        time.sleep(0.01)
        write(piece)
    time.sleep(0.03)
print()
"""


def as_shown(text, columns):
    screen = Screen(columns=columns)
    screen.feed(text.replace("\n", "\r\n"))
    return screen.text()


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (80, 5), (40, 4), (200, 50)])
def test_text_is_shown_as_it_is_while_sweeps_are_slow(columns, rows):
    code, screen, written = on_terminal([PYTHON, "-c", SLOW], columns=columns, rows=rows)
    assert code == 0
    assert "of 3 layers" in written
    assert "waiting for the disk" in written
    assert screen.text() == as_shown(TEXT, columns)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_cannot_draw_over_lines_gets_the_text_alone(env):
    code, _, written = on_terminal([PYTHON, "-c", SLOW], env=env)
    assert code == 0
    assert "\x1b" not in written
    assert "of 3 layers" not in written


def test_beside_a_pipe_nothing_is_drawn():
    """`| tee` writes to the same terminal, where nobody knows."""
    words = f"{PYTHON} -c '{SLOW.replace(chr(39), chr(34))}' | tee"
    code, screen, written = on_terminal(["sh", "-c", words])
    assert code == 0
    assert "of 3 layers" not in written
    stalled = re.sub(r"jlayer: waiting for the disk: a tile, \d+ s so far\n", "", screen.text())
    assert as_shown(stalled, 80) == as_shown(TEXT, 80)


# The command line with a counter in every sweep.
COMMAND = """
import sys
from jlayer.app import progress
from jlayer.__main__ import run
progress.PATIENCE_S = 0.0
progress.View.refresh_s = 0.002
sys.exit(run())
"""


@pytest.fixture(scope="module")
def pieces():
    """What each token adds to the text: the first 400, of the programs that the command has."""
    prompt, options = "Once upon a time", {"max_new_tokens": 900, "device": "cpu"}
    with all_shapes():
        return [step.text for step in islice(jlayer.stream(BUNDLED, prompt, **options), 400)]


@pytest.mark.parametrize("columns", [80])
def test_an_interrupt_leaves_each_line_of_the_text_once(columns, pieces):
    words = ["generate", str(BUNDLED), "-n", "900", "--device", "cpu", "Once upon a time"]
    argv = [PYTHON, "-c", COMMAND, *words]
    code, screen, _ = on_terminal(
        argv, columns=columns, keys=[(r"token ([3-9]|[12]\d)\d:", b"\x03")]
    )
    assert code == 130
    _, text, summary = re.split(r"\njlayer: |(?<=4\.00 GiB)\n", screen.text())
    n_tokens = int(re.search(r"(\d+) tokens \(interrupted\)", summary)[1])
    assert n_tokens >= 20
    shown = re.sub(r"\s", "", text).replace("^C", "")  # the screen pads and cuts its lines
    assert shown == re.sub(r"\s", "", "".join(pieces[:n_tokens]))


def test_the_demo_shows_where_the_layers_are_under_the_story_and_then_the_figures():
    code, screen, written = on_terminal([PYTHON, "-m", "jlayer", "demo", "--device", "cpu"])
    assert code == 0
    maps = re.findall(r"(?:\[[ rD#]\]){8}", written)
    assert len(set(maps)) > 3
    legend = next(line for line in written.split("\r\n") if "r read from disk" in line)
    assert len(re.sub(r"\x1b(\[\d*m|8.*)", "", legend)) < 80
    text = screen.text()
    assert "read from disk" not in text
    places = [text.index(words) for words in ("Once upon", "160 tokens", "layers streamed")]
    assert places == sorted(places)
