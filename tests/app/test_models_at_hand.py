"""`jlayer list`, `pull` and `remove`: what is at hand, against caches and folders made by hand."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.cells import cell_len

from jlayer import catalogue
from jlayer.app import table
from jlayer.app.cli import main
from jlayer.checkpoint import hub as hub_module
from jlayer.checkpoint.hub import pull
from jlayer.checkpoint.store import Store
from jlayer.sizes import human
from tests.app.processes import start
from tests.app.screen import PYTHON, on_terminal
from tests.cache import FIRST, SECOND, THIRD, cached, everything, share
from tests.conftest import BUNDLED, REPOSITORY
from tests.convert import quantized_kinds
from tests.convert.checkpoints import files_of
from tests.hub_server import COMMIT, Hub, library_turned_to

REPO = "someone/tiny"
FABLE = {name: data for name, data in files_of(BUNDLED).items() if name != "SOURCE.md"}
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty place for the hub's cache; the library of this process keeps it there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with the bundled model, and what no run needs beside it."""
    hub = Hub({REPO: {**FABLE, "README.md": b"no", "pytorch_model.bin": b"no"}})
    with library_turned_to(hub, tmp_path / "cache", monkeypatch):
        yield hub


def run(capsys, *words):
    """(exit code, the JSON that was printed, stderr)."""
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def listed(capsys, *words):
    """The models that `jlayer list` finds, by name."""
    code, found, _ = run(capsys, "list", *words)
    assert code == 0
    models = {model["name"]: model for model in found["models"]}
    assert len(models) == len(found["models"])
    return models


def without(*names, **changes):
    """The files of the bundled model, without some of them, and with others changed."""
    kept = {name: data for name, data in FABLE.items() if name not in names}
    return {**kept, **{name.replace("_json", ".json"): data for name, data in changes.items()}}


def config(**changes):
    return json.dumps({**json.loads(FABLE[CONFIG]), **changes}).encode()


# --- list


def test_a_cache_with_all_that_goes_wrong_is_listed_to_its_end(cache, capsys):
    awq = config(quantization_config={"quant_method": "awq", "bits": 4})
    pickled = {**without(WEIGHTS), "pytorch_model.bin": b"weights"}
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    sharded = {**without(WEIGHTS), f"{WEIGHTS}.index.json": index, "one.safetensors": b""}
    cut = {**FABLE, WEIGHTS: FABLE[WEIGHTS][:-5]}
    expected = {}

    def add(repo, files, state, reason="", *, name=None, **options):
        expected[name or repo] = (state, reason)
        return cached(cache, repo, files, **options)

    add("a/whole", FABLE, "runs")
    add("a/tagged", FABLE, "runs", name="a/tagged@v1", refs=("v1",))
    add("a/detached", FABLE, "runs", name=f"a/detached@{FIRST}", refs=())
    add("a/config", {CONFIG: FABLE[CONFIG]}, "incomplete", "no weights")
    add("a/nothing", {}, "incomplete", "no weights and no config.json")
    add("a/readme", {"README.md": b"# hi"}, "incomplete", "no weights and no config.json")
    add("a/no-config", without(CONFIG), "incomplete", "config.json is missing")
    add("a/shards", sharded, "incomplete", "1 weight file missing: two.safetensors")
    add("a/pickles", pickled, "convert")
    add("a/gguf", {"x.gguf": b"GGUF"}, "broken", "cut off")
    add("a/lora", {"adapter_config.json": b"{}"}, "unsupported", "an adapter")
    add("a/awq", without(config_json=awq), "unsupported", "group_size is None")
    add("a/alien", without(config_json=config(model_type="alien")), "unsupported", "alien")
    add("a/cut", cut, "broken", "bytes")
    add("a/not-json", without(config_json=b'{"model_type": '), "broken", "not JSON")
    add("a/a-list", without(config_json=b"[]"), "broken", "expected an object")
    add("a/deep", without(config_json=b"[" * 100_000), "broken", "nested deeper")
    add("a/huge", without(config_json=config(hidden_size=2**80)), "broken", "hidden_size")
    add("a/index", {**sharded, f"{WEIGHTS}.index.json": b"{}"}, "broken", "weight_map")
    # Half of a download, and half of a removal.
    folder = add("a/dangling", FABLE, "incomplete", "1 weight file missing: model.safetensors")
    (folder / WEIGHTS).resolve().unlink()
    folder = add("a/no-blobs", FABLE, "incomplete", "1 weight file missing: model.safetensors")
    shutil.rmtree(folder.parent.parent / "blobs")
    shutil.rmtree(add("a/ref", FABLE, "incomplete", "no files of this revision"))
    shutil.rmtree(add("a/blobs", FABLE, "incomplete", "nothing was fetched").parent.parent / "refs")
    shutil.rmtree(cache / "models--a--blobs" / "snapshots")
    (cache / "models--a--begun" / "blobs").mkdir(parents=True)
    (cache / "models--a--begun" / "blobs" / "1.incomplete").write_bytes(b"12345")
    expected["a/begun"] = ("incomplete", "nothing was fetched to its end")
    # What is no folder at all.
    (cache / "models--a--file").write_text("")
    expected["a/file"] = ("broken", "Not a directory")
    (cache / "models--a--loop").symlink_to("models--a--loop")
    expected["a/loop"] = ("broken", "Too many levels")
    folder = add("a/pipe", without(CONFIG), "broken", "not a regular file")
    os.mkfifo(folder / CONFIG)
    (add("a/odd-refs", FABLE, "runs").parent.parent / "refs" / "v2").write_text("../../../x")
    os.mkfifo(cache / "models--a--odd-refs" / "refs" / "pipe")
    # What is there and no model.
    (cache / "datasets--a--text" / "snapshots").mkdir(parents=True)
    (cache / ".locks").mkdir()
    (cache / "version.txt").write_text("1")

    models = listed(capsys)
    assert {name: model["state"] for name, model in models.items()} == {
        name: state for name, (state, _) in expected.items()
    }
    for name, (_, reason) in expected.items():
        assert reason in (models[name]["reason"] or ""), name
        assert "\n" not in (models[name]["reason"] or ""), name
    whole = models["a/whole"]
    assert whole["reason"] is None
    assert whole["bytes"] == sum(map(len, FABLE.values()))
    assert whole["parameters"] == 3148224
    assert (whole["form"], whole["dtype"], whole["model_type"]) == (
        *("safetensors", "bfloat16"),
        "llama",
    )
    assert models["a/awq"]["quantization"] == "awq"
    assert models["a/gguf"]["form"] == "GGUF"
    assert models["a/begun"]["bytes"] == 5
    assert models["a/config"]["advice"] == "jlayer pull a/config"
    assert models["a/pickles"]["advice"] == "jlayer convert a/pickles pickles-jlayer"
    assert models["a/detached@" + FIRST]["revision"] == FIRST
    planned = {name for name, model in models.items() if model["plan"]}
    assert {"a/whole", "a/config", "a/pickles", "a/dangling"} <= planned
    assert not {"a/gguf", "a/cut", "a/alien", "a/ref"} & planned
    # For a person, one line each: a head, the models, a line between, two sums.
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(expected) + 3
    at = lines[0].index("STATE")
    assert all(line[at - 1] == " " and line[at] != " " for line in lines[1 : 1 + len(expected)])


