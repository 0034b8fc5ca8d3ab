"""What tests of connections share: a server of the bundled model, and a client of it."""

import socket
from contextlib import contextmanager

import httpx
import pytest

from jlayer.serving.desk import Desk
from jlayer.serving.http.guard import Rules
from jlayer.serving.http.running import Serving, listen
from jlayer.serving.http.site import Site
from jlayer.streaming.steps import Run
from tests.serving.wire.bodies import TEMPLATE

NAMES = ("fable-3m", "fable")


@contextmanager
def served(
    model, *, rules=None, journal=None, limits=None, desk=None, sends=None, template=TEMPLATE
):
    """Yields a server, of its own desk unless one is given. `sends`: bytes that the system takes of
    what a client does not read."""
    own = Desk(model, limits=limits) if desk is None else desk
    if desk is None:
        own.start()
    try:
        listening = listen("127.0.0.1", 0)
        if sends is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sends)
        with Serving(Site(rules or Rules(), journal), listening) as serving:
            serving.opened(model, own, names=NAMES, chat_template=template)
            yield serving
    finally:
        if desk is None:
            own.stop()


def client_of(serving):
    return httpx.Client(base_url=serving.address, timeout=60)


@contextmanager
def held(model, gate):
    """No forward pass goes on before `gate` (an Event) is set."""

    def wait(step, tile):
        if isinstance(step, Run) and step.tile == 0:
            gate.wait(60)

    with model.engine.watch.also(wait):
        try:
            yield
        finally:
            gate.set()


@pytest.fixture(scope="package")
def serving(model, desk):
    with served(model, desk=desk) as found:
        yield found


@pytest.fixture(scope="package")
def client(serving):
    with client_of(serving) as found:
        yield found
