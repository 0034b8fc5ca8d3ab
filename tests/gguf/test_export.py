"""Models exported to GGUF: read by the package gguf, by our own reader, and by llama.cpp."""

import json

import gguf
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.convert.target import space
from jlayer.errors import CheckpointError, DoesNotFitError, UnsupportedModelError, UsageError
from jlayer.text.tokenizer import Tokenizer
from tests.campaigns import slow_but
from tests.conftest import BUNDLED, SHARED_DATA, needs_shared_data
from tests.gguf.forms import save
from tests.gguf.test_llamacpp import log_probabilities, next_tokens
from tests.gguf_files import permuted, saved_tensors, write
from tests.text.samples import TEXTS

IDS = [3, 77, 0, 130, 5, 21, 21, 90, 64, 12, 118]
NAMES = (
    "llama",
    "llama, tied, biases",
    "llama, llama3 rope",
    "llama, linear rope",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3, yarn",
    *("phi3, long texts", "stablelm, parallel", "nemotron", "cohere2", "olmo3", "smollm3"),
    "ministral3",
    *("mixtral", "glm4_moe, groups", "gemma3"),  # every byte of others is compared
)
FIRST = ("llama, llama3 rope", "qwen2", "mixtral")
TYPES = {None: "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


def exported(name, folder, **options):
    """(the published folder, the GGUF file) of a tiny model."""
    source, layered = save(name, folder / "model"), folder / "layered"
    convert_checkpoint(source, layered)
    export_checkpoint(layered, folder / "m.gguf", format="gguf", **options)
    return source, folder / "m.gguf"


def raw_tensors(path):
    found = gguf.GGUFReader(path).tensors
    return {one.name: (one.tensor_type.name, np.asarray(one.data)) for one in found}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama, tied, biases", kind) for kind in TYPES),
        *(("gemma3", kind) for kind in TYPES),
        *((name, "q8_0") for name in ("mixtral", "qwen3", "qwen3_moe", "glm4_moe")),
        *((name, None) for name in ("mixtral", "qwen2", "gemma", "gemma2")),
        *((name, "q8_0") for name in ("qwen2_moe", "ernie4_5_moe", "granitemoe", "minimax_m2")),
        *((name, None) for name in ("phi3, long texts", "stablelm, parallel", "nemotron", "glm4")),
    ],
)
def test_every_byte_is_that_of_the_package_gguf(name, kind, tmp_path):
    source, path = exported(name, tmp_path, type=kind)
    write(source, tmp_path / "other.gguf", kind=TYPES[kind])
    found, expected = raw_tensors(path), raw_tensors(tmp_path / "other.gguf")
    assert found.keys() == expected.keys()
    for tensor, (type_of, data) in expected.items():
        assert found[tensor][0] == type_of, tensor
        assert np.array_equal(found[tensor][1].view(np.uint8), data.view(np.uint8)), tensor


@pytest.mark.parametrize("name", slow_but(NAMES, FIRST))
def test_the_file_gives_the_logits_of_its_source(name, tmp_path):
    source, path = exported(name, tmp_path)
    logits = []
    for ref in (source, path):
        with AutoModel.from_pretrained(ref, device="cpu", dtype="float32") as model:
            logits.append(model.logits([IDS])[0])
    # The rows of heads are added in another order where they are reordered.
    tolerance = 1e-5 if name.startswith(("llama", "mi", "smollm3", "nemotron")) else 0
    assert np.abs(logits[0] - logits[1]).max() <= tolerance * np.abs(logits[0]).max()


