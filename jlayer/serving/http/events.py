"""/events: how the forward passes go, for the page's picture of the layers.

Everybody who looks is sent what has changed since they last took something, at most ten times a
second.
"""

from __future__ import annotations

import asyncio

from jlayer.serving.http.answering import (
    STREAM_HEADERS,
    Writer,
    beside_disconnect,
    headers_only,
    stopping_error,
)
from jlayer.serving.http.site import Site
from jlayer.serving.http.work import wait_for
from jlayer.serving.wire.asked import encode
from jlayer.serving.wire.errors import Refused

INTERVAL_S = 0.1
SILENCE_S = 4.0
CHANGING = (
    *("pass", "layer", "seconds_a_pass", "riders", "queued", "queued_batch", "tokens_per_s"),
    *("phase", "memory", "is_alive"),
)


class EventsAnswer:
    def __init__(self, site: Site):
        self._site = site

    async def __call__(self, scope, receive, send):
        if scope["method"] == "HEAD":
            return await headers_only(send)
        await beside_disconnect(self._tell(Writer(send)), receive)

    async def _tell(self, out):
        site, never = self._site, asyncio.Event()
        told = site.status()
        await out.begin(200, STREAM_HEADERS)
        await out.write(_framed("hello", told))
        while True:
            await wait_for(never, site.stopping, seconds=INTERVAL_S)
            try:
                found = site.status()
            except Refused as error:
                error = stopping_error() if site.stopping.is_set() else error
                await out.write(_framed("status", {"is_alive": False}))
                await out.end(_framed("error", error.as_dict()))
                return
            changed = {name: found[name] for name in CHANGING if found[name] != told[name]}
            if changed:
                told = found
                await out.write(_framed("status", changed))
            elif out.silent_until(SILENCE_S) <= 0:
                await out.write(b": \n\n")


def _framed(name, body):
    return f"event: {name}\ndata: ".encode() + encode(body) + b"\n\n"
