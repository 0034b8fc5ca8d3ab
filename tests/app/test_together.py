"""Verbs on several hosts: process 0 takes requests and answers them, and the others follow."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from jlayer.app.cli import main
from jlayer.convert import convert_checkpoint
from tests.app.chat.talk import TEMPLATE
from tests.app.screen import PYTHON, on_terminal
from tests.app.test_chat import COMMAND
from tests.conftest import BUNDLED
from tests.engine.hosts import command, commands_of_the_page, ended, groups, started
from tests.serving.batch.requests import answers, assert_same, request, written

FLOAT32 = ("--dtype", "float32")  # in bfloat16 who else rides may change a token
PROMPT = r"\x1b\[\?2004h"  # readline is ready for a line
REQUESTS = [
    request("a"),
    request("b", "The fox", max_tokens=9, temperature=0.8),
    request("wrong", max_tokens=-1),
    request("c", "Once upon a time", n=2, temperature=0.9, seed=3),
]


def commands(verb, folder, *words):
    return [command(verb, folder, group, *words) for group in groups(2)]


def test_a_batch_is_answered_by_process_0_as_by_one(fable, tmp_path):
    source, folder = written(tmp_path / "in", REQUESTS), str(fable)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["batch", folder, str(source), one, "--device", "cpu", *FLOAT32]) == 0
    own = {"path/to/Llama-3-70B": folder, "requests.jsonl": source, "answers.jsonl": two}
    commands = commands_of_the_page("batch", **own)  # of `jlayer batch`
    assert len(commands) == 2
    with started(*([*words, "--json", *FLOAT32] for words in commands)) as processes:
        (code, out, _), other = ended(processes)
    assert (code, other) == (0, (0, "", ""))
    assert json.loads(out)["answered"] == len(REQUESTS)
    assert_same(answers(tmp_path / "two"), answers(tmp_path / "one"))


def of_two(words):
    """(exit code, stdout, stderr) of two hosts with these words of a command line."""
    verb, *more = words
    with started(*(command(verb, more[0], group, *more[1:]) for group in groups(2))) as processes:
        return ended(processes)


@pytest.mark.slow
def test_an_evaluation_on_two_hosts_is_that_of_one(fable, tmp_path, capsys):
    """Of a text that only the first has; two models are opened one after another on both."""
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little girl, and she was brave.\n" * 5)
    convert_checkpoint(BUNDLED, tmp_path / "int8", quantize="int8")
    more = ("--text", text, "--window", "24", "--json", *FLOAT32)
    for kind in (["perplexity", fable], ["compare", fable, tmp_path / "int8"]):
        words = [str(word) for word in ("eval", *kind, *more)]
        assert main([*words, "--device", "cpu"]) == 0
        one = json.loads(capsys.readouterr().out)
        (code, out, _), other = of_two(words)
        assert (code, other) == (0, (0, "", ""))
        assert close_to(json.loads(out)) == close_to(one)


def close_to(found):
    """The figures of an evaluation, each about as it is."""
    if isinstance(found, dict):
        return {name: close_to(each) for name, each in found.items() if name != "folder"}
    return pytest.approx(found, rel=1e-4, abs=1e-6) if isinstance(found, float) else found


@pytest.mark.slow
def test_a_benchmark_on_two_hosts_is_printed_by_the_first(fable):
    (code, out, errors), other = of_two(["bench", str(fable), "--from-disk"])
    assert (code, other) == (0, (0, "", "")), errors
    *lines, last = out.splitlines()
    assert any("on each of 2 hosts (all bytes below are of one)" in line for line in lines)
    assert [line.split("  ")[0] for line in lines if "host" in line[:9]][-3:] == [
        *("host 0", "host 1", "all hosts"),
    ]
    found = json.loads(last)
    assert all("process" in own["host"] for own in found["lanes"])
    assert [row["tokens"] for row in found["sweeps"]] == [0, 1, 64, 512]


def test_workers_of_a_cluster_are_no_hosts_of_one_model(fable, tmp_path, capsys):
    words = [str(fable), "in", "out", "--ray", "local", "--processes", "2"]
    assert main(["batch", *words]) == 2
    assert "--processes: found with --ray" in capsys.readouterr().err


@pytest.mark.slow
def test_arguments_that_differ_are_refused_on_every_host(fable, tmp_path):
    source, (first, second) = written(tmp_path / "in", REQUESTS), groups(2)
    words = (source, tmp_path / "out")
    both = [
        command("batch", fable, first, *words),
        command("batch", fable, second, *words, "--served-name", "tales"),
    ]
    line = r"jlayer: --served-name: found \[\] on host 0 \(.*\) and \['tales'\] on host 1 \(.*\)"
    with started(*both) as processes:
        for code, out, errors in ended(processes):
            assert (code, out) == (2, "")
            assert re.match(line, errors)


class Served:
    """`jlayer serve` of a folder on two hosts, that is open."""

    def __init__(self, processes):
        self.processes = processes
        first = processes[0].stderr
        address = re.search(r"http://\S+?(?=/ )", first.readline())[0]
        while "Ctrl-C ends it" not in first.readline():
            pass
        self.client = httpx.Client(base_url=address, timeout=120)

    def completed(self, prompt, **body):
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, **body}
        found = self.client.post("/v1/completions", json=body)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how", "codes"),
    [(0, signal.SIGTERM, [143, 6]), (1, signal.SIGKILL, [6, -signal.SIGKILL])],
)
def test_a_server_s_requests_ride_on_all_hosts_and_all_end_together(fable, number, how, codes):
    with started(*commands("serve", fable, "--port", 0, *FLOAT32)) as processes:
        served = Served(processes)
        wanted = served.completed("The fox")
        long = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with served.client.stream("POST", "/v1/completions", json=long) as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            with ThreadPoolExecutor(3) as askers:
                assert set(askers.map(served.completed, ["The fox"] * 3)) == {wanted}
        # The one that went away is cancelled between two passes, and the next one is answered.
        assert served.completed("The fox") == wanted
        processes[number].send_signal(how)
        found = ended(processes)
    assert [code for code, *_ in found] == codes
    assert all("Traceback" not in errors for *_, errors in found)
    lost = found[1 - number][2].splitlines()[-1]
    assert ("ended early: terminated" if number == 0 else "is lost") in lost


@pytest.fixture
def chat(fable, tmp_path):
    """The words of a chat with the model, which has no template of its own."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    words = ("--chat-template", tmp_path / "template.jinja", *FLOAT32)
    return lambda n: commands("chat", fable, *words, "-n", n)


