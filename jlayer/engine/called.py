"""A model that is called as transformers' models are: the arguments of their `forward` that are
taken, the logits of whole prompts, and what `generate` gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jlayer.config import unknown_name
from jlayer.engine.decoding import Decoding
from jlayer.engine.engine import Engine
from jlayer.engine.ids import Row, as_id_lists, as_rows, encoded
from jlayer.engine.unread import is_among, refusal
from jlayer.errors import UsageError
from jlayer.plan.shapes import RunShape

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
            *("cache", "cache_params", "cache_position", "inputs_embeds", "labels", "seq_idx"),
            *("past_key_values", "position_ids", "cu_seq_lens_k", "cu_seq_lens_q"),
            *("max_length_k", "max_length_q"),
        ),
        (None,),
    ),
}
# What changes no logits: the cache that transformers would return, and what its Llama ignores.
HARMLESS = frozenset(("num_items_in_batch", "token_type_ids", "use_cache"))
TAKEN = ("input_ids", "attention_mask")


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


def all_logits(
    engine: Engine,
    input_ids,
    attention_mask=None,
    *,
    begin: int | None = None,
    adapter: str | None = None,
) -> np.ndarray:
    """Logits of every position: ids [B, T] or [T] -> float32 [B, T, V] on the host. `begin`: the
    model's beginning token, for the message. `adapter`: the name of one. Raises UsageError."""
    given, mask = encoded(input_ids, attention_mask)
    ids = as_id_lists(given)
    if mask is not None and any(row.padding.n_tokens for row in as_rows(ids, mask)):
        raise UsageError("logits: found padding in attention_mask; give rows of one length")
    lengths = [len(row) for row in ids]
    if len(set(lengths)) > 1:
        raise UsageError(f"input_ids: rows of lengths {lengths}, expected equal ones")
    for row in ids:
        engine.check_ids(row, begin=begin)
    engine.check_length(lengths[0])
    forward = engine.start(
        RunShape(len(ids), lengths[0], lengths[0], all_logits=True, single_array=True),
        adapter=adapter,
    )
    try:
        return forward.sweep(ids, [0] * len(ids), all_logits=True)
    finally:
        forward.close()


def logits_of_rows(
    engine: Engine, rows: Sequence[Sequence[int]], *, begin: int | None = None
) -> list[np.ndarray]:
    """Logits of every position of prompts of any lengths, in one pass: float32 [T, V] of each.
    `begin`: as of `all_logits`. Raises UsageError, and what a forward pass raises."""
    ids = [list(row) for row in rows]
    for row in ids:
        engine.check_ids(row, begin=begin)
    longest = max(map(len, ids))
    engine.check_length(longest)
    shape = RunShape(len(ids), longest, longest, all_logits=True, single_array=True)
    forward = engine.start(shape)
    try:
        whole = _Whole(sum(map(len, ids)), engine.cfg.vocab_size)
        forward.score(ids, whole)
    finally:
        forward.close()
    ends = np.cumsum([len(row) for row in ids])
    return np.split(whole.logits, ends[:-1])


class _Whole:
    """All logits of a pass; see `Forward.score`."""

    def __init__(self, n_rows, vocab_size):
        self.logits = np.empty((n_rows, vocab_size), np.float32)

    def add(self, output, places, row):
        self.logits[places, row : row + output.shape[1]] = output

    @property
    def are_finite(self):
        return bool(np.isfinite(self.logits).all())


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
    streamer.put(np.array([rows[0].given]))
    for (step,) in decoding:
        streamer.put(np.array(step.token_ids))
    streamer.end()
