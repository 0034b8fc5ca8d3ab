"""One model on several hosts, which are processes of this machine: the tokens and logits of one
host, each byte read once, and an end for all when one is lost."""

import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.convert import convert_checkpoint
from jlayer.engine.alike import hosts_of
from jlayer.engine.hosts import Hosts, placement_of
from jlayer.errors import UsageError
from jlayer.run_config import RunConfig
from tests.conftest import BUNDLED
from tests.engine.hosts import answers, commands_of_the_page, ended, generate, groups, started
from tests.engine.test_host_cache import tight
from tests.reference import dense_forms, latent_forms, mixture_forms

IDS = [1, 5, 9, 33, 7]
GREEDY = {"max_new_tokens": 5, "temperature": 0}
DRAWN = {"max_new_tokens": 5, "temperature": 0.9, "eos_token_id": None}


def case(name, folder, run=GREEDY, **more):
    """What `one_host` does once."""
    return {"name": name, "folder": str(folder), "ids": IDS, "run": run, **more}


def alone(one):
    """What one process gives, with one device: tokens, logits, bytes of a forward pass."""
    folder = one.get("whole", one["folder"])
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        found = jlayer.generate(model, IDS, **one["run"])
        return found.token_ids, model.logits([IDS]).ravel(), found.plan["sweep"]["bytes"]


def assert_same(cases, n_hosts, n_devices):
    found = answers(cases, n_hosts, n_devices)
    for one in cases:
        first, *_ = each = [of_host[one["name"]] for of_host in found]
        run = one["run"] if first["seed"] is None else {**one["run"], "seed": first["seed"]}
        tokens, logits, n_bytes = alone({**one, "run": run})
        assert first["token_ids"] == tokens, one["name"]
        close = {"rtol": 0, "atol": 1e-5 * np.abs(logits).max(), "err_msg": one["name"]}
        np.testing.assert_allclose(first["logits"], logits, **close)
        assert (first["cache_bytes"] > 0) == one.get("is_tight", False)
        assert 0.5 * first["cache_bytes"] <= first["held_cache_bytes"] <= first["cache_bytes"]
        for own in each:
            assert own["device"].startswith(f"{n_hosts} hosts with"), own["device"]
            if most := one.get("reads_at_most"):
                assert own["sweep_bytes"] == n_bytes // n_hosts
                # Of the others it is all that was read, for the logits too.
                assert own["read_bytes"] < (most if own is first else 1.5) * own["sweep_bytes"]
    return found


@pytest.fixture(scope="module")
def of_hosts(tmp_path_factory):
    """The folders of two hosts, each with its own rows: fill in a `process_id`."""
    home = tmp_path_factory.mktemp("rows")
    for host in range(2):
        convert_checkpoint(BUNDLED, home / str(host), rows=(host, 2))
    return home / "{process_id}"


BOTH = {"options": {"devices": 2}}
TILES = {"tile_bytes": 100_000, "reads_at_most": 1.05}


def test_two_hosts_with_two_devices_each(fable, of_hosts, tmp_path):
    """Tiles of some rows, experts whose routes process 0 decides, and tokens that it draws; where
    each host has a folder with its own rows alone, together they read each byte once."""
    mixture_forms.save(tmp_path / "mixtral", "mixtral")
    cases = [
        case("experts", tmp_path / "mixtral", **BOTH),
        case("rows", of_hosts, DRAWN, whole=str(fable), **TILES, **BOTH),
    ]
    first, second = assert_same(cases, 2, 2)
    assert first["rows"]["seed"] is not None
    assert "token_ids" not in second["rows"]


@pytest.mark.slow
def test_of_a_folder_that_both_have_each_byte_is_read_once_too(fable):
    first, second = assert_same([case("drawn", fable, DRAWN, **TILES, **BOTH)], 2, 2)
    assert first["drawn"]["seed"] is not None
    assert "token_ids" not in second["drawn"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True])
