"""What of a test's parameters is tried each time, and what in the longer campaigns alone."""

from collections.abc import Callable, Collection, Iterable
from itertools import product

import pytest
from hypothesis import given, settings


def slow_but(values: Iterable, quick: Collection) -> list:
    """The parameters `values`, of which all but the `quick` ones are marked slow."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


def covering(quick: Collection[tuple], *axes: Iterable) -> list:
    """The rows of the product of these parameters, of which all but the `quick` ones are slow.
    Between them the quick ones have each value of each axis."""
    rows = list(product(*axes))
    for values, tried in zip(zip(*rows, strict=True), zip(*quick, strict=True), strict=True):
        assert set(values) == set(tried), "a value that is tried in the slow rows alone"
    return [row if row in quick else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def examples(quick: int, many: int, **strategies) -> Callable:
    """Makes a test of a property: `quick` examples are tried each time, `many` in a slow test
    beside. `strategies`: of each argument of the property."""

    def decorate(check):
        @pytest.mark.parametrize("n_examples", slow_but((quick, many), (quick,)))
        def test(n_examples):
            settings(max_examples=n_examples)(given(**strategies)(check))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