def test_rows_of_heads_are_reordered(tmp_path):
    source, path = exported("llama", tmp_path)
    own = saved_tensors(source)["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(raw_tensors(path)["blk.1.attn_q.weight"][1], permuted(own, 4))
    assert not np.array_equal(permuted(own, 4), own)


@pytest.mark.parametrize("kind", slow_but(("f16", "q8_0"), ("f16",)))
def test_greedy_tokens_are_those_of_llama_cpp(kind, n_tokens, tmp_path, record_property):
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    path = tmp_path / "m.gguf"
    convert_checkpoint(BUNDLED, tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", path, format="gguf", type=kind)
    peer = served(path)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        ids = model.text.encode("Once upon a time")
        assert ids == peer.tokenize("Once upon a time")
        own = next_tokens(model, ids, n_tokens)
        other = [row["id"] for row in peer.greedy(ids, n_tokens)]
        pairs = enumerate(zip(own, other, strict=True))
        same = next((n for n, (one, two) in pairs if one != two), n_tokens)
        gap = 0.0
        if same < n_tokens:
            likely = log_probabilities(model.logits([[*ids, *own]])[0])[len(ids) - 1 + same]
            gap = likely[own[same]] - likely[other[same]]
    record_property(kind, f"{same} tokens are the same; at the first other {gap:.4f}")
    assert 0 <= gap <= 0.3


@needs_shared_data
@pytest.mark.parametrize("name", ["fable-3m", "stories260K"])
def test_the_tokenizer_gives_the_same_ids(name, tmp_path):
    """Byte-level BPE, and SentencePiece of which the merges alone are known."""
    source, path = SHARED_DATA / "checkpoints" / name, tmp_path / "m.gguf"
    convert_checkpoint(source, tmp_path / "layered")
    config = tmp_path / "layered" / "tokenizer_config.json"
    said = json.loads(config.read_text())
    export_checkpoint(tmp_path / "layered", path, format="gguf")
    own, published = Tokenizer.from_folder(path), Tokenizer.from_folder(source)
    for text in TEXTS:
        assert own.encode(text) == published.encode(text), text
    assert own.eos_token_id == published.eos_token_id
    assert said["eos_token"] in published.special_tokens


REFUSED = {
    "glm": (UnsupportedModelError, "a glm cannot be exported to GGUF; supported: llama"),
    "mistral, window": (UnsupportedModelError, "a mistral with a window of 8 tokens cannot be"),
    # What is found only by reading the metadata back.
    "qwen3_moe, not normed": (UnsupportedModelError, "a qwen3_moe of this form.* its experts"),
    "ernie4_5_moe, every second": (UnsupportedModelError, "a ernie4_5_moe of this form.* experts"),
    "starcoder2, window": (UnsupportedModelError, "a starcoder2 with a window of 8 tokens cannot"),
    "smollm3, every third": (UnsupportedModelError, "a smollm3 of this form.* its layer_types"),
    "gemma3, period of 3": (UnsupportedModelError, "a gemma3_text of this form.* its attentions"),
    "llama, gelu": (UnsupportedModelError, "a llama of this form.*which has no place for its mlp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name, tmp_path):
    error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        exported(name, tmp_path)
    assert not (tmp_path / "m.gguf").exists()


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layered")
    convert_checkpoint(save("llama", folder / "model"), folder / "layered")
    return folder / "layered"


def test_targets_and_types_are_refused(layered, tmp_path, capsys):
    (tmp_path / "there.gguf").write_text("mine")
    for target, options, words in (
        ("there.gguf", {}, "there.gguf: is there already; name a new file"),
        ("m.bin", {}, "ends in .gguf"),
        ("m.gguf", {"type": "q4_k"}, "type 'q4_k' is not known"),
    ):
        with pytest.raises(UsageError, match=words):
            export_checkpoint(layered, tmp_path / target, format="gguf", **options)
    with pytest.raises(UsageError, match="of the format gguf alone"):
        export_checkpoint(layered, tmp_path / "out", format="huggingface", type="f16")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.gguf"]
    out = tmp_path / "m.gguf"
    assert main(["export", str(layered), str(out), "--format", "gguf", "--type", "bf16"]) == 0
    assert "as gguf" in capsys.readouterr().out


def test_a_full_disk_and_a_damaged_tensor_leave_nothing(layered, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(space, "peak_of", lambda *_, **__: 1 << 60)
        with pytest.raises(DoesNotFitError, match="need"):
            export_checkpoint(layered, tmp_path / "m.gguf", format="gguf")
    path = layered / "layer-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match="damaged"):
            export_checkpoint(layered, tmp_path / "m.gguf", format="gguf")
    finally:
        path.write_bytes(raw)
    assert list(tmp_path.iterdir()) == []
