"""`jlayer batch --ray`: workers of a cluster answer as one process does, in the order asked, also
where one is killed; and what is refused at the doors."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jlayer.app.cli import main
from jlayer.batch import Generate
from jlayer.errors import UsageError
from tests.conftest import REPOSITORY
from tests.serving.batch.requests import answers, assert_same, many, request, written

pytest.importorskip("ray", reason="Ray is not installed")

RUN = ("--device", "cpu", "--dtype", "float32")
PROMISE = ("--host-memory", "1GiB")
# Of memory for promises each node has room for one.
NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=2, memory=1500 << 20, include_dashboard=False)
print("at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
SIMPLE = [request(f"line {at}", f"Once upon a time {at}", max_tokens=3) for at in range(5)]


def command(model, source, output, *words):
    promise = PROMISE if "--ray" in words else ()  # the process of the tests holds more itself
    return ["batch", *map(str, (model, source, output)), *RUN, *promise, *words]


@pytest.fixture(scope="module")
def cluster():
    """The process of a cluster of two nodes, each with room for one worker. A process of its own
    starts it: that of the tests has threads of JAX, and forks badly."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", NODES], cwd=REPOSITORY, **options)
    yield process
    process.communicate()


@pytest.fixture(scope="module")
def nodes(cluster):
    """The address of the cluster."""
    return cluster.stdout.readline().strip().removeprefix("at ")


@pytest.mark.slow
def test_a_local_worker_answers_what_is_left_as_one_process_does(fable, tmp_path):
    source = written(tmp_path / "in", [*SIMPLE[:4], request("wrong", max_tokens=-1)])
    assert main(command(fable, source, tmp_path / "alone")) == 0
    expected = (tmp_path / "alone").read_text().splitlines(keepends=True)
    begun = [line for line in expected if '"line 0"' in line or '"line 2"' in line]
    (tmp_path / "out").write_text("".join(begun))
    process = start(*command(fable, source, tmp_path / "out", "--ray", "local", "--json"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert (found["lines"], found["answered"], found["answered_before"]) == (5, 5, 2)
    assert (found["new_tokens"], found["refused"]) == (6, 1)
    assert found["first_refusal"].startswith("line 5: 400, max_tokens: found -1")
    assert (tmp_path / "out").read_text().startswith("".join(begun))
    there = answers(tmp_path / "out")
    assert list(there)[2:] == ["line 1", "line 3", "wrong"]
    assert_same(there, answers(tmp_path / "alone"))
    assert all(line.startswith("jlayer: ") for line in err.splitlines()), err


# Without a cluster.


def test_generate_adds_a_column_of_answers(fable, tmp_path, capsys, request):
    source = written(tmp_path / "in", SIMPLE[:2])
    assert main(command(fable, source, tmp_path / "alone")) == 0
    lines = np.array(source.read_text().splitlines(), object)
    generate = Generate(fable, column="request", answers="found", device="cpu", dtype="float32")
    request.addfinalizer(generate.close)
    rows = generate({"request": lines, "number": np.arange(2)})
    assert list(rows) == ["request", "number", "found"]
    expected = list(answers(tmp_path / "alone").values())
    for text, alone in zip(rows["found"], expected, strict=True):
        found = json.loads(text)
        assert found["custom_id"] == alone["custom_id"]
        body, other = (one["response"]["body"] for one in (found, alone))
        assert body["choices"] == other["choices"]
    with pytest.raises(UsageError, match="column: found text, expected request"):
        generate({"text": lines})
    with pytest.raises(UsageError, match=r"request 2 of 2: custom_id 'line 0' is that of request"):
        generate({"request": lines[[0, 0]]})
    with pytest.raises(UsageError, match=r"request 1 of 1: no custom_id; expected"):
        generate({"request": np.array(["{}"], object)})
    with pytest.raises(UsageError, match="another model here than the first worker found"):
        Generate(fable, key="0" * 64, device="cpu", dtype="float32")


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--workers", "2"], 2, "--workers: found without --ray"),
        (["--ray", "local", "--workers", "0"], 2, "--workers: found 0, expected a number from 1"),
        (["--ray", "nowhere"], 2, "--ray: found 'nowhere', expected HOST:PORT"),
        (["--ray", "ray://127.0.0.1:1"], 2, "expected HOST:PORT of a cluster's head, auto"),
        (["--ray", "local", "--devices", "all"], 2, "--ray: found --devices all, expected how"),
        (["--ray", f"127.0.0.1:{closed_port()}"], 5, "cannot be reached"),
    ],
)
def test_what_is_refused_before_a_cluster_is_asked(tmp_path, capsys, words, code, said):
    source = written(tmp_path / "in", SIMPLE)
    assert main(command("no/model", source, tmp_path / "out", *words)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_promise_is_asked_for(tmp_path, capsys):
    source = written(tmp_path / "in", SIMPLE)
    words = ["batch", "no/model", str(source), str(tmp_path / "out"), "--ray", "local"]
    assert main(words) == 2
    assert "--ray: found no --host-memory, by which Ray finds" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ray", "pyarrow"])
def test_without_ray_it_says_what_brings_it(tmp_path, monkeypatch, capsys, name):
    source = written(tmp_path / "in", SIMPLE)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(command("no/model", source, tmp_path / "out", "--ray", "local")) == 2
    assert f'the package {name} is not installed; pip install -e ".[ray]"' in (
        capsys.readouterr().err
    )


# On two nodes.


def start(*words):
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from jlayer.app.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process, path, n):
    deadline = time.monotonic() + 240
    while n_lines(path) < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(cluster, doing=""):
    """The processes of a cluster that have a model, and do this, by Ray's name of them."""
    found = []
    for home in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            title = (home / "cmdline").read_bytes() if home.name.isdigit() else b""
            is_worker = title.startswith(b"ray::MapWorker") and doing.encode() in title
            if is_worker and cluster.pid in ancestors(home.name):
                found.append(int(home.name))
    return found


