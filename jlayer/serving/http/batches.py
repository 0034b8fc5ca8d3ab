"""/v1/files and /v1/batches, in OpenAI's form: what a server keeps of them is a Service's."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jlayer.serving.batch.service import Service
from jlayer.serving.http.answering import as_json
from jlayer.serving.http.site import Site
from jlayer.serving.wire.errors import Refused, invalid, unavailable
from jlayer.serving.wire.fields import parse_body

SILENCE_S = 30.0  # between two parts of a body
MOST_UPLOADS = 4  # at a time: each takes its size in the system's folder of temporary files
CHUNK = 1 << 20
# kind of list -> (how many are told where none is asked for, the most)
PAGES = {"files": (10_000, 10_000), "batches": (20, 100)}
PATHS = ("/v1/files/", "/v1/batches/")  # what comes below them is an id

Body = Callable[[Request], Awaitable[bytes]]


def table(site: Site, body: Body) -> list[tuple[str, dict]]:
    """Paths, and what their methods do. `body`: reads that of a request."""
    own = Handlers(site, body)
    return [
        ("/v1/files", {"GET": own.files, "POST": own.upload}),
        ("/v1/files/{id}", {"GET": own.file, "DELETE": own.delete_file}),
        ("/v1/files/{id}/content", {"GET": own.content}),
        ("/v1/batches", {"GET": own.batches, "POST": own.create}),
        ("/v1/batches/{id}", {"GET": own.batch}),
        ("/v1/batches/{id}/cancel", {"POST": own.cancel}),
    ]


class Handlers:
    def __init__(self, site: Site, body: Body):
        self._site, self._body = site, body
        self._n_uploads = 0

    async def files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        found = self._service().files.all()
        found = [one for one in found if purpose in (None, one["purpose"])]
        return as_json(_page(found, request, "files"))

    async def upload(self, request: Request) -> Response:
        service = self._service()
        if self._n_uploads >= MOST_UPLOADS:
            raise unavailable("too many files are being sent; try again", code="busy")
        self._n_uploads += 1
        try:
            form = await _form(request)
            try:
                return as_json(await _kept(service, form))
            finally:
                await form.close()
        finally:
            self._n_uploads -= 1

    async def file(self, request: Request) -> Response:
        return as_json(self._service().files.get(request.path_params["id"]))

    async def content(self, request: Request) -> Response:
        files, file_id = self._service().files, request.path_params["id"]
        record, file = files.get(file_id), files.open(file_id)
        headers = {"Content-Length": str(record["bytes"])}
        return StreamingResponse(
            _chunks(file), headers=headers, media_type="application/octet-stream"
        )

    async def delete_file(self, request: Request) -> Response:
        service = self._service()
        return as_json(await asyncio.to_thread(service.delete_file, request.path_params["id"]))

    async def batches(self, request: Request) -> Response:
        return as_json(_page(self._service().all(), request, "batches"))

    async def create(self, request: Request) -> Response:
        service, raw = self._service(), await self._body(request)
        return as_json(await asyncio.to_thread(lambda: service.create(parse_body(raw))))

    async def batch(self, request: Request) -> Response:
        return as_json(self._service().get(request.path_params["id"]))

    async def cancel(self, request: Request) -> Response:
        service = self._service()
        return as_json(await asyncio.to_thread(service.cancel, request.path_params["id"]))

    def _service(self) -> Service:
        self._site.check_ready()
        if self._site.batches is None:
            raise invalid(
                "this server keeps no files, which batches need; start it with --state FOLDER",
                param=None,
                code="no_state",
            )
        return self._site.batches


async def _form(request):
    """The parts of a body, files in temporary files of the system."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise invalid(
            "the body: expected multipart/form-data with a file and its purpose", param="file"
        )
    parser = MultiPartParser(request.headers, _parts(request), max_files=1, max_fields=8)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        message = getattr(error, "message", "no boundary is named")
        raise invalid(f"the body: no multipart/form-data ({message})", param="file") from None


async def _parts(request) -> AsyncIterator[bytes]:
    parts = request.stream()
    try:
        while True:
            async with asyncio.timeout(SILENCE_S):
                part = await anext(parts, None)
            if part is None:
                return
            yield part
    except TimeoutError:
        raise Refused(
            408, f"the body: nothing came for {SILENCE_S:.0f} s", code="timeout"
        ) from None


async def _kept(service, form):
    """Stores the file of a form; -> its record."""
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise invalid("file: none was sent", param="file")
    if purpose != "batch":
        raise invalid(f"purpose: found {purpose!r:.60}, expected 'batch'", param="purpose")
    if any(name.startswith("expires_after") for name in form):
        raise invalid(
            "expires_after: files stay until they are deleted; leave it out", param="expires_after"
        )
    write = partial(shutil.copyfileobj, file.file, length=CHUNK)
    name = file.filename or "file"
    return await asyncio.to_thread(lambda: service.files.add(write, filename=name, purpose=purpose))


def _chunks(file) -> Iterator[bytes]:
    with file:
        while part := file.read(CHUNK):
            yield part


def _page(found, request, kind):
    """A part of a list, as the query asks for it."""
    query, (limit, most) = request.query_params, PAGES[kind]
    raw = query.get("limit", str(limit))
    if (
        not raw.isascii()
        or not raw.isdecimal()
        or not 1 <= len(raw) <= 6
        or not 1 <= int(raw) <= most
    ):
        raise invalid(f"limit: found {raw!r:.40}, expected 1 to {most}", param="limit")
    if query.get("order", "desc") not in ("asc", "desc"):
        raise invalid(f"order: found {query['order']!r:.40}, expected asc or desc", param="order")
    if query.get("order") == "asc":
        found = found[::-1]
    after = query.get("after")
    if after is not None:
        place = next((at for at, one in enumerate(found) if one["id"] == after), None)
        if place is None:
            raise invalid(f"after: {after[:100]!r} is not in this list", param="after")
        found = found[place + 1 :]
    data = found[: int(raw)]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(data) < len(found),
    }
