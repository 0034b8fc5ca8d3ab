"""Batch lines mean what the same bodies mean to the server, and are answered with its words."""

from __future__ import annotations

from collections.abc import Sequence

from jlayer.errors import JlayerError
from jlayer.serving.job import Job
from jlayer.serving.wire.asked import Asked, Reader
from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.errors import failed, invalid, refused
from jlayer.serving.wire.served import Served

READ = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}


class Answers:
    """The Answerer of `run`, for what is served."""

    def __init__(self, served: Served):
        self._served = served

    def ask(self, url: str, body: dict) -> Asked:
        if body.get("stream"):
            raise invalid("stream: a batch line is answered whole; leave it out", param="stream")
        return READ[url](body, self._served)

    def tell(self, question: Asked, jobs: Sequence[Job]) -> dict:
        reader = Reader(question, jobs)
        reader.teller.begin()
        for _ in reader.take():
            pass
        return reader.teller.whole(reader.usage())

    def refuse(self, error: JlayerError, *, has_begun: bool) -> tuple[int, dict]:
        found = failed(error) if has_begun else refused(error)
        return found.status, found.as_dict()