def ancestors(number):
    """The processes that one comes from."""
    found = [int(number)]
    while found[-1] > 1:
        status = Path("/proc", str(found[-1]), "status").read_text()
        found.append(int(re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE)[1]))
    return found[1:]


@pytest.fixture(scope="module")
def alone(fable, tmp_path_factory):
    """(a file of 200 requests, one of what one process answers)"""
    home = tmp_path_factory.mktemp("alone")
    source = written(home / "in", many(200))
    assert main(command(fable, source, home / "out")) == 0
    return source, home / "out"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_no_line_is_lost(
    fable, cluster, nodes, alone, tmp_path
):
    source, expected = alone
    output = tmp_path / "out"
    process = start(*command(fable, source, output, "--ray", nodes, "--workers", "2", "--json"))
    wait_for_lines(process, output, 16)
    own = workers(cluster)
    assert len(own) == 2
    os.kill(own[0], signal.SIGKILL)
    assert n_lines(output) < 200
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["answered"] == 200
    found = answers(output)
    assert list(found) == [f"line {at}" for at in range(200)]
    assert_same(found, answers(expected))


@pytest.mark.slow
def test_lines_that_kill_every_worker_are_not_asked_without_end(fable, cluster, nodes, tmp_path):
    source = written(tmp_path / "in", many(40))
    process = start(*command(fable, source, tmp_path / "out", "--ray", nodes, "--workers", "1"))
    n_killed, deadline = 0, time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < deadline
        for worker in workers(cluster, "submit"):
            os.kill(worker, signal.SIGKILL)
            n_killed += 1
        time.sleep(0.01)
    _, err = process.communicate()
    assert process.returncode == 6, err
    assert "a worker or its node was lost, for the last of several times, at line" in err
    assert 4 <= n_killed <= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_the_same_command_goes_on_in_order(fable, cluster, nodes, alone, tmp_path, number, code):
    source, expected = alone
    output = tmp_path / "out"
    words = command(fable, source, output, "--ray", nodes, "--workers", "2")
    process = start(*words)
    wait_for_lines(process, output, 16)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    before = n_lines(output)
    assert 16 <= before < 200
    if code > 0:
        assert f"{before} of 200 lines are answered and kept; run the same command again" in err
    deadline = time.monotonic() + 120
    while workers(cluster):  # they end with the process that asked for them
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process = start(*words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"({before} of them before)" in out
    found = answers(output)
    assert list(found) == [f"line {at}" for at in range(200)]
    assert_same(found, answers(expected))


@pytest.mark.slow
def test_what_is_wrong_with_a_model_or_a_cluster_is_one_line(fable, nodes, tmp_path, capsys):
    source = written(tmp_path / "in", SIMPLE)
    for model, words, code, said in (
        (tmp_path / "none", [], 3, f"{tmp_path / 'none'}"),
        (fable, ["--workers", "3"], 4, "--workers: found 3, and the 2 nodes of the cluster have"),
        (fable, ["--device-memory", "1MiB"], 4, "MiB"),
        (fable, [], 0, ""),
        (fable, ["--context", "64"], 2, "is the answer of another model, dtype, context"),
    ):
        output = tmp_path / "out"
        capsys.readouterr()
        assert main(command(model, source, output, "--ray", nodes, *words)) == code, words
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[-1]
        assert all(line.startswith("jlayer: ") for line in lines), lines
    assert list(answers(tmp_path / "out")) == [line["custom_id"] for line in SIMPLE]


@pytest.mark.slow
def test_a_file_of_an_object_store_is_read_by_ray_data(fable, nodes, tmp_path, capsys):
    source = written(tmp_path / "in", SIMPLE)
    assert main(command(fable, source, tmp_path / "alone")) == 0
    url = f"file://{source}"
    assert main(command(fable, url, tmp_path / "out", "--ray", nodes)) == 0
    assert_same(answers(tmp_path / "out"), answers(tmp_path / "alone"))
    source.write_text(source.read_text() + "{}\n")
    assert main(command(fable, url, tmp_path / "other", "--ray", nodes)) == 2
    assert f"{url}: line 6: no custom_id" in capsys.readouterr().err
    assert main(command(fable, f"{url}-none", tmp_path / "other", "--ray", nodes)) == 2
    assert f"{url}-none: cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_runs_in_a_pipeline_of_ray_data(fable, nodes, tmp_path):
    import ray.data

    source = written(tmp_path / "in", SIMPLE)
    ray.init(address=nodes, log_to_driver=False)
    try:
        options = {"device": "cpu", "dtype": "float32", "host_memory": "1GiB"}
        found = (
            ray.data.read_text(str(source))
            .map_batches(
                Generate,
                batch_size=16,
                concurrency=1,
                num_cpus=1,
                fn_constructor_args=(str(fable),),
                fn_constructor_kwargs=options,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    lines = {json.loads(row["text"])["custom_id"]: json.loads(row["answer"]) for row in found}
    assert lines.keys() == {line["custom_id"] for line in SIMPLE}
    assert all(line["response"]["status_code"] == 200 for line in lines.values())
