"""What a model loses without some layers, all in one sweep, is what it loses when it is opened
without them; in portions, stopped and gone on, it is the same."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.errors import UnsupportedModelError
from jlayer.measure import influence
from jlayer.measure.evaluate import perplexity
from jlayer.measure.influence import SoFar, curve, influences
from jlayer.plan import making
from tests.programs import few_shapes
from tests.reference import dense_forms, latent_forms, mixture_forms

IDS = np.random.default_rng(0).integers(3, 133, 70).tolist()
LENGTH = 16
# Windows, latents, layers with and without experts, states, norms of another kind, several streams.
KINDS = {
    "llama": dense_forms,
    "gemma3": dense_forms,
    "qwen3_5": dense_forms,
    "deepseek_v3": latent_forms,
    "glm4_moe": mixture_forms,
    "qwen3_moe": mixture_forms,
    "cohere": dense_forms,
}


@pytest.fixture(autouse=True)
def shapes():
    with few_shapes():
        yield


@contextmanager
def opened(folder, **options):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", **options) as model:
        yield model


def losses(model, order, **options):
    return list(curve(model, IDS, order, length=LENGTH, **options))


def by_itself(folder, dropped):
    """The nats a token of a model opened without these layers; None where no config can say so."""
    try:
        with opened(folder, without_layers=dropped) as model:
            return perplexity(model, IDS, length=LENGTH).nll
    except UnsupportedModelError:
        return None


@pytest.mark.slow  # tests/app/test_prune.py has one for each day
@pytest.mark.parametrize("tile_bytes", [None, 3_000])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_is_that_of_the_model_opened_without_these_layers(
    kind, tile_bytes, tmp_path, monkeypatch
):
    if tile_bytes is not None:
        monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    folder = Path(KINDS[kind].save(tmp_path / "source", kind))
    with opened(folder) as model:
        n_layers = model.config.num_hidden_layers
        orders = [range(n_layers - 1), range(n_layers - 1, 0, -1)]
        found = [loss for order in orders for loss in losses(model, order)]
    known = {loss.dropped: by_itself(folder, loss.dropped) for loss in found}
    assert any(known[loss.dropped] is not None for loss in found if loss.dropped)
    for loss in found:
        if known[loss.dropped] is not None:
            assert loss.nll == pytest.approx(known[loss.dropped], abs=2e-6), loss.dropped


def test_it_takes_one_sweep_and_under_small_budgets_more(tiny, monkeypatch):
    with opened(tiny) as model:
        before = model.engine.totals.sweeps
        whole = losses(model, [1, 0])
        assert model.engine.totals.sweeps == before + 1
        real = model.engine.plan_for
        monkeypatch.setattr(
            model.engine, "plan_for", lambda shape, **how: lacking(real(shape, **how), shape)
        )
        some = losses(model, [1, 0])
        assert model.engine.totals.sweeps > before + 5
    assert [loss.dropped for loss in some] == [loss.dropped for loss in whole]
    for one, other in zip(some, whole, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-6)


def lacking(plan, shape):
    """A plan that holds no more than two lanes."""
    return SimpleNamespace(fits=False) if shape.batch > 2 else plan


class Stopped(BaseException):
    pass


def test_stopped_after_any_sweep_the_rest_gives_the_same_numbers(tiny, monkeypatch):
    monkeypatch.setattr(influence, "MOST_WINDOWS", 6)  # several sweeps
    with opened(tiny) as model:

        def measured(so_far, stops_at=None):
            n_told = 0

            def told(*_):
                nonlocal n_told
                n_told += 1
                saved.append(SoFar.from_dict(so_far.as_dict()))
                if n_told == stops_at:
                    raise Stopped

            found = influences(model, IDS, length=LENGTH, so_far=so_far, told=told)
            return found.of_layers, losses(model, found.least(2), so_far=so_far, told=told)

        saved = []
        whole = measured(SoFar())
        n_sweeps = len(saved)
        assert n_sweeps > 3
        for stops_at in range(1, n_sweeps + 1):
            saved = []
            with pytest.raises(Stopped):
                measured(SoFar(), stops_at)
            before = model.engine.totals.sweeps
            assert measured(saved[-1]) == whole
            assert model.engine.totals.sweeps == before + n_sweeps - stops_at


def test_layers_in_tiles_give_the_same(tiny, monkeypatch):
    """The first input of a layer is made at the end of the one before it, which may be left out."""
    with opened(tiny) as model:
        expected = losses(model, [0, 1])
        assert all(tile.stage is None for tile in model.plan.tiles if tile.kind)
    monkeypatch.setattr(making, "TILE_BYTES", (3_000,))
    with opened(tiny) as model:
        assert all(tile.stage is not None for tile in model.plan.tiles)
        found = losses(model, [0, 1])
    for one, other in zip(found, expected, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-6)
