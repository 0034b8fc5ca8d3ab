"""Few programs: what the shapes of runs are rounded to in tests of what is above them.

A program takes XLA a second of CPU time. How shapes are rounded is shown in `plan`, and how pools
grow in those tests of `engine` that ask for `all_shapes`; what a model says, and what a server
answers, does not depend on it.
"""

from contextlib import contextmanager

import pytest

from jlayer.plan import shapes
from jlayer.plan.shapes import CHUNK_ROWS, LEAST_ROWS, MIN_CAPACITY, RunShape, pool_rows, tree_panes

TABLE_ENTRIES = 1024
POOL_ROWS = 4096
ROWS = (LEAST_ROWS, *(rows for rows in CHUNK_ROWS if rows >= 32))
# Whoever goes through the rows that a chunk may have.
USERS_OF_ROWS = ("plan.shapes", "plan.limits", "engine.pace", "engine.widths")


@contextmanager
def few_shapes():
    """Tables have 1024 entries and pools 4096, or a multiple; prompts of 2 to 32 tokens are padded
    to as many rows."""
    with _rounded_to(TABLE_ENTRIES, lambda entries: -(-entries // POOL_ROWS) * POOL_ROWS, ROWS):
        yield


@contextmanager
def all_shapes():
    """They have as many as without a test, inside `few_shapes`."""
    with _rounded_to(MIN_CAPACITY, pool_rows, CHUNK_ROWS):
        yield


def has_few_shapes() -> bool:
    """Whether this is inside `few_shapes`."""
    return shapes.CHUNK_ROWS is ROWS


@contextmanager
def _rounded_to(table_entries, rows_of_pool, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlayer.plan.shapes.MIN_CAPACITY", table_entries)
        patch.setattr("jlayer.plan.shapes.pool_rows", rows_of_pool)
        for user in USERS_OF_ROWS:
            patch.setattr(f"jlayer.{user}.CHUNK_ROWS", rows)
        _forget()
        yield
    _forget()


def _forget():
    RunShape.shapes.cache_clear()
    tree_panes.cache_clear()
