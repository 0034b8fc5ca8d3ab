"""The processes of a model on several hosts: how they find each other, what must be equal on all,
and what becomes of the others when one is lost.

Each keeps a TCP connection to process 0, from the start to its end. It carries what process 0
decides (`engine.deciding`); that it breaks says that a host is lost. The arrays themselves cross by
JAX's own collectives, which wait for a lost host for minutes or for ever: so the thread that sees
it ends the process. Nothing here starts JAX.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from jlayer.errors import StorageError, UsageError
from jlayer.interrupts import check
from jlayer.leaving import end_process

START_S = 120.0  # for all processes to be there
END_S = 10.0  # for the others to be done, too
BEAT_S, LOST_S = 1.0, 20.0  # a host that says nothing for so long is lost
SEEN_S = 2.0  # for a lost host to be seen
LOOK_S = 0.2  # signals are looked for so often
MOST_BYTES = 1 << 28  # of a message
# The number of a process as launchers tell it, the first that is set: of JAX's own name, Slurm,
# Open MPI and what follows PMI.
RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COORDINATOR = "JAX_COORDINATOR_ADDRESS"


class DiffersError(UsageError):
    """Something differs from host to host. It is raised in every process: none waits."""


@dataclass(frozen=True)
class Placement:
    """Where process 0 listens, how many processes there are, and which one this is."""

    address: str
    port: int
    n: int
    number: int


def placement_of(run, environment: Mapping[str, str] = os.environ) -> Placement | None:
    """What the options say and, where they do not, the variables of a launcher; None for one
    process. `run`: a RunConfig. Raises UsageError."""
    if run.processes in (None, 1):
        if run.coordinator is not None or run.process_id is not None:
            raise UsageError("processes: none given; say how many there are, with the coordinator")
        return None
    coordinator = run.coordinator or environment.get(COORDINATOR)
    if coordinator is None:
        raise UsageError(
            "coordinator: none given; expected ADDR:PORT, where process 0 listens, or "
            f"{COORDINATOR} set to it"
        )
    number = run.process_id
    if number is None:
        number = next((environment[name] for name in RANKS if name in environment), None)
    if number is None:
        raise UsageError(
            "process_id: none given; expected a number from 0 up, or a launcher that sets one of "
            f"{', '.join(RANKS)}"
        )
    if not str(number).isdigit() or int(number) >= run.processes:
        raise UsageError(
            f"process_id: found {number}, expected a number from 0 to {run.processes - 1}"
        )
    address, _, port = coordinator.rpartition(":")
    if not address or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"coordinator: found {coordinator!r:.80}, expected ADDR:PORT")
    return Placement(address.strip("[]"), int(port), run.processes, int(number))


class Hosts:
    """The connection of this process to the others, by way of process 0.

    `names`: of each process its host and process id. `is_ending`: whether this one has left, or is
    about to. `end`: called in a thread, with the line that says why, when another host is lost or
    has ended early; and with the exit code, where this one cannot go on.
    """

    def __init__(self, placement: Placement):
        """Waits for all processes. Raises StorageError where they do not come, UsageError where two
        have the same number, or others are meant."""
        self.placement, self.n, self.number = placement, placement.n, placement.number
        self.end = end_process
        self._name = f"{socket.gethostname()}, process {os.getpid()}"
        self._sockets: dict[int, socket.socket] = {}
        self._outgoing: dict[int, _Outgoing] = {}
        self._arrived: dict[int, queue.Queue] = {}
        self._gone: set[int] = set()
        self.is_ending = False
        self._changed = threading.Condition()
        if self.number == 0:
            self._accept_all()
        else:
            self._connect()
        for peer in self._sockets:
            self._arrived[peer] = queue.Queue()
            self._outgoing[peer] = _Outgoing(self._sockets[peer])
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    # At the start.

    def _accept_all(self):
        where, names = self.placement, {0: self._name}
        family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listening.bind((where.address, where.port))
            except OSError as error:
                raise StorageError(
                    f"coordinator: process 0 cannot listen at {where.address}:{where.port} "
                    f"({error.strerror or error}); give an address of its own host and a free port"
                ) from None
            listening.listen(self.n)
            listening.settimeout(LOOK_S)
            ends, refused = time.monotonic() + START_S, None
            while len(self._sockets) < self.n - 1:
                found = self._accept(listening, ends)
                hello = found and _receive_at_once(found)
                if not hello or hello[0] != "hello":
                    continue  # something else has called
                _, number, n, name = hello
                if n != self.n or number in names:
                    refused = f"processes: {n} expected by process {number}, {self.n} by process 0"
                    if number in names:
                        refused = f"process_id: {number} is the number of two: {names[number]}; "
                        refused += f"{name}; number them from 0 to {self.n - 1}"
                names[number], self._sockets[number] = name, found
                if refused:
                    break
            port = _free_port(where.address, family)
        self.names, self.jax_port = names, port
        listed = [names.get(number, "?") for number in range(self.n)]
        for found in self._sockets.values():
            _send(found, ["refused", refused] if refused else ["welcome", port, listed])
        if refused:
            raise UsageError(refused)

    def _accept(self, listening, ends):
        check()
        if time.monotonic() > ends:
            missing = sorted(set(range(1, self.n)) - self._sockets.keys())
            words = ", ".join(map(str, missing))
            raise StorageError(
                f"processes: of {self.n} the ones numbered {words} did not come within "
                f"{START_S:.0f} s; start the same command on every host"
            )
        with suppress(TimeoutError):
            return listening.accept()[0]
        return None

    def _connect(self):
        where, ends, found = self.placement, time.monotonic() + START_S, None
        while found is None:
            check()
            try:
                found = socket.create_connection((where.address, where.port), timeout=LOOK_S)
            except OSError as error:
                if time.monotonic() > ends:
                    raise StorageError(
                        f"coordinator: process 0 cannot be reached at {where.address}:{where.port} "
                        f"({error.strerror or error}); start it there"
                    ) from None
                time.sleep(LOOK_S)
        _send(found, ["hello", self.number, self.n, self._name])
        found.settimeout(LOOK_S)

        def is_patient():
            check()
            return time.monotonic() < ends + LOST_S

        answer = _receive(found, patience=is_patient)
        if answer is not None and answer[0] == "refused":
            raise UsageError(answer[1])
        if answer is None or answer[0] != "welcome":
            raise StorageError(
                f"coordinator: process 0 at {where.address}:{where.port} has ended; "
                "see what it says"
            )
        self.jax_port, self.names = answer[1], dict(enumerate(answer[2]))
        self._sockets[0] = found

    # While it runs.

    def sent(self, label: str, value):
        """What process 0 gives here, on each of them: numbers, words and lists of them."""
        if self.number == 0:
            for peer in self._sockets:
                self._send(peer, ["value", label, value])
            return value
        return self._taken(0, label)

    def collected(self, label: str, value) -> list:
        """What each process gives, in order, on each of them."""
        if self.number != 0:
            self._send(0, ["value", label, value])
            return self._taken(0, label)
        found = [value, *(self._taken(peer, label) for peer in range(1, self.n))]
        return self.sent(label, found)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises DiffersError on each of them where these differ, with the first that does."""
        for name, value in facts.items():
            found = self.collected(f"compare {name}", value)
            other = next((number for number in range(self.n) if found[number] != found[0]), None)
            if other is not None:
                raise DiffersError(
                    f"{name}: found {found[0]!r:.200} on host 0 ({self.names[0]}) and "
                    f"{found[other]!r:.200} on host {other} ({self.names[other]}), expected the "
                    "same on every host; give each the same command and model"
                )

    def _taken(self, peer, label):
        while True:
            check()
            try:
                found, value = self._arrived[peer].get(timeout=LOOK_S)
            except queue.Empty:
                if peer in self._gone:
                    raise StorageError(
                        f"host {peer} ({self.names[peer]}) has ended, and this one expects {label}"
                    ) from None
                continue
            if found != label:
                raise StorageError(
                    f"hosts: this one is at {label}, host {peer} ({self.names[peer]}) at {found}; "
                    "give each the same calls in the same order"
                )
            return value

    def _send(self, peer, message):
        try:
            self._outgoing[peer].send(message)
        except TimeoutError:
            self._is_lost(peer, f"is lost: it takes nothing for {LOST_S:.0f} s")
        except OSError:
            pass  # its reader sees that it is lost

    def _beat(self):
        while not self.is_ending:
            for peer in self._sockets:
                self._send(peer, ["alive"])
            time.sleep(BEAT_S)

    def _read(self, peer):
        connection = self._sockets[peer]
        connection.settimeout(LOOK_S)
        while True:
            match _receive(connection, patience=_within(LOST_S)):
                case ["value", label, value]:
                    self._arrived[peer].put((label, value))
                case ["alive"]:
                    pass
                case ["bye"]:
                    with self._changed:
                        self._gone.add(peer)
                        self._changed.notify_all()
                    return
                case ["ended", number, line]:
                    return self._is_lost(number, f"ended early: {line}")
                case _:
                    return self._is_lost(peer, "is lost: its connection broke")

    def _is_lost(self, number, why):
        if self.is_ending:
            return
        self.is_ending = True
        for peer in self._sockets.keys() - {number}:
            self._send(peer, ["ended", number, why])
        self.end(f"host {number} ({self.names[number]}) {why}; start all of them again")

    # At the end.

    def leave(self, line: str, *, waits: bool = False) -> None:
        """Tells the others that this process ends early, and why: they end too. `waits`: a
        collective has failed, say, and the loss that is the reason is about to be seen."""
        if waits:
            time.sleep(SEEN_S)
        if not self.is_ending:
            self.is_ending = True
            for peer in self._sockets:
                self._send(peer, ["ended", self.number, line])
                self._outgoing[peer].wait(SEEN_S)

    def finish(self) -> None:
        """Waits until the others are done as well, so that none sees another's end as a loss."""
        if self.is_ending:
            return
        self.is_ending = True
        with self._changed:
            if self.number != 0:
                self._send(0, ["bye"])
            self._changed.wait_for(lambda: self._gone >= self._sockets.keys(), timeout=END_S)
        if self.number == 0:
            for peer in self._sockets:
                self._send(peer, ["bye"])
                self._outgoing[peer].wait(SEEN_S)


