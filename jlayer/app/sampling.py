"""The options that say how tokens are drawn and when a text ends, for the verbs that generate."""

from __future__ import annotations

import argparse

from jlayer.app import options

# option -> (type, what --help says); an option that is not given keeps the model's own default
SAMPLING = {
    "temperature": (
        float,
        "divide the logits by this; 0 is greedy (default: as published, or greedy)",
    ),
    "top_p": (float, "sample from the likeliest tokens that together reach this probability"),
    "top_k": (int, "sample from this many of the likeliest tokens"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest one's probability"),
    "typical_p": (float, "sample from the most typical tokens that reach this probability"),
    "epsilon_cutoff": (float, "drop tokens less likely than this"),
    "eta_cutoff": (float, "the same, with a lower bound where many tokens are about as likely"),
    "repetition_penalty": (float, "divide the score of tokens that occurred before; 1 is off"),
    "presence_penalty": (float, "subtract from the score of new tokens that occurred; 0 is off"),
    "frequency_penalty": (float, "the same, for each time a token occurred; 0 is off"),
    "no_repeat_ngram_size": (int, "never repeat a sequence of this many tokens"),
    "min_new_tokens": (int, "do not end before this many new tokens"),
    "num_return_sequences": (int, "the number of texts, each sampled with its own noise"),
    "num_beams": (int, "search with this many beams, which all ride in one forward pass"),
    "length_penalty": (float, "of beams: the power of the length that a score is divided by"),
    "early_stopping": (str, "of beams: true ends once enough texts have ended; false, or never"),
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
METAVARS = {int: "N", float: "X", str: "MODE"}


def add_sampling(parser: argparse.ArgumentParser, names=tuple(SAMPLING), *, length: str) -> None:
    """Adds -n, the options of these names, and --stop. `length`: the default of -n in words."""
    parser.add_argument(
        *("-n", "--max-tokens", "--max-new-tokens"),
        dest="max_new_tokens",
        type=int,
        metavar="N",
        help=f"the most new tokens{length}",
    )
    for name in names:
        kind, line = SAMPLING[name]
        parser.add_argument(options.flag(name), type=kind, metavar=METAVARS[kind], help=line)
    parser.add_argument(
        "--stop", action="append", metavar="S", help="end before this text; may be repeated"
    )


def sampling_of(args: argparse.Namespace, names=tuple(SAMPLING)) -> dict:
    """The options that are given. What is wrong with them alone is said before a file is opened.
    Raises UsageError."""
    from jlayer.engine.options import check_given

    found = options.given(args, *names, "max_new_tokens", "stop")
    check_given(found)
    return found


def check_draft_of(sampling: dict, run_options: dict) -> None:
    """Raises UsageError where --speculate and --draft do not go together."""
    from jlayer.engine.options import check_draft

    check_draft(sampling.get("speculate"), run_options.get("draft"), unused=True)
