"""The command line: one way to end, one object under --json, one line for an error."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jlayer.app.cli import VERBS, main
from jlayer.app.verbs import plan
from tests.app.processes import finish, start
from tests.campaigns import slow_but
from tests.conftest import BUNDLED

PROMPT = "Once upon a time there was a little girl who"
RUN = ["-p", PROMPT, "--device", "cpu", "--dtype", "float32", "--temperature", "0"]


def test_text_to_stdout_and_the_rest_to_stderr(fable, capsys):
    assert main(["generate", str(fable), *RUN, "-n", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == " had a wife.\n\n\n"
    first, last = captured.err.splitlines()
    assert first.startswith("jlayer: cpu:0")
    assert "float32" in first
    assert "6 tokens (length)" in last


def test_json_is_one_object_with_what_the_contract_names(fable, capsys):
    assert main(["generate", str(fable), *RUN, "-n", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == " had a wife.\n\n"
    assert len(found["token_ids"]) == 6
    assert found["finish_reason"] == "length"
    assert {"prompt_tokens", "device", "dtype", "stats", "memory", "plan"} <= set(found)
    assert set(found["stats"]) >= {
        *("load_s", "prefill_s", "decode_s", "sweeps", "tokens_per_sweep", "tokens_per_s"),
        *("sweep_bytes", "read_bytes", "put_bytes", "bounced_bytes", "stall_s", "compiles"),
        *("first_token_s", "cached_bytes", "load_read_bytes", "load_cached_bytes"),
    }
    assert set(found["memory"]) >= {
        *("device_budget_bytes", "device_peak_bytes", "host_budget_bytes", "host_peak_bytes"),
    }
    assert found["plan"]["fits"] is True


def test_a_prompt_may_come_from_a_file_from_ids_and_from_stdin(fable, tmp_path, capsys):
    (tmp_path / "prompt").write_text(PROMPT)
    tail = [*RUN[2:], "-n", "3"]
    process = start("generate", fable, *tail, stdin=subprocess.PIPE)  # reads once it has begun
    outputs = []
    ids = "0,48,1278,567,260,558,457,310,260,504,859,443"
    for words in (["--prompt-file", str(tmp_path / "prompt")], ["--prompt-ids", ids]):
        assert main(["generate", str(fable), *words, *tail]) == 0
        outputs.append(capsys.readouterr().out)
    code, out, _ = finish(process, PROMPT)
    assert code == 0
    assert {*outputs, out} == {" had a wife\n"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "invalid choice"),
        (["generate"], 2, "MODEL"),
        (["generate", "/no/such", "-p", "x"], 3, "no such file or folder"),
        (["generate", "FABLE", "-p", "x", "--nonsense"], 2, "--nonsense"),
        (["generate", "FABLE", "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "FABLE", "-p", "x", "--temperature", "warm"], 2, "temperature"),
        (["generate", "FABLE", "-p", "x", "--max-new-tokens", "-1"], 2, "max_new_tokens"),
        (["generate", "FABLE", "-p", "x", "-n", "2000"], 2, "1024"),
        (["generate", "FABLE", "--prompt-ids", "1,b"], 2, "--prompt-ids"),
        (["generate", "FABLE", "--prompt-ids", "5000"], 2, "vocabulary of 4096"),
        (["generate", "FABLE", "--prompt-file", "/no/such"], 2, "does not exist"),
        (["generate", "FABLE", "-p", "x", "--dtype", "bfloat61"], 2, "did you mean 'bfloat16'"),
        (["generate", "FABLE", "-p", "x", "--device-memory", "lots"], 2, "device_memory"),
        (["generate", "FABLE", "-p", "x", "--device", "gpu"], 2, "gpu was asked for"),
        (["generate", "FABLE", "-p", "x", "--context", "4096"], 2, "1024"),
        (["generate", "FABLE", "-p", "x", "--device-memory", "1MiB"], 4, "slots"),
        (["generate", "EMPTY", "-p", "x"], 3, "name the folder that holds a model's weights"),
        (["plan", "BUNDLED", "--device-memory", "1MiB"], 4, "slots"),
        (["plan", "/no/such"], 3, "missing"),
        (["verify", "/no/such"], 3, "/no/such"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_an_error_is_one_line_and_its_code(fable, tmp_path, capsys, words, code, said, as_json):
    known = {"FABLE": str(fable), "BUNDLED": str(BUNDLED), "EMPTY": str(tmp_path)}
    argv = [known.get(word, word) for word in words] + ["--json"] * as_json
    if "--device" not in argv and argv[0] == "generate" and len(argv) > 2:
        argv += ["--device", "cpu"]
    assert main(argv) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    if as_json:
        found = json.loads(captured.out)
        assert found["exit_code"] == code
        if code == 4:
            assert (found if argv[0] == "plan" else found["plan"])["fits"] is False


def test_stdin_that_is_no_text_is_refused_where_it_fails(fable):
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "generate", str(fable)],
        input=b"abc\xff",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"stdin: not UTF-8 at byte 3" in done.stderr


@pytest.mark.parametrize("delays", slow_but([(0.3,), (0.1, 0.3, 0.4)], [(0.3,)]))
def test_a_signal_while_programs_are_compiled_ends_cleanly(fable, delays):
    """An exception out of the middle of a compilation once crashed the process at its end.

    Several at once, since most of it is waiting: each a little later after its first line.
    """
    processes = [start("generate", fable, *RUN, "-n", "900", "--json") for _ in delays]
    for process, delay in zip(processes, delays, strict=True):
        assert "cpu:0" in process.stderr.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
    for process in processes:
        status, out, _ = finish(process)
        assert status == 143
        assert json.loads(out)["finish_reason"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_an_interrupt_keeps_the_text_so_far(fable, as_json):
    words = ["generate", fable, *RUN, "-n", "900", *["--json"] * as_json]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {number: start(*words, env=env) for number in signals}  # both at once
    for process in processes.values():
        assert "cpu:0" in process.stderr.readline()
    if as_json:
        time.sleep(1.5)
    for number, process in processes.items():
        if not as_json:
            process.stdout.read(20)
        process.send_signal(number)
    for number, code in signals.items():
        status, out, err = finish(processes[number])
        assert status == code
        assert "Traceback" not in err
        assert "interrupted" in err
        if as_json:
            found = json.loads(out)
            assert found["finish_reason"] == "interrupted"
            assert len(found["token_ids"]) < 900


def test_a_reader_that_leaves_ends_the_program_quietly(fable):
    process = start("generate", fable, *RUN, "-n", "500")
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=120)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_demo_prints_a_story_and_a_table(capsys):
    assert main(["demo", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(PROMPT)
    for row in ("layers streamed", "bytes moved", "peak held by JAX", "tokens per second"):
        assert row in captured.out


def test_demo_json_answers_like_generate(capsys):
    assert main(["demo", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] in ("length", "stop")
    assert found["stats"]["put_bytes"] > 100 * found["stats"]["sweep_bytes"]


def test_every_verb_of_the_table_exists_and_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_python_dash_m_convert_is_the_verb_convert(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", str(BUNDLED), str(tmp_path / "target"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["n_layers"] == 6
    assert (tmp_path / "target" / "manifest.json").exists()


def test_debug_shows_a_traceback_and_ends_with_the_same_code(fable, capsys):
    assert main(["generate", str(fable), "-p", "x", "--top-p", "3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_plan_beyond_the_models_own_context_is_refused_as_its_run_is(fable, capsys):
    assert main(["plan", str(fable), "--context", "4096"]) == 2
    assert "the model's own limit is 1024" in capsys.readouterr().err


def test_a_plan_says_how_many_lanes_fit_and_what_they_cost(capsys):
    words = ["plan", "llama-3.1-70b-instruct", "--host-memory", "64GiB", "--context", "512"]
    assert main([*words, "--batch", "4", "--json"]) == 0
    lanes = json.loads(capsys.readouterr().out)["lanes"]
    assert lanes["asked"] == 4
    assert lanes["tokens_per_s"] == 4 / lanes["seconds"]
    assert lanes["most"] > 4
    assert lanes["most_tokens_per_s"] == lanes["most"] / lanes["most_seconds"]
    assert main([*words, "--batch", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"lanes 4: about [\d.]+ s a forward pass, [\d.]+ tokens a second", shown)
    assert f" {lanes['most']} would fit: about " in shown
    assert main([*words, "--batch", str(lanes["most"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lanes"]["most"] == lanes["most"]
    assert main([*words, "--batch", str(lanes["most"] + 1), "--json"]) == 4
    captured = capsys.readouterr()
    assert captured.err.endswith(f"; {lanes['most']} lanes would fit\n")
    refused = json.loads(captured.out)
    assert refused["lanes"]["seconds"] is None
    assert refused["lanes"]["most_seconds"] == lanes["most_seconds"]


def test_a_plan_that_does_not_fit_a_single_lane_offers_none(capsys):
    assert main(["plan", "llama-3.1-8b-instruct", "--device-memory", "900MiB", "--json"]) == 4
    captured = capsys.readouterr()
    assert "would fit" not in captured.err
    lanes = json.loads(captured.out)["lanes"]
    assert (lanes["most"], lanes["most_seconds"], lanes["tokens_per_s"]) == (0, None, None)


@pytest.mark.parametrize(
    ("n_cores", "host_memory", "is_told"),
    [(2, "2GiB", False), (16, "2GiB", False), (16, "64GiB", True)],
)
def test_a_plan_says_where_a_cpu_is_faster_unquantized(
    monkeypatch, capsys, n_cores, host_memory, is_told
):
    """In memory, not where the disk is the limit: from there fewer bytes are what counts. With
    kernels for the cores it is not slower."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(n_cores))
    words = ["llama-3.1-8b-instruct", "--device", "cpu", "--host-memory", host_memory]
    assert main(["plan", *words]) == 0
    assert capsys.readouterr().err == ""
    for why, tells in ((None, False), ("llvmlite is not installed", is_told)):
        monkeypatch.setattr(plan, "missing", lambda why=why: why)
        assert main(["plan", *words, "--quantize", "int8"]) == 0
        told = capsys.readouterr().err
        assert ("where the unquantized model would take" in told) == tells


def test_without_a_tokenizer_the_new_ids_are_shown(tiny, capsys):
    words = ["generate", str(tiny), "--prompt-ids", "1,2,3", "-n", "4", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    ids = json.loads(capsys.readouterr().out)["token_ids"]
    assert main(words) == 0
    assert capsys.readouterr().out == ",".join(map(str, ids)) + "\n"
