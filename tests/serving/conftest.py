"""What tests of the server share: one model and its desk."""

import pytest

from jlayer import AutoModel
from jlayer.serving.desk import Desk
from tests import programs


@pytest.fixture(scope="package", autouse=True)
def few_shapes():
    with programs.few_shapes():
        yield


@pytest.fixture(scope="package")
def model(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as found:
        yield found


@pytest.fixture(scope="package")
def desk(model):
    found = Desk(model)
    found.start()
    yield found
    found.stop()
    assert model.engine.n_alive == 0
