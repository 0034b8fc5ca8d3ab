"""The fields of a protobuf message, as far as a SentencePiece model needs them."""

from collections.abc import Iterator

_VARINT, _LENGTH = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}  # wire type → size


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
