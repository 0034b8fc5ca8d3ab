"""The server's socket and its thread: from the first connection to the last, in order.

It listens before the model is open, so /health tells how far that is. uvicorn speaks HTTP; what it
lacks is here: time limits on connections that send nothing, and errors in our form.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jlayer.api import Model
from jlayer.errors import StorageError, UsageError
from jlayer.serving.batch.answers import Answers
from jlayer.serving.batch.names import model_key
from jlayer.serving.batch.service import Service
from jlayer.serving.desk import Desk
from jlayer.serving.http.app import application
from jlayer.serving.http.guard import DRAIN_S
from jlayer.serving.http.site import Site
from jlayer.serving.wire.asked import encode
from jlayer.serving.wire.errors import Refused
from jlayer.serving.wire.served import Served

HEADERS_S = 20.0  # from a connection's beginning to the end of its request's headers
KEEP_ALIVE_S = 75  # longer than proxies keep theirs, so that these close first
MOST_HEADER_BYTES = 64 << 10
GRACE_S = 3  # for answers to end in, once the server is to stop
BACKLOG = 1024
DESCRIPTORS = 8192  # a connection takes one


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError: the port is in use, or is not for us."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host: {host} is no address of this machine ({error})") from None
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise _not_bound(error, host, port) from None
    return found


def _not_bound(error, host, port):
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"--port: {port} on {host} is in use by another program; give another --port, or 0 for "
            "any that is free"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(f"--port: {port} is not for this user; give one from 1024 up")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"--host: {host} is no address of this machine")
    return StorageError(f"--port: cannot listen on {host}:{port} ({error.strerror})")


def address_of(listening: socket.socket) -> str:
    """As a browser is told it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host and '[' not in host else host}:{port}"


class Serving:
    """A thread that serves a site from a listening socket, until it is stopped."""

    def __init__(self, site: Site, listening: socket.socket):
        self.site = site
        self.address = address_of(listening)
        self._listening = listening
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._config = uvicorn.Config(
            application(site),
            loop="asyncio",
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # they would be anybody's word
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        self._server = uvicorn.Server(self._config)
        self._thread = threading.Thread(target=self._run, name="jlayer-http", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        _more_descriptors()
        _quieted()
        self._thread.start()
        self._ready.wait()

    def opened(self, model: Model, desk: Desk, **of_served) -> None:
        """The model is open: requests are answered from now on, and batches that an earlier server
        had begun go on. See `Site.opened`."""
        done: Future[None] = Future()
        if self.site.journal is not None:
            answers = Answers(Served.of(model, **of_served))
            key = model_key(model, **of_served)
            journal = self.site.journal
            self.site.batches = Service(
                journal.folder, desk, answers, model=key, starts=journal.starts
            )

        def open_site():
            try:
                done.set_result(self.site.opened(model, desk, **of_served))
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(open_site)
        done.result()

    def wait(self, timeout: float | None = None) -> None:
        """Until the server has ended. Raises what it has failed with."""
        self._thread.join(timeout)
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Ends what is under way, each with an error that says so, and the thread."""
        self._put_back()
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self.site.stopping.set)
        self._server.should_exit = True
        self._thread.join(GRACE_S + 2)
        self.site.workers.close()
        if self.site.batches is not None:
            self.site.batches.stop()
        self.site.lastings.close()

    def _put_back(self):
        """First, since who ends the server may not wait for long: what runs was begun for nothing,
        unless the engine has failed at it."""
        if self.site.journal is not None:
            desk = self.site.desk
            self.site.journal.starts.stop(in_order=desk is None or desk.failure is None)

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def _run(self):
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        _ = self.site.stopping  # of this loop
        self._ready.set()
        await self._server.serve(sockets=[self._listening])


class Protocol(H11Protocol):
    """uvicorn's, with a time limit on the headers of each request, and errors in our form."""

    _headers_timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport):
        super().connection_made(transport)
        self._limit_headers()

    def connection_lost(self, exc):
        self._end_limit()
        super().connection_lost(exc)

    def data_received(self, data):
        if self._is_refused:
            return
        if self._headers_timer is None and not self._has_request:
            self._limit_headers()
        super().data_received(data)

    def handle_events(self):
        super().handle_events()
        if self._has_request:
            self._end_limit()

    @property
    def _has_request(self):
        return self.cycle is not None and not self.cycle.response_complete

    def _limit_headers(self):
        self._headers_timer = self.loop.call_later(HEADERS_S, self._on_slow)

    def _end_limit(self):
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def send_400_response(self, msg):
        """Called where h11's error is handled, which tells the two faults apart."""
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            most = f"{MOST_HEADER_BYTES >> 10} KiB"
            self._send_error(
                Refused(431, f"the headers are larger than {most}", code="headers_too_large")
            )
        else:
            self._send_error(Refused(400, "the request is no valid HTTP/1.1", code="invalid_http"))

    def _on_slow(self):
        if not self.transport.is_closing():
            self._send_error(Refused(408, f"no request came in {HEADERS_S:.0f} s", code="timeout"))

    def _send_error(self, error):
        raw = encode(error.as_dict())
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(raw))),
            ("connection", "close"),
        ]
        with suppress(h11.LocalProtocolError):  # an answer is under way already
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=raw),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        # What still comes is dropped for a moment: a connection that is closed with bytes unread is
        # reset, before its client has read why.
        self._is_refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(DRAIN_S, self.transport.close)


def _more_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _quieted():
    """What uvicorn reports of clients' faults is in their answers; of ours it logs tracebacks."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
