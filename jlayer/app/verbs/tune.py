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
from contextlib import closing, nullcontext, suppress
from dataclasses import fields
from importlib import metadata

from jlayer.app import options, progress
from jlayer.app.ending import Interrupted, word_of
from jlayer.app.inputs import folder_of, name_of, read_text
from jlayer.app.status import Status
from jlayer.app.streams import ReaderLeft, draws, takes_utf8, tell
from jlayer.app.words import time_words
from jlayer.errors import JlayerError, UsageError
from jlayer.interrupts import STOPS, check
from jlayer.run_config import RunConfig
from jlayer.sizes import counted, human
from jlayer.tuning.adapter import AdapterConfig
from jlayer.tuning.disk import WorkFolder
from jlayer.tuning.settings import SCHEDULES, Settings

RUN = ("device_memory", "host_memory", "dtype", "device")
# Setting -> (its kind, metavar, what --help says).
SETTINGS = {
    "learning_rate": (float, "X", "the highest, from which it falls"),
    "warmup": (float, "SHARE", "the share of the steps in which it is reached"),
    "weight_decay": (float, "X", "of AdamW"),
    "beta1": (float, "X", "of AdamW"),
    "beta2": (float, "X", "of AdamW"),
    "epsilon": (float, "X", "of AdamW"),
    "clip": (float, "X", "the most length of all gradients together; 0: any"),
    "dropout": (float, "SHARE", "of what the adapters multiply"),
    "epochs": (float, "N", "how often the data is gone through"),
    "steps": (int, "N", "how many steps there are, in the place of --epochs"),
    "seed": (int, "N", "of the order of texts, the first numbers of A, and dropout"),
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
    line = "make a text of each turn of a chat, where a template rewrites earlier turns"
    parser.add_argument("--turns-apart", action="store_true", help=line)
    line = "leave out and count the lines of DATA and --held-out that are bad"
    parser.add_argument("--skip-bad", action="store_true", help=line)
    options.add_run(parser, RUN)
    options.add_offline(parser)
    options.add_follow_links(parser)
    parser.add_argument("--picture", metavar="FILE.png", help="draw the loss, step by step")


def add_adapter_options(parser) -> None:
    """What a new adapter is like."""
    options.add_training(parser)
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="B A is multiplied by alpha / rank (default: 2 x rank)",
    )
    parser.add_argument(
        "--rslora", action="store_true", help="divide alpha by the rank's square root"
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
        ends = [first, last] if dash else [first, first]
        is_so = all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends)
        if not is_so or int(ends[1]) < int(ends[0]):
            raise UsageError(f"--layers: found {words!r}, expected numbers as in 0-15,20")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(found)


def run(args) -> dict:
    settings, how = settings_of(args), adapter_of(args)
    _refuse_together(args)
    run = RunConfig.from_options(**options.given(args, *RUN, "follow_links"))
    if args.picture is not None:
        from jlayer.app.picture import check_file

        check_file(args.picture, option="--picture")
    with WorkFolder(args.out, note=tell) as place:
        try:
            tuning, work, data = _opened(args, place, run, settings, how)
        except STOPS:
            then = "goes on" if place.has_checkpoints() else "begins anew"
            tell(f"stopped before it was open; the same command {then}")
            raise
        with closing(tuning):
            return _go_on(args, tuning, work, data)


def _opened(args, place, run, settings, how):
    """(the run, what is to be done, the data)."""
    from jlayer.tuning.run import Tuning

    folder = folder_of(args.ref, offline=args.offline)
    work, data = _work(args, folder, run, settings, how)
    with progress.opening() as watch:
        return Tuning(work, place=place, watch=watch), work, data


def _work(args, folder, run, settings, how):
    """(what is to be done, the data)."""
    from jlayer.checkpoint.links import links_followed
    from jlayer.checkpoint.store import Store
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer
    from jlayer.tuning import lanes
    from jlayer.tuning.adapter import fresh, load_adapter, targets_of
    from jlayer.tuning.base import check_trained
    from jlayer.tuning.data import read_data
    from jlayer.tuning.run import Work

    store = Store(folder, follow_links=run.follow_links)
    check_trained(store.cfg, run.dtype or store.float_dtype, settings)
    alphas, begun_with = {}, None
    if args.adapter is None:
        begun = fresh(targets_of(store.cfg, how), how, settings.seed)
    else:
        with links_followed(wanted=run.follow_links):
            found = load_adapter(args.adapter, store.cfg)
        begun, how, alphas, begun_with = found.state, found.how, found.alphas, found.digest
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    template = None
    if args.chat_template is not None:
        template = read_text(args.chat_template, option="--chat-template")
    how_read = {"chat_template": template, "turns_apart": args.turns_apart}
    how_read["skips_bad"] = args.skip_bad
    data = read_data(args.data, tokenizer, **how_read)
    held_out = None
    if args.held_out is not None:
        held_out = read_data(args.held_out, tokenizer, **how_read)
    for read in filter(None, (data, held_out)):
        if read.skipped:
            tell(f"left out {counted(len(read.skipped), 'bad line')}, the first: {read.skipped[0]}")
    _tell_of(data, begun, settings)
    work = Work(
        folder=folder,
        out=args.out,
        run=run,
        settings=settings,
        how=how,
        begun=begun,
        examples=lanes.cut(data.examples, settings.length),
        held_out=lanes.cut(held_out.examples, settings.length) if held_out else (),
        facts={
            **{name: metadata.version(name) for name in ("jlayer", "jax")},
            "MODEL": store.fingerprint,
            "--dtype": run.dtype or store.float_dtype,
            "--adapter": begun_with,
            "DATA": data.digest,
            "--held-out": held_out and held_out.digest,
            **_facts(how, settings),
        },
        alphas=alphas,
    )
    return work, data


