"""Which matrices get an adapter, how it begins, and the folder that it is written to."""

import hashlib
import json
import os

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS, read_adapter
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.export import export_checkpoint
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError, UsageError
from jlayer.tuning.adapter import (
    AdapterConfig,
    fresh,
    load_adapter,
    low_ranks,
    save_adapter,
    targets_of,
)
from jlayer.tuning.card import Training, card
from jlayer.tuning.modules import choices, said_of_targets
from tests.conftest import BUNDLED
from tests.convert.checkpoints import edit_json
from tests.tuning.states import assert_equal_states, drawn, drawn_for

IDS = np.random.default_rng(0).integers(3, 60, (1, 24))
Q = "model.layers.{}.self_attn.q_proj.weight"


def save(folder, state, cfg, how, **more):
    save_adapter(folder, state, cfg, how, **{"base": "org/model", "card": "words\n", **more})
    return folder


def logits(folder, adapter):
    with AutoModel.from_pretrained(
        folder, adapter=adapter, device="cpu", dtype="float32", host_share=0
    ) as model:
        return model.logits(IDS)


@pytest.fixture(scope="module")
def cfg():
    return read_config(BUNDLED)


BAD = [
    ({"rank": 0}, "rank is 0, expected a whole number from 1"),
    ({"rank": True}, "rank is True"),
    ({"rank": 2.0}, "rank is 2.0"),
    ({"alpha": 0}, "alpha is 0, expected a number above 0"),
    ({"alpha": float("inf")}, "alpha is inf"),
    ({"alpha": float("nan")}, "alpha is nan"),
    ({"alpha": 1e39, "rank": 1}, "alpha is 1e[+]39"),
    ({"targets": "q_proj"}, "targets are 'q_proj', expected 'all' or names"),
    ({"targets": ()}, "targets are"),
    ({"targets": ("",)}, "targets are"),
    ({"targets": ("q_proj", "k_proj", "q_proj")}, "targets: q_proj is there twice"),
    ({"layers": (1, 1)}, "layers are"),
    ({"layers": (-1,)}, "layers are"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UsageError, match=message):
        AdapterConfig(**values)


def test_the_scale():
    assert AdapterConfig(rank=8, alpha=24).scale == 3
    assert AdapterConfig(rank=16, alpha=24, rslora=True).scale == 6


def test_targets_by_name(cfg):
    names = ("q_proj", "mlp.up_proj", "model.layers.5.mlp.down_proj")
    found = targets_of(cfg, AdapterConfig(targets=names))
    assert list(found)[:2] == [Q.format(0), "model.layers.0.mlp.up_proj.weight"]
    assert len(found) == 2 * cfg.num_hidden_layers + 1
    assert found["model.layers.5.mlp.down_proj.weight"] == (cfg.hidden_size, cfg.intermediate_size)
    some = targets_of(cfg, AdapterConfig(targets=("q_proj",), layers=(4, 1)))
    assert list(some) == [Q.format(1), Q.format(4)]
    assert len(targets_of(cfg, AdapterConfig(layers=(2,)))) == 7


KNOWN = "choose among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all"
REFUSED = [
    ({"targets": ("q_porj",)}, f"'q_porj' is no matrix of a llama; did you mean q_proj?; {KNOWN}"),
    ({"targets": ("proj",)}, "'proj' is no matrix"),
    ({"targets": ("q_proj", "lm_head")}, f"lm_head is the head, which cannot be trained; {KNOWN}"),
    ({"targets": ("embed_tokens",)}, "embed_tokens is the embedding, which cannot be trained"),
    ({"layers": (0, 6)}, "layers: 6 is not there, expected numbers from 0 to 5"),
    (
        {"targets": ("layers.3.mlp.up_proj",), "layers": (1, 2)},
        "layers.3.mlp.up_proj is in none of the layers 1, 2",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_targets_that_are_refused(cfg, values, message):
    with pytest.raises(UsageError) as found:
        targets_of(cfg, AdapterConfig(**values))
    assert message in str(found.value)


def test_how_it_begins(cfg):
    how = AdapterConfig(rank=4)
    targets = targets_of(cfg, how)
    state = fresh(targets, how, seed=3)
    for name, (out, width) in targets.items():
        a, b = state[name]["a"], state[name]["b"]
        assert (a.shape, b.shape) == ((4, width), (out, 4))
        assert a.dtype == b.dtype == np.float32
        assert not b.any()
        assert 0.99 / np.sqrt(width) < np.abs(a).max() <= np.float32(1 / np.sqrt(width))
    assert_equal_states(state, fresh(targets, how, seed=3))
    others = fresh(targets, how, seed=4)
    assert not np.array_equal(state[Q.format(0)]["a"], others[Q.format(0)]["a"])
    assert not np.array_equal(state[Q.format(0)]["a"], state[Q.format(1)]["a"])
    # The same on every machine.
    digest = hashlib.sha256(b"".join(parts["a"].tobytes() for parts in state.values()))
    assert digest.hexdigest().startswith("87600f18817e8d46")
    with pytest.raises(UsageError, match="seed is -1"):
        fresh(targets, how, seed=-1)


def test_what_is_saved_is_read(tmp_path, cfg):
    how = AdapterConfig(
        rank=3, alpha=7.5, rslora=True, targets=("q_proj", "up_proj"), layers=(1, 4)
    )
    state = drawn(cfg, how)
    save(tmp_path / "a", state, cfg, how)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", CONFIG, WEIGHTS]
    assert (tmp_path / "a" / "README.md").read_text() == "words\n"
    read = read_adapter(tmp_path / "a", cfg)
    added = low_ranks(state, how).of_matrix
    assert {name: (one.rank, one.scale) for name, one in read.matrices.items()} == {
        name: (each.rank, each.scale) for name, each in added.items()
    }
    begun = load_adapter(tmp_path / "a", cfg)
    assert_equal_states(begun.state, state)
    assert (begun.how.rank, begun.how.alpha, begun.how.rslora) == (3, 7.5, True)
    assert begun.how.targets == ("self_attn.q_proj", "mlp.up_proj")
    assert begun.how.layers == (1, 4)
    assert begun.alphas == {}
    assert targets_of(cfg, begun.how).keys() == state.keys()


def test_equal_states_give_equal_bytes(tmp_path, cfg):
    how = AdapterConfig(rank=2)
    for name in "ab":
        save(tmp_path / name, drawn(cfg, how), cfg, how)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_safetensors_itself_writes_the_same_file(tmp_path, cfg):
    from safetensors.numpy import load_file, save_file

    how = AdapterConfig(rank=2)
    save(tmp_path / "a", drawn(cfg, how), cfg, how)
    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "b", metadata={"format": "pt"})
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_that_is_there_is_refused(tmp_path, cfg):
    how = AdapterConfig(targets=("q_proj",))
    with pytest.raises(UsageError, match=f"{tmp_path}: is there already; name a new folder"):
        save(tmp_path, drawn(cfg, how), cfg, how)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_whole_or_not_there(tmp_path, cfg, monkeypatch):
    how = AdapterConfig(targets=("q_proj",))
    (tmp_path / "a.jlayer-tmp").mkdir()  # of a run that was killed
    (tmp_path / "a.jlayer-tmp" / "more").write_text("")
    calls = []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match=r"written \(No space left on device\); free some"):
            save(tmp_path / "a", drawn(cfg, how), cfg, how)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "inside" / "a", drawn(cfg, how), cfg, how)
    assert len(os.listdir(tmp_path / "inside" / "a")) == 3


