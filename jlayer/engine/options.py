"""Generation options: names, defaults, what each may be, and who of user and makers sets it.

Names and defaults are those of transformers' GenerationConfig. What is not acted on is listed in
`unread`. How options act on logits is left to `sample`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from jlayer.config import unknown_name
from jlayer.engine.ranges import RANGES, checked
from jlayer.engine.unread import (
    FILTERS,
    HARMLESS,
    REFUSED,
    Run,
    is_harmless,
    is_read,
    published_refusal,
    refusal,
)
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.sizes import counted

DEFAULT_NEW_TOKENS = 20  # transformers', where neither the user nor the published file sets it

# The name of an option in transformers -> its name here.
ALIASES = {"stop_strings": "stop"}

# Options that transformers does not know. It reads past them in a published file, and so does
# jlayer: `seed` in a config.json may say how the weights were made, and not what to draw.
OWN = (
    *("presence_penalty", "frequency_penalty", "logit_bias", "stop", "seed", "logprobs"),
    *("prompt_logprobs", "prompt_logprobs_from", "speculate", "draft_tokens", "adapter"),
)
_WARPERS = ("temperature", *FILTERS)
# None from a user turns an option off, which for these is not the default.
_NONE_MEANS = {"top_k": 0, "speculate": "off"}
_LENGTHS = ("max_new_tokens", "max_length")
# Where the user sets the first, the published file's second has nothing to say.
_INSTEAD = (
    ("max_length", "max_new_tokens"),
    ("max_new_tokens", "max_length"),
    ("min_length", "min_new_tokens"),
)


@dataclass(frozen=True)
class SamplingOptions:
    """How ids are chosen and when a sequence ends; every field is checked when the object is made.

    temperature: 0 is greedy. top_k 0, top_p and typical_p 1, min_p None, cutoffs 0: off. seed: None
    until `seeded` draws it. sequence_bias: on the last of ids that follow one another.
    bad_words_ids: texts have none of these.
    logprobs: None, or how many of the likeliest tokens to report beside the chosen one.
    prompt_logprobs: the same for the prompt's tokens, of which prompt_logprobs_from is the first
    that is reported, counted from 0; with max_new_tokens 0 nothing else is computed.
    min_new_tokens, where not None, stands in for min_length, as in transformers.
    num_beams: above 1 a beam search; length_penalty: the power of the length that a score is
    divided by; early_stopping: see `beams`. renormalize_logits: scores are log-probabilities again
    after the options.
    speculate: how tokens are guessed ahead, one of ranges.SPECULATE; no text depends on it.
    draft_tokens: the most of these in a forward pass; None: as many as pay.
    adapter: the name of the one to compute with, of those that the model was opened with; None: the
    model as it is under its own name.
    length_from: the file that set the most tokens, None where the user did.
    Raises UsageError, with the option, the value and the range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int | None = None
    min_length: int = 0
    max_new_tokens: int | None = None
    max_length: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop: tuple[str, ...] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    renormalize_logits: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    speculate: str = "auto"
    draft_tokens: int | None = None
    adapter: str | None = None
    length_from: str | None = None

    def __post_init__(self):
        for name in RANGES:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.searches:
            self._check_beams()
        elif self.num_return_sequences > 1 and self.is_greedy:
            found = (
                f"num_return_sequences: found {self.num_return_sequences} with greedy decoding, "
                "which gives one; "
            )
            raise UsageError(
                f"{found}set do_sample=True and a temperature above 0, or num_beams",
                command_line=f"{found}give --temperature above 0, or --num-beams",
            )
        _check_guesses(self.speculate, self.draft_tokens)

    def _check_beams(self):
        if self.num_return_sequences > self.num_beams:
            raise UsageError(
                f"num_return_sequences: found {self.num_return_sequences} with num_beams "
                f"{self.num_beams}, expected at most as many"
            )
        for name in self.guessing:
            raise UsageError(
                f"{name}: found {getattr(self, name)!r} with num_beams {self.num_beams}, whose "
                "beams take the place of guesses; leave one of them out"
            )

    @classmethod
    def from_mapping(
        cls,
        options: Mapping,
        *,
        generation_config: Mapping | None = None,
        vocab_size: int | None = None,
        sampling_implied: bool = False,
        where: str = "generation_config.json",
    ) -> SamplingOptions:
        """The user's `options`, then those published with the model, then transformers' defaults.

        A user's None turns an option off, as in transformers. `generation_config` may be a whole
        config.json; keys that are no option are passed over. `sampling_implied`: a temperature,
        top_k, top_p or min_p from the user turns do_sample on. (So it is in jlayer's own interface;
        users of transformers set do_sample themselves.)
        Raises UsageError (an option of the user's, with the closest known name), CheckpointError
        (one in the file `where`) or UnsupportedModelError (one in it that is not implemented).
        """
        given = _given(options)
        if sampling_implied and "do_sample" not in given and not given.keys().isdisjoint(_WARPERS):
            given["do_sample"] = True
        published = _published(generation_config or {}, where=where, options=options, given=given)
        eos_ids = published.get("eos_token_id", ())
        if vocab_size is not None and eos_ids and max(eos_ids) >= vocab_size:
            raise CheckpointError(f"{where}: {_outside('eos_token_id', max(eos_ids), vocab_size)}")
        length_from = None if published.keys().isdisjoint(_LENGTHS) else where
        found = cls(**{**published, **given}, length_from=length_from)
        run = Run(
            found.do_sample,
            contrasts=not found.do_sample and not found.searches,
            searches=found.searches,
            gives_details=found.return_dict_in_generate,
        )
        for name, value in options.items():
            if name in REFUSED and not is_harmless(name, value, run):
                raise UsageError(refusal(name, value))
        if vocab_size is not None:
            found.check(vocab_size)
        return found

    def check(self, vocab_size: int) -> None:
        """Raises UsageError where an id is outside the vocabulary."""
        named = {
            "eos_token_id": self.eos_token_id,
            "logit_bias": [token for token, _ in self.logit_bias],
            "sequence_bias": [token for ids, _ in self.sequence_bias for token in ids],
            "bad_words_ids": [token for ids in self.bad_words_ids for token in ids],
        }
        for name, ids in named.items():
            if ids and max(ids) >= vocab_size:
                raise UsageError(_outside(name, max(ids), vocab_size))

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    @property
    def searches(self) -> bool:
        """Whether it is a beam search."""
        return self.num_beams > 1

    @property
    def n_lanes(self) -> int:
        """Sequences of a prompt that ride in a forward pass."""
        return self.num_beams if self.searches else self.num_return_sequences

    @property
    def guessing(self) -> list[str]:
        """The options that ask for guesses in so many words."""
        asked = {
            "speculate": self.speculate in ("lookup", "draft"),
            "draft_tokens": self.draft_tokens is not None,
        }
        return [name for name, is_asked in asked.items() if is_asked]

    @property
    def keeps_scores(self) -> bool:
        """Whether the scores of all tokens are told, which takes 4 bytes for each of them."""
        return self.return_dict_in_generate and self.output_scores

    @property
    def keeps_logits(self) -> bool:
        return self.return_dict_in_generate and self.output_logits

    def n_computed(self, n_prompt: int) -> int:
        """So many tokens of a prompt are computed: not the last one, where it is only scored."""
        only_scores = self.prompt_logprobs is not None and self.max_new_tokens == 0
        return n_prompt - only_scores

    @property
    def padding_id(self) -> int | None:
        """The token that is padding where no mask says so, by transformers' rule: the pad token,
        unless it may also be what ended a text."""
        return None if self.pad_token_id in self.eos_token_id else self.pad_token_id

    @property
    def filling_id(self) -> int:
        """What rows are filled up with: the pad token, else the first ending, else 0."""
        known = (self.pad_token_id, *self.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def seeded(self) -> SamplingOptions:
        """These options with a seed, which the system draws where none is given."""
        # 53 bits, so that a seed survives JSON readers that know only float64.
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(53))

    @property
    def lengths_are_published(self) -> bool:
        """Whether the most tokens are the makers' or the default, and not the user's choice."""
        return self.length_from is not None or (self.max_new_tokens, self.max_length) == (
            None,
            None,
        )

    def new_tokens_limit(
        self, n_prompt: int, *, context: int | None = None, width: int | None = None
    ) -> int:
        """How many tokens may follow: max_new_tokens, else what max_length leaves, else 20.

        `width`: the prompt's tokens with its padding, which max_length counts too, as in
        transformers. What the user did not ask for is cut to fit the `context`. Raises UsageError,
        with both figures, where what the user asked for does not fit it, or where max_length or the
        context leave no room for a single token.
        """
        width = n_prompt if width is None else width
        room = math.inf if context is None else max(0, context - n_prompt)
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
            asked = f"max_new_tokens: {counted(n_prompt, 'prompt token')} + "
            asked += f"{wanted} new ones"
        elif self.max_length is not None:
            wanted, asked = self.max_length - width, f"max_length: {self.max_length} tokens"
        else:
            wanted, asked = DEFAULT_NEW_TOKENS, None
        if wanted <= 0 and self.max_new_tokens is None:
            origin = f"{self.length_from}: " if self.length_from else ""
            raise UsageError(
                f"{origin}max_length: found {self.max_length}, and the prompt has {width} tokens "
                "already; set max_new_tokens (-n), which counts new tokens alone"
            )
        if wanted <= room:
            return wanted
        if room == 0:
            raise UsageError(
                f"prompt: its {n_prompt} tokens fill the context of {context}, so none can follow; "
                "shorten it, or raise the context if it was lowered"
            )
        if not self.lengths_are_published:
            raise UsageError(
                f"{asked}, but the context is {context}; ask for at most {room} new ones"
            )
        return room


