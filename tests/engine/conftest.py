"""What tests of the engine share."""

from dataclasses import replace

import pytest

from jlayer import AutoModel
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from tests.engine import drop_in


@pytest.fixture(scope="package")
def both(tmp_path_factory):
    """A tiny model opened here and in transformers; nothing published, no end token."""
    found = drop_in.opened(tmp_path_factory.mktemp("both"))
    yield found
    found.ours.close()


@pytest.fixture
def room_for(fable, monkeypatch):
    """Call it with a number of lanes and their context: budgets that hold so many and no more."""
    monkeypatch.setattr("jlayer.engine.engine.anonymous_bytes", lambda: 100 << 20)

    def budgets(lanes, context):
        with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
            engine = model.engine
            shape = RunShape(lanes, 5, context)
            machine = replace(engine.plan.machine, device_budget=1, host_budget=1)
            needed = make_plan(engine.weights, machine, shape)
            assert needed.cache is Tier.HOST
            return {
                "device_memory": needed.device_peak_bytes,
                "host_memory": needed.host_peak_bytes,
            }

    return budgets