def _facts(how, settings):
    """What must be the same for a run to go on, by the names of the options."""
    found = {**vars(how), **settings.as_dict(), "padded": not settings.packs}
    others = ("packs", "eval_every", "save_every")
    return {options.flag(name): value for name, value in found.items() if name not in others}


def _tell_of(data, begun, settings):
    n_numbers = sum(pair["a"].size + pair["b"].size for pair in begun.values())
    tell(
        f"{counted(len(data.examples), 'text')}, {counted(data.n_tokens, 'token')} to learn from; "
        f"an adapter of {n_numbers:,} numbers for {counted(len(begun), 'matrix', 'matrices')}"
    )
    n_cut = sum(len(one) > settings.length + 1 for one in data.examples)
    if settings.tokens_per_step % settings.length:
        tell(f"a step has {settings.lanes * settings.length} tokens, in lanes of {settings.length}")
    if n_cut:
        are = "is" if n_cut == 1 else "are"
        tell(f"{n_cut:,} of them {are} longer than {settings.length} tokens, and cut into pieces")


def _refuse_together(args):
    """Options of which one leaves the other without a use."""
    if args.steps is not None and args.epochs is not None:
        raise UsageError("--epochs: found beside --steps, which is in its place; leave one out")
    if args.eval_every and args.held_out is None:
        raise UsageError("--eval-every: found without --held-out, of which there is none; name one")
    if args.adapter is not None:
        _refuse_beside(args)


def _refuse_beside(args):
    """What a new adapter is like is not asked of one that is there."""
    for name in ("rank", "alpha", "targets", "layers"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: found beside --adapter, which has its own; leave it out")
    if args.rslora:
        raise UsageError("--rslora: found beside --adapter, which has its own; leave it out")


def _go_on(args, tuning, work, data):
    if tuning.step:
        tell(f"goes on after step {tuning.step} of {tuning.n_steps}")
    try:
        _take_steps(args, tuning)
        tuning.finish(_card(args, tuning, work, data), base=_base(args), lead=_lead(work.folder))
    except STOPS as stop:
        tuning.save()
        tell(f"stopped {_after(tuning)}; the same command {_then(tuning)}")
        raise Interrupted(stop, _result(args, tuning, data, word_of(stop))) from None
    except Exception:  # a failure of the device too: the steps that are done are whole
        _keep(tuning)
        raise
    finally:
        try:
            _draw(args, tuning)
        except JlayerError as error:  # how the run ended is more than its picture
            tell(str(error))
    found = _result(args, tuning, data, "complete")
    if not args.json:
        print(_last_line(found))
    return found


def _take_steps(args, tuning):
    view = _View(tuning)
    say = _say_json if args.json else _say
    with Status(view.lines) if draws() else nullcontext():
        for told in tuning.go_on(lambda: check()):
            view.told = told
            say(told, view.left(told))


def _keep(tuning):
    """After an error: the steps since the last checkpoint may have taken hours."""
    with suppress(JlayerError):  # the first error is the one to report
        tuning.save()
        tell(f"ended by an error {_after(tuning)}; the same command {_then(tuning)}")


def _after(tuning):
    return f"after step {tuning.step} of {tuning.n_steps}" if tuning.step else "before any step"


def _then(tuning):
    return "goes on" if tuning.step else "begins anew"


def _draw(args, tuning):
    if args.picture is None or not tuning.history.steps:
        return
    from jlayer.tuning.picture import draw_losses

    draw_losses(tuning.history, args.picture, what=f"{name_of(args.ref)}: loss")


def _result(args, tuning, data, why):
    steps = tuning.history.steps
    before, after = tuning.history.perplexity or (tuning.history.before, None)
    return {
        "out": args.out if why == "complete" else None,
        "finish_reason": why,
        "skipped_lines": len(data.skipped),
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
    words = f"{found['out']}: {counted(found['steps'], 'step')}, loss {found['loss']:.4f}"
    if found["perplexity"] is not None:
        words += f", perplexity {found['perplexity_before']:.4g} -> {found['perplexity']:.4g}"
    return words


def _say_json(told, left):
    with suppress(ReaderLeft):  # the run is not for its reader alone
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
        if not rest or not done:
            return ""
        return f"  {time_words((time.monotonic() - self._began) / done * rest)} left"

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
