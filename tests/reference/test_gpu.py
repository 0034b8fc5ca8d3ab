"""On an accelerator: the same logits as the reference on the CPU, within the same tolerances.

JAX_PLATFORMS=cuda pytest tests/reference/test_gpu.py
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jlayer import AutoModel, generate
from jlayer.convert import convert_checkpoint
from jlayer.encodings.registry import SCHEMES
from jlayer.engine.device import link_speed
from jlayer.engine.gpu import gpu_memory
from jlayer.plan import making as plans
from jlayer.streaming.devices import Devices
from tests.conftest import BUNDLED
from tests.quantized import converted, stand_for
from tests.reference import dense_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_memory() is None, reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        os.environ["JAX_PLATFORMS"] == "cpu",
        reason="JAX is held to the CPU here: run this file by itself with JAX_PLATFORMS=cuda",
    ),
]
CUBLAS_WORKSPACE = 32 << 20  # on Hopper; less on other cards
IDS = np.random.default_rng(0).integers(0, 4096, (1, 300))


def reference_logits(dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.double().numpy()


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    target = tmp_path_factory.mktemp("fable") / "layered"
    convert_checkpoint(BUNDLED, target)
    return target


@pytest.mark.parametrize("tile_bytes", [None, 100_000], ids=["whole", "tiles"])
def test_float32(layered, monkeypatch, tile_bytes):
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    expected = reference_logits(torch.float32)
    with AutoModel.from_pretrained(layered, device="gpu", dtype="float32") as model:
        found = model.logits(IDS)
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"float32: largest difference {worst:.2e} of max|logit|")
    assert worst <= 1e-5


@pytest.mark.parametrize("share", [0.5, 1])
def test_the_hosts_cores_beside_the_device(layered, monkeypatch, share):
    """In float32 the same logits and tokens; in bfloat16 no further from the exact ones than the
    reference is."""
    monkeypatch.setattr(plans, "TILE_BYTES", (100_000,))
    exact, rough = reference_logits(torch.float64), reference_logits(torch.bfloat16)
    expected, options = reference_logits(torch.float32), {"device": "gpu", "device_memory": "4GiB"}
    with AutoModel.from_pretrained(layered, dtype="float32", host_share=share, **options) as model:
        assert model.plan.host_share > 0
        found = model.logits(IDS)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with AutoModel.from_pretrained(layered, host_share=share, **options) as model:
        ours = np.sqrt(np.square(model.logits(IDS) - exact).mean())
    assert ours <= 1.2 * np.sqrt(np.square(rough - exact).mean())


@pytest.mark.parametrize("tile_bytes", [None, 100_000], ids=["whole", "tiles"])
def test_bfloat16(layered, monkeypatch, tile_bytes):
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    exact, rough = reference_logits(torch.float64), reference_logits(torch.bfloat16)
    with AutoModel.from_pretrained(layered, device="gpu") as model:
        found = model.logits(IDS)
    ours, theirs = (np.sqrt(np.square(one - exact).mean()) for one in (found, rough))
    print(f"bfloat16: root mean square to float64 {ours:.3e}, the reference's own {theirs:.3e}")
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("tile_bytes", [None, 6_000], ids=["whole", "tiles"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized(tmp_path, monkeypatch, scheme, tile_bytes):
    """Against the reference with the weights that were quantized to, biases among them."""
    source, layered = converted(tmp_path, scheme, attention_bias=True, mlp_bias=True)
    stand_for(source, layered)
    ids = np.random.default_rng(0).integers(0, 100, (1, 70))
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(layered, device="gpu") as model:
        assert model.dtype == "float32"
        found = model.logits(ids)
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{scheme}: largest difference {worst:.2e} of max|logit|")
    assert worst <= 1e-5


# One of each: norms, windows, caps, parts of heads that turn, fused matrices, states.
FAMILIES = [
    *("gemma2", "gemma3", "gemma4", "phi4-mini", "olmo2", "cohere-qk", "glm4", "smollm3"),
    *("stablelm-qk", "nemotron", "qwen3-sliding", "granite", "qwen3_5", "qwen3_next"),
]
FAMILY_IDS = np.random.default_rng(0).integers(3, 133, (1, 40))


@pytest.mark.parametrize("tile_bytes", [None, 3_000], ids=["whole", "tiles"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path, monkeypatch, name, tile_bytes):
    """As near to float64 as the reference is, or to 1e-5 of the largest logit."""
    dense_forms.save(tmp_path, name)
    exact, rough = (
        dense_forms.reference_logits(tmp_path, FAMILY_IDS, dtype).double().numpy()
        for dtype in (torch.float64, torch.float32)
    )
    monkeypatch.setattr(plans, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(tmp_path, device="gpu", dtype="float32") as model:
        found = model.logits(FAMILY_IDS)
        memory = model.engine.memory()
    most = np.abs(exact).max()
    worst, own = (np.abs(one - exact).max() / most for one in (found, rough))
    print(f"{name}: largest difference {worst:.2e} of max|logit|, the reference's own {own:.2e}")
    assert worst <= max(1e-5, 2 * own)
    assert memory["device_peak_bytes"] <= memory["device_budget_bytes"]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_guesses_of_families_change_no_token(tmp_path, name):
    dense_forms.save(tmp_path, name)
    prompt = np.resize(FAMILY_IDS[0, :9], 100).tolist()
    options = {"max_new_tokens": 40, "temperature": 0, "eos_token_id": None}
    with AutoModel.from_pretrained(tmp_path, device="gpu", dtype="float32") as model:
        plain = generate(model, [prompt, prompt[:30]], speculate="off", **options)
        found = generate(
            model, [prompt, prompt[:30]], speculate="lookup", draft_tokens=7, **options
        )
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert found[0].stats["drafted"]


def test_the_predicted_link_is_within_the_links_reach():
    """PCIe 3 x4 to PCIe 6 x16: a wrong unit or a lost wait cannot pass."""
    speed = link_speed(Devices(jax.devices()[:1]))
    print(f"link: {speed / 1e9:.1f} GB/s")
    assert 2e9 < speed < 130e9


def test_demo():
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "demo", "--json", "--device", "gpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["device"].startswith("cuda") or found["device"].startswith("gpu")
    assert found["memory"]["device_peak_how"] == "measured"
    assert found["memory"]["device_peak_bytes"] <= found["memory"]["device_budget_bytes"]
    print({key: found["stats"][key] for key in ("tokens_per_s", "load_s", "put_bytes")})


def test_bench_draws_and_finds_the_link(tmp_path):
    picture = tmp_path / "sweeps.png"
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "bench", "--json", "--timeline", str(picture)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert 2e9 < found["raw"]["link"]["median"] < 130e9
    assert all("link" in row["limits_s"] for row in found["sweeps"])
    assert picture.stat().st_size > 10_000
    print(found["raw"]["link"], found["conclusion"])


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_guesses_change_no_token(layered, temperature):
    """The draft is the model itself, kept in int8 with one scale a row: nearly always right."""
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 5}
    with AutoModel.from_pretrained(layered, device="gpu", dtype="float32", draft=BUNDLED) as model:
        plain = generate(model, "Once upon a time", speculate="off", **options)
        found = generate(model, "Once upon a time", draft_tokens=63, **options)
        draft = model.engine.draft
        # XLA counts cuBLAS's workspace with each program; a plan has it once, with the libraries.
        temporary = draft.temporary_bytes - CUBLAS_WORKSPACE
        assert draft.n_bytes + temporary <= found.plan["device"]["draft_bytes"]
    assert found.token_ids == plain.token_ids
    assert found.stats["tokens_per_sweep"] > 4
    assert found.memory["device_peak_bytes"] <= 4 << 30