def test_a_folder_of_another_host_and_a_damaged_row_end_all(of_hosts, tmp_path, damage):
    """The digests of rows that only one host has are checked by it."""
    folders = [str(of_hosts).format(process_id=number) for number in ((0, 1) if damage else (1, 0))]
    if damage:
        folders[1] = shutil.copytree(folders[1], tmp_path / "damaged")
        with open(folders[1] / "layer-00001.safetensors", "r+b") as file:
            file.seek(-5_000, os.SEEK_END)
            byte = file.read(1)[0] ^ 1
            file.seek(-5_000, os.SEEK_END)
            file.write(bytes([byte]))
    words = ("-p", "Once", "-n", "3")
    commands = (
        generate(folder, group, *words) for folder, group in zip(folders, groups(2), strict=True)
    )
    with started(*commands) as processes:
        found = ended(processes)
    if damage:
        assert [code for code, *_ in found] == [6, 3]
        assert "its digest is not that of what was converted" in found[1][2]
        return
    for number, (code, out, errors) in enumerate(found):
        assert (code in (3, 6), out) == (True, "")
        assert "holds the rows of host" in errors or f"host {1 - number}" in errors


@pytest.mark.slow
def test_caches_in_host_memory_and_quantized_weights(fable, tmp_path):
    convert_checkpoint(BUNDLED, tmp_path / "int4", quantize="int4")
    run = {"max_new_tokens": 120, "temperature": 0}
    budget = tight(fable, on={"n_devices": 2, "n_hosts": 2})
    options = {"devices": 2, "device_memory": budget}
    cases = [
        case("caches", fable, run, is_tight=True, options=options),
        # A block of the disk, of 4 KiB, has rows of both hosts where they are so short.
        case("int4", tmp_path / "int4", options={"devices": 2}, reads_at_most=1.3),
    ]
    assert_same(cases, 2, 2)


@pytest.mark.slow
def test_windows_states_and_latents_are_told_too(tmp_path):
    """Of layers with these process 0 tells other places in the cache."""
    forms = {"gemma3": dense_forms, "qwen3_next": dense_forms, "deepseek_v3": latent_forms}
    for name, form in forms.items():
        form.save(tmp_path / name, name)
    run = {"max_new_tokens": 30, "temperature": 0, "eos_token_id": None}
    guessed = {**run, "speculate": "lookup", "draft_tokens": 7}
    cases = [case(name, tmp_path / name, run) for name in forms]
    cases += [case(f"{name}, guessed", tmp_path / name, guessed) for name in forms]
    assert_same(cases, 2, 1)


@pytest.mark.slow
def test_three_hosts_that_rows_do_not_come_out_even_for(fable):
    assert_same([case("three", fable, tile_bytes=100_000)], 3, 1)


@pytest.mark.slow
def test_the_page_s_commands_run_and_one_prints(fable):
    """`jlayer generate`, as the page has it, but for the folder and the address. In every session
    `test_together` runs those of `jlayer batch`."""
    commands = commands_of_the_page("generate", **{"path/to/Llama-3-70B": fable})
    assert len(commands) == 2
    more = ["--temperature", "0", "-n", "3", "--json"]
    with started(*([*words, *more] for words in commands)) as processes:
        (code, out, _), other = ended(processes)
    assert (code, other) == (0, (0, "", ""))
    assert json.loads(out)["device"] == "2 hosts with 1 x cpu"


def lose_one(fable, number, how, *words):
    """Both hosts after one of them got a signal in the middle of a text -> what they end with, and
    after how long."""
    words = ("-p", "Once upon a time", "-n", "400", "--temperature", "0", *words)
    with started(*(generate(fable, group, *words) for group in groups(2))) as processes:
        assert processes[0].stdout.read(1)  # the text has begun
        processes[number].send_signal(how)
        began = time.monotonic()
        found = ended(processes)
        return found, time.monotonic() - began


def test_a_host_that_is_killed_ends_the_other(fable):
    found, seconds = lose_one(fable, 1, signal.SIGKILL)
    assert [code for code, *_ in found] == [6, -signal.SIGKILL]
    line = found[0][2].splitlines()[-1]
    assert re.fullmatch(r"jlayer: host 1 \(.*\) is lost: its connection broke; .* again", line)
    assert seconds < 60  # it takes 2, where the machine is not loaded


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        (signal.SIGINT, 130, "ended early: interrupted"),
        (signal.SIGTERM, 143, "ended early: terminated"),
        (signal.SIGKILL, -signal.SIGKILL, "is lost: its connection broke"),
    ],
)
def test_however_a_host_ends_so_do_all(fable, number, how, code, words):
    found, seconds = lose_one(fable, number, how)
    assert found[number][0] == code
    assert found[1 - number][0] == 6
    assert words in found[1 - number][2].splitlines()[-1]
    assert seconds < 60  # it takes 2, where the machine is not loaded


