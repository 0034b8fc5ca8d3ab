"""Continue a text. The text goes to stdout as it comes; device, plan and timing go to stderr.

Without -p, --prompt-file or --prompt-ids the prompt is read from stdin.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from jlayer.app import picture as timeline
from jlayer.app import progress
from jlayer.app.cli import INTERRUPTED, TERMINATED, Interrupted, Terminated
from jlayer.catalogue import preset
from jlayer.checkpoint.hub import Weights, local_folder
from jlayer.config import human
from jlayer.errors import StorageError, UsageError
from jlayer.plan.tiles import Tier

# option on the command line -> (type, what --help says); None means that the model's own default
# holds
SAMPLING = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "top_k": (int, "keep this many of the likeliest tokens"),
    "min_p": (float, "keep tokens at least this many times as likely as the likeliest"),
    "repetition_penalty": (float, "divide the score of tokens that were there before; 1 is off"),
    "presence_penalty": (float, "lower the score of new tokens used before; 0 is off"),
    "frequency_penalty": (float, "the same, for every time they were used; 0 is off"),
    "no_repeat_ngram_size": (int, "never repeat this many tokens in a row"),
    "min_new_tokens": (int, "no end before this many"),
    "num_return_sequences": (int, "texts for the prompt, each with noise of its own"),
    "logprobs": (int, "in --json: log-probabilities, and this many of the likeliest beside them"),
    "seed": (int, "the same seed gives the same text, everywhere"),
}
RUN = {
    "device_memory": "all that the process may hold on the device (default: 4GiB)",
    "host_memory": "all that it may hold in main memory (default: 80%% of what is available)",
    "dtype": "compute in bfloat16, float16 or float32 (default: the weights' own)",
    "device": "cpu or gpu (default: the accelerator that is there)",
}


def add_arguments(parser):
    parser.add_argument(
        "ref",
        metavar="REF",
        help="a folder, or a hub id: owner/name[@revision]",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="F")
    prompt.add_argument("--prompt-ids", metavar="1,2,3")
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, metavar="N", help="default: the model's, or 20"
    )
    for name, (kind, line) in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=line)
    parser.add_argument("--preset", metavar="NAME", help="options for a kind of machine, by name")
    chat = parser.add_argument_group("chat models")
    chat.add_argument("--chat", action="store_true", help="put the prompt in the model's format")
    chat.add_argument("--system", metavar="S", help="a system message before it (means --chat)")
    chat.add_argument(
        "--show-prompt", action="store_true", help="print the prompt as the model gets it, and end"
    )
    parser.add_argument(
        "--stop", action="append", metavar="S", help="end before this text; may be repeated"
    )
    for name, line in RUN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=line)
    parser.add_argument(
        "--context", type=int, metavar="N", help="at most this many tokens of prompt and answer"
    )
    parser.add_argument("--offline", action="store_true", help="take nothing from the network")
    timeline.add_option(parser)


def run(args) -> dict:
    timeline.check_file(args.timeline)
    prompt = read_prompt(args)
    if args.show_prompt:
        return show_prompt(args, prompt)
    from jlayer.api import AutoModel, sampling_options
    from jlayer.engine.decoding import Decoding
    from jlayer.engine.prompts import encode_prompts

    options = {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "stop")}
    given = {name: value for name, value in options.items() if value is not None}
    run_options = {**(preset(args.preset) if args.preset else {}), **given_run_options(args)}
    with AutoModel.from_pretrained(args.ref, offline=args.offline, **run_options) as model:
        prompts, _ = encode_prompts(model, prompt, chat=args.chat, system=args.system)
        decoding = Decoding(model, prompts, sampling_options(model, given), text=model.text)
        with timeline.recorded(model, args.timeline, name_of(args.ref)):
            return follow(model, decoding, show=None if args.json else write_text)


def given_run_options(args) -> dict:
    """The run options that the command line gives; the rest is left to preset and defaults."""
    options = {name: getattr(args, name) for name in (*RUN, "context")}
    return {name: value for name, value in options.items() if value is not None}


def show_prompt(args, prompt) -> dict:
    """The prompt as text and ids, without opening the weights."""
    from jlayer.text.chat import chat_messages
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

    folder = local_folder(args.ref, weights=Weights.NONE, offline=args.offline)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    if isinstance(prompt, list):
        text, ids = tokenizer.decode(prompt, skip_special_tokens=False), prompt
    else:
        chat = args.chat or args.system is not None
        messages = chat_messages(prompt, chat=chat, system=args.system)
        text = prompt if messages is None else tokenizer.render_chat(messages)
        ids = tokenizer.encode(prompt) if messages is None else tokenizer.encode_chat(messages)
    if not args.json:
        print(text)
    return {"prompt": text, "prompt_ids": ids}


def follow(model, decoding, show, *, counts: bool = True) -> dict:
    """Runs a decoding to its end, or to an interrupt, whose text so far is a result too.

    One text is shown as it comes, several one after another at the end; where there is no
    tokenizer, token ids. `counts`: whether slow sweeps show how far they are.
    """
    has_text = model.text is not None
    for line in (describe(model), *model.notes):
        print(f"jlayer: {line}", file=sys.stderr)
    live = show if len(decoding.continuations) == 1 else None
    stopped = None
    with progress.shown(model, live) if counts else nullcontext(live) as write:
        steps = iter(decoding)
        try:
            for gained in steps:
                if write and has_text:
                    write(gained[0].text)
        except (KeyboardInterrupt, Terminated) as stop:
            stopped = stop
        finally:
            steps.close()
    found = decoding.generations()
    if live and has_text:
        live("\n")
    elif show:
        texts = [one.text if has_text else ",".join(map(str, one.token_ids)) for one in found]
        show("\n\n".join(texts) + "\n")
    print(f"jlayer: {summary(found)}", file=sys.stderr)
    result = found[0].as_dict()
    if len(found) > 1:
        result["sequences"] = [one.as_dict() for one in found]
    if stopped is not None:
        raise Interrupted(result, TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED)
    return result


def name_of(ref) -> str:
    """What a model is called where there is little room: its folder's own name."""
    return os.path.basename(os.path.normpath(ref))


