"""/v1/embeddings: texts or ids → orders whose prompts are pooled, and vectors in OpenAI's form."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace

import msgspec
import numpy as np

from jlayer.engine.hidden import POOLINGS
from jlayer.engine.pooling import EMBEDDED, normalized
from jlayer.serving.job import Order
from jlayer.serving.wire.asked import Asked, Teller, Usage
from jlayer.serving.wire.completions import ids_of, prompts_of
from jlayer.serving.wire.conversation import client_of
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import read_form, refuse_given
from jlayer.serving.wire.served import Served

MOST_INPUTS = 2048  # OpenAI's
FORMATS = ("float", "base64")
UNSUPPORTED = {
    "dimensions": "vectors are as long as the model is wide; cut them yourself",
    "messages": "give text as input",
    "stream": "leave it out",
}


class Embeddings(msgspec.Struct, kw_only=True):
    """`pooling` and `normalize` are no fields of OpenAI's."""

    model: str | None = None
    input: str | list | None = None
    encoding_format: str | None = None
    user: str | None = None
    pooling: str | None = None
    normalize: bool | None = None


def read_embeddings(body: dict, served: Served, *, client: str = "") -> Asked:
    """Raises Refused."""
    refuse_given(body, UNSUPPORTED)
    form = read_form(body, Embeddings)
    served = served.asked_for(form.model)
    encoding = _one_of("encoding_format", form.encoding_format, FORMATS)
    pooling = _one_of("pooling", form.pooling, POOLINGS)
    if form.user is not None and len(form.user) > 1000:
        raise invalid("user: longer than 1000 characters", param="user")
    options = replace(EMBEDDED, adapter=served.sampling({}).adapter)
    orders = []
    for one in prompts_of(form.input, param="input", most=MOST_INPUTS):
        ids = ids_of(one, served, param="input")
        served.check_length(len(ids), 0, param="input")
        order = Order(tuple(ids), options, pooling=pooling, client=client_of(client, form.user))
        orders.append(replace(order, is_counted=not orders))
    is_normal = form.normalize is not False
    return Asked(
        orders=tuple(orders),
        views=tuple((number, 0) for number in range(len(orders))),
        teller=lambda: EmbeddingsTeller(served.name, len(orders), encoding, is_normal),
        model=served.name,
    )


def _one_of(name, found, known):
    """The first one is the default."""
    if found is not None and found not in known:
        words = " or ".join(known)
        raise invalid(f"{name}: found {found!r:.60}, expected {words}", param=name)
    return found or known[0]


class EmbeddingsTeller(Teller):
    """`encoding`: one of FORMATS."""

    def __init__(self, model: str, n_inputs: int, encoding: str, is_normal: bool):
        self._model, self._encoding, self._is_normal = model, encoding, is_normal
        self._vectors: list[np.ndarray | None] = [None] * n_inputs

    def begin(self):
        return []

    def step(self, choice, step):
        self._vectors[choice] = step.vector
        return []

    def finish(self, choice, reason):
        return []

    def end(self, usage: Usage):
        return []

    def whole(self, usage: Usage):
        vectors = np.array(self._vectors)
        vectors = normalized(vectors) if self._is_normal else vectors
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        n_tokens = usage.prompt_tokens
        told = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": self._model, "usage": told}

    def _encoded(self, vector):
        if self._encoding == "base64":
            return b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()
