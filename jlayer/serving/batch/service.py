"""Batches as a server keeps them: made of a stored file, run beside people, their answers stored.

All that a client was told is on the disk, so what a server had begun when it ended, in whatever
way, the next one goes on with. The object that clients see is the record that is kept.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jlayer.errors import JlayerError, StorageError, UsageError
from jlayer.serving.batch.journal import Journal, is_refused
from jlayer.serving.batch.lines import URLS, Limits, Lines, WrongLines
from jlayer.serving.batch.names import Names
from jlayer.serving.batch.run import Answerer, Run
from jlayer.serving.batch.stored import Files, missing, read_records, write_record
from jlayer.serving.desk import Desk, Stopping
from jlayer.serving.disk import remove
from jlayer.serving.starts import PartStarts, Starts
from jlayer.serving.wire.errors import Refused, invalid

LIMITS = {"lines": 50_000, "n_bytes": 200 << 20}  # OpenAI's
MOST_RUNNING = 4  # batches at a time; others wait
MOST_BATCHES = 2000
RETRY_S = 30.0
WATCH_S = 5.0  # between two looks at batches that wait for others to end
WINDOW = re.compile(r"([1-9]\d{0,3})([hd])", re.ASCII)
HOUR_S = 3600
OVER = ("completed", "failed", "cancelled", "expired")
# how a batch has ended -> the code and the message, OpenAI's, of lines that it did not come to
NEVER_RUN = {
    "cancelled": (
        "batch_cancelled",
        "This request was not run before the batch was cancelled.",
    ),
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}
OWN = "jlayer_model"  # what no client is told of a record: the key of the model that it is for


class _EndsEarly(Exception):
    """Its client wants no more of it, or its time is over."""


class Service:
    """The batches in a folder of a server's own. Any thread may ask it; its own run the batches.

    Raises StorageError, and Refused where a client is to change its request.
    """

    def __init__(
        self,
        folder: str,
        desk: Desk,
        answerer: Answerer,
        *,
        model: str,
        starts: Starts | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`model`: see `names.model_key`. `starts`: where those of lines are kept. `clock`: seconds
        since 1970, also across servers."""
        self.files = Files(os.path.join(folder, "files"))
        self._folder = os.path.join(folder, "batches")
        self._desk, self._answerer, self._model, self._clock = desk, answerer, model, clock
        self._starts, self._lock = starts, threading.Lock()
        self._records = read_records(self._folder)
        self._runs: dict[str, Run] = {}
        self._taken: set[str] = set()  # batches that a thread works on, or has
        self._is_stopping = threading.Event()
        self._pool = ThreadPoolExecutor(MOST_RUNNING, thread_name_prefix="jlayer-batch")
        self._end_starts(one["id"] for one in self._records.values() if one["status"] in OVER)
        for batch_id, record in self._records.items():
            if record["status"] not in OVER:
                self._pool.submit(self._work, batch_id)
        self._watcher = threading.Thread(target=self._watch, name="jlayer-batches", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """What runs is left as it is, for the next server. After the desk has stopped at the
        latest."""
        self._is_stopping.set()
        self._pool.shutdown(cancel_futures=True)
        self._watcher.join()

    def create(self, body: dict) -> dict:
        """Begins a batch, as the body of a request asks for it."""
        record = self._new(body)
        self._save(record)
        try:
            self._pool.submit(self._work, record["id"])
        except RuntimeError:
            raise Stopping("the server is stopping; this batch begins when it is back") from None
        return self.get(record["id"])

    def get(self, batch_id: str) -> dict:
        with self._lock:
            found = self._records.get(batch_id)
            run = self._runs.get(batch_id)
        if found is None:
            raise missing("Batch", batch_id, param="batch_id")
        found = {name: value for name, value in found.items() if name != OWN}
        return found if run is None else {**found, "request_counts": _counts(run)}

    def all(self) -> list[dict]:
        """The newest first."""
        with self._lock:
            ids = list(reversed(self._records))
        return [self.get(batch_id) for batch_id in ids]

    def cancel(self, batch_id: str) -> dict:
        """It ends soon; what was answered by then is in its files."""
        with self._lock:
            found = self._records.get(batch_id)
            if found is not None and found["status"] in OVER:
                raise Refused(
                    409, f"Cannot cancel a batch with status '{found['status']}'.", param="batch_id"
                )
        record = self.get(batch_id)
        if record["status"] != "cancelling":
            self._change(batch_id, status="cancelling", cancelling_at=self._now())
        return self.get(batch_id)

    def delete_file(self, file_id: str) -> dict:
        self.files.get(file_id)
        for record in self.all():
            if record["input_file_id"] == file_id and record["status"] not in OVER:
                raise Refused(
                    409,
                    f"{file_id}: {record['id']} reads it; cancel that first",
                    param="file_id",
                    code="file_in_use",
                )
        self.files.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    def _new(self, body):
        file_id, url = body.get("input_file_id"), body.get("endpoint")
        window, metadata = body.get("completion_window"), body.get("metadata")
        if not isinstance(file_id, str):
            raise invalid("input_file_id: expected the id of a file", param="input_file_id")
        if self.files.get(file_id)["purpose"] != "batch":
            raise invalid(f"{file_id}: its purpose is not batch", param="input_file_id")
        if url not in URLS:
            expected = " or ".join(URLS)
            raise invalid(f"endpoint: found {url!r:.80}, expected {expected}", param="endpoint")
        if not isinstance(window, str) or not WINDOW.fullmatch(window):
            raise invalid(
                f"completion_window: found {window!r:.40}, expected hours or days, such as 24h",
                param="completion_window",
            )
        if metadata is not None and not _is_metadata(metadata):
            raise invalid(
                "metadata: expected at most 16 texts of at most 512 characters by names of at most "
                "64",
                param="metadata",
            )
        if len(self._records) >= MOST_BATCHES:
            raise invalid(f"{MOST_BATCHES} batches are kept already", param=None)
        now = self._now()
        return {
            "id": f"batch_{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": url,
            "errors": None,
            "input_file_id": file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + window_s(window),
            **dict.fromkeys(("in_progress_at", "finalizing_at", "completed_at")),
            **dict.fromkeys(("failed_at", "expired_at", "cancelling_at", "cancelled_at")),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            OWN: self._model,
        }

    def _save(self, record):
        with self._lock:
            write_record(os.path.join(self._folder, f"{record['id']}.json"), record)
            self._records[record["id"]] = record

    def _change(self, batch_id, **fields):
        with self._lock:
            record = self._records[batch_id]
            if record["status"] == "cancelling" and fields.get("status") in (
                "in_progress",
                "finalizing",
            ):
                fields.pop("status")
            record = {**record, **fields}
            write_record(os.path.join(self._folder, f"{batch_id}.json"), record)
            self._records[batch_id] = record
        if record["status"] in OVER:
            self._end_starts([batch_id])

    def _end_starts(self, batch_ids):
        if self._starts is not None:
            self._starts.end_of(set(batch_ids))

    def _now(self):
        return int(self._clock())

    def _ends_early(self, batch_id):
        record = self._records[batch_id]
        expires_at = record["expires_at"]  # None: of an older server, which promised that
        is_late = expires_at is not None and self._clock() >= expires_at
        return is_late or record["status"] == "cancelling"

    def _take(self, batch_id):
        """Whether the thread that asks is the first one to work on a batch."""
        with self._lock:
            is_free = batch_id not in self._taken
            self._taken.add(batch_id)
            return is_free

    # In a thread of its own: a batch that waits for a thread of the pool ends in time as well.

    def _watch(self):
        while not self._is_stopping.wait(WATCH_S):
            with self._lock:
                waiting = [
                    batch_id
                    for batch_id, record in self._records.items()
                    if record["status"] not in OVER and batch_id not in self._taken
                ]
            for batch_id in waiting:
                if self._ends_early(batch_id):
                    self._work(batch_id)

    # In a thread of the pool.

    def _work(self, batch_id):
        if not self._take(batch_id):
            return
        while not self._is_stopping.is_set():
            try:
                self._try(batch_id)
                return
            except Stopping:  # the next server goes on with it
                return
            except StorageError:  # a full disk, most likely: it waits for room
                if self._starts is not None:
                    self._starts.put_back(batch_id)
                self._is_stopping.wait(RETRY_S)

    def _try(self, batch_id):
        """Answers a batch, or notes why that cannot be."""
        try:
            self._answer(batch_id)
        except (Stopping, StorageError):
            raise
        except WrongLines as error:
            self._fail(batch_id, [_problem(one.message, one.number) for one in error.problems])
        except JlayerError as error:
            message = " ".join(str(error).split())
            self._fail(batch_id, [_problem(message)])
        except Exception as error:
            traceback.print_exc()  # nobody else would see it
            self._fail(batch_id, [_problem(f"a bug in jlayer: {error!r}; see the server's log")])

    def _fail(self, batch_id, problems):
        errors = {"object": "list", "data": problems}
        self._change(batch_id, status="failed", failed_at=self._now(), errors=errors)

    def _answer(self, batch_id):
        record = self._records[batch_id]
        if record[OWN] != self._model:
            raise UsageError(
                "the server was started with another model, dtype, context or chat template than "
                "this batch was begun with; begin it again"
            )
        journal_path = os.path.join(self._folder, f"{batch_id}.jsonl")
        limits = Limits(**LIMITS, url=record["endpoint"])
        with (
            Lines(self.files.path(record["input_file_id"]), limits=limits) as lines,
            Journal(journal_path, note=lambda line: None) as journal,
        ):
            names = Names(f"{batch_id} {lines.digest}", self._model)
            journal.read(names)
            run = Run(
                *(self._desk, self._answerer, lines, journal, names),
                client=batch_id,
                starts=PartStarts(self._starts, batch_id),
                pause=lambda: self._check(batch_id),
            )
            with self._lock:
                self._runs[batch_id] = run
            if record["in_progress_at"] is None:
                self._change(batch_id, status="in_progress", in_progress_at=self._now())
            try:
                self._check(batch_id)
                run.run()
            except _EndsEarly:
                pass
            finally:
                with self._lock:
                    del self._runs[batch_id]
            self._store(batch_id, run, lines, journal, names)
        remove(journal_path)

    def _check(self, batch_id):
        if self._is_stopping.is_set():
            raise Stopping("the server is stopping")
        if self._ends_early(batch_id):
            raise _EndsEarly

    def _store(self, batch_id, run, lines, journal, names):
        """Makes the files of a batch that is over; again, where a crash came between."""
        if self._records[batch_id]["status"] == "cancelling":
            end = "cancelled"
        else:  # one that was late in its last moment, with all answers there, is none
            end = "completed" if run.n_done == run.n_lines else "expired"
        self._change(batch_id, status="finalizing", finalizing_at=self._now())
        made = {}
        for name, wanted in (("output", False), ("error", True)):
            found = _lines_of(journal, wanted)
            if wanted:
                found = _chained(found, _never_run(lines, journal, names, end))
            made[f"{name}_file_id"] = self._keep(batch_id, name, found)
        at = {f"{end}_at": self._now()}
        self._change(batch_id, status=end, request_counts=_counts(run), **made, **at)

    def _keep(self, batch_id, name, lines):
        """The id of a new file with these lines; None where there are none."""
        first = next(lines, None)
        if first is None:
            return None

        def write(file):
            for line in _chained((first,), lines):
                file.write(json.dumps(line).encode() + b"\n")

        half = f"{batch_id.removeprefix('batch_')[:23]}{0 if name == 'output' else 1}"
        filename = f"{batch_id}_{name}.jsonl"
        purpose = "batch_output"
        found = self.files.add(write, filename=filename, purpose=purpose, file_id=f"file-{half}")
        return found["id"]


def _lines_of(journal, refused) -> Iterator[dict]:
    return (line for line in journal.lines() if is_refused(line) == refused)


def window_s(window: str) -> int:
    """ "24h" or "7d" in seconds."""
    number, unit = WINDOW.fullmatch(window).groups()
    return int(number) * HOUR_S * (1 if unit == "h" else 24)


def _never_run(lines, journal, names, end) -> Iterator[dict]:
    """What stands for the lines that a batch did not come to before its end."""
    for line in lines:
        if line.custom_id not in journal.finished:
            yield {
                "id": names.line(line.custom_id),
                "custom_id": line.custom_id,
                "response": None,
                "error": dict(zip(("code", "message"), NEVER_RUN[end], strict=True)),
            }


def _chained(*parts) -> Iterator[dict]:
    for part in parts:
        yield from part


def _problem(message, number=None):
    code = "failed" if number is None else "invalid_line"
    return {"code": code, "line": number, "message": message, "param": None}


def _counts(run):
    n_failed = run.n_refused
    return {"total": run.n_lines, "completed": run.n_done - n_failed, "failed": n_failed}


def _is_metadata(value):
    return (
        isinstance(value, dict)
        and len(value) <= 16
        and all(isinstance(one, str) and len(one) <= 512 for one in value.values())
        and all(len(name) <= 64 for name in value)
    )