def write_text(piece):
    sys.stdout.write(piece)
    sys.stdout.flush()


def describe(model) -> str:
    """Where a model runs, what lives where, and how long a token should take, in one line."""
    plan = model.plan
    kept = [f"{plan.layers(tier)} {tier.value}" for tier in Tier if plan.layers(tier)]
    return (
        f"{model.device_name}, {model.dtype}, layers: {', '.join(kept)}; "
        f"{human(model.sweep_bytes)} a sweep, about {plan.sweep_seconds:.2g} s; "
        f"device at most {human(plan.device_peak_bytes)} of {human(plan.device.budget_bytes)}"
    )


def summary(found) -> str:
    """How a run went, in one line: what was predicted beside what was measured."""
    stats, predicted = found[0].stats, found[0].plan["sweep"]["seconds"]
    decoded = stats["sweeps"] - 1
    took = f"{stats['decode_s'] / decoded:.3g} s" if decoded > 0 else "nothing"
    reasons = ", ".join(sorted({one.finish_reason for one in found}))
    return (
        f"{sum(len(one.token_ids) for one in found)} tokens ({reasons}), "
        f"{stats['tokens_per_s']:.2f} tokens/s, {stats['sweeps']} sweeps, "
        f"one of a token {took} (predicted {predicted:.2g} s), "
        f"{human(stats['put_bytes'])} moved, load {stats['load_s']:.2f} s, "
        f"prefill {stats['prefill_s']:.2f} s, waited {stats['stall_s']:.2f} s for weights"
    )


def read_prompt(args):
    """The prompt as a str or ids. Raises UsageError (not numbers, not UTF-8) or what reading a file
    gives."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_ids is not None:
        try:
            return [int(word) for word in args.prompt_ids.split(",")]
        except ValueError:
            raise UsageError(
                f"--prompt-ids: found {args.prompt_ids!r}, expected numbers such as 1,2,3"
            ) from None
    if args.prompt_file is not None:
        return _decoded(_file_bytes(args.prompt_file), args.prompt_file)
    if sys.stdin.isatty():
        raise UsageError("prompt: none given; use -p TEXT, --prompt-file F, or pipe it in")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _file_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UsageError(f"--prompt-file: {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"--prompt-file: {path}: {error.strerror}") from None


def _decoded(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 at byte {error.start}; convert the text to UTF-8"
        ) from None