def test_figures_are_those_of_a_plan(tmp_path, capsys, fable):
    from jlayer.convert import convert_checkpoint

    convert_checkpoint(BUNDLED, tmp_path / "int4", quantize="int4")
    (tmp_path / "70b").mkdir()  # a config alone
    (tmp_path / "70b" / CONFIG).write_bytes(catalogue.model_json("llama-3.1-70b-instruct"))
    memory = ["--device-memory", "2GiB", "--host-memory", "8GiB", "--device", "gpu"]
    speeds = ["--link-speed", "1GB/s", "--disk-speed", "2GB/s", "--context", "64"]
    models = listed(capsys, BUNDLED, fable, tmp_path, *memory, *speeds)
    small = {str(BUNDLED), str(fable), f"{tmp_path}/int4"}
    assert models.keys() == {*small, f"{tmp_path}/70b"}
    for name, model in models.items():
        code, plan, _ = run(capsys, "plan", name, *memory, *speeds)
        assert code == 0
        assert model["seconds_a_token"] == plan["sweep"]["decode_seconds"]
        assert model["plan"]["disk_bytes_a_token"] == plan["sweep"]["disk_bytes"]
        assert model["fits"] is True
    assert models[f"{tmp_path}/70b"]["seconds_a_token"] > 60
    assert models[f"{tmp_path}/int4"]["quantization"] == "int4"
    assert models[f"{tmp_path}/int4"]["form"] == "layered"


def test_what_does_not_fit_says_what_it_needs(capsys):
    words = [BUNDLED, "--device", "gpu", "--device-memory", "600MiB", "--host-memory", "1GiB"]
    (model,) = listed(capsys, *words).values()
    assert (model["fits"], model["seconds_a_token"]) == (False, None)
    assert main(["list", *map(str, words)]) == 0
    assert model["plan"]["lacks"] in capsys.readouterr().out
    needed = model["plan"]["lacks"].removeprefix("needs ").split()[0]
    words[4] = needed
    (model,) = listed(capsys, *words).values()
    assert model["fits"] is True


