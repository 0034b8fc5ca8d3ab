"""What tests of a chat share."""

import pytest

from tests import programs


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    """See `tests.programs`."""
    with programs.few_shapes():
        yield
