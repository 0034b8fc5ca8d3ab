"""Runs have few shapes here: see `tests.programs`."""

import pytest

from tests import programs


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    with programs.few_shapes():
        yield
