"""The shape of a run of prompts: how many rows ride, and how many cache entries they take, where
those that begin alike share them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.riders import LEAST_SHARED, n_alike
from jlayer.engine.scores import first_scored
from jlayer.families.registry import has_state, windows_of
from jlayer.plan.shapes import CHUNK_ROWS, RunShape, pack
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
    each = options.num_return_sequences
    lengths = [max(1, options.n_computed(len(row.ids))) for row in rows]
    before = _shared(cfg, rows, options)
    entries, rides = 0, []
    for n_prompt, limit, n_before in zip(lengths, limits, before, strict=True):
        shares = each > 1 and n_prompt > LEAST_SHARED and not has_state(cfg)
        n_shared = n_prompt - 1 if shares else 0
        entries += n_shared + each * (n_prompt - n_shared + limit) - n_before
        rides += [n_prompt - n_before, *[n_prompt - n_shared] * (each - 1)]
    batch, longest = each * len(rows), max(lengths)
    if options.prompt_logprobs is not None or any(before):
        longest = min(longest, -(-_padded(rides, before, each) // batch))
    return RunShape(
        batch=batch,
        longest=longest,
        context=max(n_prompt + n for n_prompt, n in zip(lengths, limits, strict=True)),
        scores=options.prompt_logprobs is not None,
        sweeps=max(1, *limits),
        entries=entries,
        nodes=nodes,
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
        found.append(n_alike(one.ids, other.ids, min(most, len(one.ids) - 1)) if may_share else 0)
    return found


def _padded(rides, before, each):
    """About the rows of a forward pass that carries all of these, padding included. What is shared
    in it must be written before."""
    ranks, rank = defaultdict(list), 0
    for number, n_tokens in enumerate(rides):
        own, sibling = divmod(number, each)
        if not sibling:
            rank = 0 if not before[own] else rank + (before[own] > before[own - 1])
        ranks[rank + (sibling > 0)].append(n_tokens)
    panes = (pane for some in ranks.values() for pane in pack(some, CHUNK_ROWS[-1], shared=0))
    return sum(pane.n_rows for pane in panes)
