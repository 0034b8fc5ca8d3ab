"""The gradients of adapters, as layers stream, are those of PEFT's model, resident in torch."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import torch as torch_files
from safetensors.numpy import load_file

from jlayer.additions import Additions
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS, read_adapter
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.families.registry import has_state
from jlayer.plan.need import total
from jlayer.run_config import RunConfig
from jlayer.tuning import planning, rows
from jlayer.tuning.base import Base
from jlayer.tuning.settings import Settings
from tests.conftest import BUNDLED
from tests.quantized import converted, stand_for
from tests.reference import (
    dense_forms,
    fp8_forms,
    gpt_oss_forms,
    latent_forms,
    mixture_forms,
)
from tests.reference.test_adapter import ATTENTION, DENSE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LENGTH = 12
EVERYTHING = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
RUN = {"device": "cpu", "device_memory": 1 << 30, "host_memory": 4 << 30}


def some_lanes(n_vocab, *, packs):
    """(lanes of random texts, those texts as (ids, weights)): some fill a lane, some share one or
    are padded."""
    generator = np.random.default_rng(0)
    lengths = [(LENGTH,), (LENGTH,), (7, 4), (3,)] if packs else [(LENGTH,), (5,), (LENGTH,), (3,)]
    names = ("ids", "targets", "weights", "positions", "texts")
    lanes = {name: np.zeros((len(lengths), LENGTH), np.int32) for name in names}
    lanes["weights"] = lanes["weights"].astype(np.float32)
    texts = []
    for lane, of_lane in enumerate(lengths):
        at = 0
        for number, n in enumerate(of_lane):
            ids = generator.integers(3, n_vocab, n + 1)
            weights = generator.random(n).astype(np.float32) * generator.integers(0, 2, n)
            texts.append((ids, weights))
            own = slice(at, at + n)
            found = (ids[:-1], ids[1:], weights, np.arange(n), number + 1)
            for name, values in zip(names, found, strict=True):
                lanes[name][lane, own] = values
            at += n
    return SimpleNamespace(**lanes), texts


def of_peft(base, folder, texts, load, options):
    """Saves an adapter of random numbers -> (the losses of each text, the gradients by the names
    that its tensors are saved under)."""
    model = load(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(0)
    own = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    for value in own.values():
        torch.nn.init.normal_(value, std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    losses = []
    for ids, weights in texts:
        logits = tuned(torch.tensor(ids[None, :-1])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        (loss * torch.tensor(weights)).sum().backward()
        losses.append(loss.detach().numpy())
    return losses, {n.replace(".default", ""): p.grad.numpy() for n, p in own.items()}


def state_of(folder, cfg):
    """(the adapter's numbers, what it adds to which matrix, the tensors of each)."""
    adapter, tensors = read_adapter(folder, cfg), load_file(folder / WEIGHTS)
    pairs = {name: {"a": low.a, "b": low.b} for name, low in adapter.matrices.items()}
    state = {n: {side: tensors[t] for side, t in pair.items()} for n, pair in pairs.items()}
    rows = ((name, low.rank, low.scale) for name, low in adapter.matrices.items())
    return state, Additions.of_one(rows), pairs


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def compare(base, source, folder, load, options, *, tile_bytes, tolerance=1e-4):
    cfg = read_config(base)
    lanes, texts = some_lanes(min(60, cfg.vocab_size), packs=not has_state(cfg))
    losses, gradients = of_peft(source, folder, texts, load, options)
    state, adapter, pairs = state_of(folder, cfg)
    settings = Settings(tokens_per_step=4 * LENGTH, length=LENGTH, packs=not has_state(cfg))
    run = RunConfig(**RUN, dtype="float32")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planning, "TILE_BYTES", (tile_bytes,))
        monkeypatch.setattr(planning, "CHUNK_ROWS", (2 * LENGTH,))
        before = live_bytes()
        model = Base(base, run, settings, adapter, state)
    held = []
    try:
        assert model.plan.order.chunk_lanes == 2
        chunks = list(rows.chunks_of(model.cfg, lanes, 2, share=1.0))

        def check():
            held.append(live_bytes() - before)

        layout = model.stepper.layout
        found = model.stepper.run(model.executor, chunks, layout.flat(state), check=check)
        own_gradients = layout.views(found.gradients)
        temporary = model.programs.temporary_bytes
    finally:
        model.close()
    planned = model.plan.device
    assert temporary <= planned.temporary_bytes
    assert max(held) + temporary <= total(planned)
    own = np.concatenate(found.losses).reshape(lanes.texts.shape)
    own = own[lanes.texts > 0]
    expected = np.concatenate(losses)
    np.testing.assert_allclose(own, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert own_gradients.keys() == state.keys()
    for name, pair in pairs.items():
        for side, tensor in pair.items():
            expected = gradients[tensor]
            allowed = tolerance * np.abs(expected).max()
            np.testing.assert_allclose(
                own_gradients[name][side], expected, rtol=0, atol=allowed, err_msg=tensor
            )


def family(name, folder, targets, forms, *, tile_bytes=2000):
    forms.save(folder / "model", name)
    options = {**EVERYTHING, "target_modules": targets}
    compare(
        *(folder / "model", folder / "model", folder / "adapter", forms.load, options),
        tile_bytes=tile_bytes,
    )


@pytest.mark.parametrize("tile_bytes", [pytest.param(1 << 20, marks=pytest.mark.slow), 1500])
def test_llama(tmp_path, tile_bytes):
    family("llama", tmp_path, "all-linear", dense_forms, tile_bytes=tile_bytes)


def test_a_gated_delta_net(tmp_path):
    family("qwen3_next", tmp_path, DENSE["qwen3_next"], dense_forms)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DENSE.keys() - {"llama", "qwen3_next"}))
