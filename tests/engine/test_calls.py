"""Programs that are called in a forward pass, counted: one at each tile that the device multiplies,
and few beside it."""

from collections import Counter

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.engine.programs import Programs
from jlayer.plan.shapes import RunShape
from jlayer.plan.time import count_programs
from tests import made_up
from tests.campaigns import slow_but
from tests.families.test_family_is_data import add_families
from tests.streaming.conftest import set_tile_bytes

pytestmark = pytest.mark.usefixtures("all_shapes")

N_TOKENS = 5


@pytest.fixture
def calls(monkeypatch):
    """The calls of compiled programs, counted by label."""
    found, get = Counter(), Programs.get

    def counting(programs, label, *given, **options):
        program = get(programs, label, *given, **options)

        def called(*arguments):
            found[label] += 1
            return program(*arguments)

        return called

    monkeypatch.setattr(Programs, "get", counting)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted models by family: three layers each, with a stage whose input is made of what the
    one before has left, and with stages in another order."""
    folder, found = tmp_path_factory.mktemp("called"), {}
    with pytest.MonkeyPatch.context() as patch:
        add_families(patch)
        for family in ("llama", "sub_norm", "made_up"):
            source = made_up.save(folder / family, model_type=family, num_hidden_layers=3)
            found[family] = folder / f"{family}-layered"
            convert_checkpoint(source, found[family])
    return found


def opened(folder, monkeypatch, *, tile_bytes, share=0):
    add_families(monkeypatch)
    set_tile_bytes(monkeypatch, tile_bytes)
    return AutoModel.from_pretrained(folder, device="cpu", host_share=share)


def one_pass(model, calls, *, lanes=1, n_tokens=N_TOKENS):
    """(the plan, the tiles that the host multiplies) of one pass, all of whose logits are wanted.
    It is the second: the first one makes the pools."""
    shape = RunShape(batch=lanes, longest=n_tokens, context=n_tokens, all_logits=True)
    forward = model.engine.start(shape)
    ids = np.random.default_rng(0).integers(0, 100, (lanes, n_tokens)).tolist()
    for _ in range(2):
        calls.clear()
        forward.sweep(ids, [0] * lanes, all_logits=True)
    forward.close()
    return forward.plan, forward.plan.hosted(lanes * n_tokens)


def test_a_layer_of_llama_takes_one_program_for_each_tile(models, monkeypatch, calls):
    """The norms and the functions that end stages are in the programs of tiles, by name here; and
    the last layer makes no input of another."""
    with opened(models["llama"], monkeypatch, tile_bytes=100_000) as model:
        plan, _ = one_pass(model, calls)
    assert len(plan.tiles) == 3 * 4 + 1
    assert calls == {
        "embed 8": 1,
        "qkv 60+20+20 8 attend 1x8 cache 64 of 64": 3,
        "o 24 8 join_and_norm": 3,
        "gate_up 40+40 8 pass_on": 3,
        "down 24 8 join normed": 2,
        "down 24 8 join": 1,
        "head 133 8 wanted 8": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "sub_norm", "made_up"])
@pytest.mark.parametrize(
    ("tile_bytes", "share"),
    [(None, 0), (3_000, 0), (3_000, 0.5), (100_000, 0.5), (100_000, 1)],
)  # with a share, a tile is never a whole layer
def test_the_plan_counts_what_is_called(models, monkeypatch, calls, family, share, tile_bytes):
    with opened(models[family], monkeypatch, tile_bytes=tile_bytes, share=share) as model:
        plan, hosted = one_pass(model, calls)
    tiles = plan.tiling.shapes
    assert bool(hosted) == (share > 0)
    assert calls.total() == count_programs(plan.tiling, hosted)
    of_device = len(tiles) - len(hosted)
    if share == 0:
        assert calls.total() == of_device + 1  # one embeds
    else:
        # One ends each of the 12 stages, once the host's products are there; and one makes the
        # head's input, of the rows that are wanted.
        assert calls.total() == of_device + 12 + 2


@pytest.mark.parametrize("share", slow_but([0, 0.5], (0.5,)))
def test_every_chunk_of_a_pass_is_counted(models, monkeypatch, calls, share):
    with opened(models["llama"], monkeypatch, tile_bytes=3_000, share=share) as model:
        plan, hosted = one_pass(model, calls, lanes=5, n_tokens=300)
    assert plan.n_chunks > 1
    assert calls.total() == plan.n_chunks * count_programs(plan.tiling, hosted)
