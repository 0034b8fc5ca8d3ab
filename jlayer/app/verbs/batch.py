"""Answer a file of requests. All lines share the forward passes, so many cost little more than one.

IN has one request a line, as OpenAI's batches have them:
{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}; the url may also
be /v1/completions. All lines are checked first. OUT gets one line for each, in the order in which
they end, with the status and the body that `jlayer serve` would answer; a request that is wrong
gets its error there.

Each answer is on the disk when it counts as finished. A batch that was stopped, in whatever way,
goes on when the same command is run again.

With --ray workers of a Ray cluster answer the lines, each with a model of its own, and OUT has them
in the order of IN. IN may then be a file of an object store, such as s3://...
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager

from jlayer.app import options, progress
from jlayer.app.ending import Interrupted, code_of, word_of
from jlayer.app.running import describe
from jlayer.app.served import add_served, check_packages, names_of, run_options, template_of
from jlayer.app.streams import draws, tell
from jlayer.app.together import followed, opened_for
from jlayer.app.words import time_words
from jlayer.errors import JlayerError, UsageError
from jlayer.interrupts import STOPS, check, released
from jlayer.run_config import RunConfig
from jlayer.sizes import counted

NEEDED = ("msgspec",)
NEEDED_FOR_RAY = ("ray", "pyarrow", "pandas")
# What an answer says of its tokens -> the field of the sum.
USAGE = {"prompt_tokens": "prompt_tokens", "completion_tokens": "new_tokens"}
TOLD_S = 60.0  # between two lines of progress where none can be drawn


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument("input", metavar="IN", help="a file with one request a line (JSON lines)")
    parser.add_argument("output", metavar="OUT", help="a file for the answers; is gone on with")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="answer on a Ray cluster: HOST:PORT of its head, auto (this machine's), or local",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="how many models --ray opens (default: 1)"
    )
    add_served(parser)


def run(args) -> dict | None:
    if args.ray is not None:
        return _run_on_ray(args)
    if args.workers is not None:
        raise UsageError("--workers: found without --ray; say which cluster they are of")
    said = {"names": names_of(args), "chat_template": template_of(args)}
    check_packages("batch", NEEDED)
    if followed(args, run_options(args)):
        return None
    from jlayer.serving.batch.journal import Journal
    from jlayer.serving.batch.lines import Lines

    with released():
        lines = Lines(args.input)
    with lines, Journal(args.output, note=tell) as journal, _kept(args.output, lines, journal):
        if lines.is_file(journal.status):
            raise UsageError(f"{args.output}: is the input; name another file for the output")
        with opened_for(args, run_options(args)) as model:
            found = _answer_all(args, model, lines, journal, said)
    if not args.json:
        print(_line(found))
    return found


def _run_on_ray(args):
    if args.processes is not None:
        raise UsageError("--processes: found with --ray, whose workers have a model each; leave it")
    said = {"names": names_of(args), "chat_template": template_of(args)}
    check_packages("batch", NEEDED)
    check_packages("batch", NEEDED_FOR_RAY, extra="ray")
    n_workers = 1 if args.workers is None else args.workers
    if n_workers < 1:
        raise UsageError(f"--workers: found {n_workers}, expected a number from 1 up")
    from jlayer.app import cluster
    from jlayer.serving.batch.journal import Journal
    from jlayer.serving.batch.lines import Lines
    from jlayer.serving.batch.names import Names

    needs = cluster.needs_of(RunConfig.from_options(**run_options(args)))
    with ExitStack() as stack:
        connection, source = cluster.connected(args.ray), args.input
        if cluster.is_url(source):
            stack.enter_context(connection)
            source = stack.enter_context(cluster.fetched(source))
        with released():
            lines = stack.enter_context(Lines(source, called=args.input))
        journal = stack.enter_context(Journal(args.output, note=tell))
        stack.enter_context(_kept(args.output, lines, journal))
        if lines.is_file(journal.status):
            raise UsageError(f"{args.output}: is the input; name another file for the output")
        if source == args.input:
            stack.enter_context(connection)
        cluster.check_room(needs, n_workers)
        ref, run = _seen_from_workers(args)
        key = cluster.key_on_a_worker(ref, needs, run, said)
        journal.read(Names(lines.digest, key))
        tell(_begins(args, lines, journal))
        own = {"served_names": said["names"], "chat_template": said["chat_template"]}
        own |= {"digest": lines.digest, "key": key, **run}
        found = _write_all(args, lines, journal, cluster.answered, (ref, needs, n_workers), own)
    if not args.json:
        print(_line(found))
    return found


def _seen_from_workers(args):
    """(MODEL, the options of its run), with the paths of folders that are here written out."""
    options = {**run_options(args), "offline": args.offline}
    for name in ("draft", "adapter"):
        if options.get(name) is not None:
            options[name] = _whole_path(options[name])
    named = options.get("adapters", ())
    options["adapters"] = [(name, _whole_path(folder)) for name, folder in named]
    return _whole_path(args.ref), options


def _whole_path(ref):
    return os.path.abspath(ref) if os.path.exists(ref) else ref


def _write_all(args, lines, journal, answered, where, options):
    """Has all lines answered that are not yet, and writes the answers in order."""
    from jlayer.serving.batch.journal import is_refused

    n_before, began, told = len(journal.finished), time.monotonic(), time.monotonic() + TOLD_S
    usage, first_refusal = Counter(), None
    left = [
        lines.raw(at).decode()
        for at, line in enumerate(lines)
        if line.custom_id not in journal.finished
    ]
    with closing(answered(left, *where, **options)) as found:
        for answers in found:
            journal.add(answers)
            for answer in answers:
                body = answer["response"]["body"]
                usage.update({name: body.get("usage", {}).get(name, 0) for name in USAGE})
                if is_refused(answer) and first_refusal is None:
                    first_refusal = _words_of(answer, lines)
            if time.monotonic() >= told:
                told = time.monotonic() + TOLD_S
                tell(f"{len(journal.finished):,} of {counted(len(lines), 'line')}")
    if first_refusal is not None:
        tell(f"{args.input}: {first_refusal}")
    seconds = time.monotonic() - began
    return {
        "input": args.input,
        "output": args.output,
        "model": args.ref,
        **_counts(lines, journal),
        "answered_before": n_before,
        "first_refusal": first_refusal,
        **{field: usage[name] for name, field in USAGE.items()},
        "seconds": seconds,
        "lines_per_s": (len(journal.finished) - n_before) / max(seconds, 1e-9),
        "tokens_per_s": usage["completion_tokens"] / max(seconds, 1e-9),
    }


def _words_of(refused, lines):
    number = next(line.number for line in lines if line.custom_id == refused["custom_id"])
    response = refused["response"]
    message = response["body"]["error"]["message"]
    return f"line {number}: {response['status_code']}, {message}"


@contextmanager
def _kept(path, lines, journal):
    """Where the batch ends early, says what is finished, and how it goes on."""
    from jlayer.serving.batch.journal import GO_ON

    def words():
        n_lines = counted(len(lines), "line")
        return f"{len(journal.finished):,} of {n_lines} are answered and kept; {GO_ON}"

    try:
        yield
    except STOPS as stop:
        line = f"{path}: {word_of(stop)}; {words()}"
        tell(line)
        found = {"error": line, "exit_code": code_of(stop), "finish_reason": "interrupted"}
        raise Interrupted(stop, found | _counts(lines, journal)) from None
    except JlayerError:
        if journal.finished:
            tell(f"{path}: {words()}")
        raise


def _answer_all(args, model, lines, journal, said):
    from jlayer.serving.batch.answers import Answers
    from jlayer.serving.batch.names import Names, model_key
    from jlayer.serving.batch.run import Run
    from jlayer.serving.desk import Desk
    from jlayer.serving.wire.served import Served

    served, own = Served.of(model, **said), Names(lines.digest, model_key(model, **said))
    journal.read(own)
    for line in (describe(model), *model.notes, _begins(args, lines, journal)):
        tell(line)
    desk = Desk(model)
    pause = Told()
    batch = Run(desk, Answers(served), lines, journal, own, pause=pause)
    pause.view = view = View(desk, batch)
    with progress.shown(model, None, view=view):
        desk.start()
        try:
            batch.run()
        finally:
            desk.stop()
    return _result(args, batch, lines, journal, desk)


def _begins(args, lines, journal):
    n_before = f", {len(journal.finished):,} of them answered before" if journal.finished else ""
    return f"{args.input}: {counted(len(lines), 'line')}{n_before}"


def _counts(lines, journal):
    return {
        "lines": len(lines),
        "answered": len(journal.finished),
        "refused": journal.n_refused,
    }


def _result(args, batch, lines, journal, desk):
    status = desk.status()
    if batch.first_refusal is not None:
        tell(f"{args.input}: {batch.first_refusal}")
    seconds = max(batch.seconds, 1e-9)
    return {
        "input": args.input,
        "output": args.output,
        "model": args.ref,
        **_counts(lines, journal),
        "answered_before": batch.n_before,
        "first_refusal": batch.first_refusal,
        "prompt_tokens": batch.prompt_tokens,
        "new_tokens": batch.new_tokens,
        "forward_passes": status.passes_total,
        "tokens_a_pass": batch.new_tokens / max(1, status.passes_total),
        "seconds": batch.seconds,
        "lines_per_s": batch.lines_per_s,
        "tokens_per_s": batch.new_tokens / seconds,
    }


def _line(found):
    refused = f", {found['refused']:,} of them with an error" if found["refused"] else ""
    before = found["answered_before"]
    kept = f" ({before:,} of them before)" if before else ""
    took = f"; {counted(found['new_tokens'], 'token')} in {time_words(found['seconds'])}, "
    took += f"{found['lines_per_s']:.2f} lines/s"
    if "tokens_a_pass" in found:
        took += f", {found['tokens_a_pass']:.1f} tokens a pass"
    return (
        f"{found['output']}: holds the answers of all {found['lines']:,} lines{kept}{refused}"
        f"{took if found['answered'] > before else ''}"
    )


class View:
    """How far a batch is, as a line under nothing else: for `progress.shown`."""

    refresh_s = progress.REFRESH_S

    def __init__(self, desk, batch):
        self._desk, self._batch = desk, batch
        self._waits_for = ""

    def on_step(self, step, tile):
        self._waits_for = ""

    def on_compile(self, label):
        """The desk knows."""

    def wait(self, words: str):
        self._waits_for = words

    def status(self) -> list[str]:
        return [line for line in (self.line(), self._waits_for) if line]

    def line(self) -> str:
        batch, desk = self._batch, self._desk.status()
        parts = [f"{batch.n_done:,} of {counted(batch.n_lines, 'line')}"]
        if batch.n_done > batch.n_before:
            parts.append(f"{batch.lines_per_s:.2f} lines/s")
        place = f"sweep {desk.pass_} layer {desk.layer}/{desk.n_layers}"
        parts.append(f"{counted(desk.riders, 'rider')}, {place}")
        if desk.phase is not None:
            parts.append(desk.phase)
        if batch.eta_s is not None:
            parts.append(f"{progress.duration(batch.eta_s)} left")
        return ", ".join(parts)


class Told:
    """Called again and again while the batch runs: acts on signals, and where nothing can be drawn,
    says now and then how far it is."""

    view: View | None = None

    def __init__(self):
        self._next = time.monotonic() + TOLD_S

    def __call__(self):
        check()
        if not draws() and time.monotonic() >= self._next:
            self._next = time.monotonic() + TOLD_S
            tell(self.view.line())
