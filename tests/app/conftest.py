"""What tests of the command line share, but for those that start it as a process."""

import pytest

from tests import programs


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    """See `tests.programs`."""
    with programs.few_shapes():
        yield
