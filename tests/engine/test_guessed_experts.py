"""Experts that are put before their layer has decided: a guess changes no number, whatever it is;
what moves is what was chosen and not there, and what was guessed in vain."""

from dataclasses import replace

import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine import engine
from jlayer.plan import making
from jlayer.plan.experts import ExpertRooms
from jlayer.plan.tiles import Tier
from tests.engine.mixture import CONFIG, save

# Five layers with experts, the last three of them after one without.
LAYERS = {"num_hidden_layers": 6, "mlp_only_layers": [2]}
N_SPARSE, N_EXPERTS = 5, CONFIG["num_experts"]
N_CHOSEN = CONFIG["num_experts_per_tok"]
PROMPTS = [[5, 17, 90, 33, 2, 61], [77, 3, 40]]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": None, "speculate": "off"}
ALL = N_EXPERTS


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save(tmp_path_factory.mktemp("guesses") / "model", **LAYERS)


@pytest.fixture
def guess(monkeypatch):
    """Has all but experts stay on the device, as on a GPU; each layer keep so many experts on the
    device and in host memory, and so many be put by guess at a time."""
    real = engine.make_plan

    def rooms(on_device, in_host, guessed):
        found = ExpertRooms((on_device,) * N_SPARSE, (in_host,) * N_SPARSE, guessed)

        def make_plan(weights, machine, run, *, held=(), least_pool=None, draft=None, **options):
            plan = real(
                weights, machine, run, held=held, least_pool=least_pool, draft=draft, **options
            )
            tiers = tuple(Tier.DISK if t.expert is not None else Tier.DEVICE for t in plan.tiles)
            return making.refit(
                replace(plan, tiers=tiers, experts=found),
                *(weights, run),
                held=held,
                least_pool=least_pool,
                draft=draft,
            )

        monkeypatch.setattr(engine, "make_plan", make_plan)

    return rooms


def opened(folder):
    return AutoModel.from_pretrained(folder, device="cpu", dtype="float32")


def test_smoke(published, guess):
    guess(0, ALL, 2)
    with opened(published) as model:
        print([jlayer.generate(model, p, **GREEDY).token_ids for p in PROMPTS])
        print(model.engine.totals)
    guess(3, ALL, 2)
    with opened(published) as model:
        print([jlayer.generate(model, p, **GREEDY).token_ids for p in PROMPTS])
        print(model.engine.totals)
