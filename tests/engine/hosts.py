"""Starts the processes that are the hosts of a model, on this machine."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.conftest import REPOSITORY
from tests.programs import has_few_shapes

PATIENCE_S = 240  # the machine may be busy


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def groups(n):
    """The options of each of `n` processes."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        {"coordinator": coordinator, "processes": n, "process_id": number} for number in range(n)
    ]


@contextmanager
def started(*commands, n_devices=1, stdin=subprocess.DEVNULL):
    """A process for each of these command lines of Python; none is left at the end. `stdin`: of the
    first."""
    before = os.environ["XLA_FLAGS"].split()
    others = [flag for flag in before if "device_count" not in flag]
    flags = " ".join([f"--xla_force_host_platform_device_count={n_devices}", *others])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    how = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell has its background processes ignore it.
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    inputs = [stdin, *[subprocess.DEVNULL] * (len(commands) - 1)]
    found = [
        subprocess.Popen([sys.executable, *map(str, one)], stdin=own, **how)
        for one, own in zip(commands, inputs, strict=True)
    ]
    try:
        yield found
    finally:
        for one in found:
            one.kill()
            one.wait()


def ended(processes):
    """(exit code, stdout, stderr) of each. They are read at the same time: one that waits for its
    reader keeps the others waiting."""
    with ThreadPoolExecutor(len(processes)) as readers:
        found = list(readers.map(lambda one: one.communicate(timeout=PATIENCE_S), processes))
    return [(one.returncode, *texts) for one, texts in zip(processes, found, strict=True)]


def generate(folder, group, *words):
    """The command line of one host."""
    return command("generate", folder, group, *words)


def command(verb, folder, group, *words):
    options = [word for name in group for word in (f"--{name.replace('_', '-')}", group[name])]
    return ["-m", "jlayer", verb, folder, *words, "--device", "cpu", *options]


def commands_of_the_page(verb, **own):
    """What docs/hosts.md shows of a verb, as command lines of Python; `own`: words in place of some
    that it shows."""
    text = (REPOSITORY / "docs" / "hosts.md").read_text()
    address = groups(1)[0]["coordinator"]
    found = re.findall(rf"(?m)^ {{4}}jlayer ({verb} .*)", text)
    own = {"10.0.0.1:7070": address, **own}
    lines = [[own.get(word, word) for word in shlex.split(words)] for words in found]
    return [["-m", "jlayer", *words, "--device", "cpu"] for words in lines]


def started_for(cases, n_hosts, n_devices=1):
    """The hosts for the cases of `one_host`, with few shapes where the test has few."""
    same = {"cases": cases, "has_few_shapes": has_few_shapes()}
    asked = [json.dumps({"group": group, **same}) for group in groups(n_hosts)]
    return started(*(["-m", "tests.engine.one_host", one] for one in asked), n_devices=n_devices)


def answers(cases, n_hosts, n_devices):
    """What each host gives for the cases of `one_host`, by their names."""
    with started_for(cases, n_hosts, n_devices) as processes:
        results = ended(processes)
    for code, _, errors in results:
        assert code == 0, errors
    lines = [[json.loads(line) for line in out.splitlines()] for _, out, _ in results]
    return [{one["name"]: one for one in of_host} for of_host in lines]
