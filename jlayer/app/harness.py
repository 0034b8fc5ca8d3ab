"""`jlayer eval harness`: lm-evaluation-harness with a model that is streamed."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import redirect_stdout

from jlayer.app import options, progress
from jlayer.app.running import describe
from jlayer.app.streams import is_terminal, tell
from jlayer.app.together import followed, opened_for
from jlayer.errors import UsageError
from jlayer.interrupts import check
from jlayer.run_config import RunConfig

# What lm_eval tells of a run, without what it tells of the machine.
SHOWN = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")

OF_FIRST = ("tasks", "include_path")  # what process 0 alone uses, where there are several


def add_arguments(parser) -> None:
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument(
        "--tasks",
        metavar="T,...",
        required=True,
        help="names of tasks or groups, patterns such as mmlu_*, or YAML files",
    )
    parser.add_argument("--include-path", metavar="DIR", help="a folder with more tasks")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before a question (default: a task's)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument(
        "--chat", action="store_true", help="put the questions in the model's chat format"
    )
    parser.add_argument("--system", metavar="S", help="a system message before each question")
    options.add_run(parser)
    options.add_processes(parser)
    options.add_context(parser)
    options.add_offline(parser)
    options.add_adapter(parser)
    options.add_follow_links(parser)


def run(args) -> dict | None:
    run_options = options.given(
        args, *options.RUN, *options.PROCESSES, "context", "adapter", "follow_links"
    )
    tasks = _check(args, run_options)
    if followed(args, run_options, own=OF_FIRST):
        return None
    with (
        opened_for(args, run_options, own=OF_FIRST) as model,
        progress.shown(model, None, words=lambda number: f"forward pass {number + 1}"),
    ):
        tell(f"{args.ref}: {describe(model)}")
        for note in model.notes:
            tell(note)
        with redirect_stdout(sys.stderr):  # what it prints is no result
            from jlayer.measure.harness import evaluate

            found = evaluate(
                model,
                tasks,
                include_path=args.include_path,
                told=_tell,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.chat,
                system_instruction=args.system,
            )
        passes = model.engine.scheduler.n_passes
    if not args.json:
        print(_table(found))
    tell(f"{passes} forward passes")
    return {
        "ref": args.ref,
        **{name: found[name] for name in SHOWN if name in found},
        "sweeps": passes,
    }


def _check(args, run_options) -> list[str]:
    """The tasks. What no model could take is said before a file is opened. Raises UsageError."""
    tasks = [name for name in args.tasks.split(",") if name]
    if not tasks:
        raise UsageError("--tasks: none given; such as --tasks arc_easy,hellaswag")
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        found = getattr(args, name)
        if found is not None and found < least:
            raise UsageError(f"{options.flag(name)}: found {found}, expected {least} or more")
    if args.include_path is not None and not os.path.isdir(args.include_path):
        raise UsageError(f"--include-path: {args.include_path} is no folder")
    RunConfig.from_options(**run_options)
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError('harness: needs lm_eval; pip install -e ".[eval]"')
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when it is imported
    if args.offline:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    return tasks


def _table(found) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(found)]
    if found.get("groups"):
        tables.append(make_table(found, "groups"))
    return "\n".join(tables)


def _tell(what, done, of):
    check()
    if is_terminal(sys.stderr) or done == of:
        tell(f"{done} of {of} {what}")
