"""Runs have few shapes here: see `tests.programs`. And how long texts are."""

import pytest

from tests import programs


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    with programs.few_shapes():
        yield


@pytest.fixture
def n_tokens(request):
    """How many tokens follow a prompt. In every session they share a chunk with it, so that no
    further program is compiled for the logits of all of them."""
    return 100 if request.node.get_closest_marker("slow") else 24