def test_the_disk_is_measured_where_it_matters_and_once(tmp_path, capsys, monkeypatch):
    """A model that is streamed: the measured speed is in its time; one that stays: no reads."""
    from jlayer.streaming import direct

    asked = []

    def measure(paths):
        asked.append(list(paths))
        return 1e6

    monkeypatch.setattr(direct, "disk_speed", measure)
    for name in ("one", "two"):
        shutil.copytree(BUNDLED, tmp_path / name)
    assert all(model["fits"] for model in listed(capsys, tmp_path).values())
    assert asked == []
    tight = ["--device", "cpu", "--context", "8", "--host-memory"]
    one, _ = listed(capsys, tmp_path, *tight, "1MiB").values()
    tight.append(one["plan"]["lacks"].split()[1])  # enough to run, and not to keep weights
    assert asked == []
    models = listed(capsys, tmp_path, *tight).values()
    assert [model["plan"]["disk_speed_is"] for model in models] == ["measured"] * 2
    assert len(asked) == 1
    for model in models:
        least = model["plan"]["disk_bytes_a_token"] / 1e6
        assert model["seconds_a_token"] > least > 0
    given = listed(capsys, tmp_path, *tight, "--disk-speed", "1MB/s").values()
    assert [model["plan"]["disk_speed_is"] for model in given] == ["given"] * 2
    assert [one["seconds_a_token"] for one in given] == [one["seconds_a_token"] for one in models]


def test_folders_are_models_or_hold_some(tmp_path, cache, capsys, fable):
    home = tmp_path / "home"
    shutil.copytree(BUNDLED, home / "plain")
    (home / "layered").symlink_to(fable)
    for name in (".git", "notes", "src"):
        (home / name).mkdir()
    (home / "src" / CONFIG).write_text('{"editor": "dark"}')  # of another program
    (home / "readme.md").write_text("")
    (home / "gone").symlink_to("nowhere")
    (home / "loop").symlink_to("loop")
    (home / "gguf").mkdir()
    (home / "gguf" / "x.gguf").write_bytes(b"GGUF")
    (home / "half").mkdir()
    shutil.copy(fable / "layer-00000.safetensors", home / "half")
    states = {
        f"{home}/plain": "runs",
        f"{home}/layered": "runs",
        f"{home}/gguf": "broken",
        f"{home}/gone": "broken",
        f"{home}/loop": "broken",
        f"{home}/half": "broken",
    }
    found = listed(capsys, home)
    assert {name: model["state"] for name, model in found.items()} == states
    assert "its conversion did not end" in found[f"{home}/half"]["reason"]
    # Each model once, however often its folder is given.
    assert listed(capsys, home, home / "plain", f"{home}/", fable).keys() == states.keys()
    # Another cache: an id would mean the model in the hub's own.
    folder = cached(tmp_path / "other", "a/b", FABLE)
    assert listed(capsys, tmp_path / "other").keys() == {str(folder)}
    assert listed(capsys, tmp_path / "none")[f"{tmp_path}/none"]["state"] == "broken"
    assert listed(capsys, home / "readme.md")[f"{home}/readme.md"]["state"] == "broken"
    code, found, err = run(capsys, "list", home / "notes")
    assert (code, found["models"]) == (0, [])
    assert f"{home}/notes: no model in it" in err


def test_orbax_is_to_be_converted(tmp_path, capsys):
    from jlayer.convert import convert_checkpoint
    from jlayer.convert.export import export_checkpoint

    convert_checkpoint(BUNDLED, tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", tmp_path / "orbax", format="orbax")
    model = listed(capsys, tmp_path)[f"{tmp_path}/orbax"]
    assert (model["form"], model["state"]) == ("orbax", "convert")
    assert model["seconds_a_token"] > 0


@pytest.mark.parametrize("has_file", [False, True])
def test_what_is_repacked_is_to_be_converted(tmp_path, capsys, has_file):
    """The file that GPTQ's libraries write beside the config says the same again."""
    quantized_kinds.write(tmp_path / "gptq", "gptq")
    if has_file:
        (tmp_path / "gptq" / "quantize_config.json").write_text("{}")
    model = listed(capsys, tmp_path)[f"{tmp_path}/gptq"]
    assert (model["quantization"], model["state"]) == ("gptq", "convert")
    assert model["seconds_a_token"] > 0
    assert model["advice"] == f"jlayer convert {tmp_path}/gptq gptq-jlayer"


def test_nothing_is_said_with_where_it_was_looked_for(cache, tmp_path, capsys):
    assert main(["list", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"no models in {cache}, {tmp_path}; get one: jlayer pull owner/name, or name a folder "
        "that has some\n"
    )
    assert "no model in it" in err
    cache.write_text("")  # a file in the place of the cache
    code, found, err = run(capsys, "list", BUNDLED)
    assert (code, len(found["models"])) == (0, 1)
    assert f"{cache}: cannot be read (Not a directory)" in err


ODD = (
    "new\nline",
    "\x1b[31mred",
    "日本語のモデル" * 6,
    "u\u202ex",
    "tab\t",
    "e\udcff",
    "--json",
    "' ;",
)


def test_names_are_shown_on_one_line_each_whatever_is_in_them(tmp_path):
    for name in ODD:
        shutil.copytree(BUNDLED, tmp_path / name)
    shown, as_json = (
        start("list", tmp_path, *more, env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "none")})
        for more in ([], ["--json"])
    )
    models = json.loads(as_json.communicate()[0])["models"]
    assert {os.path.basename(model["name"]) for model in models} == set(ODD)
    out = shown.communicate()[0]
    assert (shown.returncode, as_json.returncode) == (0, 0)
    assert len(out.split("\n")) == 1 + len(ODD) + 3 + 1
    assert all(character.isprintable() or character == "\n" for character in out)


