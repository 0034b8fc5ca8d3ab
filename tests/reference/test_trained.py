"""Trained models of other families than Llama (`benchmarks/train_small.py`): the tokens that
Transformers draws, over texts that are several windows long."""

import shutil

import pytest

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from tests.conftest import BUNDLED, REPOSITORY
from tests.reference.dense_forms import load

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.reference, pytest.mark.slow]

TRAINED = REPOSITORY / "tests" / "checkpoints"
PROMPT = "Once upon a time there was a little girl who"
N_NEW = 200


@pytest.fixture(scope="module", params=["qwen3-1m", "gemma3-1m"])
def folder(request, tmp_path_factory):
    """The checkpoint with its tokenizer, which is that of the bundled model."""
    found = tmp_path_factory.mktemp(request.param) / "published"
    shutil.copytree(TRAINED / request.param, found)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, found / name)
    return found


def drawn_there(folder, ids):
    model = load(folder, torch.float32)
    with torch.no_grad():
        found = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=N_NEW, min_new_tokens=N_NEW
        )
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_greedy_tokens_are_those_of_transformers(folder, tmp_path, scheme):
    """Quantized, the text goes on as a story does; as it is, token by token the same."""
    convert_checkpoint(folder, tmp_path / "layered", quantize=scheme)
    options = {"temperature": 0, "max_new_tokens": N_NEW, "eos_token_id": None}
    with AutoModel.from_pretrained(tmp_path / "layered", device="cpu", dtype="float32") as model:
        ids = model.text.encode(PROMPT)
        plain = jlayer.generate(model, ids, speculate="off", **options)
        guessed = jlayer.generate(model, ids, speculate="lookup", draft_tokens=7, **options)
    assert guessed.token_ids == plain.token_ids
    expected = drawn_there(folder, ids)
    if scheme is None:
        assert plain.token_ids == expected
    else:
        assert plain.token_ids[:5] == expected[:5]
