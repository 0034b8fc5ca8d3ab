"""Talk with a model: answers appear as they grow, and a turn costs its new tokens alone.

At a terminal, /help shows the commands. Lines from a pipe are a message each, commands among them,
and only the answers go to stdout. With --json stdout holds one object at the end, with all messages
and figures, and the answers go to stderr.
"""

from __future__ import annotations

import sys

from jlayer.app import options
from jlayer.app.inputs import folder_of
from jlayer.app.running import describe
from jlayer.app.sampling import SAMPLING, add_sampling, check_draft_of, sampling_of
from jlayer.app.streams import is_terminal, tell
from jlayer.app.templates import TEMPLATE, add_template, system_of, template_of
from jlayer.app.together import followed, opened_for
from jlayer.catalogue import preset
from jlayer.checkpoint.hub import Weights
from jlayer.errors import UsageError

# A chat has one answer, shows it as it grows, and no figures of its tokens.
_LEFT_OUT = (
    *("num_return_sequences", "logprobs", "prompt_logprobs"),
    *("num_beams", "length_penalty", "early_stopping"),
)
NAMES = tuple(name for name in SAMPLING if name not in _LEFT_OUT)
HISTORY, LAST = "chat_history", "chat_last.json"  # files of the state folder
NO_TEMPLATE = (
    "{folder}: this model has no chat template, so it is none that one talks with; continue a text "
    f"with jlayer generate, or give a template in a file ({TEMPLATE} F)"
)


def add_arguments(parser):
    parser.add_argument("ref", metavar="MODEL", help=options.REF)
    parser.add_argument("--system", metavar="S", help="a system message before all others")
    add_sampling(
        parser,
        NAMES,
        length=" (default: the model's, or 2048; fewer where there is less room)",
    )
    parser.add_argument("--preset", metavar="NAME", help="options for a kind of machine, by name")
    add_template(parser)
    options.add_run(parser)
    options.add_processes(parser)
    options.add_draft(parser)
    options.add_adapter(parser)
    options.add_context(parser)
    options.add_prompts(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)


def run(args) -> dict | None:
    sampling = sampling_of(args, NAMES)
    form, system = template_of(args), system_of(args)
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
    template = _checked_template(args, form, system)
    if followed(args, run_options):
        return None
    with opened_for(args, run_options) as model:
        from jlayer.app.chat.history import state_path
        from jlayer.app.chat.page import Page
        from jlayer.app.chat.session import Session
        from jlayer.app.chat.turns import Speaker

        for line in (describe(model), *model.notes):
            tell(line)
        speaker = Speaker(model, options=sampling, template=template)
        source, page = _source(), Page(sys.stderr if args.json else sys.stdout)
        last = state_path(LAST) if source.is_terminal else None
        return Session(model, speaker, source, page, system=system, last_path=last).run()


def _checked_template(args, form, system) -> dict:
    """The options of the template, once a small chat was rendered: what is wrong with it is said
    before weights are fetched and opened. Raises UsageError or CheckpointError."""
    from jlayer.text.inputs import plain_variables
    from jlayer.text.tokenizer import NO_TOKENIZER, Tokenizer

    folder = folder_of(args.ref, weights=Weights.NONE, offline=args.offline)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER.format(folder=folder))
    given = form["chat_template"]
    if given is None and not tokenizer.chat_templates:
        raise UsageError(NO_TEMPLATE.format(folder=folder))
    template = plain_variables(form["chat_template_kwargs"])
    if given is not None:
        template["chat_template"] = given
    first = [] if system is None else [{"role": "system", "content": system}]
    tokenizer.render_chat([*first, {"role": "user", "content": "x"}], **template)
    return template


def _source():
    """What is read: a keyboard, or a pipe."""
    from jlayer.app.chat.reading import Keyboard, Pipe

    if not is_terminal(sys.stdin):
        return Pipe()
    from jlayer.app.chat.history import History, state_path

    history = History(state_path(HISTORY))
    if history.why_not is not None:
        tell(history.why_not)
    tell("/help shows the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    return Keyboard(history)
