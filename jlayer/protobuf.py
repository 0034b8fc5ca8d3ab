"""The fields of a protobuf message, as far as a SentencePiece model needs them."""

import struct
from collections.abc import Iterator

_VARINT, _LENGTH, _FLOAT = 0, 2, 5
_FIXED_BYTES = {1: 8, _FLOAT: 4}  # wire type → size


def protobuf_fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field of a message; a value is an int or bytes.

    Raises ValueError, KeyError or IndexError if `raw` is not a message.
    """
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, at = _varint(raw, at)
        else:
            size, at = _varint(raw, at) if wire_type == _LENGTH else (_FIXED_BYTES[wire_type], at)
            value, at = raw[at : at + size], at + size
            if at > len(raw):
                raise ValueError(f"field {key >> 3} ends beyond the message")
        yield key >> 3, value


def _varint(raw, at):
    """(integer, position after it): 7 bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
    raise ValueError("an integer of more than 10 bytes")


def encode_field(number: int, value: int | bytes | float) -> bytes:
    """One field of a message: an integer from 0 up, bytes, or a number of 32 bits."""
    if isinstance(value, bytes):
        return _encode_varint(number << 3 | _LENGTH) + _encode_varint(len(value)) + value
    if isinstance(value, float):
        return _encode_varint(number << 3 | _FLOAT) + struct.pack("<f", value)
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def _encode_varint(value):
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
