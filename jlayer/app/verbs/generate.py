"""Continue a text. The text goes to stdout as it comes; device, plan and timing go to stderr.

Without -p, --prompt-file or --prompt-ids the prompt is read from stdin.
"""

from __future__ import annotations

import sys

from jlayer.app.cli import INTERRUPTED, TERMINATED, Interrupted, Terminated
from jlayer.errors import StorageError, UsageError
from jlayer.weights.budget import human

# option on the command line -> (type, what --help says); None means that the model's own default
# holds
SAMPLING = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "top_k": (int, "keep this many of the likeliest tokens"),
    "seed": (int, "the same seed gives the same text, everywhere"),
}
RUN = {
    "device_memory": "all that the process may hold on the device (default: 4GiB)",
    "host_memory": "all that it may hold in main memory (default: 80%% of what is available)",
    "dtype": "compute in bfloat16, float16 or float32 (default: the weights' own)",
    "device": "cpu or gpu (default: the accelerator that is there)",
}


def add_arguments(parser):
    parser.add_argument("ref", metavar="REF", help="a converted folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="F")
    prompt.add_argument("--prompt-ids", metavar="1,2,3")
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, metavar="N", help="default: the model's, or 20"
    )
    for name, (kind, line) in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=line)
    parser.add_argument(
        "--stop", action="append", metavar="S", help="end before this text; may be repeated"
    )
    for name, line in RUN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=line)
    parser.add_argument(
        "--context", type=int, metavar="N", help="at most this many tokens of prompt and answer"
    )


def run(args) -> dict:
    prompt = read_prompt(args)
    from jlayer.run.generate import Decoding, encode_prompts, sampling_options
    from jlayer.run.model import AutoModel

    options = {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "stop")}
    given = {name: value for name, value in options.items() if value is not None}
    run_options = {name: getattr(args, name) for name in (*RUN, "context")}
    with AutoModel.from_pretrained(args.ref, **run_options) as model:
        prompts, _ = encode_prompts(model, prompt)
        sampling = sampling_options(model, given, implied=True)
        decoding = Decoding(model, prompts, sampling, text=model.text)
        return follow(model, decoding, show=None if args.json else write_text)


def follow(model, decoding, show) -> dict:
    """Runs a decoding of one prompt to its end, or to an interrupt, whose text so far is a result
    too."""
    print(f"jlayer: {describe(model)}", file=sys.stderr)
    stopped = None
    steps = iter(decoding)
    try:
        for (step,) in steps:
            if show:
                show(step.text)
    except (KeyboardInterrupt, Terminated) as stop:
        stopped = stop
    finally:
        steps.close()
    (found,) = decoding.generations()
    if show:
        show("\n")
    print(f"jlayer: {summary(found)}", file=sys.stderr)
    if stopped is not None:
        code = TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
        raise Interrupted(found.as_dict(), code)
    return found.as_dict()


def write_text(piece):
    sys.stdout.write(piece)
    sys.stdout.flush()


def describe(model) -> str:
    """Where a model runs and what it moves, in one line."""
    return (
        f"{model.device_name}, {model.dtype}, {model.config.num_hidden_layers} layers from disk, "
        f"{human(model.sweep_bytes)} a sweep, device at most {human(model.plan.device_peak_bytes)} "
        f"of {human(model.device_budget)}"
    )


def summary(found) -> str:
    """How a generation went, in one line."""
    stats = found.stats
    return (
        f"{len(found.token_ids)} tokens ({found.finish_reason}), "
        f"{stats['tokens_per_s']:.2f} tokens/s, {stats['sweeps']} sweeps, "
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
