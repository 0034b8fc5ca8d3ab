"""A trained model in GGUF gives the tokens that llama.cpp gives, or differs first at a near tie."""

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from tests.conftest import BUNDLED
from tests.gguf.forms import MODELS, save
from tests.gguf.test_models import IDS, scaling
from tests.gguf.words import of_json
from tests.gguf_files import write

N_TOKENS = 100
PROMPTS = ["Once upon a time", "The king and the girl went", "In the forest there was a"]
# How far the log probabilities of one token may lie apart. llama.cpp's cache is float16, and it
# rounds activations to 16 bits before it multiplies F16, to 8 before Q8_0; here they stay float32.
APART = {"F16": 0.01, "Q8_0": 0.15}


@pytest.mark.parametrize("kind", APART)
def test_greedy_tokens_are_those_of_llama_cpp(kind, tmp_path, record_property):
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    path = tmp_path / "m.gguf"
    write(BUNDLED, path, kind=kind, words=of_json(BUNDLED, "gpt-2", adds_bos=True))
    peer = served(path)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        for prompt in PROMPTS:
            ids = model.text.encode(prompt)
            own, found = next_tokens(model, ids), peer.greedy(ids, N_TOKENS)
            other = [each["id"] for each in found]
            assert len(own) == len(other) == N_TOKENS
            pairs = enumerate(zip(own, other, strict=True))
            same = next((n for n, (one, two) in pairs if one != two), N_TOKENS)
            likely = log_probabilities(model, [*ids, *own])[len(ids) - 1 :]
            apart = max(
                abs(likely[n, row["id"]] - row["logprob"])
                for n, each in enumerate(found[: same + 1])
                for row in each["top_logprobs"]
            )
            assert apart <= APART[kind]
            gap = 0.0
            if same < N_TOKENS:
                # The two that are chosen lie no further apart than two such differences explain.
                gap = likely[same, own[same]] - likely[same, other[same]]
                assert 0 <= gap <= 2 * apart
            said = f"{same} tokens are the same; apart {apart:.4f}; at the first other {gap:.4f}"
            record_property(f"{kind}, {prompt}", said)


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


# What llama.cpp takes for another model: it has norms of heads for Command R+ alone, by its number
# of layers, and windows for the EXAONE 4 of 32B alone, in the same way.
OTHERS = ("llama, llama3 rope", "cohere, norms", "exaone4, window")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OTHERS])
def test_llama_cpp_reads_the_metadata_in_the_same_way(name, tmp_path):
    """What is held against Transformers is held against llama.cpp here: the file is its own."""
    served = pytest.importorskip("tests.gguf.llamacpp").Served
    path = tmp_path / "m.gguf"
    write(save(name, tmp_path / "model"), path, settings=numbered)
    with AutoModel.from_pretrained(path, device="cpu", dtype="float32") as model:
        likely = log_probabilities(model, IDS)[-1]
    (found,) = served(path).greedy(IDS, 1)
    for row in found["top_logprobs"]:
        assert abs(likely[row["id"]] - row["logprob"]) <= 0.02


def next_tokens(model, ids):
    """Greedy tokens, the end of a text like any other."""
    options = {"temperature": 0, "max_new_tokens": N_TOKENS, "eos_token_id": None}
    return jlayer.generate(model, ids, speculate="off", **options).token_ids


def log_probabilities(model, ids):
    """Of every token after each of these: [T, V]."""
    logits = model.logits([ids])[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
