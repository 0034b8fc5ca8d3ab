"""Few programs: what the shapes of runs are rounded to in tests of what is above them.

A program takes XLA a second of CPU time. How shapes are rounded is shown in `plan`, and how pools
grow in those tests of `engine` that ask for `all_shapes`; what a model says, and what a server
answers, does not depend on it.
"""

from contextlib import contextmanager

import pytest

from jlayer.plan.shapes import MIN_CAPACITY, RunShape

COARSE = 1024


@contextmanager
def few_shapes():
    """Tables and pools have 1024 entries, or a multiple."""
    with _rounded_to(COARSE):
        yield


@contextmanager
def all_shapes():
    """They have as many as without a test, inside `few_shapes`."""
    with _rounded_to(MIN_CAPACITY):
        yield


@contextmanager
def _rounded_to(entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlayer.plan.shapes.MIN_CAPACITY", entries)
        RunShape.shapes.cache_clear()
        yield
    RunShape.shapes.cache_clear()