@pytest.mark.slow
def test_a_chat_over_a_pipe_is_that_of_one_host(chat, tmp_path, monkeypatch, capsys):
    (tmp_path / "said").write_text("Who was the king?\nAnd the fox?\n")
    with open(tmp_path / "said") as said, started(*chat(8), stdin=said) as processes:
        (code, out, _), other = ended(processes)
    assert (code, other) == (0, (0, "", ""))
    (first, *_) = chat(8)
    alone = first[: first.index("--coordinator")]
    with open(tmp_path / "said") as said, started(alone, stdin=said) as processes:
        assert ended(processes)[0][:2] == (0, out)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_between_two_passes_and_not_the_chat(chat, tmp_path):
    first, second = chat(300)
    keys = [
        (PROMPT, b"Who was the king?\r"),
        (r"token [1-4]\d:", b"\x03"),
        (rf"(?s)(?:{PROMPT}.*?){{2}}", b"\x04"),  # Ctrl-D
    ]
    with started(second) as processes:
        argv = [PYTHON, "-c", COMMAND, *map(str, first[2:])]  # without -m jlayer
        env = {"XDG_STATE_HOME": str(tmp_path / "state")}
        code, screen, _ = on_terminal(argv, keys=keys, env=env)
        assert (code, ended(processes)) == (0, [(0, "", "")])
    assert "(stopped; what there is of the answer stays)" in screen.text()
