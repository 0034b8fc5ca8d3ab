"""A batch on a Ray cluster: connects, has workers answer lines, and hands on the answers in order.

Ray is the engine: it places the workers, replaces those that die, and asks again what they had not
answered. What is refused is refused before a worker opens the model.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout

from jlayer import errors
from jlayer.batch import Generate
from jlayer.errors import DoesNotFitError, JlayerError, NetworkError, StorageError, UsageError
from jlayer.interrupts import released
from jlayer.run_config import RunConfig
from jlayer.serving.batch.run import MOST_AHEAD

LOCAL, AUTO = "local", "auto"
# Lines that a worker answers in one task: what is asked again where it dies, for each task that it
# had begun, and what is written at a time.
TASK_LINES = 16
MOST_TASKS = 4096  # of a batch; of a longer one each has more lines
MOST_DEATHS = 3  # of workers one after another, while they open the model; then the batch ends
MOST_TRIES = 4  # to answer the same lines, where each time the worker or its node dies
CONNECT_S = 5.0


class _Worker(Generate):
    """Its errors are a column, "error": Ray Data hands on what is raised as text, with a traceback,
    and drops what kind it was."""

    def __init__(self, *args, **options):
        self._failure = None
        try:
            super().__init__(*args, **options)
        except JlayerError as error:
            self._failure = error

    def __call__(self, batch):
        n = len(batch["item"])
        try:
            if self._failure is not None:
                raise self._failure
            return {"answer": super().__call__(batch)["answer"], "error": [""] * n}
        except JlayerError as error:
            return {"answer": [""] * n, "error": [_packed(error)] * n}


def _packed(error: JlayerError) -> str:
    kinds = (each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
    return json.dumps([next(kinds), str(error), error.command_line])


def _unpacked(text: str) -> JlayerError:
    kind, message, command_line = json.loads(text)
    return getattr(errors, kind)(message, command_line=command_line)


def needs_of(run: RunConfig) -> dict[str, float]:
    """What a worker takes of a node, by Ray's names. Raises UsageError where the options do not
    say it."""
    if run.host_memory is None:
        raise UsageError(
            "--ray: found no --host-memory, by which Ray finds each worker a node with room for "
            "its promise; give it, such as --host-memory 64GiB"
        )
    if run.devices is None:
        raise UsageError("--ray: found --devices all, expected how many GPUs a worker has")
    gpus = 0 if run.device == "cpu" else run.devices
    return {"CPU": 1, "memory": run.host_memory, **({"GPU": gpus} if gpus else {})}


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster at `address`: "HOST:PORT", "auto" for that of this machine, or
    "local" for one that is started here and ends with it. Raises UsageError or NetworkError."""
    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    # Ray tells in many lines what a batch tells in one; its log files have them all.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Else a thread of Ray Data that outlives the connection would start a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    options = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    options |= {"include_dashboard": False} if address == LOCAL else {}
    try:
        with released(), _quiet_stderr():
            ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise NetworkError(
            f"--ray {address}: no cluster that can be used ({found}); start one with ray start "
            f"--head, or give {LOCAL}"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    with redirect_stdout(sys.stderr):  # what Ray prints of workers that died is no result
        try:
            yield
        finally:
            ray.shutdown()


def is_url(path: str) -> bool:
    return "://" in path


@contextmanager
def fetched(url: str) -> Iterator[str]:
    """The path of a file here with the bytes of one in an object store, which Ray Data reads.
    Raises UsageError where there is no such file."""
    import ray.data
    from ray.exceptions import RayError

    try:
        with released():
            rows = ray.data.read_binary_files(url).take_all()
    except (OSError, ValueError, ImportError, RayError) as error:
        found = str(error).strip().splitlines()[-1]
        raise UsageError(f"{url}: cannot be read ({found}); name a file of requests") from None
    if len(rows) != 1:
        raise UsageError(f"{url}: found {len(rows)} files, expected one; name a file of requests")
    with tempfile.NamedTemporaryFile(prefix="jlayer-batch-") as file:
        file.write(rows[0]["bytes"])
        file.flush()
        yield file.name


def check_room(needs: Mapping[str, float], n_workers: int) -> None:
    """Raises DoesNotFitError where the cluster has no room for so many workers: Ray would wait for
    more nodes."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get(name, 0) // needed) for name, needed in needs.items()) for node in nodes
    )
    if room < n_workers:
        each = ", ".join(f"{name} {needed:,}" for name, needed in needs.items())
        raise DoesNotFitError(
            f"--workers: found {n_workers}, and the {len(nodes)} nodes of the cluster have room "
            f"for {room} ({each} each); ask for fewer, or add nodes"
        )


def key_on_a_worker(ref: str, needs: Mapping[str, float], run: dict, served: dict) -> str:
    """The `model_key` of a model as a node of the cluster has it. Raises what opening it does."""
    import ray

    gpus = {"num_gpus": needs["GPU"]} if "GPU" in needs else {}
    find = ray.remote(_key).options(num_cpus=1, **gpus)
    with _errors_of_workers(), released():
        return ray.get(find.remote(ref, run, served))


def answered(
    lines: Sequence[str], ref: str, needs: Mapping[str, float], n_workers: int, **options
) -> Iterator[list[dict]]:
    """Yields the answers of these lines in order, some at a time. `options`: of `Generate`.

    Raises JlayerError: what ended a worker, or StorageError where one died again and again.
    """
    import ray.data

    if not lines:
        return
    n_tasks = min(-(-len(lines) // TASK_LINES), MOST_TASKS)
    task_lines = -(-len(lines) // n_tasks)
    # The first worker that is ready takes as many as it may: the others have to have theirs.
    n_calls = max(1, min(MOST_AHEAD // task_lines, -(-n_tasks // n_workers)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.max_consecutive_actor_init_deaths = MOST_DEATHS
    with _without_deprecations():
        answers = ray.data.from_items(list(lines), override_num_blocks=n_tasks).map_batches(
            _Worker,
            batch_size=task_lines,
            compute=ray.data.ActorPoolStrategy(
                size=n_workers,
                max_tasks_in_flight_per_actor=n_calls,
                max_concurrent_calls_per_actor=n_calls,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(ref,),
            fn_constructor_kwargs={"column": "item", **options},
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU"),
            memory=needs["memory"],
            # A worker that dies is replaced however often; what it was at is not asked without end.
            max_task_retries=MOST_TRIES - 1,
        )
    n_answered = 0
    with closing(iter(answers.iter_batches(batch_size=None, prefetch_batches=0))) as batches:
        while True:
            where = f", for the last of several times, at line {n_answered + 1} or later"
            with _errors_of_workers(where), released():
                batch = next(batches, None)
            if batch is None:
                return
            n_answered += len(batch["answer"])
            for text in filter(None, batch["error"]):
                raise _unpacked(text)
            yield [json.loads(text) for text in batch["answer"]]


@contextmanager
def _without_deprecations():
    """`max_task_retries` is one of the remote arguments of a worker, of which Ray 2.60 warns: they
    are to have parameters with names by 2.64. This one has none yet."""
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


@contextmanager
def _quiet_stderr():
    """Drops what is written to stderr, by whatever part of the process; errors are raised."""
    sys.stderr.flush()
    before = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(null)
        os.close(before)


@contextmanager
def _errors_of_workers(where: str = ""):
    """Raises an error of ours that a worker raised as it is, and Ray's own in one line. `where`:
    among what is left to be answered."""
    from ray.exceptions import RayError

    try:
        yield
    except Exception as error:
        for found in _causes(error):
            if isinstance(found, JlayerError):
                raise found from None
        if not isinstance(error, RayError):
            raise
        found = str(error).strip().splitlines()
        raise StorageError(
            f"--ray: a worker or its node was lost{where} ({found[0]}); see Ray's logs for the "
            "reason"
        ) from error


def _causes(error) -> Iterator[BaseException]:
    """An error and what it was raised for; Ray has that in `cause`."""
    while error is not None:
        cause = getattr(error, "cause", None)
        # An error of a task is of both classes, Ray's and ours; ours is the cause.
        if not isinstance(cause, BaseException):
            yield error
            cause = error.__cause__
        error = cause


def _key(ref, run, served):
    """Runs on a worker."""
    from jlayer.checkpoint.hub import local_folder
    from jlayer.checkpoint.store import Store
    from jlayer.serving.batch.names import key_of

    offline = run.pop("offline", False)
    config = RunConfig.from_options(**run)
    how = {name: getattr(config, name) for name in ("follow_links", "adapter", "adapters")}
    store = Store(local_folder(ref, offline=offline), **how)
    context = config.context or store.cfg.max_position_embeddings
    dtype = config.dtype or store.float_dtype
    return key_of(store, dtype=dtype, context_limit=context, **served)


def _check_reachable(address):
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit()) or "://" in address:
        raise UsageError(
            f"--ray: found {address!a}, expected HOST:PORT of a cluster's head, {AUTO} for that of "
            f"this machine, or {LOCAL} for one that is started here"
        )
    try:
        with released(), socket.create_connection((host, int(port)), timeout=CONNECT_S):
            return
    except (OSError, OverflowError) as error:
        raise NetworkError(
            f"--ray {address}: cannot be reached ({error}); start a cluster there with ray start "
            f"--head, or give {LOCAL}"
        ) from None
