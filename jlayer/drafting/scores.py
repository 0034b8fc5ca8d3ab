"""From a draft model's logits to the probability that the target model draws a token.

The target draws argmax(logits + T·noise), and the noise of a position is known before the logits
are. So the draft adds it to its own logits; what remains unknown is how far the two models' logits
differ. This is one number, the sharpness s in logits, learnt from the tokens that were drawn.
"""

from __future__ import annotations

import numpy as np


def perturbed(logits: np.ndarray, noise: np.ndarray | None, *, temperature: float) -> np.ndarray:
    """logits + T·noise, float64 [.., K]: what the draft itself would draw the largest of."""
    logits = np.asarray(logits, np.float64)
    return logits if noise is None or temperature == 0 else logits + temperature * noise


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Over the last axis; values of -inf stay -inf."""
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


class Sharpness:
    """What is learnt from the draws about a draft model at one temperature.

    The sharpness, by likelihood on a grid, and how often the token drawn is a candidate at all.
    """

    GRID = np.geomspace(0.05, 3.0, 25)
    START = 0.6  # 0.55 to 0.7 was best for a draft three times smaller
    # The start weighs as much as a few observations do: their log-likelihood's curvature in log s
    # is about 0.5 each.
    PRIOR_WEIGHT = 4.0
    COVERAGE_WEIGHT = 20.0  # draws for which the coverage 1 at the start counts
    DECAY = 0.998  # a draw counts for 500 draws: texts change slowly

    def __init__(self):
        self._prior = -0.5 * self.PRIOR_WEIGHT * np.log(self.GRID / self.START) ** 2
        self._likelihood = np.zeros(len(self.GRID))
        self._value = self.START
        self._draws = self._within = self.COVERAGE_WEIGHT

    @property
    def value(self) -> float:
        """The sharpness, in logits."""
        return self._value

    @property
    def coverage(self) -> float:
        """The share of draws that were among the candidates; 0.88 of 48 at temperature 1."""
        return self._within / self._draws

    def observe(self, perturbed: np.ndarray, place: int | None) -> None:
        """Takes note of which candidate was drawn after a node.

        `perturbed`: logits + T·noise of its candidates, [K]. `place`: which of them was drawn; None
        if another token was, which says nothing about the sharpness.
        """
        self._draws = self.DECAY * self._draws + 1
        self._within = self.DECAY * self._within + (place is not None)
        if place is None or not np.isfinite(perturbed.max()):  # of a draft that is damaged
            return
        log_p = log_softmax(np.asarray(perturbed, np.float64)[None, :] / self.GRID[:, None])
        self._likelihood = self.DECAY * self._likelihood + log_p[:, place]
        weights = self._prior + self._likelihood
        weights = np.exp(weights - weights.max())
        self._value = float(np.exp(weights @ np.log(self.GRID) / weights.sum()))


class Calibration:
    """How many guessed tokens are accepted for each one that was expected."""

    LEAST, MOST = 0.1, 3.0
    START_WEIGHT = 20.0  # expected tokens for which the ratio 1 at the start counts
    DECAY = 0.99

    def __init__(self):
        self._expected = self._found = self.START_WEIGHT

    @property
    def ratio(self) -> float:
        return float(np.clip(self._found / self._expected, self.LEAST, self.MOST))

    def observe(self, expected: float, found: float) -> None:
        """Takes note of a forward pass: accepted guesses, without the token that always comes.

        `expected`: the sum of exp(scores) of the nodes that were verified.
        """
        self._expected = self.DECAY * self._expected + expected
        self._found = self.DECAY * self._found + found
