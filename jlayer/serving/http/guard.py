"""Who may ask, and how much they may send: checked before a request's body is read.

Pure ASGI, around everything. A page of another site can send requests to a server on the user's own
machine: Origin and Sec-Fetch-Site tell them. One that rebinds its own name to 127.0.0.1 is told by
Host alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from jlayer.serving.http.proxies import Network, client_behind
from jlayer.serving.wire.asked import encode
from jlayer.serving.wire.errors import Refused, error_body

MIB = 1 << 20
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # no key is asked for
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Of a request's body, by the beginning of its path; the first that fits.
BODY_LIMITS = (("/v1/files", 200 * MIB), ("", 8 * MIB))
DRAINED = 16 * MIB  # of a body that is refused, so that its sender reads why
DRAIN_S = 2.0
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@?#\s]+)(?::(\d{1,5}))?", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PREFLIGHT_S = "600"


@dataclass(frozen=True)
class Rules:
    """`hosts`: names that a request may be for, beside the machine's own; "*": any. `origins`: of
    pages that may ask from elsewhere. `key`: None where none is needed. `proxies`: whose word is
    taken for who the client is."""

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    key: str | None = None
    proxies: tuple[Network, ...] = ()


class Guard:
    """The outermost application."""

    def __init__(self, app, rules: Rules):
        self._app = app
        self._hosts = {name.lower() for name in (*LOOPBACK, *rules.hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in rules.origins}
        self._key = None if rules.key is None else _digest(rules.key.encode())
        self._proxies = rules.proxies

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), value)
        scope["request_id"] = request_id = _request_id(headers)
        more = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        try:
            self._check_host(scope, headers)
            more += self._cross_origin(headers)
            if _is_preflight(scope, headers):
                self._check_preflight(headers)
                await _answer(_with(send, more), 204, self._preflight_headers(headers))
                return
            self._check_key(scope["path"], headers)
            if self._proxies and scope.get("client"):
                # There is one key for all, so it tells nobody apart. Keys that did would go first.
                peer, port = scope["client"]
                scope["client"] = (client_behind(peer, scope["headers"], self._proxies), port)
            limit = _body_limit(scope["path"])
            _check_length(headers, limit)
        except Refused as error:
            is_whole = not _has_body(headers)
            await refuse(scope, receive, _with(send, more), error, is_whole=is_whole)
            return
        await self._app(scope, Limited(receive, limit), _with(send, more))

    def _check_host(self, scope, headers):
        raw = headers.get(b"host")
        if raw is None and scope["http_version"] == "1.0":
            return  # no browser asks so
        host = _host_of(raw)
        if host not in self._hosts and "*" not in self._hosts:
            raise Refused(
                403,
                f"Host: found {_shown(raw)}, which this server does not answer for; start it with "
                "--allow-host NAME if that is its name",
                code="host_not_allowed",
            )

    def _cross_origin(self, headers) -> list:
        """The headers for a page of an origin that is allowed. Raises Refused for others."""
        origin = headers.get(b"origin")
        if origin is not None:
            found = origin.decode("latin-1").lower()
            if found in self._origins or ("*" in self._origins and found != "null"):
                return [
                    (b"access-control-allow-origin", origin),
                    (b"access-control-expose-headers", b"x-request-id, retry-after"),
                    (b"vary", b"Origin"),
                ]
            if not _is_own(found, headers.get(b"host")):
                raise Refused(
                    403,
                    f"Origin: pages of {_shown(origin)} may not ask this server; start it with "
                    "--allow-origin ORIGIN if they should",
                    code="origin_not_allowed",
                )
        elif headers.get(b"sec-fetch-site", b"").lower() == b"cross-site":
            raise Refused(
                403,
                "Sec-Fetch-Site: a page of another site may not ask this server",
                code="origin_not_allowed",
            )
        return []

    def _check_preflight(self, headers):
        """Only of an origin that is allowed, or its own."""
        if headers.get(b"access-control-request-method", b"") == b"":
            raise Refused(400, "a preflight without Access-Control-Request-Method")

    def _preflight_headers(self, headers):
        wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
        found = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", _PREFLIGHT_S.encode()),
        ]
        if headers.get(b"access-control-request-private-network") == b"true":
            found.append((b"access-control-allow-private-network", b"true"))
        return found

    def _check_key(self, path, headers):
        if self._key is None or path in OPEN_PATHS:
            return
        given = _given_key(headers)
        if given is None:
            raise _no_key("no key was given; send Authorization: Bearer KEY", "missing_api_key")
        if not hmac.compare_digest(_digest(given), self._key):
            raise _no_key("the key is not this server's", "invalid_api_key")


class Limited:
    """`receive` that counts a body whose length nobody told, and refuses what is beyond."""

    def __init__(self, receive, limit: int):
        self._receive, self._count = receive, 0
        self._limit: int | None = limit
        self.is_whole = False  # nothing more comes

    async def __call__(self):
        message = await self._receive()
        if message["type"] == "http.request":
            self._count += len(message.get("body", b""))
            self.is_whole = not message.get("more_body")
            if self._limit is not None and self._count > self._limit:
                limit, self._limit = self._limit, None  # what still comes is drained
                raise _too_large(limit)
        return message


async def refuse(scope, receive, send, error: Refused, *, is_whole: bool = False) -> None:
    """Answers with an error. Of a body that still comes a little is taken before the connection is
    closed: one that is closed at once is reset, before its client has read why."""
    is_whole = is_whole or getattr(receive, "is_whole", False)
    raw = encode(error_body(error, scope["path"]))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(raw)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        *(() if is_whole else ((b"connection", b"close"),)),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": raw, "more_body": True})
    if not is_whole:
        await drain(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def drain(receive) -> None:
    """Takes what is left of a body, as far as it comes soon."""
    n_bytes = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while n_bytes <= DRAINED:
                message = await receive()
                n_bytes += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        pass


async def _answer(send, status, headers):
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _with(send, more):
    async def sending(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


def _request_id(headers):
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _has_body(headers):
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip() != b"0"


def _is_preflight(scope, headers):
    return scope["method"] == "OPTIONS" and b"origin" in headers


def _host_of(raw):
    """The name in a Host header, without its port; None where it is none."""
    found = _HOST.fullmatch((raw or b"").decode("latin-1").strip())
    return None if found is None else found[1].lower().rstrip(".")


def _is_own(origin, host):
    """Whether a page comes from this server: behind a proxy its scheme may be https."""
    scheme, _, rest = origin.partition("://")
    own = (host or b"").decode("latin-1").lower()
    return scheme in ("http", "https") and bool(own) and rest == own


def _given_key(headers):
    """A bearer's, or `x-api-key`. An empty one is none."""
    scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        return key.strip()
    return headers.get(b"x-api-key", b"").strip() or None


def _digest(key):
    """Of equal length for all keys."""
    return hashlib.sha256(key).digest()


def _no_key(message, code):
    return Refused(401, message, code=code, headers={"WWW-Authenticate": 'Bearer realm="jlayer"'})


def _body_limit(path):
    return next(limit for begins, limit in BODY_LIMITS if path.startswith(begins))


def _check_length(headers, limit):
    raw = headers.get(b"content-length")
    if raw is not None and raw.isdigit() and (len(raw) > 15 or int(raw) > limit):
        raise _too_large(limit)


def _too_large(limit):
    return Refused(
        413,
        f"the body is larger than {limit >> 20} MiB, the most that is taken here",
        code="request_too_large",
    )


def _shown(raw):
    return repr((raw or b"").decode("latin-1")[:100])
