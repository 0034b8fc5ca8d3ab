"""A trained model in GGUF gives the tokens that llama.cpp gives, or differs first at a near tie."""

import json
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import save_file

import jlayer
from jlayer import AutoModel
from jlayer.gguf.reader import read_head
from tests.campaigns import slow_but
from tests.conftest import BUNDLED
from tests.gguf.forms import FIRST, MODELS, logits_with, save
from tests.gguf.test_models import IDS, scaling
from tests.gguf.words import of_json
from tests.gguf_files import saved_tensors, write

PROMPTS = ["Once upon a time", "The king and the girl went", "In the forest there was a"]
# How far the log probabilities of one token may lie apart. llama.cpp's cache is float16, and it
# rounds activations to 16 bits before it multiplies F16, to 8 before Q8_0; here they stay float32.
APART = {"F16": 0.01, "Q8_0": 0.15}


# Of the other kind a file that is exported here is compared: see `test_export`.
@pytest.mark.parametrize("kind", slow_but(APART, ("Q8_0",)))
@pytest.mark.parametrize("n_prompts", slow_but((1, len(PROMPTS)), (1,)))
def test_greedy_tokens_are_those_of_llama_cpp(kind, n_prompts, n_tokens, tmp_path, record_property):
    path = tmp_path / "m.gguf"
    write(BUNDLED, path, kind=kind, words=of_json(BUNDLED, "gpt-2", adds_bos=True))
    for prompt, found in compared(path, PROMPTS[:n_prompts], n_tokens).items():
        assert found.apart <= APART[kind]
        record_property(f"{kind}, {prompt}", str(found))


