"""The filters of sampling: which of the likeliest tokens a draw may give, after temperature and
top_k.

Each is a function (weights, options, least) -> which of them stay. `weights`: float64, what the
filters before have left. At least `least` of them stay, as far as there are so many. They act in
the order of FILTERS, which is that of transformers; only the typical ones may leave the likeliest
out, whose weight is 0.
"""

from __future__ import annotations

import numpy as np

from jlayer.engine.options import SamplingOptions


def within_top_p(weights: np.ndarray, options: SamplingOptions, least: int):
    """Keeps the fewest likeliest tokens whose probability sum reaches top_p."""
    if options.top_p >= 1.0:
        return slice(None)
    mass = np.exp(weights)
    mass /= mass.sum()
    spare = 1.0 - options.top_p
    # All tokens below spare / V together have less than `spare`, so they are dropped without
    # sorting: sorting 128k tokens takes 13 ms.
    small = mass < min(spare / len(mass), _least_of(mass, least))
    # Ascending by mass. Of equal mass the higher id comes first, so it is dropped first.
    large = np.flatnonzero(~small)[::-1]
    order = large[np.argsort(mass[large], kind="stable")]
    below = mass[small].sum() + np.cumsum(mass[order]) <= spare
    below[-least:] = False
    return np.sort(order[~below])


def within_min_p(weights: np.ndarray, options: SamplingOptions, least: int):
    """Keeps tokens at least min_p times as likely as the likeliest."""
    if options.min_p is None:
        return slice(None)
    return (np.exp(weights) >= options.min_p) | (weights >= _least_of(weights, least))


def within_typical_p(weights: np.ndarray, options: SamplingOptions, least: int):
    """Keeps the tokens whose information is nearest to the expected one, up to a probability sum of
    typical_p (Meister et al., 2022)."""
    if options.typical_p >= 1.0:
        return slice(None)
    log_p = _log_p(weights)
    mass = np.exp(log_p)
    distance = np.abs(-log_p - _entropy(log_p, mass))
    order = np.argsort(distance, kind="stable")
    n_below = int((np.cumsum(mass[order]) < options.typical_p).sum())
    kept = distance <= distance[order[min(n_below, len(order) - 1)]]
    kept[order[:least]] = True
    return kept


def within_epsilon(weights: np.ndarray, options: SamplingOptions, least: int):
    """Keeps tokens at least as likely as epsilon_cutoff."""
    if options.epsilon_cutoff == 0.0:
        return slice(None)
    return _at_least(weights, _log_p(weights), options.epsilon_cutoff, least)


def within_eta(weights: np.ndarray, options: SamplingOptions, least: int):
    """Keeps tokens at least as likely as eta_cutoff, or less where the draw is open: the square
    root of it times e^-entropy (Hewitt et al., 2022)."""
    epsilon = options.eta_cutoff
    if epsilon == 0.0:
        return slice(None)
    log_p = _log_p(weights)
    eta = min(epsilon, np.sqrt(epsilon) * np.exp(-_entropy(log_p, np.exp(log_p))))
    return _at_least(weights, log_p, eta, least)


FILTERS = (within_top_p, within_min_p, within_typical_p, within_epsilon, within_eta)


def _at_least(weights, log_p, cutoff, least):
    return (np.exp(log_p) >= cutoff) | (weights >= _least_of(weights, least))


def _least_of(values, least):
    """The smallest of the `least` largest."""
    least = min(least, len(values))
    return values.max() if least == 1 else np.partition(values, -least)[-least]


def _log_p(weights):
    return weights - np.log(np.exp(weights).sum())


def _entropy(log_p, mass):
    with np.errstate(invalid="ignore"):  # 0 times -inf
        return -np.nansum(mass * log_p)
