"""--save, --save-every and --resume: runs of a command that are put down and taken up."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from jlayer.app.options import flag
from jlayer.app.streams import tell
from jlayer.errors import UsageError

# What --resume has from the saved run: arguments by name, and what they are called.
PROMPT = {
    "text": "PROMPT",
    "prompt": "--prompt",
    "prompt_file": "--prompt-file",
    "prompt_ids": "--prompt-ids",
    "chat": "--chat",
    "show_prompt": "--show-prompt",
}


def add_saving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runs that are put down")
    group.add_argument(
        "--save",
        metavar="FOLDER",
        help="save the run there when it ends or is stopped, so that it can go on",
    )
    group.add_argument("--save-every", type=int, metavar="N", help="and after every N new tokens")
    group.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run that was saved there; -n counts all"
    )


def check_saving(args: argparse.Namespace, given: Sequence[str], run_options: dict) -> None:
    """What is wrong with the options is said before a model is opened. `given`: those of sampling
    and of the template, by name. Raises UsageError, CheckpointError or StorageError."""
    if args.save_every is not None and args.save is None:
        raise UsageError("--save-every: there is no folder to save to; add --save FOLDER")
    if args.save_every is not None and args.save_every < 1:
        raise UsageError(f"--save-every: found {args.save_every}, expected a number from 1 up")
    if args.save is None and args.resume is None:
        return
    if run_options.get("processes") is not None:
        raise UsageError(
            f"{'--resume' if args.save is None else '--save'}: each of several processes has its "
            "own part of the cache, and such a run cannot be saved or taken up; leave it out"
        )
    if args.resume is not None:
        _refuse_others(args, given)
    _check_folders(args)


def _refuse_others(args, given):
    """A run that goes on is the run that it was."""
    named = [words for name, words in PROMPT.items() if getattr(args, name) not in (None, False)]
    named += [flag(name) for name in given if name != "max_new_tokens"]
    if named:
        raise UsageError(
            f"{named[0]}: the run of --resume goes on as it was begun; leave it out, or begin "
            "another run"
        )


def _check_folders(args):
    from jlayer.engine.states import StateFolder

    if args.resume is not None:
        with StateFolder(args.resume).reading():
            pass
    if args.save is None:
        return
    folder = StateFolder(args.save)
    folder.check()
    is_same = args.resume is not None and folder.is_at(args.resume)
    if not is_same and folder.holds_one:
        raise UsageError(
            f"--save: {args.save} holds a saved run already; go on with it (--resume {args.save}), "
            "remove it, or name another folder"
        )


def saving(args: argparse.Namespace, decoding, *, is_single: bool) -> Callable | None:
    """Has a run saved when it ends or is stopped, and whenever so many tokens more are there: what
    is to be called with the steps of each forward pass. None without --save. Raises UsageError for
    a run that cannot be saved, before its first pass."""
    if args.save is None:
        return None
    from jlayer.engine.session import check_can_be_saved, save_run

    check_can_be_saved(decoding)

    def save():
        save_run(args.save, decoding, is_single=is_single)

    def save_last():
        save()
        count = sum(len(lane.token_ids) for lane in decoding.lanes)
        tell(f"saved to {args.save} ({count} new tokens); --resume {args.save} goes on")

    decoding.before_end = save_last
    n_unsaved = 0

    def after(steps):
        nonlocal n_unsaved
        n_unsaved += sum(len(step.token_ids) for step in steps if step is not None)
        if args.save_every is not None and n_unsaved >= args.save_every and not decoding.is_closed:
            save()
            n_unsaved = 0

    return after
