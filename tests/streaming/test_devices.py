"""Several devices give the tokens of one, however a model is cut, kept and cached."""

import itertools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.engine import device as choosing
from jlayer.errors import UsageError
from jlayer.plan.machine import PLATFORMS
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.steps import Put
from tests.campaigns import slow_but
from tests.conftest import BUNDLED
from tests.engine.test_engine import IDS
from tests.engine.test_host_cache import tight

N_NEW = 24
QUICK = [(100_000, 2)]  # of bytes of a tile, and devices
HOW = {"device": "cpu", "dtype": "float32"}


def tokens(folder, n=1, **options):
    with AutoModel.from_pretrained(folder, devices=n, **HOW, **options) as model:
        found = jlayer.generate(model, IDS, max_new_tokens=N_NEW, temperature=0)
        return found.token_ids, model.logits([IDS]), found


@pytest.fixture(scope="module")
def want(fable):
    return tokens(fable)[:2]


def same(found, want):
    assert found[0] == want[0]
    np.testing.assert_allclose(found[1], want[1], rtol=0, atol=1e-5 * np.abs(want[1]).max())


# Of 5000 bytes a tile has a few rows, which three devices cannot share evenly.
@pytest.mark.parametrize("cut", slow_but(itertools.product((20_000, 100_000), (2, 3)), QUICK))
def test_however_it_is_cut(fable, want, cuts, cut):
    tile_bytes, n = cut
    cuts(tile_bytes)
    same(tokens(fable, n), want)


@pytest.mark.parametrize(
    "tiers", slow_but([tuple(Tier), (Tier.HOST,), (Tier.DEVICE,), (Tier.DISK,)], [tuple(Tier)])
)
def test_wherever_tiles_stay(fable, want, tiers_in_turn, tiers):
    tiers_in_turn(*tiers)
    same(tokens(fable, 2), want)


@pytest.mark.parametrize("n", slow_but([1, 2], (2,)))
def test_with_many_tiles_ahead(fable, want, cuts, tiers_in_turn, monkeypatch, n):
    """As on a GPU: a tile is called before the one before it is waited for."""
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], ahead=4))
    cuts(100_000)
    tiers_in_turn(Tier.HOST, Tier.HOST, Tier.DISK)
    same(tokens(fable, n), want)


# Of the two key/value heads each device has all, where there are three.
@pytest.mark.parametrize("n", slow_but([2, 3], (2,)))
def test_with_the_cache_in_host_memory(fable, want, n):
    budget = tight(fable, devices=n)
    found = tokens(fable, n, device_memory=budget)
    same(found, want)
    assert found[2].plan["host"]["cache_bytes"] > 0


# Where tiles are joined, as on a GPU, those whose rows three devices cannot share evenly are not.
@pytest.mark.parametrize(
    "case",
    slow_but(
        itertools.product(["int8", "int4"], (2, 3), (False, True)),
        [("int4", 3, False), ("int4", 2, True)],
    ),
)
def test_quantized(tmp_path, monkeypatch, case):
    scheme, n, joins = case
    convert_checkpoint(BUNDLED, tmp_path / "q", quantize=scheme)
    want = tokens(tmp_path / "q", 1, host_share=0)
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=joins))
    same(tokens(tmp_path / "q", n, host_share=0), want)


def test_a_joined_tile_crosses_as_one_array_to_each(tmp_path, monkeypatch):
    convert_checkpoint(BUNDLED, tmp_path / "q", quantize="int4")
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=True))
    put = []
    with AutoModel.from_pretrained(tmp_path / "q", devices=2, host_share=0, **HOW) as model:
        model.engine.watch.on_taken = lambda step, made: isinstance(step, Put) and put.append(made)
        model.logits([IDS])
        tiles = {tile.joined.n_bytes for tile in model.plan.tiles}
    assert {made.addressable_data(0).nbytes for made in put} == tiles
    assert {made.nbytes for made in put} == {2 * n_bytes for n_bytes in tiles}


def test_beside_the_host_s_cores(fable, want, cuts):
    cuts(100_000)
    found = tokens(fable, 2, host_share=0.5)
    same(found, want)
    assert found[2].plan["host_share"] > 0.2


@pytest.mark.slow
def test_with_a_draft(fable, want):
    found = tokens(fable, 2, draft=str(BUNDLED))
    same(found, want)
    assert found[2].stats["drafted"]


@pytest.mark.slow
def test_lanes_that_join(fable, cuts):
    cuts(100_000)
    prompts, found = [IDS, IDS[:2], IDS[1:]], {}
    for n in (1, 3):
        with AutoModel.from_pretrained(fable, devices=n, **HOW) as model:
            handles = [model.submit(one, max_new_tokens=9, temperature=0) for one in prompts]
            found[n] = [handle.result().token_ids for handle in handles]
    assert found[1] == found[3]


def test_each_device_has_its_share_and_no_more(fable):
    """What is held is counted on every device: its rows of the tiles, and its heads' cache."""
    with AutoModel.from_pretrained(fable, devices=2, keeps_layers=False, **HOW) as model:
        assert model.engine.device_name == "2 x cpu"
        held, engine = {}, model.engine

        def watch(step, result):
            arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
            if type(step).__name__ == "Put":
                tile = engine.plan.tiles[step.tile]
                for one in engine.devices.all:
                    own = [shard for leaf in arrays for shard in leaf.addressable_shards]
                    n_bytes = sum(s.data.nbytes for s in own if s.device == one)
                    held[tile.name, one.id] = (n_bytes, tile.share.n_bytes, tile.n_bytes)

        engine.watch.on_taken = watch
        run = engine.start(RunShape(1, len(IDS), len(IDS)))
        run.sweep([IDS], [0])
        caches = jax.tree.leaves(engine.caches.layers)
        assert len({device for _, device in held}) == 2
        for found, share, whole in held.values():
            assert found == share == whole // 2
        heads = {leaf.sharding.shard_shape(leaf.shape)[1] for leaf in caches}
        assert heads == {1}


def test_more_than_there_are(fable):
    n = len(jax.devices("cpu"))
    words = (
        f"devices: {n + 1} asked for, but JAX finds {n} cpu here; ask for at most {n}, or for all"
    )
    with pytest.raises(UsageError, match=re.escape(words)):
        AutoModel.from_pretrained(fable, devices=n + 1, **HOW)


def test_all(fable):
    with AutoModel.from_pretrained(fable, devices="all", **HOW) as model:
        assert len(model.engine.devices) == len(jax.devices("cpu"))


def test_cards_that_are_not_alike_are_refused(monkeypatch):
    monkeypatch.setattr(choosing, "gpu_memories", lambda: [(8 << 30, 6 << 30), (4 << 30, 3 << 30)])
    with pytest.raises(UsageError, match=r"the GPUs have 8.00 GiB, 4.00 GiB; expected GPUs alike"):
        choosing.choose("gpu", 1 << 30, n_devices=2)
