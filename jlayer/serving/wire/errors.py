"""Refusals as clients of OpenAI's protocol read them: a status, and one JSON object.

Every error of ours has a row in a table here; nothing else decides a status.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil

from jlayer.errors import (
    CheckpointError,
    DoesNotFitError,
    JlayerError,
    LockedError,
    NetworkError,
    StorageError,
    UsageError,
)
from jlayer.serving.queue import QueueFull
from jlayer.serving.starts import GivenUp

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",  # as OpenAI calls an unknown model
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}
# Our names of options -> the wire's, where they differ.
PARAMS = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_return_sequences": "n",
    "min_new_tokens": "min_tokens",
    "continue_final_message": "messages",
    "template variables": "chat_template_kwargs",
}
_NAMED = re.compile(r"([a-z_][a-z_ ]*?)((?:\[\d+\]|\.\w+)*)( \([^)]*\))?: ")
_TOO_LONG = re.compile(r"context|too long")


class Refused(JlayerError):
    """A request that is answered with an error. `param`: which part of it is meant; `code`: for
    programs; `headers`: further ones of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def as_dict(self) -> dict:
        return {
            "error": {
                "message": str(self),
                "type": TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


MESSAGES_PATH = "/v1/messages"
_MESSAGES_TYPES = {
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


def messages_error(error: Refused) -> dict:
    """The same for clients of /v1/messages: their types, and one field more around it."""
    body = error.as_dict()["error"]
    body["type"] = _MESSAGES_TYPES.get(error.status, body["type"])
    return {"type": "error", "error": body}


def error_body(error: Refused, path: str) -> dict:
    """An error in the form of whoever speaks at a path."""
    return messages_error(error) if path.startswith(MESSAGES_PATH) else error.as_dict()


def invalid(message: str, *, param: str | None, code: str | None = None) -> Refused:
    """What a client has to change in its request."""
    return Refused(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, retry_after_s: float = 5) -> Refused:
    return Refused(503, message, code=code, headers={"Retry-After": str(ceil(retry_after_s))})


def refused(error: BaseException) -> Refused:
    """Any error of ours, from before an order was taken, as the client gets it."""
    if isinstance(error, Refused):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        after = {"Retry-After": str(ceil(error.retry_after_s))}
        return Refused(429, message, code="queue_full", headers=after)
    if isinstance(error, DoesNotFitError):
        return invalid(message, param=None, code="does_not_fit")
    if isinstance(error, UsageError):
        param = param_of(message)
        is_length = param in ("prompt", "max_tokens") and _TOO_LONG.search(message)
        return invalid(message, param=param, code="context_length_exceeded" if is_length else None)
    if isinstance(error, CheckpointError):  # what this prompt meets in the model's own files
        return invalid(message, param=None, code="model_cannot")
    if isinstance(error, LockedError):
        return Refused(409, message, code="locked")
    if isinstance(error, GivenUp):
        return Refused(500, message, code="given_up")
    if isinstance(error, StorageError | NetworkError):
        return Refused(500, message, code="storage")
    if type(error).__name__ == "Stopping":  # its module imports the whole engine
        return unavailable(message, code="stopping")
    return Refused(500, message or "the server failed", code="internal")


def failed(error: BaseException) -> Refused:
    """Why a text has ended that had begun: what the options did is the client's, all else ours."""
    found = refused(error)
    if isinstance(error, CheckpointError):
        return Refused(500, str(found), code="engine")
    return found


def param_of(message: str) -> str | None:
    """The part of the request that one of our messages begins with, under the wire's name."""
    named = _NAMED.match(message)
    if named is None:
        return None
    name, path = named[1], named[2]
    name = PARAMS.get(name, name)
    return None if " " in name else name + path
