"""The card of a trained adapter: its README.md, as Hugging Face shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from jlayer.tuning.adapter import AdapterConfig, State

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_WHITE = re.compile(r"\s+")


@dataclass(frozen=True)
class Training:
    """What was done. `base`: the model's id, or its folder, of which the card has the last name
    alone. `data`, `data_sha256`: the name of the file and its digest. `n_tokens`: those that were
    learned from, over all steps. `schedule`: of the learning rate, in words. `final_loss`: the mean
    loss a token of the last step, in nats. `perplexity`: of held-out examples, before and after;
    None without such. `versions`: package -> version."""

    base: str
    data: str
    data_sha256: str
    n_examples: int
    n_tokens: int
    n_steps: int
    learning_rate: float
    schedule: str
    seed: int
    final_loss: float
    perplexity: tuple[float, float] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card(training: Training, how: AdapterConfig, state: State) -> str:
    """The text of README.md."""
    base = _last_name(training.base)
    rows = [*_done(training), *_adapter(how, state), *_outcome(training)]
    versions = [
        f"- {_plain(name)} {_plain(version)}" for name, version in training.versions.items()
    ]
    lines = [
        *_front_matter(training.base),
        f"# An adapter for {_plain(base)}",
        "",
        "A low-rank adapter (LoRA) in PEFT's form, trained by `jlayer tune` with the base model's",
        "weights frozen.",
        "",
        *("| | |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *("## Use", ""),
        f"    jlayer generate {_plain(base)} --adapter path/to/this/folder -p '...'",
        "",
        'With PEFT: `PeftModel.from_pretrained(model, "path/to/this/folder")`.',
    ]
    if versions:
        lines += ["", "### Framework versions", "", *versions]
    return "\n".join(lines) + "\n"


def _front_matter(base):
    # The hub refuses a card whose base_model is no id.
    known = [f"base_model: {json.dumps(base)}"] if _is_hub_id(base) else []
    tags = ([f"base_model:adapter:{base}"] if known else []) + ["lora"]
    return [
        "---",
        *known,
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _done(training):
    yield "base model", f"`{_plain(_last_name(training.base))}`"
    yield "data", f"`{_plain(_last_name(training.data))}`"
    yield "SHA-256 of the data", f"`{training.data_sha256}`"
    yield "examples", f"{training.n_examples:,}"
    yield "tokens learned from", f"{training.n_tokens:,}"
    yield "steps", f"{training.n_steps:,}"
    yield "learning rate", f"{training.learning_rate:g}, {_plain(training.schedule)}"
    yield "seed", training.seed


def _adapter(how, state):
    ranks = sorted({len(parts["a"]) for parts in state.values()})
    n_numbers = sum(part.size for parts in state.values() for part in parts.values())
    ends = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in state)
    yield "rank", ", ".join(map(str, ranks))
    yield "alpha", f"{how.alpha:g}{' (rsLoRA)' if how.rslora else ''}"
    yield "matrices", f"{len(state):,}: {', '.join(f'`{end}`' for end in ends)}"
    yield "trained numbers", f"{n_numbers:,}"


def _outcome(training):
    yield "last loss", f"{training.final_loss:.4f} nats a token"
    if training.perplexity is not None:
        before, after = training.perplexity
        yield "held-out perplexity", f"{before:.4g} before, {after:.4g} after"


def _is_hub_id(base):
    return _HUB_ID.fullmatch(base) is not None and ".." not in base


def _last_name(path):
    """A hub's id as it is; of a path the last name: a card is published, folders of a machine are
    not."""
    return path if _is_hub_id(path) else path.rstrip("/").rpartition("/")[2]


def _plain(text):
    """Text from outside, in one cell of a table."""
    return _WHITE.sub(" ", text).replace("|", "\\|").replace("`", "'")
