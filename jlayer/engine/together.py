"""Rows that functions of the user's look at together, as transformers shows them to these: all
rows of a run, a token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from jlayer.engine.functions import Functions
from jlayer.engine.joint import Commit, Joint
from jlayer.engine.lane import Lane


class Together(Joint):
    """The rows of a run. `prompts`: the number of each lane's prompt.

    A row that has ended stays in its place, filled up, with scores of 0: nothing is computed for
    it. (transformers goes on computing it.)
    """

    def __init__(self, lanes: Sequence[Lane], functions: Functions, prompts: Sequence[int]):
        super().__init__(lanes)
        self._functions, self._prompts = functions, tuple(prompts)
        self._scores: list[np.ndarray] = []  # of each token so far, where they are wanted

    def decided(self, logits: Mapping[int, np.ndarray]) -> Commit:
        asked = [number for number, lane in enumerate(self.lanes) if lane.is_alive]
        width = logits[asked[0]].shape[0]
        scores = np.zeros((len(self.lanes), width), np.float32)
        for number in asked:
            lane = self.lanes[number]
            scores[number] = lane.scores_of(logits[number], lane.token_ids, lane.constraint)
        ids = self._ids([lane.token_ids for lane in self.lanes])
        scores = self._functions.scores(ids, scores, self._prompts, asked)
        choices = {n: self.lanes[n].pick(scores[n], logits[n]) for n in asked}
        tokens = [
            [*lane.token_ids, *([choices[n].token_id] if n in choices else [])]
            for n, lane in enumerate(self.lanes)
        ]
        kept = None
        if self.lanes[0].options.keeps_scores:
            one = np.stack(
                [choices[n].scores if n in choices else row for n, row in enumerate(scores)]
            )
            kept = [*self._scores, one]
        ended = self._functions.ended(self._ids(tokens), kept)
        return partial(self._commit, choices, ended, kept)

    def _commit(self, choices, ended, kept, _pool):
        self._scores = kept or []
        for number, choice in choices.items():
            self.lanes[number].add([choice], ends=bool(ended[number]))

    def _ids(self, tokens):
        """int64 [B, T]: prompts as they were given, and the new tokens."""
        fill = self.lanes[0].options.filling_id
        before = max(len(lane.row.given) for lane in self.lanes)
        new = max(map(len, tokens))
        return np.array(
            [
                [fill] * (before - len(lane.row.given))
                + lane.row.given
                + own
                + [fill] * (new - len(own))
                for lane, own in zip(self.lanes, tokens, strict=True)
            ],
            np.int64,
        )
