"""What is told to who waits when the server ends."""

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace

from jlayer.serving.http.answering import WholeAnswer
from jlayer.serving.wire.errors import Refused


class GivenUp:
    """Work that is cancelled as soon as nobody waits for it."""

    is_over, error = False, None

    @contextmanager
    def watched(self):
        yield asyncio.Event()
        self.is_over, self.error = True, Refused(409, "the request was cancelled", code="cancelled")

    def reader(self):
        return SimpleNamespace(teller=SimpleNamespace(body_error=lambda error: error.code))


def test_an_answer_that_is_given_up_at_the_end_says_that_the_server_stops():
    sent = []

    async def ask():
        stopping, never = asyncio.Event(), asyncio.Event()
        stopping.set()

        async def send(message):
            sent.append(message)

        await WholeAnswer(GivenUp(), stopping)({}, never.wait, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 503
    assert b"stopping" in sent[-1]["body"]
