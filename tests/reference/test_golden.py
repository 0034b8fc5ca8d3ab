"""The real checkpoints, through our converter and our command line, against their published greedy
ids."""

import json

import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.convert import convert_checkpoint
from tests import programs
from tests.conftest import BUNDLED, SHARED_DATA, needs_shared_data

pytestmark = [pytest.mark.reference, needs_shared_data]
CHECKPOINTS = ["fable-1m", "fable-3m", "stories260K", "aidreams260K"]


def golden(name):
    """(prompt, prompt ids, greedy ids, top-5 ids, top-5 logits) of each case, in the two forms they
    come in."""
    found = json.loads((SHARED_DATA / "checkpoints" / name / "golden.json").read_text())
    for case in found.get("prompts", []):
        yield (
            case["prompt"],
            case["input_ids"],
            case["greedy_ids"],
            case["top5_ids"],
            case["top5_logits"],
        )
    for case in found.get("cases", []):
        top = case["next_token_top5"]
        yield (
            case["prompt"],
            case["input_ids"],
            case["greedy_new_ids"],
            [entry["id"] for entry in top],
            [entry["logit"] for entry in top],
        )


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """Prompts are of many lengths."""
    with programs.few_shapes():
        yield


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    target = tmp_path_factory.mktemp(request.param) / "layered"
    convert_checkpoint(SHARED_DATA / "checkpoints" / request.param, target)
    return request.param, target


@pytest.mark.slow
def test_command_line_gives_exactly_the_greedy_ids(checkpoint, capsys):
    name, folder = checkpoint
    for prompt, ids, expected, _, _ in golden(name):
        argv = ["generate", str(folder), "-p", prompt, "-n", str(len(expected))]
        code = main(
            [*argv, "--json", "--dtype", "float32", "--temperature", "0", "--device", "cpu"]
        )
        found = json.loads(capsys.readouterr().out)
        assert code == 0
        assert found["prompt_tokens"] == len(ids)
        assert found["token_ids"] == expected


def test_top_logits(checkpoint):
    name, folder = checkpoint
    with AutoModel.from_pretrained(folder, dtype="float32", device="cpu") as model:
        for prompt, ids, _, top_ids, top_logits in golden(name):
            assert model.text.encode(prompt) == ids
            last = model.logits(ids)[0, -1]
            assert last.argsort()[::-1][:5].tolist() == top_ids
            assert last[top_ids].tolist() == pytest.approx(top_logits, abs=6e-5)


def test_the_bundled_checkpoint_is_the_published_one():
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        published = SHARED_DATA / "checkpoints" / "fable-3m" / name
        assert (BUNDLED / name).read_bytes() == published.read_bytes()
