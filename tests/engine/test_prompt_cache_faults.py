"""What goes wrong around kept prompts: other processes, kills, odd files, few descriptors. A right
token or an error in one line, never another token."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest

import jlayer
from jlayer.checkpoint.safetensors import read_header
from jlayer.engine import kept_blocks, prompt_cache
from jlayer.engine.prompt_cache import Held
from jlayer.errors import CheckpointError, StorageError, UsageError
from tests.engine import keeping
from tests.engine.sessions import DRAWN, PLAIN, opened, saved_model, tokens_of, undisturbed
from tests.reference import dense_forms

BLOCK = keeping.BLOCK
PROMPT = [7 + n for n in range(61)]
N_WHOLE = 60 // BLOCK * BLOCK


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_cache, "BLOCK", BLOCK)
        yield


@pytest.fixture(scope="module")
def expected(tiny):
    with opened(tiny) as model:
        return undisturbed(model, PROMPT, **PLAIN)


def run(model, prompt, **options):
    """(tokens, how many of the prompt's were there)"""
    found = jlayer.generate(model, prompt, **{**PLAIN, **options})
    return tokens_of(found), found.stats["kept_tokens"]


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".jlayer-lock"]


def facts_of(path):
    return json.loads(read_header(path).metadata["jlayer-block"])["facts"]


def test_a_block_in_the_place_of_one_of_another_text_is_refused(tiny, tmp_path):
    """Its tokens are those that belong there; what comes before them is not."""
    one, other = ([n] * BLOCK + [6] * BLOCK + [9, 10] for n in (3, 4))
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, one)
        expected, _ = run(model, other)
        alike = [path for path in files_in(tmp_path) if facts_of(path)["tokens"] == [6] * BLOCK]
        first, second = sorted(alike, key=lambda path: path.stat().st_mtime)
        whole = second.read_bytes()
        shutil.copy(first, second)
        with pytest.raises(
            CheckpointError, match=rf"^{second}: a kept prompt of another model or text; remove it$"
        ):
            run(model, other)
        second.write_bytes(whole)
        assert run(model, other) == (expected, 2 * BLOCK)


def test_few_descriptors_are_enough(tiny, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(prompt_cache, "BLOCK", 2)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, [90, *PROMPT[1:]])  # what a run opens and compiles is there
        n_open = len(os.listdir("/proc/self/fd"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 8, most[1]))
            assert run(model, PROMPT) == (expected, 0)
            assert run(model, PROMPT) == (expected, 60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, most[1]))
            with pytest.raises(StorageError, match=r"^[^\n]*Too many open files[^\n]*$"):
                run(model, PROMPT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
        assert not model.engine.n_alive
        assert run(model, PROMPT) == (expected, 60)


def test_a_folder_that_was_removed_is_made_again(tiny, tmp_path, expected):
    folder = tmp_path / "prompts"
    with opened(tiny, prompt_cache=folder) as model:
        run(model, PROMPT)
        shutil.rmtree(folder)
        for n_kept in (0, N_WHOLE):
            assert run(model, PROMPT) == (expected, n_kept)
        shutil.rmtree(folder)
        folder.write_text("a file")
        with pytest.raises(StorageError, match=r"^prompt_cache: \S+prompts cannot be written \(\w"):
            run(model, PROMPT)
        assert not model.engine.n_alive


def test_strange_files_among_the_blocks_stop_nobody(tiny, tmp_path, expected):
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, PROMPT)
        (key,) = (path for path in tmp_path.iterdir() if path.is_dir())
        n_bytes = sum(path.stat().st_size for path in files_in(tmp_path))
    for digit, make in enumerate(
        (os.mkdir, os.mkfifo, lambda at: os.symlink("nowhere", at), lambda at: os.symlink(at, at))
    ):
        for tail in (".safetensors", ".safetensors.jlayer-tmp", ".end.safetensors"):
            make(key / (str(digit) * 32 + tail))
    (tmp_path / ("0" * 32)).write_text("no folder")
    (tmp_path / "notes.txt").write_text("of the user")
    with opened(tiny, prompt_cache=tmp_path, prompt_cache_size=int(n_bytes * 1.3)) as model:
        assert run(model, PROMPT) == (expected, N_WHOLE)
        other = [90, *PROMPT[1:]]
        run(model, other)
        assert run(model, other)[1] == N_WHOLE, "what was oldest went"
    assert (tmp_path / "notes.txt").exists()


def test_times_of_use_of_another_user_s_files_stay_as_they_are(
    tiny, tmp_path, monkeypatch, expected
):
    def refused(*_):
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(os, "utime", refused)
    with opened(tiny, prompt_cache=tmp_path) as model:
        for n_kept in (0, N_WHOLE):
            assert run(model, PROMPT) == (expected, n_kept)


def test_a_folder_that_cannot_be_listed_is_one_line(tiny, tmp_path, monkeypatch):
    real = os.listdir

    def broken(path):
        if os.fspath(path).startswith(str(tmp_path)):
            raise OSError(5, os.strerror(5), os.fspath(path))
        return real(path)

    with opened(tiny, prompt_cache=tmp_path) as model:
        monkeypatch.setattr(os, "listdir", broken)
        with pytest.raises(
            StorageError,
            match=r"^prompt_cache: \S+ cannot be written \(Input/output error: /\S+\); name .*r$",
        ):
            run(model, PROMPT)
        assert not model.engine.n_alive


