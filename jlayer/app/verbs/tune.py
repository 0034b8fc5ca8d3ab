"""Train a low-rank adapter (LoRA) of a model larger than the GPU: its frozen layers stream forward
and back, and an adapter and its gradients are there for one layer at a time.

    jlayer tune MODEL DATA.jsonl OUT

DATA has an example a line: {"text": ...}, {"prompt": ..., "completion": ...}, {"instruction": ...,
"input": ..., "output": ...} or {"messages": [...]}; or it is one text (.txt). OUT becomes a folder
as PEFT has them: jlayer generate MODEL --adapter OUT.

A run that was stopped, in whatever way, goes on when the same command is run again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import fields
from importlib import metadata

from jlayer.app import options, progress
from jlayer.app import picture as timeline
from jlayer.app.ending import Interrupted, word_of
from jlayer.app.inputs import folder_of, name_of, read_text
from jlayer.app.status import Status
from jlayer.app.streams import draws, takes_utf8, tell
from jlayer.app.words import time_words
from jlayer.errors import UsageError
from jlayer.interrupts import STOPS, check
from jlayer.run_config import RunConfig
from jlayer.sizes import human
from jlayer.tuning.adapter import AdapterConfig
from jlayer.tuning.settings import SCHEDULES, Settings

RUN = ("device_memory", "host_memory", "dtype", "device")
# Setting -> (its kind, metavar, what --help says).
SETTINGS = {
    "learning_rate": (float, "X", "the highest"),
    "warmup": (float, "SHARE", "the share of the steps in which it is reached"),
    "weight_decay": (float, "X", "of AdamW"),
    "beta1": (float, "X", "of AdamW"),
    "beta2": (float, "X", "of AdamW"),
    "epsilon": (float, "X", "of AdamW"),
    "clip": (float, "X", "the most length of all gradients together; 0: any"),
    "dropout": (float, "SHARE", "of what the adapters multiply"),
    "tokens_per_step": (int, "N", "the tokens of a step"),
    "length": (int, "N", "the most tokens of a text; longer ones are cut into pieces"),
    "epochs": (float, "N", "how often the data is gone through"),
    "steps": (int, "N", "how many steps there are, in the place of --epochs"),
    "seed": (int, "N", "of the order, the first numbers and dropout"),
    "eval_every": (int, "N", "measure --held-out every so many steps; 0: at the end alone"),
    "save_every": (int, "N", "write a checkpoint every so many steps; 0: at the end alone"),
}


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument("data", metavar="DATA", help="a file to learn from, .jsonl or .txt")
    parser.add_argument("out", metavar="OUT", help="a new folder for the adapter")
    add_adapter_options(parser)
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="an adapter to begin with, in the place of a new one"
    )
    add_settings(parser)
    parser.add_argument(
        "--held-out", metavar="FILE", help="text whose perplexity is measured, as DATA is"
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="for messages, in the place of the model's own"
    )
    options.add_run(parser, RUN)
    options.add_offline(parser)
    options.add_follow_links(parser)
    parser.add_argument("--picture", metavar="FILE.png", help="draw the loss, step by step")


def add_adapter_options(parser) -> None:
    """What a new adapter is like."""
    of = AdapterConfig()
    parser.add_argument("--rank", type=int, metavar="N", help=f"(default: {of.rank})")
    parser.add_argument("--alpha", type=float, metavar="X", help="(default: twice the rank)")
    parser.add_argument(
        "--rslora", action="store_true", help="divide alpha by the rank's square root"
    )
    parser.add_argument(
        "--targets",
        metavar="LIST",
        help="the matrices that get one: all, or names such as q_proj,v_proj (default: all)",
    )
    parser.add_argument("--layers", metavar="LIST", help="such as 0-15,20 (default: all)")


def add_settings(parser) -> None:
    """How it is trained."""
    of = Settings()
    for name, (kind, metavar, line) in SETTINGS.items():
        default = getattr(of, name)
        shown = "" if default is None else f" (default: {default:g})"
        parser.add_argument(options.flag(name), type=kind, metavar=metavar, help=line + shown)
    parser.add_argument(
        "--schedule", choices=SCHEDULES, help=f"of the learning rate (default: {of.schedule})"
    )
    parser.add_argument(
        "--padded", action="store_true", help="give each text a lane of its own, filled up"
    )


def settings_of(args) -> Settings:
    """Raises UsageError."""
    names = [field.name for field in fields(Settings) if field.name != "packs"]
    return Settings(**options.given(args, *names), packs=not args.padded)


def adapter_of(args) -> AdapterConfig:
    """Raises UsageError."""
    given = options.given(args, "rank", "alpha")
    if args.alpha is None and args.rank is not None:
        given["alpha"] = 2 * args.rank
    if args.targets is not None and args.targets != "all":
        given["targets"] = tuple(name.strip() for name in args.targets.split(","))
    if args.layers is not None:
        given["layers"] = _layers(args.layers)
    return AdapterConfig(**given, rslora=args.rslora)


def _layers(words):
    found = []
    for part in words.split(","):
        first, dash, last = part.strip().partition("-")
        if (
            not first.isdigit()
            or (dash and not last.isdigit())
            or (dash and int(last) < int(first))
        ):
            raise UsageError(f"--layers: found {words!r}, expected numbers as in 0-15,20")
        found += range(int(first), int(last if dash else first) + 1)
    return tuple(found)


def run(args) -> dict:
    settings, how = settings_of(args), adapter_of(args)
    run = RunConfig.from_options(**options.given(args, *RUN, "follow_links"))
    timeline.check_file(args.picture, option="--picture")
    from jlayer.tuning.run import WORK, Tuning

    goes_on = os.path.isdir(args.out + WORK)
    if os.path.lexists(args.out) and not goes_on:
        raise UsageError(f"{args.out}: is there already; name a new folder, or remove it")
    folder = folder_of(args.ref, offline=args.offline)
    work, told = _work(args, folder, run, settings, how)
    with progress.opening() as watch:
        tuning = Tuning(work, watch=watch)
    with closing(tuning):
        return _go_on(args, tuning, work, told)


def _work(args, folder, run, settings, how):
    """(what is to be done, what the card says of the data)."""
    from jlayer.checkpoint.store import Store
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer
    from jlayer.tuning import lanes
    from jlayer.tuning.adapter import fresh, load_adapter, targets_of
    from jlayer.tuning.data import read_data
    from jlayer.tuning.run import Work

    store = Store(folder, follow_links=run.follow_links)
    cfg, fingerprint = store.cfg, store.fingerprint
    alphas, adapter_digest = {}, None
    if args.adapter is None:
        targets = targets_of(cfg, how)
        begun = fresh(targets, how, settings.seed)
    else:
        _refuse_beside(args)
        found = load_adapter(args.adapter, cfg)
        begun, how, alphas, adapter_digest = found.state, found.how, found.alphas, found.digest
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    template = args.chat_template and read_text(args.chat_template, option="--chat-template")
    data = read_data(args.data, tokenizer, chat_template=template)
    held_out = args.held_out and read_data(args.held_out, tokenizer, chat_template=template)
    facts = {
        "version of jlayer": metadata.version("jlayer"),
        "model": fingerprint,
        "dtype": run.dtype,
        "adapter": adapter_digest,
        "data": data.sha256,
        "held-out data": held_out.sha256 if held_out else None,
        "chat template": template,
        **{f"--{name.replace('_', '-')}": value for name, value in vars(how).items()},
        **{f"--{name.replace('_', '-')}": value for name, value in settings.as_dict().items()},
    }
    facts = {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}
    for name in ("--save-every", "--eval-every"):
        facts.pop(name)
    examples = lanes.cut(data.examples, settings.length)
    tell(
        f"{len(data.examples):,} texts, {data.n_tokens:,} tokens to learn from; an adapter of "
        f"{sum(pair['a'].size + pair['b'].size for pair in begun.values()):,} numbers for "
        f"{len(begun)} matrices"
    )
    n_cut = sum(len(one.ids) > settings.length + 1 for one in data.examples)
    if n_cut:
        tell(f"{n_cut:,} of them are longer than {settings.length} tokens, and cut into pieces")
    work = Work(
        folder=folder,
        out=args.out,
        run=run,
        settings=settings,
        how=how,
        begun=begun,
        examples=examples,
        held_out=lanes.cut(held_out.examples, settings.length) if held_out else (),
        facts=facts,
        alphas=alphas,
    )
    return work, data


def _refuse_beside(args):
    """What a new adapter is like is not asked of one that is there."""
    for name in ("rank", "alpha", "targets", "layers"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: found beside --adapter, which has its own; leave it out")
    if args.rslora:
        raise UsageError("--rslora: found beside --adapter, which has its own; leave it out")


def _go_on(args, tuning, work, data):
    view = _View(tuning)
    if tuning.step:
        tell(f"goes on after step {tuning.step} of {tuning.n_steps}")
    say = _say_json if args.json else _say
    try:
        with Status(view.lines) if draws() else nullcontext():
            for told in tuning.go_on(lambda: check()):
                view.told = told
                say(told, view.left(told))
    except STOPS as stop:
        tuning.save()
        tell(f"stopped after step {tuning.step} of {tuning.n_steps}; the same command goes on")
        raise Interrupted(stop, _result(args, tuning, word_of(stop))) from None
    finally:
        if args.picture and tuning.history.steps:
            from jlayer.tuning.picture import draw_losses

            draw_losses(tuning.history, args.picture, what=f"{name_of(args.ref)}: loss")
    tuning.finish(_card(args, tuning, work, data), base=_base(args), lead=_lead(work.folder))
    found = _result(args, tuning, "complete")
    if not args.json:
        print(_last_line(found))
    return found


def _result(args, tuning, why):
    steps = tuning.history.steps
    before, after = tuning.history.perplexity or (tuning.history.before, None)
    return {
        "out": args.out if why == "complete" else None,
        "finish_reason": why,
        "steps": tuning.step,
        "loss": steps[-1]["loss"] if steps else None,
        "seconds": sum(step["seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "perplexity_before": before,
        "perplexity": after,
        "plan": tuning.base.plan.as_dict(),
        "compiles": sum(tuning.base.programs.compiles.values()),
    }


def _last_line(found):
    words = f"{found['out']}: {found['steps']} steps, loss {found['loss']:.4f}"
    if found["perplexity"] is not None:
        words += f", perplexity {found['perplexity_before']:.4g} -> {found['perplexity']:.4g}"
    return words


def _say_json(told, left):
    print(json.dumps(told.as_dict(), ensure_ascii=not takes_utf8(sys.stdout)), flush=True)


def _say(told, left):
    words = f"step {told.step}/{told.n_steps}  loss {told.loss:.4f}"
    if told.perplexity is not None:
        words += f"  held-out perplexity {told.perplexity:.4g}"
    tell(f"{words}  {told.tokens / told.seconds:.3g} tokens/s{left}")


class _View:
    """The lines under what is said: where a run is, and what is left of it."""

    def __init__(self, tuning):
        self._tuning, self.told, self._began = tuning, None, time.monotonic()
        self._first = tuning.step

    def left(self, told) -> str:
        """The time that is left, in words."""
        done = told.step - self._first
        rest = told.n_steps - told.step
        seconds = (time.monotonic() - self._began) / done * rest
        return f"  {time_words(seconds)} left" if rest else ""

    def lines(self):
        told, plan = self.told, self._tuning.base.plan
        if told is None:
            return [f"step 1 of {self._tuning.n_steps}: about {time_words(plan.seconds)} a step"]
        share = told.put_bytes / plan.machine.bytes_per_s / told.seconds
        words = f"epoch {told.epoch:.2f}, learning rate {told.rate:.3g}, {time_words(told.seconds)}"
        return [f"{words} a step, {human(told.put_bytes)} moved, link {share:.0%} of the time"]


def _base(args):
    return args.ref if not os.path.exists(args.ref) else os.path.abspath(args.ref)


def _lead(folder):
    from jlayer.checkpoint.layout import CONFIG
    from jlayer.families.base import BODY
    from jlayer.families.holders import module_lead
    from jlayer.strict import read_json_object

    path = os.path.join(folder, CONFIG)
    return module_lead(read_json_object(path)) if os.path.isfile(path) else BODY


def _card(args, tuning, work, data):
    from jlayer.tuning.card import Training, card

    settings, steps = work.settings, tuning.history.steps
    training = Training(
        base=args.ref,
        data=os.path.basename(args.data),
        data_sha256=data.sha256,
        n_examples=len(data.examples),
        n_tokens=sum(step["tokens"] for step in steps),
        n_steps=tuning.step,
        learning_rate=settings.learning_rate,
        schedule=f"{settings.schedule} after {settings.warmup:g} of warm-up",
        seed=settings.seed,
        final_loss=steps[-1]["loss"],
        perplexity=tuning.history.perplexity,
        versions={name: metadata.version(name) for name in ("jlayer", "jax", "optax")},
    )
    return card(training, work.how, tuning.state)
