"""Tensors as published: one array of floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.encodings.base import WHOLE, Encoding
from jlayer.spec import ITEM_BYTES


@dataclass(frozen=True)
class Plain(Encoding):
    """A tensor of any shape in one dtype, which is also the name of the encoding."""

    product: str = "plain"

    def pieces(self, shape):
        return {WHOLE: (self.name, shape)}

    def decoded_bytes(self, n_rows, width, *, dtype, platform):
        return 0 if self.name == dtype else n_rows * width * ITEM_BYTES[dtype]


ENCODINGS = tuple(Plain(name) for name in ITEM_BYTES)
