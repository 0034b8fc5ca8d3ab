"""gpt-oss with its experts in MXFP4: a tiny random model, written as it is published, gives the
logits of Transformers, as it is and converted, however its tokens come."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.checkpoint.layout import read_manifest
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.verify import verify_folder
from jlayer.cores.decode import decoded
from jlayer.encodings.tables import E8M0_NAN, MXFP4
from jlayer.families.experts import LOGIT_BIAS, ROUTER
from jlayer.families.registry import layer_kinds
from jlayer.model.cache import empty_cache
from jlayer.model.experts import route
from jlayer.model.products import dequantize, weight
from jlayer.model.stages import block
from jlayer.plan import making
from jlayer.plan.shapes import RunShape
from tests.campaigns import slow_but
from tests.chain import chain
from tests.reference.drawn import drawn_here, drawn_there
from tests.reference.gpt_oss_forms import drawn, in_transformers, reference_logits, write
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
N_TOKENS = 40  # several windows of 6
IDS = np.random.default_rng(0).integers(3, 133, (1, N_TOKENS))
PIECES = (1, 1, 2, 7, 3, 11, 15)
PROMPTS = [IDS[0, :n].tolist() for n in (31, 5, 12, 1)]
N_NEW = 8


@pytest.fixture(scope="module")
def made():
    """(the config, the published tensors)."""
    return drawn()


@pytest.fixture(scope="module")
def source(made, tmp_path_factory):
    """The folder as it is published."""
    return write(tmp_path_factory.mktemp("gpt-oss") / "published", *made)


@pytest.fixture(scope="module")
def layered(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("gpt-oss") / "layered"
    convert_checkpoint(source, target)
    return target


@pytest.fixture(scope="module")
def expected(made):
    return reference_logits(*made, IDS, torch.float32).numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_logits_of_a_prompt_as_published_and_converted(source, layered, expected):
    found = []
    for folder in (source, layered):
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            found.append(model.logits(IDS))
    assert_close(found[0], expected)
    np.testing.assert_array_equal(found[0], found[1])


def test_experts_that_are_plain_numbers(made, expected, tmp_path):
    """As Transformers saves what it has decoded: inputs first, gates and ups in turn."""
    plain = tmp_path / "plain"
    in_transformers(*made, torch.float32).save_pretrained(plain)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    convert_checkpoint(plain, tmp_path / "layered")
    for folder in (plain, tmp_path / "layered"):
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            assert_close(model.logits(IDS), expected)


@pytest.mark.slow
def test_logits_of_every_position_with_a_cache(source, expected):
    """Token by token, then in pieces that fit neither the window nor the sizes of chunks."""
    with AutoModel.from_pretrained(source, device="cpu") as model:
        forward = model.engine.start(RunShape(longest=16, context=N_TOKENS, all_logits=True))
        at = 0
        for size in PIECES:
            found = forward.sweep([IDS[0, at : at + size].tolist()], [at], all_logits=True)
            part = expected[:, at : at + size]
            atol = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(found, part, rtol=0, atol=atol)
            at += size
        assert at == N_TOKENS


@pytest.mark.slow
def test_a_batch_in_tiles_under_the_smallest_budget(made, source, monkeypatch):
    """The tokens that Transformers draws for each prompt by itself; none of the weights stay."""
    expected = drawn_there(in_transformers(*made, torch.float32), PROMPTS, n_new=N_NEW)
    with AutoModel.from_pretrained(source, device="cpu", context=64) as model:
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == expected
    set_tile_bytes(monkeypatch, 2000)
    with AutoModel.from_pretrained(source, device="cpu", context=64) as model:
        drawn_here(model, PROMPTS, n_new=N_NEW)
        least = model.engine.plan.as_dict()["smallest_device_memory_bytes"]
    with AutoModel.from_pretrained(source, device="cpu", context=64, device_memory=least) as model:
        assert drawn_here(model, PROMPTS, n_new=N_NEW) == expected


@pytest.mark.parametrize("kept", slow_but([(0, 0), (2, 3)], [(2, 3)]))
def test_what_is_kept_of_the_experts_changes_no_number(source, expected, monkeypatch, kept):
    """All of them stream, or some stay: on the device, in host memory."""
    numbers = iter(kept * 100)
    monkeypatch.setattr(making, "rooms", lambda counts, *_: (next(numbers),) * len(counts))
    with AutoModel.from_pretrained(source, device="cpu") as model:
        found = [model.logits(IDS) for _ in range(2)]
        assert (model.engine.totals.experts_on_device > 0) == (kept[0] > 0)
    monkeypatch.undo()
    with AutoModel.from_pretrained(source, device="cpu") as model:
        resident = model.logits(IDS)
    assert_close(resident, expected)
    for each in found:
        np.testing.assert_array_equal(each, resident)


@pytest.mark.slow
def test_of_many_rows_those_are_picked_that_chose_an_expert(made, source, monkeypatch):
    """With biases, of whole experts and of cut ones."""
    ids = np.random.default_rng(5).integers(3, 133, (1, 300))
    expected = reference_logits(*made, ids, torch.float32).numpy()
    for tile_bytes in (10_000_000, 2000):
        set_tile_bytes(monkeypatch, tile_bytes)
        with AutoModel.from_pretrained(source, device="cpu") as model:
            found = model.logits(ids)
            assert any("picked" in label for label in model.engine.compiles)
        assert_close(found, expected)


@pytest.mark.slow
def test_trees_of_guesses_change_no_token(source):
    """Rows of a tree see their ancestors alone, and every head its sink once."""
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7], [9, 4] * 4]
    given = {"temperature": 0, "max_new_tokens": 24, "eos_token_id": None}
    with AutoModel.from_pretrained(source, device="cpu", context=64) as model:
        plain = [jlayer.generate(model, each, speculate="off", **given) for each in prompts]
        guessed = jlayer.generate(model, prompts, speculate="lookup", draft_tokens=7, **given)
    assert [each.token_ids for each in guessed] == [each.token_ids for each in plain]
    assert all(each.stats["verified"] > 0 for each in guessed)


def test_conversion_keeps_the_bytes_of_the_experts(made, layered):
    from safetensors.numpy import load_file

    _, tensors = made
    assert verify_folder(layered).findings == ()
    assert read_manifest(layered).quantization.table.encodings == (MXFP4.name,)
    file = load_file(layered / "layer-00001.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        for expert in (0, 6):
            lead = f"model.layers.1.mlp.experts.{expert}.{name}"
            stack = f"model.layers.1.mlp.experts.{name}"
            for piece, published in (("weight.q", "blocks"), ("weight.scale", "scales")):
                found = file[f"{lead}.{piece}"]
                part = tensors[f"{stack}_{published}"][expert]
                np.testing.assert_array_equal(found, part.reshape(found.shape))
            np.testing.assert_array_equal(file[f"{lead}.bias"], tensors[f"{stack}_bias"][expert])


def test_half_bytes_stand_for_what_transformers_decodes():
    """Bit for bit, for all half bytes with all scales that are numbers; XLA may take what float32
    has no full precision for, below 2^-126, as zero."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    n_rows, width = 8, 256 * 32
    pieces = {
        "q": np.random.default_rng(0).integers(0, 256, (n_rows, width // 2), dtype=np.uint8),
        "scale": np.tile(np.arange(256, dtype=np.uint8), (n_rows, 1)),
    }
    blocks = torch.tensor(pieces["q"].reshape(1, n_rows, 256, 16))
    scales = torch.tensor(pieces["scale"][None])
    there = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].numpy().T
    with np.errstate(over="ignore"):
        here = decoded(MXFP4.name, pieces, width)
    held = weight(pieces, form=MXFP4.name, block_bytes=1 << 20)
    on_device = np.asarray(dequantize(held, width))

    def bits(numbers, least):
        columns = np.repeat(np.arange(256), 32)
        kept = np.ascontiguousarray(numbers[:, (columns >= least) & (columns < E8M0_NAN)])
        return kept.view(np.uint32)

    np.testing.assert_array_equal(bits(here, 0), bits(there, 0))
    np.testing.assert_array_equal(bits(on_device, 2), bits(there, 2))
    assert np.isnan(here[:, -32:]).all()


SWITCHES = [
    {"swiglu_limit": 7.0},
    {"rope_scaling": None},  # another scaling, which the family has where none is named
    {"swiglu_alpha": 1.0},
    {"num_experts_per_tok": 2},
    {"sliding_window": 7},
    {"rms_norm_eps": 0.1},
    {"rope_theta": 100.0},
    {"layer_types": ["full_attention"] * 3},
]


@pytest.mark.parametrize(
    "change",
    slow_but(SWITCHES, SWITCHES[:2]),
    ids=lambda change: next(iter(change)),
)
def test_every_switch_is_read_and_matters(made, expected, change, tmp_path):
    config, tensors = made
    config = {**config, **change}
    there = reference_logits(config, tensors, IDS, torch.float32).numpy()
    with AutoModel.from_pretrained(write(tmp_path, config, tensors), device="cpu") as model:
        assert_close(model.logits(IDS), there)
    assert np.abs(there - expected).max() > 1e-3 * np.abs(expected).max()


def test_the_ends_of_yarns_ramp_are_not_rounded(made, expected, tmp_path):
    config, tensors = made
    scaling = {**config["rope_scaling"], "truncate": True}
    config = {**config, "rope_scaling": scaling}
    there = reference_logits(config, tensors, IDS, torch.float32).numpy()
    with AutoModel.from_pretrained(write(tmp_path, config, tensors), device="cpu") as model:
        assert_close(model.logits(IDS), there)
    assert np.abs(there - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("is_rounded", [False, True], ids=["apart", "ties"])
def test_the_router_chooses_and_weighs_as_that_of_transformers(made, is_rounded):
    """With a bias; of experts that score the same, which one is for each library to say."""
    rng = np.random.default_rng(0)
    router = in_transformers(*made, torch.float32).model.layers[0].mlp.router
    weight, bias = np.eye(7, 64, dtype=np.float32), rng.normal(0, 1, 7).astype(np.float32)
    inputs = rng.normal(0, 2, (300, 64)).astype(np.float32)
    if is_rounded:
        bias, inputs = np.round(bias), np.round(inputs / 2)
    with torch.no_grad():
        router.weight.copy_(torch.as_tensor(weight))
        router.bias.copy_(torch.as_tensor(bias))
        _, weights, chosen = router(torch.as_tensor(inputs))
    there = torch.zeros(300, 7).scatter(1, chosen, weights).numpy()
    how = model_config(made[0], where="here").experts.router
    whole = {ROUTER: jnp.asarray(weight), LOGIT_BIAS: jnp.asarray(bias)}
    here, _ = route({}, whole, jnp.asarray(inputs), how=how)
    np.testing.assert_array_equal((np.asarray(here) != 0).sum(axis=1), how.n_chosen)
    if is_rounded:
        here, there = np.sort(here), np.sort(there)
    np.testing.assert_allclose(here, there, rtol=0, atol=2e-7)


def leaves_of(cfg, kind, tensors, layer):
    """The weights of a layer by leaf, as `block` takes them: those of all experts in one array."""

    def plain(leaf):
        lead = f"model.layers.{layer}."
        if not leaf.n_experts:
            return tensors[lead + leaf.published]
        stack = f"{lead}mlp.experts.{leaf.of or leaf.name}"
        if leaf.of:
            return tensors[f"{stack}_bias"]
        n_rows, width = leaf.shape(cfg)
        codes = tensors[f"{stack}_blocks"].reshape(leaf.n_experts, n_rows, -1)
        pairs = zip(codes, tensors[f"{stack}_scales"], strict=True)
        return np.stack([decoded(MXFP4.name, {"q": q, "scale": s}, width) for q, s in pairs])

    return {leaf.name: plain(leaf) for leaf in kind.leaves}


def test_block_is_the_reference_decoder_layer(made):
    config, tensors = made
    model = in_transformers(config, tensors, torch.float32).model
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        turned = model.rotary_emb(x, torch.arange(9)[None])
        expected = model.layers[1](x, attention_mask=mask, position_embeddings=turned)
    expected = expected[0] if isinstance(expected, tuple) else expected
    cfg = model_config(config, where="here")
    kind = layer_kinds(cfg)[1]
    weights = leaves_of(cfg, kind, tensors, 1)
    empty = empty_cache(kind.cache, n_rows=64, dtype="float32")
    found, _ = jax.jit(block(kind))(weights, x[0].numpy(), empty, chain(9))
    assert_close(found, expected.reshape(9, 64).numpy())


def test_sinks_take_their_share(made, expected, tmp_path):
    """Without them every head's weights would sum to one."""
    config, tensors = made
    low = {
        name: np.full_like(array, -1e4) if name.endswith("sinks") else array
        for name, array in tensors.items()
    }
    there = reference_logits(config, low, IDS, torch.float32).numpy()
    with AutoModel.from_pretrained(write(tmp_path, config, low), device="cpu") as model:
        assert_close(model.logits(IDS), there)
    assert np.abs(there - expected).max() > 1e-3 * np.abs(expected).max()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt_oss"