def test_rows_of_a_gguf_file(tmp_path):
    """The state is in the order of the file's rows, the adapter in the published one."""
    convert_checkpoint(BUNDLED, tmp_path / "layered")
    gguf = tmp_path / "model.gguf"
    export_checkpoint(tmp_path / "layered", gguf, format="gguf")
    cfg, how, state = drawn_for(gguf, rank=2, alpha=2)
    save(tmp_path / "adapter", state, cfg, how)
    assert_equal_states(load_adapter(tmp_path / "adapter", cfg).state, state)
    there = load_adapter(tmp_path / "adapter", read_config(BUNDLED)).state
    assert not np.array_equal(there[Q.format(0)]["b"], state[Q.format(0)]["b"])
    found, expected = (logits(model, tmp_path / "adapter") for model in (gguf, BUNDLED))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_not_gone_on_from(tmp_path, cfg):
    how = AdapterConfig(targets=("q_proj",))
    save(tmp_path / "nan", drawn(cfg, how), cfg, how)
    raw = bytearray((tmp_path / "nan" / WEIGHTS).read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "nan" / WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match="has NaN or infinite numbers"):
        load_adapter(tmp_path / "nan", cfg)


def test_a_few_of_many_matrices(cfg):
    """Ends where they are enough, with the layers where those are; else whole names."""
    names = [Q.format(0), Q.format(1), "model.layers.1.mlp.up_proj.weight"]
    whole = [name.removesuffix(".weight") for name in names]
    said = said_of_targets(cfg, names)
    assert said == {"target_modules": whole, "layers_to_transform": None}
    said = said_of_targets(cfg, names[1:])
    assert said == {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
    said = said_of_targets(cfg, map(Q.format, range(6)))
    assert said == {"target_modules": ["q_proj"], "layers_to_transform": None}
    said = said_of_targets(cfg, names[:1], lead="model.language_model.")
    assert said["target_modules"] == ["model.language_model.layers.0.self_attn.q_proj"]


def training(**more):
    return Training(
        **{
            "base": "org/model",
            "data": "words.jsonl",
            "data_sha256": "ab" * 32,
            "n_examples": 1200,
            "n_tokens": 345_678,
            "n_steps": 90,
            "learning_rate": 2e-4,
            "schedule": "cosine to 0 after 9 steps",
            "seed": 7,
            "final_loss": 1.23456,
            "perplexity": (12.3456, 8.7654),
            "versions": {"jlayer": "0.1.0", "jax": "0.10.1"},
            **more,
        }
    )


def test_the_card(cfg):
    from huggingface_hub import ModelCard

    how = AdapterConfig(rank=2, alpha=4, targets=("q_proj", "up_proj"))
    state = drawn(cfg, how)
    text = card(training(), how, state)
    found = ModelCard(text)
    assert found.data.base_model == "org/model"
    assert found.data.library_name == "peft"
    assert "lora" in found.data.tags
    for words in (
        *("`words.jsonl`", "ab" * 32, "1,200", "345,678", "0.0002, cosine to 0", "| seed | 7 |"),
        *("| rank | 2 |", "| alpha | 4 |", "12: `q_proj`, `up_proj`", "1.2346 nats"),
        *("12.35 before, 8.765 after", "- jlayer 0.1.0", "- jax 0.10.1"),
    ):
        assert words in text, words
    assert text == card(training(), how, state)


def test_a_card_has_no_folder_of_the_machine(cfg):
    from huggingface_hub import ModelCard

    how = AdapterConfig(rank=1, targets=("q_proj",))
    done = training(base="/data/models/big/", data="/home/me/words.jsonl", perplexity=None)
    text = card(done, how, drawn(cfg, how))
    assert "/data" not in text
    assert "/home" not in text
    assert "`big`" in text
    assert "held-out" not in text
    assert ModelCard(text).data.base_model is None


def test_a_model_that_has_been_read_with_an_adapter(tmp_path, cfg):
    """What is trained is of the model, whatever is beside it."""
    from dataclasses import replace

    how = AdapterConfig(rank=2)
    with_it = replace(cfg, additions=low_ranks(drawn(cfg, how), how))
    assert targets_of(with_it, how) == targets_of(cfg, how)
    assert choices(with_it) == choices(cfg)


def test_an_adapter_of_lengths_is_not_gone_on_from(tmp_path, cfg):
    from safetensors.numpy import load_file, save_file

    how = AdapterConfig(rank=2, targets=("q_proj",), layers=(0,))
    save(tmp_path / "a", drawn(cfg, how), cfg, how)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{module}.lora_magnitude_vector"] = np.ones(cfg.hidden_size, np.float32)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    edit_json(tmp_path / "a" / CONFIG, use_dora=True)
    with pytest.raises(UnsupportedModelError, match=r"scales the rows of .*cannot be trained"):
        load_adapter(tmp_path / "a", cfg)


def test_the_config_is_whole_json(tmp_path, cfg):
    how = AdapterConfig(rank=2, alpha=4.0)
    save(tmp_path / "a", drawn(cfg, how), cfg, how, dropout=0.05)
    said = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert said["lora_alpha"] == 4
    assert type(said["lora_alpha"]) is int
    assert said["lora_dropout"] == 0.05
    assert said["base_model_name_or_path"] == "org/model"


def test_parameters_of_experts_are_refused(tmp_path, cfg):
    how = AdapterConfig(targets=("q_proj",))
    save(tmp_path / "a", drawn(cfg, how), cfg, how)
    edit_json(tmp_path / "a" / CONFIG, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedModelError, match=r"target_parameters has mlp.experts.gate_up"):
        load_adapter(tmp_path / "a", cfg)
