"""The shape of a run of prompts: how many rows ride, and how many cache entries they take, where
those that begin alike share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jlayer.engine.hidden import Pooled
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.riders import LEAST_SHARED, n_alike
from jlayer.engine.scores import first_scored
from jlayer.families.registry import has_state, windows_of
from jlayer.plan.shapes import PackedRows, RunShape
from jlayer.spec import ModelConfig


def shape_of(
    cfg: ModelConfig,
    rows: Sequence[Row],
    limits: Sequence[int],
    options: SamplingOptions,
    *,
    nodes: int = 0,
) -> RunShape:
    """The shape of a run of these prompts, with at most so many new tokens each, and `nodes`
    guesses in a forward pass.

    Sequences of one prompt share its entries, but for the last one, whose logits each of them
    needs; and so do prompts that stand next to each other, as far as they are alike.
    """
    each = options.n_lanes
    lengths = [max(1, options.n_computed(len(row.ids))) for row in rows]
    before = _shared(cfg, rows, options)
    entries, rides = 0, []
    for n_prompt, limit, n_before in zip(lengths, limits, before, strict=True):
        shares = each > 1 and n_prompt > LEAST_SHARED and not has_state(cfg)
        n_shared = n_prompt - 1 if shares else 0
        entries += n_shared + each * (n_prompt - n_shared + limit) - n_before
        rides += [n_prompt - n_before, *[n_prompt - n_shared] * (each - 1)]
    # A vector of a row is less than its logits, which the plan knows.
    scores = options.prompt_logprobs is not None or any(row.pooling for row in rows)
    return RunShape(
        batch=each * len(rows),
        longest=max(lengths),
        context=max(n_prompt + n for n_prompt, n in zip(lengths, limits, strict=True)),
        scores=scores,
        sweeps=max(1, *limits),
        entries=entries,
        rides=_padded(rides, before, each) if scores or any(before) else None,
        nodes=nodes,
        vectors=sum(len(row.ids) for row in rows if row.vectors is not None),
    )


def _shared(cfg, rows, options):
    """So many entries of each prompt are those of the one before it, whatever else is there. A
    window may have moved on, and a state is at its end."""
    may_share = not (has_state(cfg) or windows_of(cfg) or cfg.switches_at is not None)
    found = [0]
    for one, other in pairwise(rows):
        most = options.n_computed(len(other.ids)) - 1
        if options.prompt_logprobs is not None:
            most = min(most, first_scored(other, options) - 1)
        if other.pooling is not None:
            most = min(most, Pooled.of(other).next)
        found.append(n_alike(one.ids, other.ids, min(most, len(one.ids) - 1)) if may_share else 0)
    return found


def _padded(rides, before, each):
    """About the rows of a forward pass that carries all of these, padding included. What is shared
    in it must be written before."""
    rows, levels = PackedRows(), []  # so many tokens are shared, of prompts inside one another
    for number, n_tokens in enumerate(rides):
        own, sibling = divmod(number, each)
        while levels and levels[-1] > before[own]:
            levels.pop()
        if before[own] and before[own] not in levels:
            levels.append(before[own])
        rows.add(n_tokens, len(levels) + (sibling > 0))
    return rows.n_rows
