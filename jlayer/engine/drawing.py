"""Draws the tokens of a forward pass: of each lane the next one and, as long as what was drawn had
been guessed, the one after it.

A guess is accepted if it equals the draw, and only then: so the tokens are those of plain decoding,
whatever was guessed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jlayer.drafting.tree import ROOT
from jlayer.engine.functions import Raised
from jlayer.engine.joint import Commit
from jlayer.engine.riders import Rider
from jlayer.engine.sample import Choice
from jlayer.errors import JlayerError
from jlayer.plan.memory import DRAWERS


@dataclass(frozen=True)
class Drawn:
    """What a lane drew: tokens, each after the one before; all but the last were guessed, as these
    `nodes`. `error`: why there are no more; `is_finite`: whether the logits were."""

    rider: Rider
    choices: list[Choice]
    nodes: list[int]
    error: Exception | None = None
    is_finite: bool = True


def draw_all(pairs: Sequence[tuple[Rider, np.ndarray]]) -> list[Drawn]:
    """What each lane draws from its logits [1 + guesses, V].

    Several draw at a time: numpy lets go of the interpreter for most of it.
    """
    if len(pairs) < 2:
        return [draw(*pair) for pair in pairs]
    n_threads = min(DRAWERS, len(os.sched_getaffinity(0)), len(pairs))
    with ThreadPoolExecutor(n_threads, thread_name_prefix="jlayer-draw") as drawers:
        return list(drawers.map(lambda pair: draw(*pair), pairs))


def decide_all(pairs: Sequence[tuple[Rider, np.ndarray]]) -> tuple[list[Drawn], list[Commit]]:
    """What lanes that wait for each other draw from their logits [1, V]: (what keeps some from it,
    what is to be done to the lanes once the pass has succeeded). Changes nothing."""
    drawn, together = [], {}
    for rider, (logits,) in pairs:
        if np.isfinite(logits).all():
            together.setdefault(id(rider.lane.joint), []).append((rider, logits))
        else:
            drawn.append(Drawn(rider, [], [], is_finite=False))
    commits = []
    for some in together.values():
        first = some[0][0]
        try:
            arrived = {rider.lane: logits for rider, logits in some}
            commits.append(first.lane.joint.decide(arrived))
        except (JlayerError, Raised) as error:
            error = error.__cause__ if isinstance(error, Raised) else error
            drawn.append(Drawn(first, [], [], error))
            some = some[1:]
        drawn += [Drawn(rider, [], []) for rider, _ in some]
    return drawn, commits


def draw(rider: Rider, logits: np.ndarray) -> Drawn:
    """What a lane draws from the logits [1 + guesses, V] after its last token and each guess.
    Changes nothing. Logits that nothing drawn leads to are not looked at."""
    lane, guesses = rider.lane, rider.guesses
    following = {}
    if guesses is not None:
        pairs = zip(guesses.parents, guesses.tokens, strict=True)
        following = {pair: node for node, pair in enumerate(pairs)}
    choices, nodes, node = [], [], ROOT
    while node is not None:
        row = logits[node + 1]
        if not np.isfinite(row).all():
            return Drawn(rider, choices, nodes, is_finite=False)
        try:
            choice = lane.choose(row, [one.token_id for one in choices])
        except JlayerError as error:
            return Drawn(rider, choices, nodes, error)
        choices.append(choice)
        node = following.get((node, choice.token_id))
        if lane.ends_with(choice.token_id, len(choices)):
            break
        if node is not None:
            nodes.append(node)
    return Drawn(rider, choices, nodes)
