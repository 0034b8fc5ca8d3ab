"""The fields of a protobuf message, as much as reading a SentencePiece model takes."""

from collections.abc import Iterator


def protobuf_fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an int, or bytes.

    Raises ValueError, KeyError or IndexError where `raw` is no message.
    """
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
        else:
            size, at = _varint(raw, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = raw[at : at + size], at + size
            if at > len(raw):
                raise ValueError
        yield key >> 3, value


def _varint(raw, at):
    value = 0
    for shift in range(0, 70, 7):
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
    raise ValueError
