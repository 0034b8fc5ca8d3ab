"""What tests of the engine share."""

import pytest

from jlayer.engine.prompt_room import PromptRoom
from tests import programs
from tests.engine import drop_in


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    """See `tests.programs`."""
    with programs.few_shapes():
        yield


@pytest.fixture(scope="package")
def both(tmp_path_factory):
    """A tiny model opened here and in transformers; nothing published, no end token."""
    found = drop_in.opened(tmp_path_factory.mktemp("both"))
    yield found
    found.ours.close()


@pytest.fixture(autouse=True)
def prompts_ride_as_many(request, monkeypatch):
    """How many rows of prompts ride is learnt from the clock; here it is a chunk, so that what a
    pass carries does not depend on the machine."""
    if request.module.__name__ != "tests.engine.test_prompt_room":
        monkeypatch.setattr(PromptRoom, "learn", lambda self, plan, **pass_: None)