# How far from the float32 product of the decoded weights log probabilities may be: here it is the
# rounding of float32 alone, while llama.cpp rounds activations to 8 bits and the cache to 16.
NEAR = 1e-4
FOLDERS = {192: lambda folder: BUNDLED, 256: lambda folder: widened(BUNDLED, folder)}
# (mix, inputs of a row, how many prompts)
CASES = product(("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ4_XS"), FOLDERS, (len(PROMPTS),))
CASES = slow_but([("Q4_K_M", 256, 1), *CASES], [("Q4_K_M", 256, 1)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_a_file_that_llama_cpp_has_quantized(case, n_tokens, tmp_path, record_property):
    """In rows of 256, and in rows of 192, of which most have to be in blocks of 32."""
    mix, width, n_prompts = case
    quantizer = pytest.importorskip("tests.gguf.quantizer")
    folder, path = FOLDERS[width](tmp_path / "wide"), tmp_path / "m.gguf"
    kinds = quantizer.mixed(mix, json.loads((folder / "config.json").read_text()))
    words = of_json(BUNDLED, "gpt-2", adds_bos=True)
    decoded = write(folder, path, kinds=kinds, quantize=quantizer.quantize, words=words)
    written = {name: tensor.type for name, tensor in read_head(path).tensors.items()}
    assert {name: written[name].upper() for name in kinds} == kinds
    of_prompts = compared(path, PROMPTS[:n_prompts], n_tokens, folder, decoded)
    for prompt, found in of_prompts.items():
        assert found.own_error <= NEAR <= found.other_error
        record_property(f"{mix}, rows of {width}, {prompt}", str(found))


@dataclass(frozen=True)
class Found:
    """What comes of a prompt: how many greedy tokens are the same, how far log probabilities are
    apart, how much more likely than the other's is the first token that differs; and how far ours
    and the other's are from the float32 product, where that is computed."""

    n_same: int
    apart: float
    gap: float
    own_error: float | None = None
    other_error: float | None = None


def compared(path, prompts, n_tokens, folder=None, decoded=None):
    """Prompt -> Found, of a file and llama.cpp. `folder`, `decoded`: the model in Transformers'
    form and the weights that the file holds."""
    peer = pytest.importorskip("tests.gguf.llamacpp").Served(path)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        return {
            prompt: _compared(model, peer, prompt, n_tokens, folder, decoded) for prompt in prompts
        }


def _compared(model, peer, prompt, n_tokens, folder, decoded):
    ids = model.text.encode(prompt)
    own, found = next_tokens(model, ids, n_tokens), peer.greedy(ids, n_tokens)
    other = [each["id"] for each in found]
    assert len(own) == len(other) == n_tokens
    pairs = enumerate(zip(own, other, strict=True))
    same = next((n for n, (one, two) in pairs if one != two), n_tokens)
    likely = log_probabilities(model.logits([[*ids, *own]])[0])[len(ids) - 1 :]
    rows = [(n, row) for n, each in enumerate(found[: same + 1]) for row in each["top_logprobs"]]
    at = tuple(np.array([(n, row["id"]) for n, row in rows]).T)
    theirs = np.array([row["logprob"] for _, row in rows])
    apart, gap, errors = float(np.abs(likely[at] - theirs).max()), 0.0, ()
    if same < n_tokens:
        # The two that are chosen lie no further apart than two such differences explain.
        gap = float(likely[same, own[same]] - likely[same, other[same]])
        assert 0 <= gap <= 2 * apart
    if decoded is not None:
        exact = log_probabilities(logits_with(folder, decoded, [*ids, *own]))[len(ids) - 1 :]
        errors = [float(np.abs(some - exact[at]).max()) for some in (likely[at], theirs)]
        # Ours are the greedy tokens of the float32 product, all of them.
        chosen = np.arange(n_tokens), own
        assert (exact[:n_tokens].max(axis=-1) - exact[chosen] <= 2 * NEAR).all()
    return Found(same, apart, gap, *errors)


def widened(folder, target):
    """The same model in rows of 256: zeros beside 192 numbers, and beside three heads that share a
    key head. The mean of squares is over more numbers, so norms are less and so is their epsilon:
    the logits are the same."""
    config = json.loads((folder / "config.json").read_text())
    width, head, groups = config["hidden_size"], config["head_dim"], config["num_key_value_heads"]
    share, more = width / 256, 256 - width
    found = {}
    for name, array in saved_tensors(folder).items():
        if "norm" in name:
            found[name] = np.pad(array * np.float32(share**0.5), (0, more))
        elif "q_proj" in name:
            heads = array.reshape(groups, -1, width)
            found[name] = np.pad(heads, ((0, 0), (0, head), (0, more))).reshape(256, 256)
        elif "o_proj" in name:
            heads = array.reshape(width, groups, -1)
            found[name] = np.pad(heads, ((0, more), (0, 0), (0, head))).reshape(256, 256)
        else:
            by_axis = [(0, more if size == width else 0) for size in array.shape]
            found[name] = np.pad(array, by_axis)
    config |= {
        "hidden_size": 256,
        "num_attention_heads": 256 // head,
        "rms_norm_eps": config["rms_norm_eps"] * share,
        "dtype": "float32",
    }
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_model_that_was_widened_is_the_same(tmp_path):
    ids = list(range(40, 60))
    expected = logits_with(BUNDLED, saved_tensors(BUNDLED), ids)
    folder = widened(BUNDLED, tmp_path / "wide")
    found = logits_with(folder, saved_tensors(folder), ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def numbered(writer, config):
    """A tokenizer of the words t0, t1, ..., without which llama.cpp opens no model."""
    n_tokens = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(n_tokens)])
    writer.add_token_types([1] * n_tokens)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(1)
    scaling(writer, config)
    if "linear_num_key_heads" in config:
        # llama.cpp takes it for the epsilon of the norms of queries and keys, too.
        writer.kv_data[0].pop(f"{writer.arch}.attention.layer_norm_rms_epsilon")
        writer.add_layer_norm_rms_eps(1e-6)


# What llama.cpp takes for another model: it has norms of heads for Command R+ alone, by its number
# of layers, and windows for the EXAONE 4 of 32B alone, in the same way.
OTHERS = (
    *("llama, llama3 rope", "cohere, norms", "exaone4, window"),
    "qwen3_5, of unequal heads",
)


@pytest.mark.parametrize("name", slow_but([n for n in MODELS if n not in OTHERS], FIRST))
def test_llama_cpp_reads_the_metadata_in_the_same_way(name, tmp_path):
    """What is held against Transformers is held against llama.cpp here: the file is its own."""
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    path = tmp_path / "m.gguf"
    write(save(name, tmp_path / "model"), path, settings=numbered)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        likely = log_probabilities(model.logits([IDS])[0])[-1]
    (found,) = served(path).greedy(IDS, 1)
    for row in found["top_logprobs"]:
        assert abs(likely[row["id"]] - row["logprob"]) <= 0.02


def next_tokens(model, ids, n_tokens):
    """Greedy tokens, the end of a text like any other."""
    options = {"temperature": 0, "max_new_tokens": n_tokens, "eos_token_id": None}
    return jlayer.generate(model, ids, speculate="off", **options).token_ids


def log_probabilities(logits):
    """Of every token after each of these: [T, V]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
