"""What `jlayer plan --tune` shows: the memory of a run of tuning, and the seconds of a step."""

from __future__ import annotations

from dataclasses import replace

from jlayer.additions import Additions
from jlayer.app import options
from jlayer.app.words import time_words
from jlayer.errors import UsageError
from jlayer.families.registry import has_state
from jlayer.plan.machine import Machine
from jlayer.plan.tiles import Weights
from jlayer.sizes import human
from jlayer.tuning.adapter import ALL, AdapterConfig, targets_of
from jlayer.tuning.planning import described, make_plan
from jlayer.tuning.settings import Settings


def add_arguments(parser) -> None:
    """Adds --tune, and what such a plan depends on."""
    parser.add_argument("--tune", action="store_true", help="plan for jlayer tune instead of a run")
    options.add_training(parser)


def check(args) -> None:
    """Raises UsageError for options that are of the other kind of plan."""
    given = [name for name in options.TRAINING if getattr(args, name) is not None]
    if not args.tune and given:
        raise UsageError(f"{options.flag(given[0])}: found without --tune, which it belongs to")
    others = ("draft", "adapter", "devices", "host_share")
    there = [name for name in others if args.tune and getattr(args, name) not in (None, [])]
    if there:
        raise UsageError(f"{options.flag(there[0])}: found with --tune, which has none; leave it")


def run(args, weights: Weights, machine: Machine) -> dict:
    """Shows the plan, and returns it. Raises UsageError, or DoesNotFitError with the sum."""
    settings = Settings(
        **options.given(args, "tokens_per_step", "length"), packs=not has_state(weights.cfg)
    )
    given = options.given(args, "rank")
    given |= {"alpha": 2 * args.rank} if args.rank else {}
    given |= {"targets": tuple(args.targets.split(","))} if args.targets not in (None, ALL) else {}
    how = AdapterConfig(**given)
    rows = ((name, how.rank, how.scale) for name in targets_of(weights.cfg, how))
    plan = make_plan(weights, replace(machine, host=None), settings, Additions.of_one(rows))
    if not args.json:
        print("\n".join([*described(plan), *_lines(plan)]))
    plan.check()
    return plan.as_dict()


def _lines(plan):
    numbers = f"{plan.n_trained:,} numbers"
    step = f"{plan.tokens:,} tokens, {human(plan.put_bytes)} moved"
    if plan.disk_bytes:
        step += f", {human(plan.disk_bytes)} of it from disk"
    return [
        f"adapter         {numbers}",
        f"step            {step}; about {time_words(plan.seconds)}",
        "fits" if plan.fits else "does not fit",
    ]
