"""A family is data: one that nobody published is a table, and runs like any other, cut as it may
be and stored as it may be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.encodings.registry import encoding, piece_name
from jlayer.families import experts, qwen_next
from jlayer.families.base import bias_name
from jlayer.families.registry import (
    FAMILIES,
    family_of,
    final_norm_leaves,
    head_leaf,
    head_stage,
    layer_kinds,
    layer_tensor_name,
    published_tensors,
)
from jlayer.model.cache import empty_cache
from jlayer.model.products import Encoded, dequantize, weight
from jlayer.model.stages import COMBINE, FUNCTIONS, block, call, multiply
from jlayer.plan.machine import PLATFORMS
from jlayer.plan.shapes import RunShape
from jlayer.spec import Place, Role
from tests import made_up
from tests.campaigns import slow_but
from tests.chain import chain
from tests.streaming.conftest import set_tile_bytes
from tests.tiny import stored_arrays

IDS = [5, 17, 99, 3, 64, 128, 1]
SCHEMES = [None, "int8", "int4"]


def add_families(patch):
    for name, family in made_up.FAMILIES.items():
        patch.setitem(FAMILIES, name, family)


@pytest.fixture(scope="module", autouse=True)
def known_families():
    with pytest.MonkeyPatch.context() as patch:
        add_families(patch)
        yield


@pytest.fixture(scope="module", params=SCHEMES, ids=str)
def stored(request, tmp_path_factory):
    """A converted model, and the logits of IDS by `block(kind)` over whole layers."""
    folder = tmp_path_factory.mktemp("made-up")
    source = made_up.save(folder / "source", attention_bias=True, mlp_bias=True)
    convert_checkpoint(source, folder / "layered", quantize=request.param)
    return folder / "layered", logits_by_blocks(folder / "layered")


def logits_by_blocks(folder):
    """Logits [1, T, V] of IDS, layer after layer over whole matrices, without tiles or streams."""
    store, arrays = Store(folder), stored_arrays(folder)
    cfg, shapes = store.cfg, published_tensors(store.cfg)

    def whole(name):
        form = store.form_of(name)
        pieces = {
            piece: jnp.asarray(arrays[piece_name(name, piece)])
            for piece in encoding(form).pieces(shapes[name])
        }
        return weight(pieces, form=form, block_bytes=BLOCK_BYTES["cpu"])

    table = whole(family_of(cfg).embedding.published)
    if isinstance(table, Encoded):
        table = dequantize(table, cfg.hidden_size)
    hidden = table[jnp.asarray(IDS)]
    compiled = {kind: jax.jit(block(kind)) for kind in layer_kinds(cfg)}
    for number, kind in enumerate(layer_kinds(cfg)):
        layer = {leaf.name: whole(layer_tensor_name(cfg, leaf, number)) for leaf in kind.leaves}
        cache = empty_cache(kind.cache, n_rows=64, dtype="float32")
        hidden, _ = compiled[kind](layer, hidden, cache, chain(len(IDS)))
    stage = head_stage(cfg)
    last_leaves = (*final_norm_leaves(cfg), head_leaf(cfg))
    last = {leaf.name: whole(leaf.published) for leaf in last_leaves}
    (x,) = call(stage.input, {"hidden": hidden}, last).values()
    (logits,) = multiply(stage, x, last).values()
    return np.asarray(logits)[None]


# Rows of a product are the same sums; only the library's order within one may differ. What was
# cached is multiplied with other shapes.
TILED, CACHED = 1e-6, 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", [None, 3_000, 1])
def test_tiles_of_any_size_are_the_blocks(stored, monkeypatch, tile_bytes):
    folder, expected = stored
    most = np.abs(expected).max()
    set_tile_bytes(monkeypatch, tile_bytes)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        found = model.logits(IDS)
        assert (model.plan.tiling.is_whole) == (tile_bytes is None)
        forward = model.engine.start(RunShape(longest=4, context=len(IDS), all_logits=True))
        pieces = [(0, 4), (4, 5), (5, 7)]
        cached = [forward.sweep([IDS[a:b]], [a], all_logits=True) for a, b in pieces]
        forward.close()
        # Needs follow from the tables: what was promised holds for any kind of layer.
        assert model.engine.programs.temporary_bytes <= model.plan.device.temporary_bytes
    np.testing.assert_allclose(found, expected, rtol=0, atol=TILED * most)
    np.testing.assert_allclose(np.concatenate(cached, axis=1), expected, rtol=0, atol=CACHED * most)


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", slow_but([None, 500], (500,)))
def test_tiles_that_cross_as_one_array_are_the_blocks(stored, monkeypatch, tile_bytes):
    """As on a GPU, whose layout of a tile is the same here; plain tiles never are one array."""
    folder, expected = stored
    set_tile_bytes(monkeypatch, tile_bytes)
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=True))
    with AutoModel.from_pretrained(folder, device="cpu", keeps_layers=False) as model:
        found = model.logits(IDS)
        is_quantized = Store(folder).manifest.quantization is not None
        assert {tile.joined is not None for tile in model.plan.tiles} == {is_quantized}
    np.testing.assert_allclose(found, expected, rtol=0, atol=TILED * np.abs(expected).max())


@pytest.mark.parametrize("tile_bytes", slow_but([None, 3_000], (3_000,)))
def test_more_layers_of_the_same_kinds_compile_no_more(tmp_path, monkeypatch, tile_bytes):
    set_tile_bytes(monkeypatch, tile_bytes)
    compiles = []
    for n_layers in (4, 7):  # the first kind stands last in both, and before another layer
        folder = made_up.save(tmp_path / str(n_layers), num_hidden_layers=n_layers)
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            model.logits(IDS)
            compiles.append(model.engine.compiles)
    assert compiles[0] == compiles[1]
    if tile_bytes is None:
        assert compiles[0]["block 8 1x8 cache 64 of 64"] == 3  # one for each kind


@pytest.mark.parametrize("tile_bytes", slow_but([None, 500], (500,)))
def test_a_stage_may_make_its_input_of_what_the_one_before_has_left(
    tmp_path, monkeypatch, tile_bytes
):
    folder = made_up.save(tmp_path / "published", model_type="sub_norm", num_hidden_layers=2)
    expected = logits_by_blocks(folder)
    set_tile_bytes(monkeypatch, tile_bytes)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TILED * np.abs(expected).max())


def test_the_made_up_family_differs_from_llama_where_it_counts():
    """Else what holds for it would be no more than what holds for Llama."""
    cfg = made_up.config()
    first, second, third, again = layer_kinds(cfg)
    assert (again, second.leaves) == (first, third.leaves)
    assert "gate_proj" not in {leaf.name for leaf in first.leaves}
    assert [stage.name for stage in second.stages] == ["gate_up", "down", "qkv", "o"]
    names = published_tensors(cfg).keys()
    assert "model.layers.0.mlp.gate_proj.weight" not in names
    assert "model.layers.1.mlp.gate_proj.weight" in names


def all_kinds():
    with pytest.MonkeyPatch.context() as patch:
        add_families(patch)
        for family in qwen_next.FAMILIES:
            patch.setitem(FAMILIES, family.model_type, family)
        others = ("llama", "ernie4_5_moe", *(family.model_type for family in qwen_next.FAMILIES))
        patch.setattr(experts, "MOVES_FROM", 24 * 64)  # the router of one of them moves
        two = {"num_experts": 2, "num_experts_per_tok": 1}
        more = {"qwen3_next": {"num_experts": 0}, "qwen3_5_moe_text": two}
        configs = [
            made_up.config(
                model_type=name, attention_bias=True, mlp_bias=True, **more.get(name, {})
            )
            for name in (*made_up.FAMILIES, *others)
        ]
        return [
            pytest.param(kind, id=f"{cfg.model_type}-{kind.name}")
            for cfg in configs
            for kind in dict.fromkeys(layer_kinds(cfg))
        ]


@pytest.mark.parametrize("kind", all_kinds())
def test_a_table_is_whole(kind):
    """Every streamed matrix is multiplied in one stage, biases go with a matrix, norms are used
    uncut, and every function that is named is there."""
    matrices = [leaf.name for leaf in kind.leaves if leaf.role is Role.MATRIX]
    multiplied = [leaf for stage in kind.stages for leaf in stage.leaves]
    assert sorted(multiplied) == sorted(matrices)
    for leaf in kind.leaves:
        assert (leaf.role is Role.BIAS) == (leaf.of is not None)
        if leaf.of:
            assert leaf.of in matrices
            assert leaf.name == bias_name(leaf.of)
            assert leaf.axes == kind.leaf(leaf.of).axes[:1]
            assert leaf.place is kind.leaf(leaf.of).place is Place.TILE
    functions = [f for stage in kind.stages for f in (stage.input, stage.finish) if f]
    used_whole = {leaf for function in functions for leaf in function.whole}
    assert used_whole == {leaf.name for leaf in kind.leaves if leaf.is_uncut}
    assert all(leaf.is_uncut for leaf in kind.leaves if leaf.moves)
    assert {leaf.name for leaf in kind.kept_in(Place.DEVICE)} == used_whole - kind.moving
    assert {function.name for function in functions} <= FUNCTIONS.keys()
    groups = [group for stage in kind.stages for group in stage.groups]
    assert {group.combine for group in groups} <= COMBINE.keys()
    assert all((len(group.leaves) == 1) == (group.combine is None) for group in groups)
    assert len({leaf.published for leaf in kind.leaves}) == len(kind.leaves)
