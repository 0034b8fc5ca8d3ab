"""A model that is called as transformers' models are: the arguments of their `forward` that are
taken, the logits of whole prompts, and what `generate` gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jlayer.config import unknown_name
from jlayer.engine.answers import answer
from jlayer.engine.decoding import Decoding
from jlayer.engine.engine import Engine
from jlayer.engine.functions import taken
from jlayer.engine.ids import Row, as_id_lists, as_rows, encoded
from jlayer.engine.options import SamplingOptions
from jlayer.engine.stops import given_tokenizer
from jlayer.engine.unread import is_among, refusal
from jlayer.engine.vectors import check_assistant, rows_of_vectors
from jlayer.errors import UsageError
from jlayer.plan.shapes import RunShape
from jlayer.text.tokenizer import Tokenizer

# Argument -> values that ask for nothing besides logits; the rest is refused.
REFUSED = {
    "is_causal": (None, True),
    "logits_to_keep": (None, 0),  # 0 is all of them
    "num_logits_to_keep": (None, 0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "return_dict": (None, True),
    **dict.fromkeys(
        (
            *("cache", "cache_params", "cache_position", "labels", "seq_idx", "past_key_values"),
            *("position_ids", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"),
        ),
        (None,),
    ),
}
# What changes no logits: the cache that transformers would return, and what its Llama ignores.
HARMLESS = frozenset(("num_items_in_batch", "token_type_ids", "use_cache"))
TAKEN = ("input_ids", "attention_mask", "inputs_embeds")


@dataclass(frozen=True)
class Output:
    """What a call returns: float32 logits [B, T, V] on the host, as `.logits` or `[0]`."""

    logits: np.ndarray

    def __getitem__(self, name):
        return {"logits": self.logits, 0: self.logits}[name]


def check_called(options: Mapping) -> None:
    """Raises UsageError where an argument asks for what a call does not do here."""
    for name, value in options.items():
        if name in REFUSED:
            if not is_among(value, REFUSED[name]):
                raise UsageError(refusal(name, value))
        elif name not in HARMLESS:
            known = (*TAKEN, *REFUSED, *HARMLESS)
            raise UsageError(unknown_name("argument", name, known))


def check_one_prompt(input_ids, inputs_embeds, *, name: str = "input_ids") -> None:
    """Raises UsageError unless there are ids or embeddings, and not both. `name`: of the ids."""
    if input_ids is not None and inputs_embeds is not None:
        raise UsageError(f"inputs_embeds: {name} was given too; leave one out")
    if input_ids is None and inputs_embeds is None:
        raise UsageError(f"{name}: none given; give ids, or what a tokenizer gives")


def all_logits(
    engine: Engine,
    input_ids=None,
    attention_mask=None,
    *,
    inputs_embeds=None,
    begin: int | None = None,
    adapter: str | None = None,
) -> np.ndarray:
    """Logits of every position: ids [B, T] or [T], or embeddings [B, T, D] -> float32 [B, T, V] on
    the host. `begin`: the model's beginning token, for the message. `adapter`: the name of one.
    Raises UsageError."""
    given, mask = encoded(input_ids, attention_mask)
    check_one_prompt(given, inputs_embeds)
    if inputs_embeds is None:
        rows = [Row(ids, ids) for ids in as_id_lists(given)]
        masked = rows if mask is None else as_rows([row.ids for row in rows], mask)
    else:
        masked = rows = vectors_of(engine, inputs_embeds, mask)
    if any(row.padding.n_tokens for row in masked):
        raise UsageError("logits: found padding in attention_mask; give rows of one length")
    lengths = [len(row.ids) for row in rows]
    if len(set(lengths)) > 1:
        raise UsageError(f"input_ids: rows of lengths {lengths}, expected equal ones")
    _check_rows(engine, rows, begin=begin)
    forward = engine.start(_shape(rows), adapter=adapter)
    try:
        ids, vectors = [row.ids for row in rows], [row.vectors for row in rows]
        return forward.sweep(ids, [0] * len(ids), all_logits=True, vectors=vectors)
    finally:
        forward.close()


def vectors_of(engine: Engine, inputs_embeds, attention_mask=None) -> list[Row]:
    """Embeddings [B, T, D] as prompts of this model: see `rows_of_vectors`."""
    sizes = {"width": engine.cfg.hidden_size, "dtype": engine.dtype}
    return rows_of_vectors(inputs_embeds, attention_mask, **sizes)


def logits_of_rows(
    engine: Engine, rows: Sequence[Row], *, begin: int | None = None
) -> list[np.ndarray]:
    """Logits of every position of prompts of any lengths, in one pass: float32 [T, V] of each.
    `begin`: as of `all_logits`. Raises UsageError, and what a forward pass raises."""
    _check_rows(engine, rows, begin=begin)
    lengths = [len(row.ids) for row in rows]
    forward = engine.start(_shape(rows))
    try:
        whole = _Whole(sum(lengths), engine.cfg.vocab_size)
        ids, vectors = [row.ids for row in rows], [row.vectors for row in rows]
        forward.score(ids, whole, vectors=vectors)
    finally:
        forward.close()
    return np.split(whole.logits, np.cumsum(lengths)[:-1])


def _check_rows(engine, rows, *, begin):
    for row in rows:
        if row.vectors is None:
            engine.check_ids(row.ids, begin=begin)
    engine.check_length(max(len(row.ids) for row in rows))


def _shape(rows):
    longest = max(len(row.ids) for row in rows)
    n_vectors = sum(len(row.ids) for row in rows if row.vectors is not None)
    how = {"all_logits": True, "single_array": True, "vectors": n_vectors}
    return RunShape(len(rows), longest, longest, **how)


class _Whole:
    """All logits of a pass; see `Forward.score`."""

    def __init__(self, n_rows, vocab_size):
        self.logits = np.empty((n_rows, vocab_size), np.float32)

    def add(self, output, places, row):
        self.logits[places, row : row + output.shape[1]] = output

    @property
    def are_finite(self):
        return bool(np.isfinite(self.logits).all())


class Called(Protocol):
    """What `generate_ids` needs of a model: see `Model`."""

    engine: Engine

    @property
    def text(self) -> Tokenizer | None: ...

    def sampling_options(
        self, options: dict, *, generation_config=None, implied: bool = True
    ) -> SamplingOptions: ...


def generate_ids(
    model: Called,
    inputs=None,
    *,
    input_ids=None,
    inputs_embeds=None,
    attention_mask=None,
    generation_config=None,
    streamer=None,
    tokenizer=None,
    **options,
):
    """transformers' `generate`: ids [B, T] -> prompt and new ids, in the type that was given.

    The ids may also be what a tokenizer gives, a mapping with both; without any, the text starts
    from the model's beginning token. `attention_mask` marks padding with 0. Without one, the pad
    token is padding, unless it also ends texts (as in transformers). `streamer`: any object with
    `put` and `end`, for one sequence; it gets the prompt first, as in transformers. `tokenizer`:
    transformers', to look for stop strings with; the model's own where it is not given.

    `inputs_embeds`: embeddings [B, T, D] in place of ids -> the new ids alone, in an array of the
    same library. Options see no ids of such a prompt, as in transformers.

    With `do_sample` and no `seed`, each row draws with a seed of its own, and torch's generator has
    no say.
    """
    if inputs is not None and input_ids is not None:
        raise UsageError("inputs: input_ids was given too; leave one out")
    if inputs_embeds is not None:
        check_one_prompt(input_ids if inputs is None else inputs, inputs_embeds)
        check_assistant(options.get("assistant_model"))
    functions, options = taken(options)
    sampling = model.sampling_options(options, generation_config=generation_config, implied=False)
    given, mask = encoded(input_ids if inputs is None else inputs, attention_mask)
    if inputs_embeds is not None:
        given, rows = inputs_embeds, vectors_of(model.engine, inputs_embeds, mask)
    else:
        if given is None:
            given = _beginning(sampling.bos_token_id)
        rows = as_rows(given, mask, pad=sampling.padding_id)
    text = (given_tokenizer(tokenizer) or model.text) if sampling.stop else None
    decoding = Decoding(model.engine, rows, sampling, stop_text=text, functions=functions)
    try:
        drive(decoding, rows, streamer)
    finally:
        decoding.close()
    return answer(decoding, given)


def _beginning(token):
    """The prompt where none is given. Raises UsageError."""
    if token is None:
        raise UsageError("inputs: none given, and the model has no bos_token_id to start from")
    return np.array([[token]])


def drive(decoding: Decoding, rows: Sequence[Row], streamer) -> None:
    """Runs a decoding to its end; `streamer` gets the prompt, and new ids as they come."""
    if streamer is None:
        for _ in decoding:
            pass
        return
    if decoding.options.searches:
        raise UsageError(
            f"streamer: found with num_beams {decoding.options.num_beams}, which knows its text at "
            "the end alone; leave one of them out"
        )
    if len(decoding.lanes) > 1:
        raise UsageError("streamer: takes one sequence at a time; leave it out for a batch")
    streamer.put(np.array([rows[0].given], np.int64))
    for (step,) in decoding:
        streamer.put(np.array(step.token_ids))
    streamer.end()
