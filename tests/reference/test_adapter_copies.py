"""What PEFT saves of the model's own head and embedding beside an adapter: passed over where it is
the same."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jlayer import AutoModel
from jlayer.checkpoint.adapter import WEIGHTS
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.errors import UnsupportedModelError
from jlayer.tuning.adapter import load_adapter
from tests.reference import dense_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = np.random.default_rng(0).integers(3, 60, (1, 24))
HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    dense_forms.save(folder, "llama")
    return folder


def saved(base, folder, *, dtype=torch.float32, targets=("lm_head", "o_proj"), **how):
    """The logits of PEFT's model, whose adapter is saved as it is by default."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=list(targets)))
    torch.manual_seed(0)
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    tuned.save_pretrained(folder, **how)
    with torch.no_grad():
        return tuned(torch.tensor(IDS)).logits.float().numpy()


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    expected = saved(base, folder)
    assert HEAD in load_file(folder / WEIGHTS)
    return folder, expected


def logits(folder, adapter):
    with AutoModel.from_pretrained(
        folder, adapter=adapter, device="cpu", dtype="float32", host_share=0
    ) as model:
        return model.logits(IDS)


def test_a_head_that_is_the_model_s_own(base, made, tmp_path):
    adapter, expected = made
    allowed = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits(base, adapter), expected, rtol=0, atol=allowed)
    convert_checkpoint(base, tmp_path / "merged", merge=adapter)
    np.testing.assert_allclose(logits(tmp_path / "merged", None), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_may_be_saved_in_another_dtype(base, tmp_path, dtype):
    saved(base, tmp_path, dtype=dtype)
    assert load_file(tmp_path / WEIGHTS)[HEAD].dtype == dtype
    Store(base, adapter=tmp_path)


def test_both_where_they_are_asked_for(base, tmp_path):
    saved(base, tmp_path, targets=("o_proj",), save_embedding_layers=True)
    names = {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}
    assert load_file(tmp_path / WEIGHTS).keys() >= names
    store = Store(base, adapter=tmp_path)
    with pytest.raises(UnsupportedModelError, match="save_embedding_layers=False"):
        load_adapter(tmp_path, store.cfg)


def damaged(made, folder, change):
    adapter, _ = made
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(adapter / WEIGHTS)
    tensors[HEAD] = change(tensors[HEAD])
    save_file(tensors, folder / WEIGHTS)


def test_one_that_was_trained_is_refused(base, made, tmp_path):
    def change(head):
        head[-1, -1] += 1e-3
        return head

    damaged(made, tmp_path, change)
    for use in (
        lambda: Store(base, adapter=tmp_path),
        lambda: convert_checkpoint(base, tmp_path / "merged", merge=tmp_path),
    ):
        with pytest.raises(UnsupportedModelError, match=r"lm_head\S+ is not the .*trained"):
            use()


def test_a_resized_vocabulary_is_refused(base, made, tmp_path):
    damaged(made, tmp_path, lambda head: torch.cat([head, head[:7]]))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\S+ \[\d+, \d+\].*resized"):
        Store(base, adapter=tmp_path)


def test_a_quantized_head_cannot_be_compared(base, made, tmp_path):
    convert_checkpoint(base, tmp_path / "layered", quantize="int8")
    with pytest.raises(UnsupportedModelError, match=r"cannot be compared with lm_head\.weight"):
        Store(tmp_path / "layered", adapter=made[0])