def test_a_bound_that_holds_no_file_is_refused(tiny, tmp_path, expected):
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, PROMPT)
    path = files_in(tmp_path)[0]
    numbers = path.stat().st_size - read_header(path).data_start
    with pytest.raises(UsageError, match=r"prompt_cache_size: .* give more$"):
        opened(tiny, prompt_cache=tmp_path, prompt_cache_size=numbers + 8).__enter__()


def test_the_oldest_go_whatever_the_clock_says(tmp_path):
    key = tmp_path / ("a" * 32)
    key.mkdir()
    paths = [str(key / (digit * 32 + ".safetensors")) for digit in "0123"]
    for days, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(b"x" * 10)
        used = time.time() + (days + 1) * 86400  # the clock has been put back since
        os.utime(path, (used, used))
    held = Held(str(tmp_path), 50, stays=[paths[0]])
    assert held.add(20)
    assert [os.path.exists(path) for path in paths] == [True, False, True, True]
    assert not held.add(30), "one stays"
    assert [os.path.exists(path) for path in paths] == [True, False, False, False]
    assert held.add(20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("mistral", "float32"), ("gemma3", "float16"), ("qwen3_5", "float16"), ("llama", "float16")],
)
def test_models_of_windows_alone_and_small_numbers(kind, dtype, tmp_path):
    save = dense_forms.save if kind == "mistral" else None
    folder = save(tmp_path / "model", kind) if save else saved_model(kind, tmp_path)
    others = [*PROMPT[:50], 5, 6], [*PROMPT[:25], *range(90, 110)]
    with opened(folder, dtype=dtype) as model:
        expected = [undisturbed(model, one, **DRAWN) for one in (PROMPT, *others)]
    for _ in range(2):
        with opened(folder, dtype=dtype, prompt_cache=tmp_path / "prompts") as model:
            for prompt, tokens in zip((PROMPT, *others), expected, strict=True):
                assert run(model, prompt, **DRAWN)[0] == tokens
    with opened(folder, dtype=dtype, prompt_cache=tmp_path / "prompts") as model:
        assert run(model, PROMPT, **DRAWN) == (expected[0], N_WHOLE)
        found = jlayer.generate(model, [PROMPT, PROMPT, others[0]], **PLAIN)
        assert found[0].token_ids == found[1].token_ids == run(model, PROMPT)[0][0]


def started(folder, cache, most_bytes, *words):
    command = [sys.executable, "-m", "tests.engine.keeping", folder, cache, most_bytes, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], **pipes)


@pytest.fixture
def answers(tiny):
    """What each prompt gives, and the bytes of three of them in a folder."""
    with opened(tiny) as model:
        return [keeping.tokens(model, number) for number in range(keeping.N_PROMPTS)]


def bytes_of_three(tiny, folder):
    with opened(tiny, prompt_cache=folder) as model:
        for number in (0, 2, 4):
            keeping.tokens(model, number)
    return sum(path.stat().st_size for path in files_in(folder))


@pytest.mark.slow
def test_processes_share_a_folder_while_blocks_go(tiny, tmp_path, answers):
    most, folder = bytes_of_three(tiny, tmp_path / "first"), tmp_path / "prompts"
    others = [started(tiny, folder, most, seed, 60) for seed in (1, 2)]
    draw = random.Random(3)
    with opened(tiny, prompt_cache=folder, prompt_cache_size=most) as model:
        while any(other.poll() is None for other in others):
            number = draw.randrange(keeping.N_PROMPTS)
            assert keeping.tokens(model, number) == answers[number]
            assert sum(path.stat().st_size for path in files_in(folder)) <= most * 1.2
    for other in others:
        said, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
        found = [json.loads(line) for line in said.splitlines()]
        assert len(found) == 60
        for number, tokens in found:
            assert tokens == answers[number]
    names = [path.name for path in files_in(folder)]
    assert not [name for name in names if "tmp" in name]


@pytest.mark.slow
def test_a_process_that_is_killed_as_it_keeps_harms_nobody(tiny, tmp_path, answers):
    most, folder = bytes_of_three(tiny, tmp_path / "first"), tmp_path / "prompts"
    draw, n_left = random.Random(4), 0
    kills = [("rename", n) for n in (1, 2, 5, 9)]
    kills += [("fsync", n) for n in (1, 3, 6, 12)] + [("unlink", n) for n in (1, 5, 7, 8)]
    kills += [("pwrite", draw.randrange(1, 120)) for _ in range(8)]
    with opened(tiny, prompt_cache=folder, prompt_cache_size=most) as model:
        for number, (name, nth) in enumerate(kills):
            process = started(tiny, folder, most, number, 40, name, nth)
            said, errors = process.communicate(timeout=120)
            assert process.returncode == -9, (name, nth, errors)
            for line in said.splitlines():
                which, tokens = json.loads(line)
                assert tokens == answers[which]
            left = [path for path in files_in(folder) if path.name.endswith(".jlayer-tmp")]
            n_left += bool(left)
            for path in set(files_in(folder)) - set(left):
                assert re.fullmatch(r"[0-9a-f]{32}\.safetensors", path.name)
                with kept_blocks.opened([str(path)]):
                    pass
            for which in draw.sample(range(keeping.N_PROMPTS), 3):
                assert keeping.tokens(model, which) == answers[which]
            if number % 4 == 0:
                shutil.rmtree(folder)  # so that the next one keeps all of its own
        for _ in range(3):
            for which in range(keeping.N_PROMPTS):
                assert keeping.tokens(model, which) == answers[which]
        names = [path.name for path in files_in(folder)]
        assert n_left > 5
        assert not [name for name in names if "tmp" in name], "they go first"
        assert sum(path.stat().st_size for path in files_in(folder)) <= most
