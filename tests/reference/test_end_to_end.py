"""A random model of each style, saved by the reference, converted and streamed by us: the same
logits."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.plan.shapes import RunShape
from tests.convert.checkpoints import edit_tensors, numbers, tensor_of
from tests.tiny import tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

# The reference differs from itself by 7e-7 (its own two attention paths); float32 rounding of
# another order by some 1e-6.
TOLERANCE = 1e-5
PROMPT = 150  # more than two chunks of 64, so that chunks meet inside a layer
SEEDS = range(5)


def build(folder, style, *, seed=0, dtype="float32"):
    source = tiny_llama(folder / f"source-{seed}", seed=seed, dtype=dtype, **style)
    target = folder / f"target-{seed}"
    convert_checkpoint(source, target)
    return source, target


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 133, (1, n))


def reference_logits(source, ids, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


def test_prefill_and_every_decoded_position(tmp_path, style):
    source, target = build(tmp_path, style)
    ids = random_ids(PROMPT)
    expected = reference_logits(source, ids, torch.float32).numpy()
    tolerance = TOLERANCE * np.abs(expected).max()
    with AutoModel.from_pretrained(target, device="cpu") as model:
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=tolerance)
        # Token by token, then in pieces that do not fit the chunk sizes: the cache carries what
        # went before.
        forward = model.engine.start(RunShape(longest=64, context=PROMPT, all_logits=True))
        at = 0
        for size in (1, 1, 1, 2, 7, 3, 40, 66, 1, 28):
            found = forward.sweep([ids[0, at : at + size].tolist()], [at], all_logits=True)
            np.testing.assert_allclose(found, expected[:, at : at + size], rtol=0, atol=tolerance)
            at += size
        assert at == PROMPT


@pytest.mark.parametrize("in_place", [False, True])
def test_every_tensor_may_have_a_dtype_of_its_own(tmp_path, in_place):
    """As where a trainer kept norms in float32, but not all of them."""
    source = tiny_llama(tmp_path / "source")

    def mix(tensors):
        dtypes = itertools.cycle([ml_dtypes.bfloat16, np.float32, np.float16])
        for name, dtype in zip(tensors, dtypes, strict=False):
            tensors[name] = tensor_of(numbers(tensors[name]).astype(dtype))

    edit_tensors(source / "model.safetensors", mix)
    ids = random_ids(20)
    expected = reference_logits(source, ids, torch.float32).numpy()
    folder = source if in_place else tmp_path / "target"
    if not in_place:
        convert_checkpoint(source, folder)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        store = model.engine.store
        assert len({store.form_of(name) for name in store.vectors}) > 1
        found = model.logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_is_as_close_to_the_truth_as_the_reference(tmp_path, dtype):
    """Root mean square against a float64 run, pooled over seeds; a single maximum would be luck."""
    ours, theirs = [], []
    for seed in SEEDS:
        source, target = build(tmp_path, {}, seed=seed, dtype=dtype)
        ids = random_ids(40, seed)
        exact = reference_logits(source, ids, torch.float64).numpy()
        rough = reference_logits(source, ids, getattr(torch, dtype)).double().numpy()
        with AutoModel.from_pretrained(target, device="cpu") as model:
            assert model.dtype == dtype
            ours.append(np.square(model.logits(ids) - exact).mean())
        theirs.append(np.square(rough - exact).mean())
    assert np.sqrt(np.mean(ours)) <= 1.2 * np.sqrt(np.mean(theirs))


def test_float32_run_of_bfloat16_weights_is_exact(tmp_path):
    source, target = build(tmp_path, {}, dtype="bfloat16")
    ids = random_ids(20)
    expected = reference_logits(source, ids, torch.float32).numpy()
    with AutoModel.from_pretrained(target, device="cpu", dtype="float32") as model:
        found = model.logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
