"""Bodies read strictly: JSON without doubled keys, NaN or deep nesting, each field by its type.

What is wrong is a 400 that names the place. null is the default, and what nobody knows is passed
over; what a client relies on and is not done here is refused by name.
"""

from __future__ import annotations

import json
import re
from typing import TypeVar

import msgspec

from jlayer.errors import CheckpointError
from jlayer.serving.wire.errors import invalid
from jlayer.strict import parse_json_object

Form = TypeVar("Form", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a character beyond \uffff, perhaps without the other


def parse_body(raw: bytes) -> dict:
    """The JSON object of a body. Raises Refused."""
    if not raw.strip():
        raise invalid("the body is empty; expected a JSON object", param=None)
    try:
        body = parse_json_object(raw, what="the body", advice="send a JSON object in UTF-8")
        if _HALF.search(raw):
            msgspec.json.encode(body)
    except CheckpointError as error:
        raise invalid(str(error), param=None, code="invalid_json") from None
    except UnicodeEncodeError:
        raise invalid(
            "the body: half of a surrogate pair, which is no character; send text in UTF-8",
            param=None,
            code="invalid_json",
        ) from None
    return body


def read_form(body: dict, form: type[Form]) -> Form:
    """The fields of a body. Raises Refused, with the place of what has another type."""
    try:
        return msgspec.convert(body, form)
    except msgspec.ValidationError as error:
        found = str(error)
        place = _PLACE.search(found)
        param = place[1] if place and place[1] else None
        words = _PLACE.sub("", found).replace("`", "").replace(" | null", "")
        words = words[0].lower() + words[1:]
        raise invalid(f"{param or 'the body'}: {words}", param=param) from None


def refuse_given(body: dict, names: dict[str, str]) -> None:
    """Raises Refused where a body has one of these, with what to do instead."""
    for name, advice in names.items():
        value = body.get(name)  # 0 asks for something, and equals False
        if not (value is None or value is False or value in ([], {})):
            raise invalid(
                f"{name}: not supported by this server; {advice}",
                param=name,
                code="unsupported_parameter",
            )


def check_count(value: list | dict | None, name: str, most: int) -> None:
    if value is not None and len(value) > most:
        raise invalid(f"{name}: found {len(value)}, at most {most} are taken", param=name)


def check_range(value: float | None, name: str, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise invalid(f"{name}: found {value}, expected {least} to {most}", param=name)


def check_finite(value: object, name: str, *, most_bytes: int) -> None:
    """Raises Refused where a free-form value holds infinity (1e999), or too much."""
    try:
        raw = json.dumps(value, allow_nan=False)
        raw.encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"{name}: {error}", param=name) from None
    if len(raw) > most_bytes:
        raise invalid(f"{name}: {len(raw)} bytes, at most {most_bytes} are taken", param=name)


def is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)