def test_what_no_one_may_read_is_a_row(cache, tmp_path, capsys, monkeypatch):
    """Tests may run as root, who may read all; so the system's answer is made up."""
    hub_s = cached(cache, REPO, FABLE).parent.parent
    shutil.copytree(BUNDLED, tmp_path / "home" / "shut")
    shutil.copytree(BUNDLED, tmp_path / "home" / "open")
    real, closed = os.listdir, {str(hub_s / "snapshots"), str(tmp_path / "home" / "shut")}

    def refuse(path="."):
        if path in closed:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", refuse)
    models = listed(capsys, tmp_path / "home")
    assert models[f"{tmp_path}/home/open"]["state"] == "runs"
    for name in (REPO, f"{tmp_path}/home/shut"):
        assert models[name]["state"] == "broken"
        assert "cannot be read (Permission denied)" in models[name]["reason"]
    code, found, _ = remove(capsys, REPO)
    assert (code, "Permission denied" in found["error"]) == (6, True)


def test_a_config_of_a_model_without_end_does_not_hold_up_the_list(tmp_path, capsys):
    widths = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / CONFIG).write_bytes(config(**widths, num_hidden_layers=10_000))
    (model,) = listed(capsys, tmp_path).values()
    assert (model["state"], model["fits"]) == ("incomplete", False)
    assert "too much for a quick plan" in model["plan"]["lacks"]


