"""What `model.generate` gives back: ids in the type that came in, or an object with these and what
else was asked for, as transformers has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from jlayer.engine.arrays import as_kind
from jlayer.engine.beaming import Beams
from jlayer.engine.decoding import Decoding
from jlayer.engine.ids import filled, like


@dataclass(frozen=True)
class Sequences:
    """What `generate` returns with return_dict_in_generate. None is what was not asked for.

    `sequences`: ids [B, T] of prompt and answer. `scores`, `logits`: for each new token float32
    [rows, V] after and before all options; NaN in rows that had ended. `sequences_scores`: of beams
    [B]. `beam_indices` [B, new tokens]: the row of `scores` that each token was taken from, -1
    where a text has ended.
    """

    sequences: object
    sequences_scores: object = None
    scores: tuple | None = None
    logits: tuple | None = None
    beam_indices: object = None

    def keys(self) -> tuple[str, ...]:
        """Those that are there, in order."""
        names = (field.name for field in fields(self))
        return tuple(name for name in names if getattr(self, name) is not None)

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, name):
        return getattr(self, name) if isinstance(name, str) else self.to_tuple()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


def answer(decoding: Decoding, given) -> object:
    """The ids of all texts with their prompts, as `given` was; the new ones alone of a prompt of
    embeddings. Or `Sequences`."""
    options, lanes = decoding.options, decoding.lanes
    whole = [lane.row.given + lane.token_ids for lane in lanes]
    if lanes[0].row.vectors is None:
        sequences = like(given, whole, _filling(options))
    else:
        sequences = as_kind(given, filled(whole, _filling(options)))
    if not options.return_dict_in_generate:
        return sequences
    told = {}
    if options.searches:
        told = _of_beams([lane.joint for lane in lanes[:: options.num_return_sequences]], options)
    else:
        for name in ("scores", "logits"):
            if getattr(options, f"output_{name}"):
                told[name] = _of_rows([[getattr(c, name) for c in lane.choices] for lane in lanes])
    kind = {name: as_kind(given, value) for name, value in told.items()}
    return Sequences(sequences, **kind)


def _filling(options):
    """What rows are filled up with. That of beams is as transformers has it: there a pad token 0
    is none, and without an end it is -1."""
    if not options.searches:
        return options.filling_id
    return (options.pad_token_id or options.eos_token_id[0]) if options.eos_token_id else -1


def _of_rows(rows):
    """[B][tokens] of float32 [V] -> of each token float32 [B, V]."""
    width = next((len(one) for row in rows for one in row), 0)
    ended = np.full(width, np.nan, np.float32)
    longest = max(map(len, rows))
    return tuple(
        np.stack([row[step] if step < len(row) else ended for row in rows])
        for step in range(longest)
    )


def _of_beams(searches: list[Beams | None], options):
    """What is told of the searches of all prompts; None: of one that had no token to find."""
    found, n, n_shown = {}, options.num_beams, options.num_return_sequences
    if any(search is None for search in searches):
        return found
    best = [beam for search in searches for beam in search.search.ended[:n_shown]]
    if options.output_scores:
        found["sequences_scores"] = np.array([beam.score for beam in best], np.float32)
    for place, name in enumerate(("logits", "scores")):
        if getattr(options, f"output_{name}"):
            found[name] = _of_rows(
                [[step[place][b] for step in one.told] for one in searches for b in range(n)]
            )
    longest = max((len(beam.parents) for beam in best if beam.has_ended), default=0)
    indices = np.full((len(best), longest), -1, np.int32)
    for row, beam in enumerate(best):
        first = n * (row // n_shown)
        if beam.has_ended:
            indices[row, : len(beam.parents)] = [first + parent for parent in beam.parents]
    found["beam_indices"] = indices
    return found
