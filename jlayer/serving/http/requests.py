"""/v1/requests: what has come of a request that outlives its connection."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jlayer.serving.http.answering import StreamAnswer, as_json
from jlayer.serving.http.lasting import Lasting, Lastings
from jlayer.serving.http.site import Site
from jlayer.serving.http.work import Ended, wait_for
from jlayer.serving.wire.errors import Refused
from jlayer.serving.wire.resumed import ResumedReader, read_position


async def take(lastings: Lastings, path: str, request: Request, raw: bytes, *, client: str):
    """The answer to a request that is to outlive its connection; None to one that is not."""
    key = request.headers.get("idempotency-key") or None
    prefers = request.headers.get("prefer", "").lower().replace(";", ",").split(",")
    if key is None and "respond-async" not in [each.strip() for each in prefers]:
        return None
    one = await lastings.accept(path, raw, client=client, key=key, is_retry=is_retry(request))
    headers = {"Location": f"/v1/requests/{one.id}", "Preference-Applied": "respond-async"}
    return as_json(described(one), 202, headers)


def is_retry(request: Request) -> bool:
    """openai-python says so itself."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return count.isdecimal() and len(count) < 10 and int(count) > 0


def described(one: Lasting) -> dict:
    """Its state, and the text so far."""
    found = {
        "id": one.id,
        "object": "jlayer.request",
        "status": one.status,
        "created": one.identity.created,
        "path": one.path,
        "eta_s": None,
    }
    if one.ended is not None:
        is_done = one.ended["status"] == 200
        found["eta_s"] = 0
        found["response"] = one.ended["body"] if is_done else None
        found["error"] = None if is_done else one.ended["body"].get("error")
    elif one.work is not None and one.work.jobs:
        progress = one.work.progress().as_dict()
        found |= {"eta_s": progress["eta_s"], "progress": progress}
    jobs = one.jobs()
    if jobs and one.asked is not None:
        texts = [jobs[order].sequences[sequence] for order, sequence in one.asked.views]
        found["choices"] = [
            {
                "index": number,
                "text": "".join(step.text for step in text.steps),
                "tokens": sum(len(step.token_ids) for step in text.steps),
                "finish_reason": text.finish_reason,
            }
            for number, text in enumerate(texts)
        ]
    return found


class Requests:
    """The handlers."""

    def __init__(self, site: Site, lastings: Lastings):
        self._site, self._lastings = site, lastings

    async def get(self, request: Request) -> Response:
        return as_json(described(self._found(request)))

    async def delete(self, request: Request) -> Response:
        one = self._found(request)
        await self._lastings.forget(one)
        return as_json({"id": one.id, "object": "jlayer.request", "deleted": True})

    async def stream(self, request: Request):
        one = self._found(request)
        self._site.check_ready()
        while one.work is None and one.ended is None:  # it waits for room after a restart
            await wait_for(one.changed, self._site.stopping, seconds=60)
            self._site.check_ready()
        if one.ended is not None and one.ended["jobs"] is None:
            error = one.ended["body"]["error"]
            status, code = one.ended["status"], error.get("code")
            raise Refused(status, error["message"], param=error["param"], code=code)
        asked = await self._lastings.read(one)
        position = read_position(request.query_params.get("after", ""), len(asked.views))
        served, _ = self._site.check_ready()
        reader = ResumedReader(asked, one.jobs(), position, served.text)
        work = Ended(asked) if one.ended is not None else one.work
        return StreamAnswer(work, self._site.stopping, reader)

    def _found(self, request):
        return self._lastings.find(request.path_params["id"])
