"""Continue a text. The text goes to stdout while it grows; device, plan and timing go to stderr.

The prompt is PROMPT, -p, --prompt-file or --prompt-ids; without any of them, or with "-" for a
text, it is read from stdin. The newline at the end of a file or of stdin is not part of it.
"""

from __future__ import annotations

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
from jlayer.app.running import follow, write_text
from jlayer.app.sampling import add_sampling, check_draft_of, sampling_of
from jlayer.app.saving import add_saving, check_saving, saving
from jlayer.app.templates import TEMPLATE, VARIABLE, add_template, system_of, template_of
from jlayer.app.together import followed, opened_for
from jlayer.catalogue import preset
from jlayer.checkpoint.hub import Weights
from jlayer.errors import UsageError
from jlayer.interrupts import check

MISSING = (
    "prompt: none given, and stdin is {found}; write it after MODEL, use -p TEXT or "
    "--prompt-file F, or pipe it in"
)


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("text", metavar="PROMPT", nargs="?", help="the text to continue")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the same, as an option")
    prompt.add_argument("--prompt-file", metavar="F", help="a UTF-8 file with the prompt")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the prompt as token ids")
    add_sampling(parser, length=" (default: the model's, or 20)")
    parser.add_argument("--preset", metavar="NAME", help="options for a kind of machine, by name")
    chat = parser.add_argument_group("chat models")
    chat.add_argument("--chat", action="store_true", help="put the prompt in the model's format")
    chat.add_argument("--system", metavar="S", help="a system message before it; implies --chat")
    add_template(chat, implied="; implies --chat")
    chat.add_argument(
        "--show-prompt", action="store_true", help="print the prompt as the model gets it, and end"
    )
    add_saving(parser)
    options.add_run(parser)
    options.add_processes(parser)
    options.add_draft(parser)
    options.add_adapter(parser)
    options.add_context(parser)
    options.add_prompts(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)
    timeline.add_option(parser)
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="print more figures of the run at its end"
    )


def run(args) -> dict | None:
    timeline.check_file(args.timeline)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.json:
            found = f"{options.flag(name)}: they are shown in the JSON object only"
            raise UsageError(f"{found}; add --json")
    sampling = sampling_of(args)
    form = chat_form(args)
    if args.show_prompt and args.resume is None:
        return show_prompt(args, read_prompt(args), form)
    run_options = {
        **(preset(args.preset) if args.preset else {}),
        **options.given(
            args,
            *options.RUN,
            *options.PROCESSES,
            *options.PROMPTS,
            "context",
            "draft",
            "adapter",
            "follow_links",
        ),
    }
    check_draft_of(sampling, run_options)
    templates = [name for name in form if form[name]]
    check_saving(args, [*sampling, *templates], run_options)
    prompt = read_prompt(args) if args.resume is None else None
    if followed(args, run_options):
        return None
    with opened_for(args, run_options) as model:
        check()
        if args.resume is None:
            decoding, is_single = model.decoding(prompt, options=sampling, **form)
        else:
            session = model.load_session(args.resume, **sampling)
            decoding, is_single = session.decoding, session.is_single
        after = saving(args, decoding, is_single=is_single)
        with timeline.recorded(model, args.timeline, name_of(args.ref)):
            show = None if args.json else write_text
            return follow(model, decoding, show, after=after, verbose=args.verbose)


def chat_form(args) -> dict:
    """How a text becomes messages, and these a prompt: the options of `encode_prompts`."""
    form, system = template_of(args), system_of(args)
    given = [name for name, value in form.items() if value is not None]
    if args.prompt_ids is not None and given:
        option = TEMPLATE if "chat_template" in given else VARIABLE
        raise UsageError(f"{option}: is for chats, and --prompt-ids go to the model as they are")
    return {"chat": args.chat or system is not None or bool(given), "system": system, **form}


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
