"""Quantized folders: products, logits and tokens are those of the decoded weights."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.safetensors import read_header
from jlayer.convert import convert_checkpoint
from jlayer.convert.transform import packed as on_host
from jlayer.convert.transform.quantize import quantize
from jlayer.cores.decode import decoded
from jlayer.encodings.grouped import block_rows
from jlayer.encodings.registry import SCHEMES
from jlayer.encodings.tables import TABLES
from jlayer.engine import engine
from jlayer.errors import CheckpointError
from jlayer.model.products import Encoded, InBlob, dequantize, product
from jlayer.plan import making
from jlayer.plan.machine import PLATFORMS
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.streaming.steps import Put
from tests.campaigns import slow_but
from tests.conftest import BUNDLED
from tests.convert.checkpoints import edit_manifest
from tests.quantized import converted, stand_for

IDS = [5, 17, 99, 3, 64, 128, 1]


def random_weight(rows, width, scheme, *, seed=0, block_bytes=1 << 30):
    """A random quantized matrix, and the same one decoded to float32."""
    numbers = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    pieces = quantize(numbers, scheme)
    arrays = {name: jnp.asarray(piece) for name, piece in pieces.items()}
    weight = Encoded(arrays, encoding=scheme.name, block_bytes=block_bytes)
    return weight, on_host.dequantize(scheme, pieces["q"], pieces["scale"], width=width)


@settings(deadline=None, max_examples=12)
@given(
    rows=st.sampled_from([1, 3, 37, 64]),
    width=st.sampled_from([1, 7, 32, 33, 129, 200]),
    scheme=st.sampled_from(list(SCHEMES.values())),
    block_bytes=st.sampled_from([1, 3000, 1 << 30]),
)
@example(rows=37, width=33, scheme=SCHEMES["int4"], block_bytes=3000)  # blocks that overlap
def test_a_product_is_that_with_the_weights_that_it_stands_for(rows, width, scheme, block_bytes):
    weight, exact = random_weight(rows, width, scheme, seed=rows, block_bytes=block_bytes)
    # Compiled, as they run; step by step, JAX would make a program of each operation and shape.
    assert np.array_equal(jax.jit(dequantize, static_argnums=1)(weight, width), exact)  # bit by bit
    x = np.random.default_rng(1).standard_normal((2, 3, width)).astype(np.float32)
    found = jax.jit(product)(jnp.asarray(x), weight)
    assert found.dtype == jnp.float32
    # Only the order of a sum may differ.
    scale = np.abs(x) @ np.abs(exact.T)
    assert (np.abs(found - x @ exact.T) <= 1e-6 * scale + 1e-30).all()


@pytest.mark.parametrize("columns", [1, 3, 200])  # multiplied in three ways on a CPU
@pytest.mark.parametrize("block_bytes", [3000, 1 << 30], ids=["blocks that overlap", "whole"])
@pytest.mark.parametrize("is_joined", [False, True], ids=["apart", "in a blob"])
def test_a_product_with_half_bytes_of_a_table(columns, block_bytes, is_joined):
    table, rng, rows, width = TABLES["mxfp4"], np.random.default_rng(0), 37, 96
    pieces = {
        "q": rng.integers(0, 256, (rows, width // 2), dtype=np.uint8),
        "scale": rng.integers(120, 130, (rows, width // 32), dtype=np.uint8),
    }
    exact = decoded(table.name, pieces, width)
    held = pieces
    if is_joined:
        blob = jnp.asarray(np.concatenate([[7] * 5, *(a.reshape(-1) for a in pieces.values())]))
        offsets = (5, 5 + pieces["q"].size)
        held = {
            name: InBlob(blob.astype(jnp.uint8), at, piece.shape, "uint8")
            for at, (name, piece) in zip(offsets, pieces.items(), strict=True)
        }
    x = rng.standard_normal((columns, width)).astype(np.float32)
    weight = Encoded(held, encoding=table.name, block_bytes=block_bytes)
    found = jax.jit(product)(jnp.asarray(x), weight)
    assert (np.abs(found - x @ exact.T) <= 1e-6 * (np.abs(x) @ np.abs(exact.T))).all()
    assert np.array_equal(jax.jit(dequantize, static_argnums=1)(weight, width), exact)


def test_in_bfloat16_the_weights_are_rounded_once():
    weight, exact = random_weight(24, 96, SCHEMES["int4"], block_bytes=2000)
    x = np.random.default_rng(1).standard_normal((9, 96)).astype(jnp.bfloat16)
    rounded = exact.astype(jnp.bfloat16).astype(np.float32)
    expected = x.astype(np.float32) @ rounded.T
    np.testing.assert_allclose(product(jnp.asarray(x), weight), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 100_000))
def test_blocks_are_within_bounds_and_leave_no_row_out(n_rows, row_bytes, block_bytes):
    height = block_rows(n_rows, row_bytes, block_bytes)
    assert 1 <= height <= n_rows
    assert height == n_rows or height % 8 == 0
    assert height * row_bytes <= max(block_bytes, 8 * row_bytes)


def test_what_is_written_out_is_a_block_and_never_the_matrix():
    weight, _ = random_weight(512, 256, SCHEMES["int4"], block_bytes=64 * 256 * 4)
    x = jnp.ones((2, 256), jnp.float32)
    program = jax.jit(product).lower(x, weight).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 64 * 256 * 4


STYLES = [{"attention_bias": True, "mlp_bias": True}, {"tied": True}, {}]


@pytest.mark.reference
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("style", slow_but(STYLES, STYLES[1:2]), ids=str)
def test_logits_are_those_of_the_reference_with_these_weights(tmp_path, scheme, style):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source, layered = converted(tmp_path, scheme, **style)
    stand_for(source, layered)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits.numpy()
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        assert model.dtype == "float32"
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module", params=SCHEMES)
def layered(request, tmp_path_factory):
    return converted(tmp_path_factory.mktemp(request.param), request.param)[1]


@pytest.fixture(scope="module")
def whole(layered):
    """Logits and six greedy tokens of the model in whole layers."""
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        logits = model.logits(IDS)
        assert model.plan.tiling.is_whole
        return logits, model.generate(IDS, max_new_tokens=6, do_sample=False)


@pytest.mark.slow
@pytest.mark.parametrize(("tile_bytes", "keeps_layers"), [(6_000, True), (1_500, False)])
def test_tiled_equals_whole_wherever_it_lies(layered, whole, monkeypatch, tile_bytes, keeps_layers):
    expected, tokens = whole
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(layered, device="cpu", keeps_layers=keeps_layers) as model:
        assert len(model.plan.tiles) > 12
        assert model.generate(IDS, max_new_tokens=6, do_sample=False) == tokens
        found = model.logits(IDS)
        for tile in model.plan.tiles:  # the pieces of a matrix come with the same rows
            rows = {}
            for part in tile.parts:
                rows.setdefault(part.matrix, set()).add((part.first_row, part.shape[0]))
            assert all(len(own) == 1 for own in rows.values())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", [None, 6_000, 1_500])
def test_what_crosses_as_one_array_gives_the_same_logits(layered, monkeypatch, tile_bytes):
    """As on a GPU; most arrays begin where no disk block does."""
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(layered, device="cpu", keeps_layers=False) as model:
        expected = model.logits(IDS)
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=True))
    put = []
    with AutoModel.from_pretrained(layered, device="cpu", keeps_layers=False) as model:
        model.engine.watch.on_taken = lambda step, made: isinstance(step, Put) and put.append(made)
        assert np.array_equal(model.logits(IDS), expected)
        assert len(put) >= len(model.plan.tiles)
        assert all(isinstance(made, jax.Array) and made.ndim == 1 for made in put)


@pytest.mark.slow
def test_every_mix_of_tiers_gives_the_same_tokens(layered, whole, monkeypatch):
    _, expected = whole
    monkeypatch.setattr(making, "TILE_BYTES", (1_500,))
    kinds = list(Tier)

    def mixed(*args, **options):
        made = making.make_plan(*args, **options)
        return replace(made, tiers=tuple(kinds[i % 3] for i in range(len(made.tiles))))

    monkeypatch.setattr(engine, "make_plan", mixed)
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        assert model.generate(IDS, max_new_tokens=6, do_sample=False) == expected
        assert set(model.plan.tiers) == set(Tier)


@pytest.mark.parametrize("tile_bytes", slow_but([None, 6_000], (6_000,)))
def test_streamed_equals_resident(layered, monkeypatch, tile_bytes):
    """The same programs with weights that were loaded whole, without slots, readers or schedule."""
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        streamed = model.logits(IDS)
        forward = model.engine.start(RunShape(1, len(IDS), len(IDS), all_logits=True))

        def load(part):
            segment = model.engine.store.segment_of(part.tensor)
            raw = np.fromfile(segment.file, np.uint8)[segment.offset :][: segment.n_bytes]
            whole = raw.view(np.dtype(part.dtype)).reshape(-1, *part.shape[1:])
            return jnp.array(whole[part.first_row : part.first_row + part.shape[0]])

        forward.compile(len(IDS), all_logits=True)
        passing = forward.enter([IDS], [0], all_logits=True)
        found = []
        for tile in forward.plan.tiles:
            outputs = forward.advance(tile, {part.leaf: load(part) for part in tile.parts}, passing)
            if tile.kind is None:
                found.append(np.concatenate(outputs)[None, : len(IDS)])
        forward.close()
        assert np.array_equal(np.concatenate(found, axis=2), streamed)


@pytest.mark.slow
def test_the_smallest_accepted_budget_holds_the_blocks_too(layered):
    with AutoModel.from_pretrained(layered, device="cpu") as model:
        expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
        smallest = making.make_plan(
            model.engine.weights,
            replace(model.plan.machine, device_budget=1),
            RunShape(1, len(IDS), len(IDS) + 4),
        ).device_peak_bytes
    with AutoModel.from_pretrained(layered, device="cpu", device_memory=smallest) as model:
        assert model.generate(IDS, max_new_tokens=4, do_sample=False) == expected
        assert model.engine.device_peak_bytes <= smallest


def test_a_flipped_bit_in_any_piece_is_found_while_streaming(tmp_path):
    _, layered = converted(tmp_path, "int4")
    for name in ("embed_tokens.weight.scale", "1.mlp.up_proj.weight.q", "lm_head.weight.scale"):
        path, entry = next(
            (path, entry)
            for path in layered.glob("*.safetensors")
            for tensor, entry in read_header(path).tensors.items()
            if tensor.endswith(name)
        )
        whole = path.read_bytes()
        raw = bytearray(whole)
        raw[entry.offset + entry.n_bytes // 2] ^= 1
        path.write_bytes(raw)
        with (
            AutoModel.from_pretrained(layered, device="cpu") as model,
            pytest.raises(CheckpointError, match=name),
        ):
            model.logits(IDS)
        path.write_bytes(whole)


def test_an_unknown_scheme_is_refused_by_name(tmp_path, capsys):
    convert_checkpoint(BUNDLED, tmp_path / "out", quantize="int8")

    def rename(manifest):
        manifest["quantization"]["scheme"] = "int5-super"

    edit_manifest(tmp_path / "out", rename)
    for verb in ("generate", "verify", "plan"):
        words = [verb, str(tmp_path / "out")]
        assert main([*words, "-p", "x"] if verb == "generate" else words) == 3
        assert "int5-super" in capsys.readouterr().err


def test_a_trained_model_still_tells_its_story(tmp_path, capsys):
    convert_checkpoint(BUNDLED, tmp_path / "out", quantize="int8")
    words = ["generate", str(tmp_path / "out"), "--prompt-ids", "0,399", "-n", "8", "--json"]
    assert main([*words, "--device", "cpu", "--temperature", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "bfloat16"
    assert found["text"].isprintable()
