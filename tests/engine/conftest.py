"""What tests of the engine share."""

import pytest

from tests.engine import drop_in


@pytest.fixture(scope="package")
def both(tmp_path_factory):
    """A tiny model opened here and in transformers; nothing published, no end token."""
    found = drop_in.opened(tmp_path_factory.mktemp("both"))
    yield found
    found.ours.close()