IN_NO_FOLDER = """
import os, sys
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
sys.path.insert(1, sys.argv[2])
from jlayer.app.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("words", "code"), [(["list", "."], 0), (["list", "x"], 0), (["remove", "./x", "--yes"], 6)]
)
def test_a_working_directory_that_is_gone(tmp_path, words, code):
    (tmp_path / "gone").mkdir()
    words = [tmp_path / "gone", REPOSITORY, *words]
    process = start(*words, code=IN_NO_FOLDER, env={**os.environ, "HF_HOME": str(tmp_path)})
    _, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (code, False), err


@pytest.mark.parametrize("columns", [*range(1, 60, 7), 80, 150, 250, 400])
def test_a_table_is_as_wide_as_the_terminal_and_its_columns_are_aligned(columns):
    rows = [
        ("owner/" + "very-long-name-" * 4 + "END", "x", "1", "runs"),
        ("日本語" * 10 + "終", "layered, int4", "22.5 GiB", "broken: " + "reason " * 20),
        ("é\u0301", "", "", ""),
        ("a\x1b[2Jb", "x", "1", "👩‍👩‍👧‍👦 " * 9),
    ]
    head = ("NAME", "FORM", "BYTES", "STATE")
    natural = table.lines(head, rows, right=(2,))
    assert len(natural) == 1 + len(rows)
    assert len({cell_len(line[: line.index(word)]) for line, word in states_of(natural)}) == 1
    lines = table.lines(head, rows, right=(2,), columns=columns)
    assert all(cell_len(line) <= columns for line in lines)
    if columns >= max(map(cell_len, natural)):
        assert lines == natural
        return
    assert len(lines) == 2 * len(natural)  # a line more for each
    firsts, seconds = lines[::2], lines[1::2]
    if columns >= 50:
        assert "very-long" in firsts[1]
        assert "END" in firsts[1]  # the end tells names apart
        assert "終" in firsts[2]
        assert len({cell_len(line[: line.index(word)]) for line, word in states_of(firsts)}) == 1
        assert seconds[2].split() == ["layered,", "int4", "22.5", "GiB"]


def states_of(lines):
    return [(lines[0], "STATE"), (lines[1], "runs"), (lines[2], "broken")]


def test_on_a_terminal_no_line_is_broken(tmp_path):
    for name in ("short", "日本語のモデル" * 6, "a-model-of-a-long-name-" * 5):
        shutil.copytree(BUNDLED, tmp_path / name)
    code, screen, _ = on_terminal(
        [PYTHON, "-m", "jlayer", "list", tmp_path],
        columns=90,
        env={"HF_HOME": str(tmp_path / "none")},
    )
    assert code == 0
    lines = screen.text().splitlines()
    assert len(lines) == 2 * (1 + 3) + 3
    assert all("safetensors, bfloat16" in line for line in lines[3:8:2])
    assert all(line.endswith("runs") for line in lines[2:8:2])


def test_it_needs_neither_the_network_nor_what_is_slow_to_import(cache, tmp_path):
    cached(cache, REPO, FABLE)
    cached(cache, "a/pickles", {**without(WEIGHTS), "pytorch_model.bin": b""})
    heavy = ("jax", "torch", "transformers", "flax", "orbax", "huggingface_hub.file_download")
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from jlayer.app.cli import main\n"
        f"assert main(['list', {str(BUNDLED)!r}, '--device', 'gpu']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        check=True,
    )
    assert done.stderr.strip().endswith("[]"), done.stderr
    assert REPO in done.stdout


# --- pull


def test_pull_fetches_what_a_run_needs_and_says_where_it_is(hub, cache, capsys):
    assert main(["pull", REPO]) == 0
    out, err = capsys.readouterr()
    folder = out.removesuffix("\n")
    assert files_of(Path(folder)) == FABLE
    assert hub.fetched() == set(FABLE)
    assert "files to fetch" in err
    assert "are free" in err
    assert Store(folder).cfg.model_type == "llama"
    sent = dict(hub.sent)
    code, found, _ = run(capsys, "pull", f"{REPO}@v1")
    assert (code, hub.sent) == (0, sent)
    assert found == {
        "id": f"{REPO}@v1",
        "folder": folder,
        "revision": COMMIT,
        "files": len(FABLE),
        "bytes": sum(map(len, FABLE.values())),
    }
    (model,) = listed(capsys).values()
    assert (model["name"], model["refs"], model["state"]) == (REPO, ["main", "v1"], "runs")


class Recorder:
    """Notes what a download reports."""

    def __init__(self):
        self.total, self.done, self.files, self.seen = 0, 0, [], []

    def start(self, total_bytes):
        self.total += total_bytes

    def file(self, name):
        self.files.append(name)

    def advance(self, n_bytes):
        self.done += n_bytes
        self.seen.append(self.done)


def test_progress_counts_each_byte_once_while_it_comes(hub):
    hub.holds[WEIGHTS] = threading.Event()
    half, recorder = len(FABLE[WEIGHTS]) // 2, Recorder()

    def seen(n_bytes):
        """Goes on once it was reported that half of the file has come."""
        recorder.done += n_bytes
        recorder.seen.append(recorder.done)
        if 0 < recorder.done < recorder.total:
            hub.holds[WEIGHTS].set()

    recorder.advance = seen
    import huggingface_hub.constants as constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        pull(REPO, note=lambda line: None, progress=recorder)
    assert set(recorder.files) | {CONFIG} == set(FABLE)
    assert recorder.done == recorder.total == sum(len(FABLE[name]) for name in recorder.files)
    assert any(0 < done <= recorder.total - half for done in recorder.seen)


def test_pull_refuses_what_the_disk_has_no_room_for(hub, capsys, monkeypatch):
    real = hub_module.shutil.disk_usage
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: real(path)._replace(free=999))
    code, found, _ = run(capsys, "pull", REPO)
    assert code == found["exit_code"] == 4
    assert "have 999 free" in found["error"]
    assert hub.fetched() == {CONFIG}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["someone/tiny", "--offline"], 2, "a pull is a download"),
        (["someone/tiny/"], 2, "did you mean someone/tiny?"),
        (["https://huggingface.co/someone/tiny/tree/main"], 2, "did you mean someone/tiny?"),
        ([""], 2, "no hub id"),
        (["."], 2, "found here"),
        (["../x"], 2, "no hub id"),
        (["tiny"], 2, "no hub id"),
        (["a/b@"], 2, "no hub id"),
        (["a/b\n"], 2, r"'a/b\n'"),
        (["a/../b"], 2, "no hub id"),
        (["a b/c"], 2, "no hub id"),
        (["someone/tiny@../x"], 5, "no revision '../x'"),
        (["someone/tiny@v9"], 5, "no revision 'v9'"),
        (["someone/else"], 5, "no such model"),
    ],
)
def test_what_cannot_be_pulled_is_one_line(hub, capsys, words, code, said):
    assert main(["pull", *words]) == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (out, said in line) == ("", True), err
    assert not hub.fetched()


def test_offline_by_the_environment_is_said(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["pull", REPO]) == 5
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert hub.asked == []


def test_a_cache_that_cannot_be_written_is_one_line(hub, cache, capsys):
    cache.write_text("a file in its place")
    assert main(["pull", REPO]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_stopped_goes_on_with_the_same_command(hub, cache, capsys, number):
    hub.holds[WEIGHTS] = threading.Event()
    env = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = start("pull", REPO, "--json", env={**os.environ, **env})
    with process:
        while not hub.sent.get(WEIGHTS):
            assert process.poll() is None
        # Half of it has come: it is listed so, and not removed under its feet.
        (model,) = listed(capsys).values()
        assert model["state"] == "incomplete"
        assert model["reason"].endswith("being fetched by another process")
        assert main(["remove", REPO, "--yes"]) == 7
        assert "another process is fetching it" in capsys.readouterr().err
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    hub.holds.pop(WEIGHTS).set()
    assert process.returncode == 128 + number
    assert json.loads(out)["finish_reason"] == "interrupted"
    assert "the same command goes on" in err
    assert "Traceback" not in err
    (model,) = listed(capsys).values()
    assert (model["state"], model["advice"]) == ("incomplete", f"jlayer pull {REPO}")
    sent = dict(hub.sent)
    assert main(["pull", REPO]) == 0
    again = {name for name in FABLE if hub.sent[name] != sent.get(name)}
    assert again <= {WEIGHTS, *(set(FABLE) - set(sent))}
    assert files_of(Path(capsys.readouterr().out.strip())) == FABLE


# --- remove


def remove(capsys, *words):
    return run(capsys, "remove", *words, "--yes")


def test_remove_frees_what_it_says_and_leaves_all_else(cache, capsys):
    cached(cache, REPO, FABLE, refs=("main", "v1"))
    cached(cache, "someone/other", FABLE)
    (cache / "models--someone--tiny" / ".no_exist" / FIRST).mkdir(parents=True)
    (cache / "models--someone--tiny" / "blobs" / "x.incomplete").write_bytes(b"12345")
    kept = everything(cache / "models--someone--other")
    assert main(["remove", REPO, "--yes"]) == 0
    out, err = capsys.readouterr()
    n_bytes = sum(map(len, FABLE.values())) + 5 + 2 * len(FIRST)
    assert out == f"{REPO}: removed, {human(n_bytes)} freed\n"
    assert f"{REPO}: revision {FIRST[:12]} (main, v1)" in err
    assert os.listdir(cache) == ["models--someone--other"]
    assert everything(cache / "models--someone--other") == kept
    code, found, _ = remove(capsys, "someone/other")
    assert code == 0
    assert found["freed_bytes"] == sum(map(len, FABLE.values())) + len(FIRST)  # and refs/main
    assert found["revisions"] == [FIRST]
    assert os.listdir(cache) == []
    assert remove(capsys, "someone/other")[0] == 3


def revisions(cache):
    """A model in three revisions that have most files in common."""
    cached(cache, REPO, FABLE, commit=FIRST)
    changed = {**FABLE, CONFIG: config(note=2), "tokenizer_config.json": b'{"own": 2}'}
    second = cached(cache, REPO, changed, commit=SECOND, refs=("v2", "refs/pr/1"))
    cached(cache, REPO, without("tokenizer.json"), commit=THIRD, refs=())
    return {CONFIG: changed[CONFIG], "tokenizer_config.json": b'{"own": 2}'}, second


@pytest.mark.parametrize("name", ["v2", "refs/pr/1", SECOND, SECOND[:7]])
def test_a_revision_goes_with_what_it_alone_uses(cache, capsys, name):
    own, _ = revisions(cache)
    before = everything(cache)
    code, found, err = remove(capsys, f"{REPO}@{name}")
    assert code == 0
    assert found["whole"] is False
    assert found["freed_bytes"] == sum(map(len, own.values()))
    common = {data for name, data in FABLE.items() if name not in own}
    assert found["kept_bytes"] == sum(map(len, common))
    assert "stay, which others use as well" in err
    gone = before.keys() - everything(cache).keys()
    assert {path for path in gone if "/blobs/" in path and before[path] in own.values()}
    assert sum("/blobs/" in path for path in gone) == len(own)
    left = listed(capsys)
    assert {name: model["state"] for name, model in left.items()} == {
        REPO: "runs",
        f"{REPO}@{THIRD}": "runs",
    }
    for each in (REPO, f"{REPO}@{THIRD}"):  # by its name all the same where it is the last one
        assert remove(capsys, each if each != REPO else f"{REPO}@main")[0] == 0
    assert os.listdir(cache) == []


def test_a_store_that_models_share_loses_what_no_other_uses(cache, capsys):
    import huggingface_hub

    for repo in (REPO, "someone/other"):
        cached(cache, repo, FABLE)
    blobs = cache / "models--someone--tiny" / "blobs", cache / "models--someone--other" / "blobs"
    name = (cache / f"models--someone--tiny/snapshots/{FIRST}" / WEIGHTS).resolve().name
    place = share(cache, blobs[0] / name)
    assert share(cache, blobs[1] / name) == place
    sizes = {"whole": sum(map(len, FABLE.values())) + len(FIRST), "shared": len(FABLE[WEIGHTS])}
    code, found, _ = remove(capsys, REPO)
    assert (code, found["freed_bytes"]) == (0, sizes["whole"] - sizes["shared"])
    assert found["kept_bytes"] == sizes["shared"]
    assert place.read_bytes() == FABLE[WEIGHTS]
    (model,) = listed(capsys).values()
    assert model["state"] == "runs"
    # The library sees the cache as we do.
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert repo.repo_id == "someone/other"
    code, found, _ = remove(capsys, "someone/other")
    assert (code, found["freed_bytes"]) == (0, sizes["whole"])
    assert not place.exists()


class Stopped(BaseException):
    """The process ends here."""


CHANGES = ("unlink", "rmdir")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "revision"])
def test_a_removal_that_is_cut_off_anywhere_is_seen_and_goes_on(
    cache, tmp_path, capsys, monkeypatch, whole
):
    _, second = revisions(cache)
    first = second.parent / FIRST
    shutil.copytree(cache, tmp_path / "kept", symlinks=True)
    before = everything(cache)
    name, what = f"{REPO}@v2", REPO if whole else f"{REPO}@v2"
    real = {each: getattr(os, each) for each in CHANGES}
    n_changes = 0
    while True:
        left = n_changes

        def counted(each):
            def change(*args, **options):
                nonlocal left
                if not left:
                    raise Stopped
                left -= 1
                return real[each](*args, **options)

            return change

        for each in CHANGES:
            monkeypatch.setattr(os, each, counted(each))
        try:
            assert remove(capsys, what)[0] == 0
            is_over = True
        except Stopped:
            is_over = False
        for each in CHANGES:
            monkeypatch.setattr(os, each, real[each])
        capsys.readouterr()
        if is_over:
            break
        if n_changes:
            assert not os.path.lexists((first if whole else second) / CONFIG)  # before all else
            states = {one: model["state"] for one, model in listed(capsys).items()}
            if whole:  # three files say of three revisions what they are; these go first
                assert [*states.values()].count("runs") <= max(0, 3 - n_changes)
                assert states
            if not whole:
                assert states.pop(name) == "incomplete"
                assert set(states.values()) == {"runs"}
        else:
            assert everything(cache) == before
        code, _, _ = remove(capsys, what)
        assert code == 0
        if whole:
            assert os.listdir(cache) == []
        else:
            assert not second.exists()
            assert {one: each["state"] for one, each in listed(capsys).items()} == {
                REPO: "runs",
                f"{REPO}@{THIRD}": "runs",
            }
            assert len(os.listdir(cache / "models--someone--tiny" / "blobs")) == len(FABLE)
        shutil.rmtree(cache)
        shutil.copytree(tmp_path / "kept", cache, symlinks=True)
        n_changes += 1
    assert n_changes >= (20 if whole else 10)


@pytest.mark.parametrize(("typed", "code"), [(b"y\n", 0), (b"n\n", 2), (b"\n", 2), (b"\x04", 2)])
def test_it_asks_on_a_terminal(cache, typed, code):
    cached(cache, REPO, FABLE, refs=("main", "v1"))
    before = everything(cache)
    found, screen, _ = on_terminal(
        [PYTHON, "-m", "jlayer", "remove", REPO],
        columns=100,
        keys=[(r"\[y/N\] ", typed)],
        env={"HF_HUB_CACHE": str(cache)},
    )
    assert found == code
    assert f"remove {REPO} for good, 6.26 MiB? [y/N]" in screen.text()
    assert f"{REPO}: revision {FIRST[:12]} (main, v1)" in screen.text()
    assert (everything(cache) == before) is (code == 2)


def test_without_a_terminal_it_needs_a_yes(cache, capsys, monkeypatch):
    cached(cache, REPO, FABLE)
    before = everything(cache)
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["remove", REPO]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert everything(cache) == before


OPEN = "import sys; file = open(sys.argv[1]); print(flush=True); input()"
MAPPED = """
import ctypes, os, sys
fd, libc = os.open(sys.argv[1], os.O_RDONLY), ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
place = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))  # to read, private
assert place not in (None, ctypes.c_void_p(-1).value)
os.close(fd)
print(flush=True)
input()
"""


def test_what_another_process_uses_stays(cache, capsys):
    folder = cached(cache, REPO, FABLE)
    changed = {**FABLE, "merges.txt": b"own"}
    cached(cache, REPO, changed, commit=SECOND, refs=("v2",))
    locks = cache / ".locks" / "models--someone--tiny"
    locks.mkdir(parents=True)
    (locks / "other.lock").write_text("")
    before = everything(cache)
    with open(locks / "blob.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, found, _ = remove(capsys, REPO)
        assert code == found["exit_code"] == 7
        assert "is fetching it" in found["error"]
    (locks / "blob.lock").unlink()
    for reads in (OPEN, MAPPED):
        with start(folder / WEIGHTS, code=reads, stdin=subprocess.PIPE) as process:
            process.stdout.readline()
            code, found, _ = remove(capsys, REPO)
            assert (code, f"process {process.pid} has " in found["error"]) == (7, True)
            assert everything(cache) == before
            # Of the other revision nothing goes that it reads.
            assert remove(capsys, f"{REPO}@v2")[0] == 0
            cached(cache, REPO, changed, commit=SECOND, refs=("v2",))
            process.communicate("\n")
    assert remove(capsys, REPO)[0] == 0
    assert os.listdir(cache) == [".locks"]


def test_no_link_is_followed_out_of_the_cache(cache, tmp_path, capsys):
    outside = tmp_path / "outside"
    shutil.copytree(BUNDLED, outside)
    kept = everything(outside)
    home = cached(cache, REPO, FABLE).parent.parent
    for place in ("snapshots", "blobs", "refs", "."):
        (home / place / "link").symlink_to(outside)
    (home / "snapshots" / FIRST / "link").symlink_to(outside)
    (home / "blobs" / "file").symlink_to(outside / WEIGHTS)
    code, found, _ = remove(capsys, REPO)
    assert (code, found["freed_bytes"]) == (0, sum(map(len, FABLE.values())) + len(FIRST))
    assert os.listdir(cache) == []
    assert everything(outside) == kept
    # Where a part of it lies elsewhere, that stays.
    for place in ("snapshots", "blobs", "refs"):
        home = cached(cache, REPO, FABLE).parent.parent
        shutil.move(home / place, outside / place)
        (home / place).symlink_to(outside / place)
        kept = everything(outside)
        assert remove(capsys, REPO)[0] == 0
        assert os.listdir(cache) == []
        assert everything(outside) == kept
        shutil.rmtree(outside / place)
    # A model that lies elsewhere as a whole is not removed at all.
    cached(tmp_path / "disk", REPO, FABLE)
    (cache / "models--someone--tiny").symlink_to(tmp_path / "disk" / "models--someone--tiny")
    assert listed(capsys)[REPO]["state"] == "runs"
    code, found, _ = remove(capsys, REPO)
    assert (code, "a link to " in found["error"]) == (2, True)
    assert listed(capsys)[REPO]["state"] == "runs"


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("", 2, "an empty name"),
        (".", 2, "outside the hub's cache"),
        ("..", 2, "the whole cache is there"),
        ("/", 2, "the whole cache is there"),
        ("./x", 2, "outside the hub's cache"),
        ("~", 2, "no hub id"),
        ("*", 2, "no hub id"),
        ("CACHE", 2, "the whole cache is there"),
        ("CACHE/", 2, "the whole cache is there"),
        ("CACHE/..", 2, "the whole cache is there"),
        ("CACHE/.locks", 2, "not the folder of a model"),
        ("CACHE/datasets--a--b", 2, "not the folder of a model"),
        ("CACHE/models--someone--tiny/..", 2, "the whole cache is there"),
        ("CACHE/models--someone--tiny/blobs", 2, "not the folder of a model"),
        ("CACHE/models--someone--tiny/snapshots", 2, "not the folder of a model"),
        ("CACHE/models--someone--none", 3, "not there"),
        ("CACHE/models--someone--tiny/snapshots/..", 2, "not the folder of a model"),
        ("FOLDER", 2, "outside the hub's cache"),
        ("here/there", 2, "or the hub's here/there from another folder"),
        ("someone/tiny/", 2, "no hub id"),
        ("someone/tiny/..", 2, "no hub id"),
        ("someone/../tiny", 2, "no hub id"),
        ("../models--someone--tiny", 2, "outside the hub's cache"),
        ("someone\\tiny", 2, "no hub id"),
        ("someone/tiny\n", 2, "no hub id"),
        ("someone/tiny\0", 2, "no hub id"),
        ("someone/tiny@", 2, "no hub id"),
        ("someone/tiny@@main", 2, "no hub id"),
        ("someone/tiny@v2", 3, "no revision 'v2' in the cache; there is main"),
        ("someone/tiny@aaa", 3, "no revision 'aaa'"),  # too short
        ("someone/tiny@../../x", 3, "no revision '../../x'"),
        ("someone/tny", 3, "did you mean someone/tiny?"),
        ("tiny", 3, "not in the cache"),
        ("x" * 5000, 3, "not in the cache"),
        ("\udcff", 2, "no hub id"),
    ],
)
def test_what_is_not_removed(cache, tmp_path, capsys, monkeypatch, what, code, said):
    cached(cache, REPO, FABLE)
    (cache / "datasets--a--b" / "blobs").mkdir(parents=True)
    (cache / ".locks").mkdir()
    (tmp_path / "home" / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    before = everything(tmp_path)
    what = what.replace("CACHE", str(cache)).replace("FOLDER", str(BUNDLED))
    found_code, found, err = remove(capsys, what)
    assert (found_code, said in found["error"]) == (code, True), found
    assert len(err.splitlines()) == 1
    assert everything(tmp_path) == before


def test_folders_of_the_cache_name_models_too(cache, tmp_path, capsys, monkeypatch):
    """Also those that no id names; and a cache that is a link is the one that it leads to."""
    (tmp_path / "disk").mkdir()
    cache.symlink_to(tmp_path / "disk")
    gpt2 = cached(cache, "gpt2", FABLE)
    cached(cache, "a/b--c", FABLE)
    assert listed(capsys).keys() == {str(gpt2), f"{cache}/models--a--b--c/snapshots/{FIRST}"}
    assert remove(capsys, gpt2)[0] == 0
    monkeypatch.chdir(cache)
    assert remove(capsys, "models--a--b--c/")[0] == 0
    assert os.listdir(tmp_path / "disk") == []
    assert cache.is_symlink()
    cached(cache, "gpt2", FABLE)
    assert remove(capsys, "gpt2")[0] == 0
    revisions(cache)
    assert remove(capsys, f"models--someone--tiny/snapshots/{SECOND}")[0] == 0
    assert listed(capsys).keys() == {REPO, f"{REPO}@{THIRD}"}


def test_a_file_that_cannot_be_removed_is_named_and_the_rest_can_be_told(
    cache, capsys, monkeypatch
):
    cached(cache, REPO, FABLE)
    real = os.unlink

    def refuse(path, **options):
        if "blobs" in os.fspath(path):
            raise PermissionError(1, "Operation not permitted", path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    code, found, _ = remove(capsys, REPO)
    assert code == found["exit_code"] == 6
    assert "cannot be removed (Operation not permitted)" in found["error"]
    monkeypatch.undo()
