"""The picture of a run: refused before the run if it cannot be drawn, and true to the record."""

import importlib.util
import os
from dataclasses import replace

import pytest

from jlayer.app import picture
from jlayer.app.cli import main
from jlayer.errors import StorageError, UsageError
from jlayer.families.registry import layer_kinds
from jlayer.plan.tiles import Tier, Tile
from jlayer.streaming.record import Span, Timeline
from tests.conftest import BUNDLED
from tests.plan.models import SMALL

PNG = b"\x89PNG\r\n\x1a\n"
GENERATE = ["-p", "Once upon a time", "--device", "cpu", "-n", "3"]


def timeline(n_tiles=3, tiers=(Tier.DISK, Tier.HOST)):
    """Two sweeps of `n_tiles` layers; every 10 ms a layer is read, all the time, and one runs."""
    tiles = tuple(Tile(f"layer {i}", layer_kinds(SMALL)[0], None, i, ()) for i in range(n_tiles))
    spans = []
    for number in range(2 * n_tiles):
        at, tile = number / 100, number % n_tiles
        spans += [
            Span("read", tile, at, at + 0.01),
            Span("put", tile, at, at + 0.002),
            Span("run", tile, at + 0.002, at + 0.005),
            Span("free", tile, at + 0.004, at + 0.006),
        ]
    kinds = tuple(tiers[i % len(tiers)] for i in range(n_tiles))
    return Timeline(tiles, kinds, tuple(spans), (0.0, n_tiles / 100), 2 * n_tiles / 100)


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_without_matplotlib_it_is_refused_before_the_model_is_opened(verb, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    words = ["/no/such/model", "--timeline", "x.png", *(GENERATE[:2] if verb == "generate" else ())]
    assert main([verb, *words]) == 2
    assert 'pip install -e ".[timeline]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("x.jpg", UsageError, "ends in .png"),
        ("none/x.png", UsageError, "no folder"),
        ("folder.png", UsageError, "not a regular file"),
        ("pipe.png", UsageError, "not a regular file"),
        ("x" * 300 + ".png", StorageError, "too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path, name, error, said):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(error, match=said):
        picture.check_file(str(tmp_path / name))


def test_asking_leaves_files_as_they_are(tmp_path):
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"before")
    picture.check_file(str(kept))
    picture.check_file(str(tmp_path / "new.png"))
    assert kept.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["kept.png"]


def test_generate_draws_its_last_sweeps(fable, tmp_path, capsys):
    file = tmp_path / "sweeps.png"
    assert main(["generate", str(fable), *GENERATE, "--timeline", str(file)]) == 0
    assert file.read_bytes().startswith(PNG)
    assert f"timeline in {file}" in capsys.readouterr().err


def words_of(figure):
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


def test_the_picture_says_what_limits_and_shows_only_the_tiers_in_use():
    words = words_of(picture.draw(timeline(), what="m on d"))
    said = "m on d: 2 forward passes of 0 B, 30 ms each; the disk is the busiest, 100% of the time"
    assert said in words
    assert {"busy 100%", "busy 20%", "busy 30%"} <= set(words)
    assert picture.WORDS[Tier.DISK] in words
    assert picture.WORDS[Tier.HOST] in words
    assert picture.WORDS[Tier.DEVICE] not in words
    assert {"layer", "0", "1", "2"} <= set(words)


def test_several_devices_have_a_bar_each_and_a_tile_counts_once():
    plain = timeline(30)  # with twice as many runs there would be a second picture
    own = tuple(replace(span, row=1) for span in plain.spans if span.lane in picture.BY_DEVICE)
    both = replace(plain, spans=(*plain.spans, *own))
    found = []
    for each in (plain, both):
        (axes,) = picture.draw(each, what="m on d").axes
        labels = [label.get_text() for label in axes.get_yticklabels()]
        found.append((labels, picture.title(each, "m on d"), len(axes.collections)))
    (alone, title, bars), (labels, of_both, more) = found
    assert of_both == title
    assert labels[1] == alone[1] + ",\neach of 2 devices" == "run: multiply,\neach of 2 devices"
    assert labels[2].startswith("put: host to device,\neach")
    assert (labels[0], *labels[3:]) == (alone[0], *alone[3:])
    assert more > bars


def test_a_name_is_no_formula(tmp_path):
    """Two $ enclose one for matplotlib."""
    file = tmp_path / "file.png"
    picture.write(timeline(), str(file), what="a$x_{$")
    assert file.read_bytes().startswith(PNG)


def test_guessing_has_a_lane_where_tokens_were_guessed():
    plain, labels = timeline(), []
    drafted = replace(plain, spans=(*plain.spans, Span("draft", None, 0.029, 0.035)))
    for each in (plain, drafted):
        (axes,) = picture.draw(each, what="").axes
        labels.append([label.get_text() for label in axes.get_yticklabels()])
        assert axes.get_ylim()[1] > max(axes.get_yticks())
    without, guesses = labels
    assert [label.partition(":")[0] for label in without] == ["free", "run", "put", "read", "layer"]
    assert guesses == [*without[:-1], "draft: guess tokens", "layer"]
    words = words_of(picture.draw(replace(drafted, starts=(0.0, 0.04)), what="m"))
    assert "busy 10%" in words
    assert any(
        each.startswith("m: 2 forward passes of 0 B, 40 ms each with its g") for each in words
    )


def test_experts_have_colours_of_their_own_and_the_wait_for_their_choice_a_lane():
    plain = timeline()
    tiles = (plain.tiles[0], replace(plain.tiles[1], expert=0), replace(plain.tiles[2], expert=0))
    put, guess = Span("put", 1, 0.001, 0.002), Span("put", 2, 0.002, 0.003, guessed=True)
    waits = (Span("decide", 1, 0.012, 0.015), Span("decide", 2, 0.022, 0.025))
    chosen = replace(plain, tiles=tiles, spans=(*plain.spans, put, *waits))
    guessed = replace(chosen, spans=(*chosen.spans, guess))
    found = [words_of(picture.draw(each, what="")) for each in (plain, chosen, guessed)]
    for number, words in enumerate(found):
        assert ("decide: wait for the choice" in words) == (number > 0)
        assert (picture.EXPERT_WORDS in words) == (number > 0)
        assert (picture.GUESSED_WORDS in words) == (number > 1)
        assert (picture.WORDS[Tier.HOST] in words) == (number == 0)  # of experts it says nothing
    assert "busy 10%" in found[1]
    from matplotlib.colors import to_hex

    (axes,) = picture.draw(guessed, what="").axes
    colours = {to_hex(c) for part in axes.collections for c in part.get_facecolor()}
    assert {each.lower() for each in (*picture.EXPERTS, picture.GUESSED)} <= colours


def test_generate_draws_where_it_guessed(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(picture, "write", lambda timeline, path, what: drawn.append(timeline))
    words = [*GENERATE[:-1], "8", "--temperature", "0", "--draft", str(BUNDLED)]
    file = tmp_path / "sweeps.png"
    options = ["--draft-tokens", "2", "--timeline", str(file)]
    assert main(["generate", str(BUNDLED), *words, *options]) == 0
    (timeline,) = drawn
    assert timeline.lane("draft")
    assert "forward passes" in capsys.readouterr().err


def test_a_crowd_of_tiles_gets_a_close_look():
    few, many = timeline(40), timeline(60)
    assert len(picture.draw(few, what="").axes) == 1
    figure = picture.draw(many, what="")
    assert len(figure.axes) == 2
    left, right = figure.axes[1].get_xlim()
    n_runs = sum(left <= 1e3 * s.begin and 1e3 * s.end <= right + 1e-9 for s in many.lane("run"))
    assert n_runs == picture.CLOSELY
