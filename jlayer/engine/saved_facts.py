"""What a saved run says of itself, checked before any of it is used: the digest beside it tells of
damage, and not of who has written it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jlayer.engine.ranges import MAX_SEED

_LARGE = 1 << 31


def check_facts(facts: Mapping, *, vocab_size: int) -> None:
    """Raises ValueError, LookupError or TypeError where these are not of a run that was saved, of a
    model with so many tokens."""
    options, rows, lanes = facts["options"], facts["rows"], facts["lanes"]
    _expect(type(facts["is_single"]) is bool, "is_single")
    _expect(isinstance(options, dict) and options["num_beams"] == 1, "options")
    _expect(isinstance(rows, list) and rows, "rows")
    each = options["num_return_sequences"]
    _expect(isinstance(lanes, list) and len(lanes) == len(rows) * each, "lanes")
    for row in rows:
        _check_row(row, vocab_size)
    for number, lane in enumerate(lanes):
        row = None if number % each else rows[number // each]
        _check_lane(lane, options, vocab_size, row=row)


def check_places(places: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
    """The same of where the entries of texts of so many tokens are among all that are there."""
    for place, length in zip(places, lengths, strict=True):
        is_one = place.dtype == np.int32 and place.ndim == 1 and 0 < len(place) < length
        _expect(is_one and len(np.unique(place)) == len(place), "a table")
    found = np.unique(np.concatenate(places))
    _expect(np.array_equal(found, np.arange(len(found))), "a table")


def _check_row(row, vocab_size):
    given, ids, (n_padding, n_first) = row["given"], row["ids"], row["padding"]
    _expect(_are_ids(ids, vocab_size) and ids, "ids")
    _expect(_are_ids(given, _LARGE) and len(given) == len(ids) + n_padding, "given")
    _expect(_is_id(n_padding, _LARGE) and _is_id(n_first, n_padding + 1), "padding")
    _expect(row["scored_from"] is None or _is_id(row["scored_from"], _LARGE), "scored_from")


def _check_lane(lane, options, vocab_size, *, row):
    """`row`: the prompt, of its first text."""
    tokens, seed, logprobs = lane["tokens"], lane["seed"], lane["logprobs"]
    _expect(_is_id(lane["limit"], _LARGE), "limit")
    _expect(_are_ids(tokens, vocab_size) and len(tokens) <= lane["limit"], "tokens")
    is_greedy = not options["do_sample"] or options["temperature"] == 0
    _expect(_is_id(seed, MAX_SEED + 1) or (seed is None and is_greedy), "seed")
    _expect(type(lane["has_entries"]) is bool, "has_entries")
    _expect((logprobs is None) == (options["logprobs"] is None), "logprobs")
    if logprobs is not None:
        _expect(len(logprobs) == len(tokens), "logprobs")
        for logprob, top in logprobs:
            _check_scores(logprob, top, vocab_size)
    if (scores := lane["prompt_scores"]) is None:
        return
    is_asked = row is not None and options["prompt_logprobs"] is not None
    _expect(is_asked and len(scores) == len(row["ids"]), "prompt_scores")
    for token, logprob, top in filter(None, scores):
        _expect(_is_id(token, vocab_size), "prompt_scores")
        _check_scores(logprob, top, vocab_size)


def _check_scores(logprob, top, vocab_size):
    _expect(isinstance(logprob, float), "logprobs")
    for token, likely in top:
        _expect(_is_id(token, vocab_size) and isinstance(likely, float), "logprobs")


def _are_ids(found, most):
    return isinstance(found, list) and all(_is_id(token, most) for token in found)


def _is_id(value, most):
    return type(value) is int and 0 <= value < most


def _expect(is_so, what):
    if not is_so:
        raise ValueError(f"{what}: of no run that was saved")
