"""`jlayer serve`: what it refuses to start with, and, as a process, how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from jlayer.app.cli import main
from jlayer.serving.http.running import Serving
from tests.app.processes import finish, start
from tests.conftest import BUNDLED

PATIENCE_S = 90
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def refused(monkeypatch, capsys):
    """(exit code, stderr) of `jlayer serve WORDS`, in this process, where it serves nobody."""

    def serves(serving):
        raise AssertionError("it was not refused")

    monkeypatch.setattr(Serving, "wait", serves)

    def outcome(*words):
        code = main(["serve", *map(str, words)])
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        return code, err

    return outcome


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "::"], "--api-key-file"),
        (["--host", "example.com"], "--api-key-file"),
        (["--host", "0.0.0.0", "--api-key", ""], "--api-key"),
        (["--host", "0.0.0.0", "--api-key", "two words"], "--api-key"),
        (["--api-key", "a", "--api-key-file", "b"], "keep one"),
        (["--api-key-file", "/does/not/exist"], "/does/not/exist"),
        (["--chat-template", "/does/not/exist"], "/does/not/exist"),
        (["--port", "70000"], "--port"),
        (["--max-queue", "0"], "--max-queue"),
        (["--trusted-proxy", "proxy.example.com"], "--trusted-proxy"),
        (["--trusted-proxy", "10.0.0.1/8"], "--trusted-proxy"),
        (["--trusted-proxy", "0.0.0.0/0"], "--trusted-proxy"),
        (["--trusted-proxy", "::ffff:10.0.0.1"], "write 10.0.0.1"),
        (["--context", "0"], "context"),
        (["--host", "192.0.2.1", "--api-key", "k"], "--host"),
    ],
)
def test_what_cannot_be_started_is_a_line_and_a_code(refused, words, named):
    code, err = refused(BUNDLED, "--port", "0", *words)
    assert code == 2
    assert named in err


def test_a_port_in_use_is_a_line_and_a_code(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, err = refused(BUNDLED, "--port", taken.getsockname()[1])
    assert code == 2
    assert "--port" in err


def test_a_model_that_is_not_there_ends_the_server(tmp_path):
    code, err = finish(start("serve", tmp_path / "nothing", "--port", "0"))[::2]
    assert code in (2, 3, 5)
    assert "Traceback" not in err


def test_a_package_that_is_missing_names_the_extra():
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'starlette' else real(name)\n"
        "from jlayer.app.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    exit_code, _, err = finish(start("serve", BUNDLED, code=code))
    assert exit_code == 2
    assert 'pip install -e ".[serve]"' in err


def test_help_imports_neither_the_server_nor_jax():
    code = (
        "import sys; from jlayer.app.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('jax', 'starlette', 'uvicorn', 'msgspec', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("[]")
    assert "--allow-origin" in done.stdout


class Server:
    """`jlayer serve` of the bundled model. A context manager; kills what is left."""

    def __init__(self, *words, **options):
        common = ("--port", "0", "--device", "cpu", "--dtype", "float32")
        self.process = start("serve", BUNDLED, *common, *words, **options)

    def __enter__(self):
        line = self.process.stderr.readline()
        found = re.search(r"http://\S+?(?=/ )", line)
        assert found, line + self.process.stderr.read()
        self.client = httpx.Client(base_url=found[0], timeout=PATIENCE_S)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def open(self):
        """Waits until the model is open."""
        ends = time.monotonic() + PATIENCE_S
        while self.client.get("/health").status_code != 200:
            assert time.monotonic() < ends
            time.sleep(0.02)
        return self


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_ends_streams_with_an_error_and_the_process_in_seconds(number, code):
    with Server() as server:
        server.open()
        with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as got:
            lines = got.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            began = time.monotonic()
            server.process.send_signal(number)
            last = [line for line in lines if line][-1]
        exit_code, out, err = finish(server.process)
        assert time.monotonic() - began < 10
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert exit_code == code
    assert out == ""
    assert "Traceback" not in err


def test_it_listens_and_tells_before_the_model_is_open_and_a_signal_ends_that_too():
    with Server() as server:
        found = server.client.get("/health")
        assert found.status_code in (503, 200)
        server.process.send_signal(signal.SIGTERM)
        exit_code, _, err = finish(server.process)
    assert exit_code == 143
    assert "Traceback" not in err


def test_the_key_comes_from_a_file_or_the_environment_and_is_never_told(tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("of-a-file\n")
    monkeypatch.setenv("JLAYER_API_KEY", "of-the-environment")
    for words, own in ((["--api-key-file", key], "of-a-file"), ([], "of-the-environment")):
        with Server(*words) as server:
            assert server.client.get("/health").status_code in (200, 503)
            asked = {"authorization": f"Bearer {own}"}
            assert server.client.get("/metrics", headers=asked).status_code == 200
            assert server.client.get("/metrics").status_code == 401
            server.process.send_signal(signal.SIGTERM)
            _, out, err = finish(server.process)
            assert own not in out + err


@pytest.mark.slow
def test_killed_under_load_and_started_again_all_that_was_accepted_is_answered_once(tmp_path):
    """Three times, at moments of its own choosing; the fourth server answers the rest."""
    names, responses = {}, {}
    body = {"prompt": "Once upon", "max_tokens": 60, "temperature": 1.1, "ignore_eos": True}
    for round_ in range(4):
        with Server("--state", tmp_path / "state") as server:
            server.open()
            if round_ < 3:
                for number in range(12):
                    seed = 100 * round_ + number
                    found = server.client.post(
                        "/v1/completions", json={**body, "seed": seed}, headers=ASYNC
                    )
                    names[seed] = found.json()["id"]
                time.sleep(0.3 * round_)
                for name in names.values():
                    found = server.client.get(f"/v1/requests/{name}").json()
                    if found["status"] == "done":
                        assert responses.setdefault(name, found["response"]) == found["response"]
                continue  # killed
            for seed, name in names.items():
                server.client.get(f"/v1/requests/{name}/stream")
                found = {"status": "running"}
                while found["status"] == "running":  # until it is written down
                    found = server.client.get(f"/v1/requests/{name}").json()
                assert found["status"] == "done"
                response = found["response"]
                assert responses.setdefault(name, response) == response, "it had been told before"
                plain = server.client.post("/v1/completions", json={**body, "seed": seed}).json()
                assert response["choices"] == plain["choices"]
    lines = (tmp_path / "state" / "requests.jsonl").read_text().splitlines()
    assert len(names) == 36
    ended = [json.loads(line) for line in lines]
    assert sum("accept" in line for line in ended) == 36


def test_a_second_server_does_not_take_the_firsts_folder(refused, tmp_path):
    with Server("--state", tmp_path / "state"):
        code, err = refused(BUNDLED, "--port", "0", "--state", tmp_path / "state")
    assert code == 7
    assert "--state" in err
