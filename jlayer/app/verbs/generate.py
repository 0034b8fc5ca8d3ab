"""Continue a text. The text goes to stdout while it grows; device, plan and timing go to stderr.

The prompt is PROMPT, -p, --prompt-file or --prompt-ids; without any of them, or with "-" for a
text, it is read from stdin. The newline at the end of a file or of stdin is not part of it.
"""

from __future__ import annotations

import json

from jlayer.app import options
from jlayer.app import picture as timeline
from jlayer.app.inputs import (
    argument_text,
    folder_of,
    name_of,
    read_stdin,
    read_text,
    without_line_end,
)
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
    "prompt_logprobs": (int, "the same for the tokens of the prompt"),
    "speculate": (
        str,
        "how tokens are guessed ahead, which changes no text: auto, off, lookup (in the text so "
        "far) or draft (default: auto)",
    ),
    "draft_tokens": (int, "the most guessed tokens in a forward pass (default: as many as pay)"),
    "seed": (int, "the same seed gives the same text on every machine"),
}
TEMPLATE, VARIABLE = "--chat-template", "--template-var"
MISSING = (
    "prompt: none given, and stdin is {found}; write it after MODEL, use -p TEXT or "
    "--prompt-file F, or pipe it in"
)
METAVARS = {int: "N", float: "X", str: "MODE"}


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("text", metavar="PROMPT", nargs="?", help="the text to continue")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the same, as an option")
    prompt.add_argument("--prompt-file", metavar="F", help="a UTF-8 file with the prompt")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the prompt as token ids")
    parser.add_argument(
        *("-n", "--max-tokens", "--max-new-tokens"),
        dest="max_new_tokens",
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
    chat.add_argument(TEMPLATE, metavar="F", help="a file with another template; implies --chat")
    chat.add_argument(
        VARIABLE,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a value that the template reads, such as enable_thinking=false, or tools or documents"
        " with a list; may be repeated; implies --chat",
    )
    chat.add_argument(
        "--show-prompt", action="store_true", help="print the prompt as the model gets it, and end"
    )
    options.add_run(parser)
    options.add_draft(parser)
    options.add_context(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)
    timeline.add_option(parser)
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="print more figures of the run at its end"
    )


def run(args) -> dict:
    timeline.check_file(args.timeline)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.json:
            found = f"{options.flag(name)}: they are shown in the JSON object only"
            raise UsageError(f"{found}; add --json")
    sampling = options.given(args, *SAMPLING, "max_new_tokens", "stop")
    _check(sampling)
    form = chat_form(args)
    prompt = read_prompt(args)
    if args.show_prompt:
        return show_prompt(args, prompt, form)
    run_options = {
        **(preset(args.preset) if args.preset else {}),
        **options.given(args, *options.RUN, "context", "draft", "follow_links"),
    }
    _check_draft(sampling, run_options)
    with opened(args.ref, offline=args.offline, **run_options) as model:
        check()
        decoding, _ = model.decoding(prompt, options=sampling, **form)
        with timeline.recorded(model, args.timeline, name_of(args.ref)):
            show = None if args.json else write_text
            return follow(model, decoding, show, verbose=args.verbose)


def _check(sampling):
    """What is wrong with these options alone is said before a file is opened."""
    from jlayer.engine.options import check_given

    check_given(sampling)


def _check_draft(sampling, run_options):
    from jlayer.engine.options import check_draft

    check_draft(sampling.get("speculate"), run_options.get("draft"), unused=True)


def chat_form(args) -> dict:
    """How a text becomes messages, and these a prompt: the options of `encode_prompts`."""
    system, path, template = args.system, args.chat_template, None
    if path is not None:
        template = read_text(path, option=TEMPLATE)
        if "{" not in template:
            raise UsageError(f"{TEMPLATE}: {path} holds no template: nothing in {{braces}}")
    variables = template_variables(args.template_var)
    if args.prompt_ids is not None and (path is not None or variables):
        option = VARIABLE if path is None else TEMPLATE
        raise UsageError(f"{option}: is for chats, and --prompt-ids go to the model as they are")
    return {
        "chat": args.chat or system is not None or template is not None or bool(variables),
        "system": None if system is None else argument_text(system, option="--system"),
        "chat_template": template,
        "chat_template_kwargs": variables or None,
    }


def template_variables(words: list[str]) -> dict:
    """NAME=JSON, as often as it is given -> values by name."""
    found = {}
    for word in words:
        name, equals, raw = argument_text(word, option=VARIABLE).partition("=")
        where = f"{VARIABLE} {name}" if equals else f"{VARIABLE}: found {word!r:.60}"
        if not equals or not name.isidentifier():
            raise UsageError(f"{where}: expected NAME=JSON, such as enable_thinking=false")
        if name in found:
            raise UsageError(f"{where}: given twice")
        try:
            found[name] = json.loads(raw, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: {raw!r:.60} is not JSON ({error}); expected true, false, a number, text "
                "in double quotes ('\"high\"'), a list or an object"
            ) from None
    return found


def _without_doubles(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def show_prompt(args, prompt, form) -> dict:
    """The prompt as text and ids, without opening the weights."""
    from jlayer.text.chat import chat_messages
    from jlayer.text.inputs import plain_variables
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

    folder = folder_of(args.ref, weights=Weights.NONE, offline=args.offline)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    if isinstance(prompt, list):
        text, ids = tokenizer.decode(prompt, skip_special_tokens=False), prompt
    else:
        variables = form.pop("chat_template_kwargs") or {}
        template = {"chat_template": form.pop("chat_template"), **plain_variables(variables)}
        messages = chat_messages(prompt, **form)
        if messages is None:
            text, ids = prompt, tokenizer.encode(prompt)
        else:
            text = tokenizer.render_chat(messages, **template)
            ids = tokenizer.encode_chat(messages, **template)
    if not args.json:
        print(text)
    return {"prompt": text, "prompt_ids": ids}


def read_prompt(args) -> str | list[int]:
    """The prompt as text or ids. Raises UsageError or StorageError."""
    if args.prompt_ids is not None:
        try:
            return [int(word) for word in args.prompt_ids.split(",")]
        except ValueError:
            raise UsageError(
                f"--prompt-ids: found {args.prompt_ids!r}, expected numbers such as 1,2,3"
            ) from None
    text = args.text if args.prompt is None else args.prompt
    if args.prompt_file is not None:
        text = read_text(args.prompt_file, option="--prompt-file")
    elif text is None or text == "-":
        text = read_stdin(missing=MISSING)
    else:
        return argument_text(text, option="--prompt")
    return without_line_end(text)
