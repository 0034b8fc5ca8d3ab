"""`jlayer generate` that is stopped, killed and resumed prints what an undisturbed one prints."""

import json
import os
import random
import signal

import pytest

from jlayer.app.cli import main
from jlayer.engine.lane import Lane
from jlayer.engine.states import StateFolder
from tests.app.processes import finish, start
from tests.campaigns import slow_but
from tests.conftest import BUNDLED

MODEL = [str(BUNDLED), "--device", "cpu", "--dtype", "float32"]
BEGIN = ["generate", *MODEL, "-p", "Once upon a time"]
DRAWN = ["--temperature", "0.9", "--seed", "3"]
N = 12


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "run")


def run(capsys, *words, code=0):
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    return capsys.readouterr()


def result(capsys, *words, code=0):
    return json.loads(run(capsys, *words, "--json", code=code).out)


def undisturbed(capsys, *words):
    return result(capsys, *BEGIN, *words, "-n", N)


@pytest.mark.parametrize("words", slow_but([(), tuple(DRAWN)], [tuple(DRAWN)]))
def test_a_run_that_has_ended_goes_on_where_more_is_asked_for(capsys, folder, words):
    expected = undisturbed(capsys, *words)
    first = result(capsys, *BEGIN, *words, "-n", 5, "--save", folder)
    assert first["token_ids"] == expected["token_ids"][:5]
    second = result(capsys, "generate", *MODEL, "--resume", folder, "-n", N)
    for name in ("text", "token_ids", "finish_reason", "seed", "prompt_tokens"):
        assert second[name] == expected[name]
    assert second["stats"]["kept_tokens"] == expected["prompt_tokens"] + 4
    shown = run(capsys, "generate", *MODEL, "--resume", folder, "-n", N).out
    assert shown == expected["text"] + "\n", "what was there before is shown too"
    assert result(capsys, "generate", *MODEL, "--resume", folder)["text"] == first["text"]


def test_ctrl_c_saves_what_there_is(capsys, folder, monkeypatch):
    expected = undisturbed(capsys, *DRAWN)
    add = Lane.add

    def stopped(lane, choices):
        added = add(lane, choices)
        if len(lane.token_ids) == 7:
            signal.raise_signal(signal.SIGINT)
        return added

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "add", stopped)
        # pytest may have been started with SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        printed = run(capsys, *BEGIN, *DRAWN, "-n", N, "--save", folder, "--json", code=130)
        signal.signal(signal.SIGINT, before)
    assert json.loads(printed.out)["token_ids"] == expected["token_ids"][:7]
    assert f"saved to {folder} (7 new tokens); --resume {folder} goes on" in printed.err
    again = run(capsys, "generate", *MODEL, "--resume", folder, "--save", folder).out
    assert again == expected["text"] + "\n"


def test_it_is_saved_every_so_many_tokens(capsys, folder, monkeypatch):
    saved, save = [], StateFolder.save

    def noting(self, facts, parts, **how):
        saved.append(len(facts["lanes"][0]["tokens"]))
        save(self, facts, parts, **how)

    monkeypatch.setattr(StateFolder, "save", noting)
    run(capsys, *BEGIN, "-n", 8, "--save", folder, "--save-every", 3)
    assert saved == [3, 6, 8]


def refused(capsys, *words, code=2):
    said = run(capsys, *words, code=code).err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_is_said_in_one_line(capsys, folder, tmp_path):
    resume = ["generate", *MODEL, "--resume", folder]
    assert "does not exist" in refused(capsys, *resume)
    assert "add --save" in refused(capsys, *BEGIN, "--save-every", 3)
    assert "from 1 up" in refused(capsys, *BEGIN, "--save", folder, "--save-every", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("Dear")
    assert "letter" in refused(capsys, *BEGIN, "--save", tmp_path / "mine")
    beams = [*BEGIN, "--num-beams", 2, "--save", folder]
    assert "a beam search cannot be saved" in refused(capsys, *beams), "before its first pass"
    run(capsys, *BEGIN, "-n", 3, "--save", folder)
    assert "holds a saved run already" in refused(capsys, *BEGIN, "--save", folder)
    for words in (["-p", "x"], ["x"], ["--seed", "1"], ["--system", "x"], ["--prompt-ids", "1"]):
        assert "goes on as it was begun" in refused(capsys, *resume, *words)
    assert "has 3 new tokens already" in refused(capsys, *resume, "-n", 2)
    other = ["generate", str(BUNDLED), "--device", "cpu", "--resume", folder]
    assert "saved with another dtype: expected float32, found bfloat16; give --dtype float32" in (
        refused(capsys, *other)
    )
    several = ["--processes", 2, "--process-id", 0, "--coordinator", "localhost:1"]
    assert "several processes" in refused(capsys, *resume, *several)


# Kills itself at the nth call of a function while it saves.
KILLED = """
import os, signal, sys
import jlayer.engine.states as states
from jlayer.app.cli import main
names = {"rename": (os, "rename"), "part": (states, "write_part"), "sync": (states, "sync_folder"),
         "remove": (states, "remove_state"), "removed": (states.shutil, "rmtree"),
         "state": (states, "write_state")}
name, left, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
where, attribute = names[name]
real = getattr(where, attribute)
def stopped(*given, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **more)
setattr(where, attribute, stopped)
sys.exit(main(words))
"""
PLACES = ("rename", "part", "sync", "remove", "removed", "state")


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_50_times_gives_the_same_text(capsys, folder):
    n_tokens, rng = 400, random.Random(5)
    expected = result(capsys, *BEGIN, *DRAWN, "-n", n_tokens)["token_ids"]
    n_kills, n_before = 0, 0
    while n_kills < 50:
        is_there = os.path.isdir(folder) and StateFolder(folder).holds_one
        words = ["generate", *MODEL, "--resume", folder] if is_there else [*BEGIN, *DRAWN]
        words += ["-n", str(n_tokens), "--save", folder, "--save-every", "1"]
        place = rng.choice(PLACES)
        code, _, said = finish(start(place, rng.randrange(1, 9), *words, code=KILLED))
        assert code == -signal.SIGKILL, said
        n_kills += 1
        if not StateFolder(folder).holds_one:
            assert n_before == 0
            continue
        with StateFolder(folder).reading() as state:
            (lane,) = state.facts["lanes"]
            for _ in state.parts():
                pass
        found = lane["tokens"]
        assert len(found) >= n_before, "the old state stands until the new one is whole"
        assert found == expected[: len(found)]
        n_before = len(found)
    assert 50 < n_before < n_tokens - 10, "it has been killed while it went on"
    found = result(capsys, "generate", *MODEL, "--resume", folder, "--save", folder)
    assert found["token_ids"] == expected