def check_given(options: Mapping) -> None:
    """Checks what a user sets by itself, before the model and its published options are there.
    Raises UsageError."""
    given = _given(options)
    for name, value in given.items():
        checked(name, value)
    _check_guesses(given.get("speculate"), given.get("draft_tokens"))
    run = Run(
        searches=given.get("num_beams", 1) > 1,
        gives_details=bool(options.get("return_dict_in_generate")),
    )
    for name, value in options.items():
        if name in REFUSED and not is_harmless(name, value, run):
            raise UsageError(refusal(name, value))


def _check_guesses(speculate, draft_tokens):
    if speculate == "off" and draft_tokens is not None:
        raise UsageError(
            f"draft_tokens: found {draft_tokens}, but speculate is 'off', which guesses none; "
            "leave one of them out"
        )


def check_draft(speculate: str | None, draft: str | None, *, unused: bool = False) -> None:
    """Raises UsageError where an option asks for a draft model that is not there; with `unused`,
    also where one is given that the run would have loaded for nothing."""
    if speculate == "draft" and draft is None:
        found = "speculate: found 'draft', but there is no draft model"
        raise UsageError(
            f"{found}; open the model with draft=FOLDER", command_line=f"{found}; give --draft REF"
        )
    if unused and draft is not None and speculate in ("off", "lookup"):
        raise UsageError(
            f"draft: found {draft}, but speculate is {speculate!r}, which uses no draft model; "
            "leave one of them out"
        )


