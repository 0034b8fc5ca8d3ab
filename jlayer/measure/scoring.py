"""Scores continuations, each after a text of its own, and continues texts: all that are asked for,
in as few forward passes as memory allows.

What begins alike is computed once: the answers to one question, questions behind the same examples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from jlayer.api import Model
from jlayer.engine.decoding import Decoding
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.portions import portions
from jlayer.engine.sample import Choice
from jlayer.engine.shaping import shape_of
from jlayer.errors import UsageError
from jlayer.plan.shapes import capacity_for

SCORED = SamplingOptions(max_new_tokens=0, prompt_logprobs=1)

Told = Callable[[int, int], None]
Ids = Sequence[int]


@dataclass(frozen=True)
class Scored:
    """The log-probability of a continuation, and whether each of its tokens is the likeliest after
    those before it; of equally likely ones that is the one with the lowest id."""

    logprob: float
    is_greedy: bool


def score(
    model: Model, pairs: Sequence[tuple[Ids, Ids]], *, told: Told = lambda done, of: None
) -> list[Scored]:
    """How likely each continuation is after its text: pairs of ids, both of a token or more.

    Nothing follows the last token, so the two may be a token longer than the context; of longer
    ones the first tokens are left out. `told(done, of)`: called as they are done. Raises UsageError
    for what cannot be scored, and what a forward pass raises.
    """
    limit = model.context_limit
    cut = [_cut(context, continuation, limit) for context, continuation in pairs]
    for ids, _ in cut:
        model.engine.check_ids(list(ids))
    known: dict[tuple, Scored] = {}
    # Long ones are not beside short ones, whose tables would be as long.
    order = sorted(set(cut), key=lambda one: (-capacity_for(len(one[0])), one))
    rows = [Row(list(ids), list(ids), scored_from=first) for ids, first in order]
    for some in portions(model.engine, rows, SCORED):
        with closing(Decoding(model.engine, some, SCORED)) as decoding:
            for _ in decoding:
                n_ended = sum(not lane.is_alive for lane in decoding.lanes)
                told(len(known) + n_ended, len(order))
        for row, lane in zip(some, decoding.lanes, strict=True):
            found = lane.scores.found[row.scored_from :]
            known[tuple(row.ids), row.scored_from] = _sum(found)
    return [known[one] for one in cut]


def _cut(context, continuation, limit):
    """(the ids, the place of the first one that is scored)."""
    if not context or not continuation:
        raise UsageError(
            "score: found no token in a text or its continuation, expected one or more"
        )
    if len(continuation) > limit:
        raise UsageError(
            f"score: a continuation of {len(continuation)} tokens, longer than the context of "
            f"{limit}; shorten it"
        )
    ids = (*context, *continuation)[-limit - 1 :]
    return ids, len(ids) - len(continuation)


def _sum(choices: Sequence[Choice]) -> Scored:
    is_greedy = all(one.token_id == one.top[0][0] for one in choices)
    return Scored(sum(one.logprob for one in choices), is_greedy)


def continue_all(
    model: Model,
    asked: Sequence[tuple[Ids, SamplingOptions]],
    *,
    told: Told = lambda done, of: None,
) -> list[list[int]]:
    """The new tokens after each prompt, with options of its own. Those with the same options are a
    run; runs that fit together share their passes. Raises what a run raises."""
    groups: dict[SamplingOptions, list[int]] = {}
    for number in sorted(range(len(asked)), key=lambda number: tuple(asked[number][0])):
        groups.setdefault(asked[number][1], []).append(number)
    waiting, active, n_done = deque(groups.items()), [], 0
    found: list[list[int]] = [[] for _ in asked]
    with ExitStack() as opened:
        while waiting or active:
            while waiting and _may_begin(model, waiting[0], asked, [run for run, *_ in active]):
                options, numbers = waiting.popleft()
                rows = [Row(list(ids), list(ids)) for ids in (asked[n][0] for n in numbers)]
                decoding = Decoding(model.engine, rows, options, text=model.text, most_unread=None)
                opened.callback(decoding.close)
                active.append((decoding, iter(decoding), numbers))
            for one in list(active):
                decoding, steps, numbers = one
                if next(steps, None) is None:
                    for number, lane in zip(numbers, decoding.lanes, strict=True):
                        found[number] = lane.token_ids
                    active.remove(one)
                    n_done += len(numbers)
                n_ended = sum(not lane.is_alive for run, *_ in active for lane in run.lanes)
                told(n_done + n_ended, len(asked))
    return found


def _may_begin(model, group, asked, active):
    """Whether the budgets hold all of a group beside those that are alive, and none of these waits
    for room: what waits looks again while the others are not read, and so keep their room."""
    if not active or any(run.is_waiting for run in active):
        return not active
    options, numbers = group
    rows = [Row(list(asked[number][0]), list(asked[number][0])) for number in numbers]
    limits = [options.new_tokens_limit(len(row.ids), context=model.context_limit) for row in rows]
    return model.engine.plan_for(shape_of(model.config, rows, limits, options)).fits
