"""An adapter beside the weights gives the logits and the tokens of the model that PEFT merges it
into: streamed, with the host's cores, on several devices, over quantized weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlayer import AutoModel
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.engine import engine
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.plan import making as plans
from jlayer.plan.machine import PLATFORMS
from jlayer.serving.batch.names import key_of
from tests.adapters import write_adapter
from tests.conftest import BUNDLED
from tests.quantized import converted, stand_for
from tests.reference import dense_forms, latent_forms, mixture_forms
from tests.reference.adapters import FORMS, adapted
from tests.reference.drawn import drawn_here, drawn_there

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = np.random.default_rng(0).integers(3, 60, (1, 24))
PROMPTS = IDS[:, :9].tolist()
EVERYTHING = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
# Matrices that every mixture of experts multiplies by rows, where it has them.
ATTENTION = r".*\.(q|k|v|o)_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    dense_forms.save(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """By form: (the folder of an adapter, the logits and tokens of the model that PEFT merges it
    into)."""
    found = {}

    def of(form):
        if form not in found:
            folder = tmp_path_factory.mktemp("adapter")
            found[form] = folder, of_peft(adapted(base, folder, **FORMS[form]))
        return found[form]

    return of


def of_peft(merged):
    with torch.no_grad():
        logits = merged(torch.tensor(IDS)).logits.numpy()
    return logits, drawn_there(merged, PROMPTS, n_new=5)


def of_jlayer(folder, adapter, *, n_new=0, **options):
    with AutoModel.from_pretrained(
        folder, adapter=adapter, device="cpu", dtype="float32", **options
    ) as model:
        return model.logits(IDS), drawn_here(model, PROMPTS, n_new=n_new) if n_new else None


def assert_same(own, expected, *, tolerance=1e-5):
    allowed = tolerance * np.abs(expected[0]).max()
    np.testing.assert_allclose(own[0], expected[0], rtol=0, atol=allowed)
    assert own[1] in (None, expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_form(base, made, form):
    adapter, expected = made(form)
    assert_same(of_jlayer(base, adapter, n_new=5, host_share=0), expected)


@pytest.mark.parametrize("host_share", [0.5, 1])
def test_with_cores_of_the_host(base, made, host_share):
    adapter, expected = made("patterns")
    assert_same(of_jlayer(base, adapter, host_share=host_share), expected)


@pytest.mark.parametrize(
    ("devices", "form"),
    [
        *((2, form) for form in ("patterns", "dora")),
        *(pytest.param(1, form, marks=pytest.mark.slow) for form in ("patterns", "dora")),
    ],
)
def test_in_tiles(base, made, monkeypatch, devices, form):
    """Of a few rows each; on several devices also as one array, as they cross to GPUs."""
    adapter, expected = made(form)
    monkeypatch.setattr(plans, "TILE_BYTES", (1500,))
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], joins=devices > 1))
    assert_same(of_jlayer(base, adapter, devices=devices, host_share=0), expected)


def test_the_head_too(base, tmp_path):
    options = {**EVERYTHING, "target_modules": ["lm_head", "o_proj"]}
    expected = of_peft(adapted(base, tmp_path, **options))
    for share in (0, 1):
        assert_same(of_jlayer(base, tmp_path, host_share=share), expected)


@pytest.mark.parametrize(
    ("scheme", "scales_rows"),
    [
        ("int4", False),
        ("int8", True),
        pytest.param("int8", False, marks=pytest.mark.slow),
        pytest.param("int4", True, marks=pytest.mark.slow),
    ],
)
def test_over_quantized_weights(tmp_path, scheme, scales_rows):
    """As over the weights that they stand for."""
    source, layered = converted(tmp_path, scheme)
    stand_for(source, layered)
    options = {**EVERYTHING, "use_dora": scales_rows}
    expected = of_peft(adapted(source, tmp_path / "adapter", **options))
    for share in (0,) if scales_rows else (0, 0.5):
        own = of_jlayer(layered, tmp_path / "adapter", host_share=share)
        assert_same(own, expected, tolerance=3e-5)


FIRST = ("phi3", "qwen2")  # fused matrices, biases
# PEFT takes routers and fused experts for linear too where a family can have some.
DENSE = dict.fromkeys(dense_forms.DENSE, "all-linear") | {
    "qwen3_next": r".*\.(q_proj|o_proj|in_proj_qkvz|in_proj_ba|out_proj)"
}


def family(name, folder, targets, forms, **more):
    forms.save(folder / "model", name)
    options = {"r": 3, "lora_alpha": 7, "target_modules": targets, **more}
    merged = adapted(folder / "model", folder / "adapter", load=forms.load, **options)
    with torch.no_grad():
        expected = merged(torch.tensor(IDS)).logits.numpy()
    with AutoModel.from_pretrained(
        folder / "model", adapter=folder / "adapter", device="cpu", dtype="float32"
    ) as model:
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", FIRST)
def test_a_family(tmp_path, name):
    """With lengths of rows where it has biases, which these do not scale."""
    family(name, tmp_path, DENSE[name], dense_forms, use_dora=name == "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scales_rows"), [("phi3", True), ("qwen2", False)])
def test_the_same_in_the_other_way(tmp_path, name, scales_rows):
    family(name, tmp_path, DENSE[name], dense_forms, use_dora=scales_rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DENSE.keys() - set(FIRST)))
def test_any_dense_family(tmp_path, name):
    family(name, tmp_path, DENSE[name], dense_forms)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(mixture_forms.MIXTURES))
def test_attention_of_a_mixture(tmp_path, name):
    family(name, tmp_path, ATTENTION, mixture_forms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forms", "name", "targets"),
    [
        (latent_forms, "deepseek_v3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]),
        (mixture_forms, "qwen2_moe", r".*\.(q_proj|shared_expert\.(gate|up|down)_proj)"),
    ],
)
def test_latents_and_a_shared_expert(tmp_path, forms, name, targets):
    family(name, tmp_path, targets, forms)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_in_16_bits(base, tmp_path, dtype):
    from safetensors import torch as files

    adapted(base, tmp_path, **EVERYTHING)
    tensors = files.load_file(tmp_path / WEIGHTS)
    short = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    files.save_file(short, tmp_path / WEIGHTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.no_grad():
        expected = tuned(torch.tensor(IDS)).logits.numpy(), None
    for share in (0, 1):
        assert_same(of_jlayer(base, tmp_path, host_share=share), expected)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """(a GGUF file, whose rows of queries and keys are in another order, by heads; an adapter for
    it; the logits of the model with that)."""
    folder = tmp_path_factory.mktemp("gguf")
    convert_checkpoint(BUNDLED, folder / "layered")
    export_checkpoint(folder / "layered", folder / "model.gguf", format="gguf")
    adapter = write_adapter(folder / "adapter", BUNDLED)
    return folder / "model.gguf", adapter, of_jlayer(BUNDLED, adapter)


@pytest.mark.parametrize("host_share", [0, 1])
def test_over_a_gguf_file(gguf, host_share):
    file, adapter, expected = gguf
    assert_same(of_jlayer(file, adapter, host_share=host_share), expected)


def test_lengths_of_rows_over_a_gguf_file(gguf, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", BUNDLED, has_lengths=True)
    own = of_jlayer(gguf[0], adapter, host_share=0)
    assert_same(own, of_jlayer(BUNDLED, adapter, host_share=0))
    assert not np.allclose(own[0], gguf[2][0], atol=1e-3)


def test_what_is_in_memory_is_no_file_of_the_disk(gguf):
    file, adapter, _ = gguf
    store = Store(file, adapter=adapter)
    assert store.files == [str(file), str(adapter / WEIGHTS)]
    assert len(store.identities) == 3


def test_one_that_lies_beside_the_weights_is_not_said_to_be_left_out(base, made, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    shutil.copytree(made("lora")[0], folder, dirs_exist_ok=True)
    notes = [" ".join(Store(folder, adapter=each).notes) for each in (None, folder)]
    assert "an adapter (LoRA) beside the weights, which is not applied" in notes[0]
    assert "adapter" not in notes[1]


def test_over_what_was_a_gguf_file(gguf, tmp_path):
    file, adapter, expected = gguf
    convert_checkpoint(file, tmp_path / "layered")
    assert_same(of_jlayer(tmp_path / "layered", adapter), expected)


def test_lengths_of_rows_beside_other_adapters_are_refused_with_what_to_do(base, made):
    (lengths, _), (lora, _) = made("dora"), made("lora")
    with pytest.raises(UnsupportedModelError, match=r"scales the rows of .*q_proj.*--merge"):
        Store(base, adapters=[("a", lora), ("b", lengths)])


def test_cores_of_the_host_do_not_know_lengths_of_rows(base, made, monkeypatch):
    """They are left out where nobody asks for them, however much they could do."""
    monkeypatch.setattr(engine, "LEAST_HOSTED_BYTES", 1)
    adapter, expected = made("dora")
    with AutoModel.from_pretrained(base, adapter=adapter, device="cpu", dtype="float32") as model:
        assert model.engine.host is None
        assert_same((model.logits(IDS), None), expected)
    with pytest.raises(UsageError, match=r"host_share: .*\(DoRA\).*set it to 0"):
        of_jlayer(base, adapter, host_share=0.5)


def test_a_matrix_that_is_used_uncut_is_refused(tmp_path):
    latent_forms.save(tmp_path / "model", "deepseek_v3")
    options = {"r": 2, "target_modules": ["kv_b_proj", "o_proj"]}
    adapted(tmp_path / "model", tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedModelError, match=r"by row: \S+kv_b_proj.weight.*--merge"):
        Store(tmp_path / "model", adapter=tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(made, tmp_path):
    dense_forms.save(tmp_path, "phi3")
    with pytest.raises(CheckpointError, match="take the model that the adapter was trained for"):
        Store(tmp_path, adapter=made("lora")[0])


def test_another_adapter_is_another_model(base, made, tmp_path):
    adapter, _ = made("lora")
    shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name][0, 0] += 1
    save_file(tensors, tmp_path / "other" / WEIGHTS)
    convert_checkpoint(base, tmp_path / "layered")
    for model in (base, tmp_path / "layered"):
        stores = [Store(model, adapter=each) for each in (None, adapter, tmp_path / "other")]
        keys = {key_of(store, dtype="float32", context_limit=64) for store in stores}
        assert len({store.fingerprint for store in stores}) == len(keys) == 3


def test_it_is_counted(base, made):
    """B once; A with each tile that has rows of its matrix."""
    adapter, _ = made("lora")
    rank = json.loads((adapter / CONFIG).read_text())["r"]
    with_it, without = (
        AutoModel.from_pretrained(base, adapter=folder, device="cpu", dtype="float32", host_share=0)
        for folder in (adapter, None)
    )
    with with_it, without:
        sums = [sum(tile.n_bytes for tile in model.plan.tiles) for model in (with_it, without)]
        kind = without.engine.plan.tiles[0].kind
        sizes = [leaf.shape(without.config) for leaf in kind.leaves if leaf.name.endswith("proj")]
    n_layers = 3
    assert sums[0] - sums[1] == 4 * n_layers * sum(rank * (out + width) for out, width in sizes)