def option_names() -> tuple[str, ...]:
    """The names that `SamplingOptions.from_mapping` acts on, those of transformers included."""
    return (*RANGES, *ALIASES)


def is_option(name: str) -> bool:
    """Whether `from_mapping` knows a name, be it to act on, to pass over or to refuse."""
    return name in option_names() or name in REFUSED or name in HARMLESS


def configured(generation_config) -> dict:
    """The options that transformers' GenerationConfig, or a mapping in its place, sets.

    What is None there is not set, and what transformers does not know it reads past.
    """
    if generation_config is None:
        return {}
    if hasattr(generation_config, "to_dict"):
        generation_config = generation_config.to_dict()
    if not isinstance(generation_config, Mapping):
        found = type(generation_config).__name__
        raise UsageError(f"generation_config: found {found}, expected a GenerationConfig or a dict")
    return {
        name: value
        for name, value in generation_config.items()
        if value is not None and name not in OWN and is_option(name)
    }


def _given(options):
    """The user's options under our names; None means off."""
    defaults = {field.name: field.default for field in fields(SamplingOptions)} | _NONE_MEANS
    found = {}
    for name, value in options.items():
        ours = ALIASES.get(name, name)
        if ours in RANGES:
            if ours in found:
                raise UsageError(f"{name}: {ours} is the same option and was given too; keep one")
            found[ours] = defaults[ours] if value is None else value
        elif not is_option(name):
            raise UsageError(unknown_name("option", name, option_names()))
    return found


def _published(generation_config, *, where, options, given):
    """The options of a published file that this run reads and the user does not overrule, checked
    here so that the error names the file."""
    overruled = {ALIASES.get(name, name) for name in options}
    named = ((ALIASES.get(name, name), name, value) for name, value in generation_config.items())
    found = {
        ours: value
        for ours, name, value in named
        if name not in OWN and ours not in overruled and value is not None
    }
    for one, other in _INSTEAD:
        if given.get(one) is not None:
            found.pop(other, None)

    def decides(name, otherwise):
        if name in given or name not in found:
            return given.get(name, otherwise)
        return checked(name, found[name], where=where)

    do_sample, searches = decides("do_sample", False), decides("num_beams", 1) > 1
    run = Run(
        samples=do_sample and decides("temperature", 1.0) != 0,
        contrasts=not do_sample and not searches,
        searches=searches,
        gives_details=decides("return_dict_in_generate", False),
    )
    read = {name: value for name, value in found.items() if is_read(name, run)}
    for name, value in read.items():
        if name in REFUSED and not is_harmless(name, value, run):
            found = f"{where}: {published_refusal(name, value)}"
            raise UnsupportedModelError(
                f"{found}, or overrule it in Python with {name}=None", command_line=found
            )
    found = {name: checked(name, read[name], where=where) for name in read if name in RANGES}
    if found.get("max_new_tokens") == 0:
        raise CheckpointError(
            f"{where}: max_new_tokens: found 0, expected an integer from 1 up; "
            "overrule it with max_new_tokens (-n)"
        )
    return found


def _outside(name, token, vocab_size):
    return f"{name}: found id {token}, expected ids below the vocabulary of {vocab_size}"