class _Outgoing:
    """What is sent over a connection, from any thread, in order. A garbage collection in the middle
    of it may send more: that waits until it is done."""

    def __init__(self, connection: socket.socket):
        self._connection = connection.dup()  # whose time to send is not that of receiving
        self._connection.settimeout(LOST_S)
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def send(self, message) -> None:
        """Sends it, or leaves it to who is sending. Raises OSError."""
        self._waiting.append(_encoded(message))
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._connection.sendall(self._waiting.popleft())
            finally:
                self._lock.release()

    def wait(self, seconds: float) -> None:
        """Until nothing waits to be sent, or so long."""
        is_patient = _within(seconds)
        while (self._waiting or self._lock.locked()) and is_patient():
            time.sleep(LOOK_S / 10)


def _free_port(address, family):
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.bind((address, 0))
        return found.getsockname()[1]


def _send(connection, message):
    connection.sendall(_encoded(message))


def _encoded(message):
    data = json.dumps(message, default=lambda array: array.tolist()).encode()
    return len(data).to_bytes(4, "big") + data


def _within(seconds):
    """A function that says whether so many seconds from now have not passed."""
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() < ends


def _receive_at_once(connection):
    """The first message of somebody who calls; None for nothing that is one."""
    connection.settimeout(LOOK_S * 5)
    return _receive(connection, patience=lambda: False)


def _receive(connection, *, patience):
    """A message; None where the connection is at its end, or says nothing for too long."""
    try:
        size = int.from_bytes(_exactly(connection, 4, patience), "big")
        if size > MOST_BYTES:
            return None
        return json.loads(_exactly(connection, size, patience))
    except (OSError, EOFError, ValueError):
        return None


def _exactly(connection, size, patience):
    found = bytearray()
    while len(found) < size:
        try:
            part = connection.recv(min(size - len(found), 1 << 20))
        except TimeoutError:
            if not patience():
                raise
            continue
        if not part:
            raise EOFError
        found += part
    return bytes(found)
