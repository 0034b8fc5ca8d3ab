"""What of a test's parameters is tried each time, and what in the longer campaigns alone."""

from collections.abc import Collection, Iterable

import pytest


def slow_but(values: Iterable, quick: Collection) -> list:
    """The parameters `values`, of which all but the `quick` ones are marked slow."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
