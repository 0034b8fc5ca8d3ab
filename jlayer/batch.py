"""Requests answered by workers of a cluster: the class that Ray Data calls in each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from jlayer.api import AutoModel
from jlayer.errors import UsageError
from jlayer.serving.batch.answers import Answers
from jlayer.serving.batch.given import GivenLines, KeptAnswers
from jlayer.serving.batch.names import Names, model_key
from jlayer.serving.batch.run import Run
from jlayer.serving.desk import Desk
from jlayer.serving.wire.served import Served


class Generate:
    """Answers requests with one model, which stays open: for `Dataset.map_batches` of Ray Data.

    `model`: a folder or a hub id, as the worker sees it. `column`: of the requests, each as a line
    of `jlayer batch` has it (a text of JSON). `answers`: of the column that is added: the line that
    `jlayer batch` writes. `served_names`: under which requests may name the model; () is its own.
    `chat_template`: in place of the model's. `digest`: of where the requests come from; ids of
    answers, and seeds that a request leaves out, are made of it. `key`: the `model_key` that the
    model must have. `options`: those of `AutoModel.from_pretrained`.

    Several threads may call it at a time: their requests share forward passes. Raises what
    `AutoModel.from_pretrained` does.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        column: str = "text",
        answers: str = "answer",
        served_names: Sequence[str] = (),
        chat_template: str | None = None,
        digest: str = "",
        key: str | None = None,
        **options,
    ):
        self._column, self._answers = column, answers
        own = os.path.basename(os.path.normpath(model))
        served = {"names": tuple(served_names) or (own,), "chat_template": chat_template}
        self._model = AutoModel.from_pretrained(model, **options)
        found = model_key(self._model, **served)
        if key is not None and found != key:
            self._model.close()
            raise UsageError(
                f"{model}: another model here than the first worker found, or other files beside "
                "it; put the same folder on every node"
            )
        self._names = Names(digest, found)
        self._answerer = Answers(Served.of(self._model, **served))
        self._desk = Desk(self._model)
        self._desk.start()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of a batch, and the answers beside them. Raises UsageError for what is no
        request (a request that is wrong is answered with its error), and whatever ends a run."""
        if self._column not in batch:
            known = ", ".join(batch)
            raise UsageError(f"column: found {known}, expected {self._column}; name it")
        lines, journal = GivenLines([str(text) for text in batch[self._column]]), KeptAnswers()
        Run(self._desk, self._answerer, lines, journal, self._names).run()
        texts = [json.dumps(journal.finished[line.custom_id]) for line in lines]
        return {**batch, self._answers: np.array(texts, object)}

    def close(self) -> None:
        """Ends what runs and closes the model; the end of the process does as well."""
        self._desk.stop()
        self._model.close()
