"""What tests of guessed tokens share: pools of one size, a pair of models, and what they give
plainly."""

import pytest

from tests import programs
from tests.engine import guesses
from tests.engine.guesses import Plain, is_whole, tiny_pair


@pytest.fixture(scope="module", autouse=True)
def pools_of_one_size():
    """Chunks have as many rows as without a test: how wide a tree may be is about them."""
    with programs.all_shapes(), pytest.MonkeyPatch.context() as patch:
        guesses.few_pools(patch)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model, and a draft that is often right. Nothing of it is held when all is over."""
    with tiny_pair(tmp_path_factory.mktemp("pair")) as model:
        yield model
        assert is_whole(model)


@pytest.fixture(scope="module")
def plain(model):
    return Plain(model)
