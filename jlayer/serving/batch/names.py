"""Names and seeds of a batch's answers, each made from its input, its model and its custom_id.

So a batch that was stopped and goes on gives what an undisturbed one gives, and a line of an output
shows by itself which input and which model it is of.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from jlayer.api import Model
from jlayer.checkpoint.layout import SIDE_FILES, encode_manifest
from jlayer.checkpoint.store import Store

_HALF = 16  # hexadecimal digits
_PREFIX = "batch_req_"


@dataclass(frozen=True)
class Names:
    """`digest`: of the input. `model`: of all that texts depend on beside it, see `model_key`."""

    digest: str
    model: str

    def line(self, custom_id: str) -> str:
        """The id of a line of the output: a half of it is of the input, a half of the model."""
        return f"{_PREFIX}{self._half('line', custom_id)}{self._model_half(custom_id)}"

    def request(self, custom_id: str) -> str:
        return f"req_{self._half('request', custom_id)}"

    def answer(self, custom_id: str, found: str) -> str:
        """The id of a body, in place of one that was drawn: with the same prefix."""
        return f"{found.partition('-')[0]}-{self._half('answer', custom_id)}"

    def seed(self, custom_id: str, order: int) -> int:
        """For the noise of an order that came without one. 53 bits, as where it is drawn."""
        return int(self._half(f"seed {order}", custom_id), 16) >> 11

    def strangeness(self, line: str, custom_id: str) -> str | None:
        """What a line with that id is of instead: "input" or "model"; None where it is ours."""
        own = self.line(custom_id)
        if line == own:
            return None
        return "input" if line[:-_HALF] != own[:-_HALF] else "model"

    def _half(self, what, custom_id):
        return _hashed(self.digest, what, custom_id)

    def _model_half(self, custom_id):
        return _hashed(self.model, "model", custom_id)


def _hashed(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_HALF]


def model_key(model: Model, **options) -> str:
    """A digest of all that texts depend on beside the requests: weights, tokenizer, templates,
    dtype, context, and further `options` of whoever answers."""
    return key_of(
        model.engine.store, dtype=model.dtype, context_limit=model.context_limit, **options
    )


def key_of(store: Store, *, dtype: str, context_limit: int, **options) -> str:
    """The same, of a model whose weights are not loaded."""
    if store.manifest is not None:
        weights = hashlib.sha256(encode_manifest(store.manifest)).hexdigest()
    else:
        weights = store.fingerprint
    weights = (weights, store.adapter_digest)
    digest = hashlib.sha256(repr((weights, dtype, context_limit)).encode())
    digest.update(repr(sorted(options.items())).encode())
    for name in SIDE_FILES:
        try:
            with open(os.path.join(store.folder, name), "rb") as file:
                digest.update(repr((name, hashlib.file_digest(file, "sha256").digest())).encode())
        except OSError:  # this model has none of that name
            continue
    return digest.hexdigest()
