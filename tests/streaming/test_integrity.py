"""What streams is what was converted: damage anywhere ends in a refusal by name, before a token."""

import json
import shutil

import pytest

from jlayer import AutoModel
from jlayer.checkpoint import digest
from jlayer.checkpoint.layout import read_manifest
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError
from jlayer.plan.tiles import Tier
from tests.campaigns import slow_but
from tests.tiny import tiny_llama

IDS = [5, 17, 99, 3, 64, 128, 1]
MATRICES = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
MATRICES += ["mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biased")
    source = tiny_llama(folder / "source", attention_bias=True, dtype="bfloat16")
    convert_checkpoint(source, folder / "layered")
    return folder / "layered"


def damage(folder, tensor, target, *, at=0.5):
    """A copy of a folder with one low bit of one number of a tensor changed; returns the file."""
    shutil.copytree(folder, target)
    for name, listed in read_manifest(folder).files.items():
        if tensor in listed.tensors:
            place = listed.tensors[tensor]
            with open(target / name, "r+b") as file:
                file.seek(place.offset + int(place.n_bytes * at))
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
            return name
    raise AssertionError(tensor)


def refusal(folder):
    """What a generation says, its model opened and closed around it."""
    with (
        pytest.raises(CheckpointError) as error,
        AutoModel.from_pretrained(folder, device="cpu") as model,
    ):
        model.generate(IDS, max_new_tokens=1)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "tile_bytes"),
    [
        *((f"model.layers.1.{name}.weight", 1000) for name in MATRICES),
        (f"model.layers.1.{MATRICES[-1]}.weight", None),
        ("model.layers.2.self_attn.k_proj.bias", 1000),
        ("model.layers.0.input_layernorm.weight", None),
        ("model.norm.weight", None),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_flipped_bit_is_refused_by_its_tensor_before_a_token(
    biased, tmp_path, cuts, tensor, tile_bytes
):
    cuts(tile_bytes)
    name = damage(biased, tensor, tmp_path / "damaged")
    said = refusal(tmp_path / "damaged")
    assert name in said
    assert f"tensor {tensor}: damaged" in said
    if "proj.weight" in tensor:
        assert said.startswith("layer 1")


@pytest.mark.parametrize("tier", slow_but(Tier, (Tier.HOST,)))
def test_wherever_a_tile_lives_it_is_checked_at_its_first_read(
    biased, tmp_path, cuts, tiers_in_turn, tier
):
    cuts(1000)
    tiers_in_turn(tier)
    damage(biased, "model.layers.1.mlp.up_proj.weight", tmp_path / "damaged", at=0.99)
    assert refusal(tmp_path / "damaged").startswith("layer 1 gate_up")
    with AutoModel.from_pretrained(biased, device="cpu") as model:
        model.generate(IDS, max_new_tokens=3)


def test_it_stays_refused_when_asked_again(biased, tmp_path):
    damage(biased, "model.layers.1.mlp.up_proj.weight", tmp_path / "damaged")
    with AutoModel.from_pretrained(tmp_path / "damaged", device="cpu") as model:
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"up_proj.weight: damaged"):
                model.generate(IDS, max_new_tokens=1)


def test_a_tied_table_is_checked_as_the_head_streams_it(tmp_path):
    source = tiny_llama(tmp_path / "source", tied=True)
    convert_checkpoint(source, tmp_path / "layered")
    damage(tmp_path / "layered", "model.embed_tokens.weight", tmp_path / "damaged")
    assert "embed_tokens.weight: damaged" in refusal(tmp_path / "damaged")


def test_a_layer_of_another_model_of_the_same_shape_is_refused(tiny, tmp_path):
    convert_checkpoint(tiny_llama(tmp_path / "source", seed=1), tmp_path / "other")
    shutil.copytree(tiny, tmp_path / "mixed")
    name = "layer-00001.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "mixed" / name)
    assert "layer-00001.safetensors: tensor" in (said := refusal(tmp_path / "mixed"))
    assert "or of another model" in said


def test_layers_that_changed_places_are_refused_at_open(tiny, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny, folder)
    (folder / "layer-00001.safetensors").rename(folder / "spare")
    (folder / "layer-00002.safetensors").rename(folder / "layer-00001.safetensors")
    (folder / "spare").rename(folder / "layer-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors holds other tensors"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_a_changed_config_is_refused_at_open(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(CheckpointError, match=r"config\.json: changed since it was converted"):
        AutoModel.from_pretrained(tmp_path / "changed", device="cpu")


@pytest.fixture
def hashed(monkeypatch):
    """The bytes of each digest that is taken of rows."""
    sizes, real = [], digest.rows_digest

    def noting(data, row_bytes, *, first_row=0):
        sizes.append(len(data))
        return real(data, row_bytes, first_row=first_row)

    monkeypatch.setattr(digest, "rows_digest", noting)
    return sizes


def test_nothing_is_hashed_twice(biased, cuts, plans_anew, hashed):
    """The first sweep sees every matrix once, a plan that is made anew begins with what is left."""
    with AutoModel.from_pretrained(biased, device="cpu", keeps_layers=False) as model:
        model.generate(IDS, max_new_tokens=4)
        assert sum(hashed) == model.engine.store.weight_bytes
        n_tiles = len(model.plan.tiles)
        cuts(1000)
        plans_anew()
        model.generate(IDS, max_new_tokens=4)
        assert len(model.plan.tiles) > n_tiles
        assert sum(hashed) == model.engine.store.weight_bytes


def interrupt(model, name):
    """Starts a generation, and interrupts it at the first step of a tile of this name."""

    def stop(step, tile):
        if tile.name.startswith(name):
            raise KeyboardInterrupt

    model.engine.watch.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, max_new_tokens=1)
    model.engine.watch.on_step = None


def test_a_plan_made_anew_in_the_first_sweep_checks_all_the_same(biased, cuts, plans_anew, hashed):
    """Interrupted before all rows of a tensor came, cut otherwise, and gone on with."""
    with AutoModel.from_pretrained(biased, device="cpu") as model:
        expected = model.generate(IDS, max_new_tokens=4)
    cuts(300)
    with AutoModel.from_pretrained(biased, device="cpu", keeps_layers=False) as model:
        interrupt(model, "layer 1 gate_up 2")
        cuts(None)
        plans_anew()
        assert model.generate(IDS, max_new_tokens=4) == expected
        assert model.plan.tiling.is_whole
        # Every tensor has been checked by now: with other tiles again, nothing is left to hash.
        hashed.clear()
        cuts(1000)
        assert model.generate(IDS, max_new_tokens=4) == expected
        assert not model.plan.tiling.is_whole
        assert hashed == []


def test_damage_shows_in_a_plan_made_anew_in_the_first_sweep(biased, tmp_path, cuts, plans_anew):
    """The damaged rows have come before the interrupt, and others of their tensor have not."""
    damage(biased, "model.layers.1.mlp.up_proj.weight", tmp_path / "damaged", at=0.01)
    cuts(300)
    with AutoModel.from_pretrained(tmp_path / "damaged", device="cpu", keeps_layers=False) as model:
        interrupt(model, "layer 1 gate_up 9")
        cuts(None)
        plans_anew()
        with pytest.raises(CheckpointError, match=r"layer 1: .*up_proj.weight: damaged"):
            model.generate(IDS, max_new_tokens=1)
