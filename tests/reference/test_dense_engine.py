"""What the engine does, for other families than Llama: rounding, quantized weights, the host's
cores, drafts, and how often programs are compiled."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.config import model_config
from jlayer.families.registry import layer_kinds, published_tensors
from jlayer.model.ops import ACTIVATION
from tests.convert.checkpoints import edit_json, tensor_of, write_tensors
from tests.reference.dense_forms import FREE, FULL, SLIDING, reference_logits, save
from tests.reference.drawn import assert_quantized_stands_for
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit
IDS = np.random.default_rng(0).integers(3, 133, (1, 40))
# Of each form of norm one: weighted after rounding, before it, 1 + weight, layer norms without a
# bias, with one, of 1 + weight, and without a weight.
NORMS = ["qwen3", "olmo2", "gemma2", "cohere", "starcoder2", "nemotron", "olmo"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_is_as_close_to_the_truth_as_the_reference(tmp_path, name):
    """Root mean square against a float64 run, pooled over five seeds."""
    ours, theirs = [], []
    for seed in range(5):
        folder = save(tmp_path / str(seed), name, seed=seed, dtype="bfloat16")
        exact, rough = (
            reference_logits(folder, IDS, dtype).double().numpy()
            for dtype in (torch.float64, torch.bfloat16)
        )
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            assert model.dtype == "bfloat16"
            ours.append(np.square(model.logits(IDS) - exact).mean())
        theirs.append(np.square(rough - exact).mean())
    assert np.sqrt(np.mean(ours)) <= 1.2 * np.sqrt(np.mean(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["phi3", "cohere-qk", "gemma4", "olmo", "qwen3_5"])
def test_quantized_weights_are_those_that_they_stand_for(tmp_path, name, scheme):
    """Fused matrices, norms of two axes, tied heads, no vector at all, a convolution."""
    source = save(tmp_path / "source", name)
    assert_quantized_stands_for(
        source, tmp_path / "layered", scheme, IDS, reference_logits, tolerance=TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "cohere2", "phi3", "granite", "qwen3_5"])
def test_the_hosts_cores_multiply_any_family(tmp_path, monkeypatch, name):
    """Of the head's products too logits are made: scaled, and capped."""
    save(tmp_path, name)
    expected = reference_logits(tmp_path, IDS, torch.float32).numpy()
    set_tile_bytes(monkeypatch, 3_000)
    with AutoModel.from_pretrained(
        tmp_path, device="cpu", dtype="float32", host_share=0.5
    ) as model:
        assert model.plan.host_share > 0
        found = model.logits(IDS)
    most = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * TOLERANCE * most)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_guesses"),
    [
        *((name, 15) for name in ("qwen3", "gemma", "cohere", "stablelm", "phi3-partial")),
        ("mistral", 15),
        ("mistral", 127),  # more nodes are tried than have room in the pools of its window
    ],
)
def test_a_draft_of_any_family_guesses_what_its_own_kind_says(tmp_path, name, n_guesses):
    """A draft that is the model itself is nearly always right, far beyond a window too."""
    save(tmp_path, name)
    options = {"temperature": 0, "max_new_tokens": 30, "eos_token_id": None}
    prompt = IDS[0].tolist()
    with AutoModel.from_pretrained(
        tmp_path, device="cpu", dtype="float32", draft=tmp_path
    ) as model:
        plain = jlayer.generate(model, prompt, speculate="off", **options)
        found = jlayer.generate(model, prompt, speculate="draft", draft_tokens=n_guesses, **options)
    assert found.token_ids == plain.token_ids
    assert found.stats["tokens_per_sweep"] > 3


def three_kinds(folder, n_layers):
    """A SmolLM 3 with layers of three kinds in turn, of random weights."""
    config = {
        "model_type": "smollm3",
        **FREE,
        "num_hidden_layers": n_layers,
        "layer_types": ([FULL, SLIDING, FULL] * n_layers)[:n_layers],
        "no_rope_layers": [int(n % 3 == 0) for n in range(n_layers)],
        "use_sliding_window": True,
        "sliding_window": 6,
    }
    cfg, rng = model_config(config, where="here"), np.random.default_rng(0)
    assert len(set(layer_kinds(cfg))) == 3
    folder.mkdir()
    tensors = {
        name: tensor_of(rng.normal(0, 0.1, shape).astype(np.float32))
        for name, shape in published_tensors(cfg).items()
    }
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_programs_are_compiled_for_kinds_and_not_for_layers(tmp_path):
    found = []
    for n_layers in (3, 24):
        with AutoModel.from_pretrained(
            three_kinds(tmp_path / str(n_layers), n_layers), device="cpu"
        ) as model:
            model.logits(IDS)
            found.append(model.engine.compiles)
    assert found[0] == found[1]
    assert sum(count for label, count in found[0].items() if label.startswith("block")) == 3


def test_gelu_is_not_its_approximation():
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    for name, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        expected = torch.nn.functional.gelu(
            torch.tensor(x, dtype=torch.float64), approximate=approximate
        )
        np.testing.assert_allclose(ACTIVATION[name](jnp.asarray(x)), expected, rtol=0, atol=1e-6)
    apart = np.abs(ACTIVATION["gelu"](x) - ACTIVATION["gelu_tanh"](x)).max()
    assert apart > 1e-4


@pytest.mark.parametrize(("act", "is_exact"), [("gelu", True), ("gelu_pytorch_tanh", False)])
def test_either_gelu_is_taken_where_it_is_named(tmp_path, act, is_exact):
    """They move the logits by 3e-4 of the largest, which 1e-5 sees."""
    save(tmp_path, "starcoder2")
    edit_json(tmp_path / "config.json", hidden_act=act)
    expected = reference_logits(tmp_path, IDS, torch.float32).numpy()
    edit_json(tmp_path / "config.json", hidden_act="gelu_pytorch_tanh" if is_exact else "gelu")
    other = reference_logits(tmp_path, IDS, torch.float32).numpy()
    edit_json(tmp_path / "config.json", hidden_act=act)
    with AutoModel.from_pretrained(tmp_path, device="cpu") as model:
        found = model.logits(IDS)
    most = np.abs(expected).max()
    assert np.abs(found - expected).max() <= TOLERANCE * most < np.abs(found - other).max() / 5
