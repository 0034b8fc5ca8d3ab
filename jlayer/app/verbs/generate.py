"""Continue a text. The text goes to stdout while it grows; device, plan and timing go to stderr.

Without -p, --prompt-file or --prompt-ids the prompt is read from stdin.
"""

from __future__ import annotations

from jlayer.app import options
from jlayer.app import picture as timeline
from jlayer.app.inputs import folder_of, name_of, read_file, read_stdin
from jlayer.app.running import follow, opened, write_text
from jlayer.catalogue import preset
from jlayer.checkpoint.hub import Weights
from jlayer.errors import UsageError
from jlayer.interrupts import check

# option -> (type, what --help says); an option that is not given keeps the model's own default
SAMPLING = {
    "temperature": (
        float,
        "divide the logits by this; 0 is greedy (default: as published, or greedy)",
    ),
    "top_p": (float, "sample from the likeliest tokens that together reach this probability"),
    "top_k": (int, "sample from this many of the likeliest tokens"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest one's probability"),
    "repetition_penalty": (float, "divide the score of tokens that occurred before; 1 is off"),
    "presence_penalty": (float, "subtract from the score of new tokens that occurred; 0 is off"),
    "frequency_penalty": (float, "the same, for each time a token occurred; 0 is off"),
    "no_repeat_ngram_size": (int, "never repeat a sequence of this many tokens"),
    "min_new_tokens": (int, "do not end before this many new tokens"),
    "num_return_sequences": (int, "the number of texts, each sampled with its own noise"),
    "logprobs": (int, "with --json: log-probabilities of the new tokens and of the N likeliest"),
    "seed": (int, "the same seed gives the same text on every machine"),
}
METAVARS = {int: "N", float: "X"}


def add_arguments(parser):
    parser.add_argument("ref", metavar="REF", help=options.REF)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="F", help="a UTF-8 file with the prompt")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the prompt as token ids")
    parser.add_argument(
        *("-n", "--max-new-tokens"),
        type=int,
        metavar="N",
        help="the most new tokens (default: the model's, or 20)",
    )
    for name, (kind, line) in SAMPLING.items():
        parser.add_argument(options.flag(name), type=kind, metavar=METAVARS[kind], help=line)
    parser.add_argument(
        "--stop", action="append", metavar="S", help="end before this text; may be repeated"
    )
    parser.add_argument("--preset", metavar="NAME", help="options for a kind of machine, by name")
    chat = parser.add_argument_group("chat models")
    chat.add_argument("--chat", action="store_true", help="put the prompt in the model's format")
    chat.add_argument("--system", metavar="S", help="a system message before it; implies --chat")
    chat.add_argument(
        "--show-prompt", action="store_true", help="print the prompt as the model gets it, and end"
    )
    options.add_run(parser)
    options.add_context(parser)
    options.add_offline(parser)
    timeline.add_option(parser)


def run(args) -> dict:
    timeline.check_file(args.timeline)
    prompt = read_prompt(args)
    if args.show_prompt:
        return show_prompt(args, prompt)
    sampling = options.given(args, *SAMPLING, "max_new_tokens", "stop")
    run_options = {
        **(preset(args.preset) if args.preset else {}),
        **options.given(args, *options.RUN, "context"),
    }
    with opened(args.ref, offline=args.offline, **run_options) as model:
        check()
        decoding, _ = model.decoding(prompt, options=sampling, chat=args.chat, system=args.system)
        with timeline.recorded(model, args.timeline, name_of(args.ref)):
            return follow(model, decoding, show=None if args.json else write_text)


def show_prompt(args, prompt) -> dict:
    """The prompt as text and ids, without opening the weights."""
    from jlayer.text.chat import chat_messages
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

    folder = folder_of(args.ref, weights=Weights.NONE, offline=args.offline)
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


def read_prompt(args) -> str | list[int]:
    """The prompt as text or ids. Raises UsageError or StorageError."""
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
        return read_file(args.prompt_file, option="--prompt-file")
    return read_stdin(missing="prompt: none given; use -p TEXT, --prompt-file F, or pipe it in")