@pytest.mark.slow
def test_a_host_that_stands_still_for_a_while_only_slows(fable):
    words = ("-p", "Once upon a time", "-n", "20", "--temperature", "0")
    with started(*(generate(fable, group, *words) for group in groups(2))) as processes:
        begin = processes[0].stdout.read(1)
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(3)
        processes[1].send_signal(signal.SIGCONT)
        (code, text, _), other = ended(processes)
    assert (code, other) == (0, (0, "", ""))
    assert len((begin + text).split()) > 10


def test_what_differs_is_refused_on_every_host(fable):
    first, second = groups(2)
    commands = [
        generate(fable, first, "-p", "One"),
        generate(fable, second, "-p", "One", "--dtype", "float32"),
    ]
    line = r"jlayer: dtype: found None on host 0 \(.*\) and 'float32' on host 1 \(.*\), expected"
    with started(*commands) as processes:
        for code, out, errors in ended(processes):
            assert (code, out) == (2, "")
            assert re.match(line, errors)


def placed(environment=None, **options):
    found = placement_of(RunConfig.from_options(**options), environment or {})
    return found and (found.address, found.port, found.n, found.number)


def test_where_the_processes_are():
    assert placed() is placed(processes=1) is None
    whole = {"coordinator": "node-a:70", "processes": "3", "process_id": "2"}
    assert placed(**whole) == ("node-a", 70, 3, 2)
    assert placed(coordinator="[::1]:70", processes=2, process_id=0) == ("::1", 70, 2, 0)
    told = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:70", "SLURM_PROCID": "1"}
    assert placed(told, processes=2) == ("10.0.0.1", 70, 2, 1)
    assert placed(told, processes=2, process_id=0)[3] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coordinator": "a:1"}, "processes: none given"),
        ({"processes": 2}, "coordinator: none given"),
        ({"processes": 2, "coordinator": "a:1"}, "process_id: none given"),
        ({"processes": 2, "coordinator": "a:1", "process_id": 2}, "expected a number from 0 to 1"),
        ({"processes": 2, "coordinator": "a", "process_id": 0}, "expected ADDR:PORT"),
        ({"processes": 2, "coordinator": "a:0", "process_id": 0}, "expected ADDR:PORT"),
        ({"processes": 0}, "processes: found 0, expected a number from 1 up"),
        ({"processes": 2, "process_id": -1}, "process_id: found -1, expected a number from 0 up"),
    ],
)
def test_what_is_no_place_is_refused(options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        placed(**options)


def test_what_several_processes_cannot_have_is_refused_before_any_is_waited_for():
    options = {**groups(2)[0], "host_share": 0.5}
    with pytest.raises(UsageError, match="host_share: the host's cores multiply nothing"):
        hosts_of(RunConfig.from_options(**options))


@pytest.mark.parametrize("words", [["plan", "MODEL"], ["tune", "MODEL", "data", "out"]])
def test_other_commands_do_not_have_the_options(words, capsys):
    assert main([*words, "--processes", "2"]) == 2
    assert "--processes" in capsys.readouterr().err


@pytest.fixture
def two():
    """Both ends of a connection, in one process."""
    options = groups(2)
    places = [placement_of(RunConfig.from_options(**one), {}) for one in options]
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(Hosts, places))
    yield found
    with ThreadPoolExecutor(2) as both:
        list(both.map(Hosts.finish, found))


def test_what_takes_long_to_send_arrives_whole(two):
    """It was cut off after 0.2 s, as what is received in pieces is."""
    first, second = two
    words = "x" * 150_000_000
    with ThreadPoolExecutor(1) as other:
        arrived = other.submit(second.sent, "words", None)
        first.sent("words", words)
        assert arrived.result(timeout=60) == words
        first.sent("more", 1)
        assert second.sent("more", None) == 1


def test_what_is_sent_in_the_middle_of_sending_comes_before_it(two):
    """A garbage collection may end a run, of which the others are told."""
    first, second = two

    class Ending:
        def tolist(self):
            first.sent("ended", 1)
            return 2

    first.sent("outer", Ending())
    assert second.sent("ended", None) == 1
    assert second.sent("outer", None) == 2