def test_any_dense_family(tmp_path, name):
    family(name, tmp_path, DENSE[name], dense_forms)


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_a_mixture(tmp_path, name):
    family(name, tmp_path, ATTENTION, mixture_forms, tile_bytes=1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(mixture_forms.MIXTURES.keys() - {"qwen3_moe"}))
def test_any_mixture(tmp_path, name):
    family(name, tmp_path, ATTENTION, mixture_forms, tile_bytes=1 << 20)


@pytest.mark.parametrize(
    ("forms", "name", "targets"),
    [
        (latent_forms, "deepseek_v3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]),
        pytest.param(
            *(mixture_forms, "qwen2_moe", r".*\.(q_proj|shared_expert\.(gate|up|down)_proj)"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_latents_and_a_shared_expert(tmp_path, forms, name, targets):
    family(name, tmp_path, targets, forms, tile_bytes=1 << 20)


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_over_quantized_weights(tmp_path, scheme):
    """As over the weights that they stand for."""
    source, layered = converted(tmp_path, scheme)
    stand_for(source, layered)
    load = transformers.AutoModelForCausalLM.from_pretrained
    compare(layered, source, tmp_path / "adapter", load, EVERYTHING, tile_bytes=1500)


def test_some_layers_alone(tmp_path):
    """Below the lowest with an adapter nothing goes back."""
    dense_forms.save(tmp_path / "model", "llama")
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    where = tmp_path / "model", tmp_path / "model", tmp_path / "adapter"
    compare(*where, dense_forms.load, options, tile_bytes=1500)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["layers_to_transform"] == [1]


PLAIN = transformers.AutoModelForCausalLM.from_pretrained


@pytest.mark.slow
def test_experts_in_mxfp4(tmp_path):
    config, tensors = gpt_oss_forms.drawn()
    base = gpt_oss_forms.write(tmp_path / "model", config, tensors)

    def load(folder, dtype):
        return gpt_oss_forms.in_transformers(config, tensors, dtype)

    options = {**EVERYTHING, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    compare(base, base, tmp_path / "adapter", load, options, tile_bytes=1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["grid", "compressed by channel"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_over_fp8(tmp_path, name, form):
    """As over the weights that they stand for."""
    base, plain = fp8_forms.save(tmp_path, name, form)
    targets = ["o_proj"] + (["q_a_proj"] if name == "deepseek_v3" else ["q_proj", "down_proj"])
    options = {**EVERYTHING, "target_modules": targets}
    compare(base, plain, tmp_path / "adapter", PLAIN, options, tile_bytes=1 << 20)


@pytest.mark.slow
def test_over_a_gguf_file(tmp_path):
    convert_checkpoint(BUNDLED, tmp_path / "model")
    file = tmp_path / "model.gguf"
    export_checkpoint(tmp_path / "model", file, format="gguf", type="bf16")
    options = {**EVERYTHING, "target_modules": ["v_proj", "down_proj"]}
    compare(file, BUNDLED, tmp_path / "adapter", PLAIN, options, tile_bytes=100_000)


@pytest.mark.slow
def test_other_scales_in_other_layers(tmp_path):
    dense_forms.save(tmp_path / "model", "llama")
    options = {**EVERYTHING, "alpha_pattern": {"layers.1.self_attn.q_proj": 14}}
    where = tmp_path / "model", tmp_path / "model", tmp_path / "adapter"
    compare(*where, dense_forms.load, options, tile_bytes=1500)


@pytest.mark.slow
def test_layers_of_a_kind_that_are_stored_in_other_ways(tmp_path):
    """Such have other tiles: of a matrix in 16 bits a tile has twice the rows."""
    dense_forms.save(tmp_path / "model", "llama")
    file = tmp_path / "model" / "model.safetensors"
    tensors = torch_files.load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    torch_files.save_file(tensors, file, metadata={"format": "pt"})
    where = tmp_path / "model", tmp_path / "model", tmp_path / "adapter"
    compare(*where, dense_forms.load, EVERYTHING, tile_bytes=1500)
