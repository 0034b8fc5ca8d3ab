"""`jlayer convert --merge`: the weights that PEFT's own merge gives, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS
from jlayer.checkpoint.layout import MANIFEST, MERGED
from jlayer.convert import convert_checkpoint
from jlayer.convert.target.write import TargetWriter
from jlayer.convert.verify import verify_folder
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from tests.convert.checkpoints import numbers, read_tensors
from tests.convert.quantized_kinds import IN_PLACE, write
from tests.reference import dense_forms
from tests.reference.adapters import FORMS, adapted
from tests.reference.test_multimodal import save as save_multimodal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
IDS = np.random.default_rng(0).integers(3, 60, (1, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    dense_forms.save(folder, "llama")
    return folder


def changed(adapter, tmp_path, **config):
    """A copy of an adapter with other values in its config."""
    copy = tmp_path / "changed"
    shutil.copytree(adapter, copy, dirs_exist_ok=True)
    found = json.loads((copy / CONFIG).read_text()) | config
    (copy / CONFIG).write_text(json.dumps(found))
    return copy


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted(base, folder, **FORMS["lora"])
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_of_peft(base, tmp_path, form):
    expected = adapted(base, tmp_path / "adapter", **FORMS[form])
    convert_checkpoint(base, tmp_path / "out", merge=tmp_path / "adapter")
    own, before = (
        {name: numbers(tensor) for name, tensor in read_tensors(folder).items()}
        for folder in (tmp_path / "out", base)
    )
    wanted = {name: value.numpy() for name, value in expected.state_dict().items()}
    n_changed = 0
    for name, value in own.items():
        n_changed += not np.array_equal(value, before[name])
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=2e-6, err_msg=name)
    assert (
        n_changed == json.loads((tmp_path / "out" / MERGED).read_text())["adapters"][0]["matrices"]
    )
    assert verify_folder(tmp_path / "out").findings == ()
    with torch.no_grad():
        logits = expected(torch.tensor(IDS)).logits.numpy()
    with AutoModel.from_pretrained(tmp_path / "out", device="cpu", dtype="float32") as model:
        np.testing.assert_allclose(model.logits(IDS), logits, atol=1e-5 * np.abs(logits).max())


OF_THE_TEXT = r".*language_model.*\.(q_proj|down_proj)"


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llama4"])
def test_of_the_text_model_in_a_multimodal_one(tmp_path, name):
    """Its modules have other names than its published tensors, and than a text model's."""
    base, load = (
        save_multimodal(tmp_path / "base", name),
        transformers.AutoModelForImageTextToText.from_pretrained,
    )
    options = {"r": 4, "target_modules": OF_THE_TEXT, "rank_pattern": {"layers.1.*q_proj": 2}}
    expected = adapted(base, tmp_path / "adapter", load=load, **options).state_dict()
    convert_checkpoint(base, tmp_path / "out", merge=tmp_path / "adapter")
    convert_checkpoint(base, tmp_path / "plain")
    own, before = (read_tensors(tmp_path / out) for out in ("out", "plain"))
    norm = re.compile(r".*language_model\..*\bnorm\.weight")
    lead = next(filter(norm.fullmatch, expected)).removesuffix("norm.weight")
    changed = {name for name in own if own[name] != before[name]}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "down_proj"}
    for name in changed:
        wanted = expected[lead + name.removeprefix("model.")].numpy()
        np.testing.assert_allclose(numbers(own[name]), wanted, rtol=0, atol=2e-6, err_msg=name)


def test_one_rounding_to_the_dtype_of_the_base(tmp_path):
    dense_forms.save(tmp_path / "base", "llama", dtype="bfloat16")
    expected = adapted(tmp_path / "base", tmp_path / "adapter", **FORMS["lora"]).state_dict()
    convert_checkpoint(tmp_path / "base", tmp_path / "out", merge=tmp_path / "adapter")
    differ = n = 0
    for name, tensor in read_tensors(tmp_path / "out").items():
        rounded = expected[name].to(torch.bfloat16).float().numpy()
        differ += (numbers(tensor).astype(np.float32) != rounded).sum()
        n += rounded.size
    assert differ / n < 1e-3  # where float32 sums in another order fall on the other side


def test_merged_and_quantized_is_the_merged_model_quantized(base, adapter, tmp_path):
    convert_checkpoint(base, tmp_path / "at once", merge=adapter, quantize="int8")
    convert_checkpoint(base, tmp_path / "merged", merge=adapter)
    convert_checkpoint(tmp_path / "merged", tmp_path / "after", quantize="int8")
    once, after = (read_tensors(tmp_path / name) for name in ("at once", "after"))
    assert once == after


def test_the_same_command_again_finds_it_done_and_another_adapter_is_refused(
    base, adapter, tmp_path
):
    done = convert_checkpoint(base, tmp_path / "out", merge=adapter)
    assert convert_checkpoint(base, tmp_path / "out", merge=adapter).status == "unchanged"
    assert done.fingerprint != convert_checkpoint(base, tmp_path / "plain").fingerprint
    for merge in (None, changed(adapter, tmp_path, lora_alpha=13)):
        with pytest.raises(UsageError, match=MERGED):
            convert_checkpoint(base, tmp_path / "out", merge=merge)


def test_an_unfinished_conversion_does_not_go_on_with_another_adapter(
    base, adapter, tmp_path, monkeypatch
):
    write, calls = TargetWriter.write, []

    def stop(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, *args, **options)

    monkeypatch.setattr(TargetWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(base, tmp_path / "out", merge=adapter)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"began with merge \w+, not of no adapter"):
        convert_checkpoint(base, tmp_path / "out")
    assert convert_checkpoint(base, tmp_path / "out", merge=adapter).n_resumed == 2
    convert_checkpoint(base, tmp_path / "at once", merge=adapter)
    own, whole = (tmp_path / name / MANIFEST for name in ("out", "at once"))
    assert own.read_bytes() == whole.read_bytes()


def test_adapters_one_after_another_are_all_named(base, adapter, tmp_path):
    convert_checkpoint(base, tmp_path / "one", merge=adapter)
    convert_checkpoint(tmp_path / "one", tmp_path / "two", merge=adapter)
    found = json.loads((tmp_path / "two" / MERGED).read_text())["adapters"]
    assert len(found) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"bias": "all"}, "bias is all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_tomorrow": 3}, "of_tomorrow is 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base, adapter, tmp_path, config, said):
    with pytest.raises(UnsupportedModelError) as error:
        convert_checkpoint(base, tmp_path / "out", merge=changed(adapter, tmp_path, **config))
    assert f"{CONFIG}: {said}, which is not supported; merge it with PEFT" in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 5}, "and [5, "),
        ({"r": 0}, "r is 0, expected an integer from 1"),
        ({"lora_alpha": None}, "lora_alpha is null, expected a positive number"),
        ({"use_dora": True}, "has no lora_magnitude_vector, but use_dora is true"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], expected an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '(', which is no pattern"),
        ({"alpha_pattern": {"a{99999999999999999999}": 1}}, "which is no pattern (the repetition"),
        ({"rank_pattern": {"(" * 3000 + ")" * 3000: 1}}, "which is no pattern (maximum recursion"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300 for model.layers.0.mlp.down_proj, expected"),
        ({"target_modules": ["k_proj", "v_proj"]}, "layers.0.mlp.down_proj, model.layers.0.mlp.g"),
        ({"target_modules": r".*\.mlp\..*"}, "has model.layers.0.self_attn.k_proj"),
        ({"target_modules": 5}, "target_modules is 5, expected a pattern or a name, or a list"),
        ({"exclude_modules": ["q_proj"]}, "has model.layers.0.self_attn.q_proj, model.layers.1"),
        ({"layers_to_transform": [1, 2]}, "has model.layers.0.mlp.down_proj"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "has model.layers.0.mlp.down_proj"),
        ({"layers_to_transform": True}, "layers_to_transform is True, expected a number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj is 2.5"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(base, adapter, tmp_path, config, said):
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(base, tmp_path / "out", merge=changed(adapter, tmp_path, **config))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "((.|..)+)+[#%]"},
        {"rank_pattern": {"((.|..)+)+[#%]": 3}},
        {"layers_to_transform": 0, "layers_pattern": "((.|..)+)+[#%]"},
    ],
)
def test_a_pattern_whose_matching_does_not_end_is_refused(
    base, adapter, tmp_path, monkeypatch, config
):
    monkeypatch.setattr("jlayer.checkpoint.adapter.PATIENCE_S", 0.1)
    with pytest.raises(CheckpointError, match=r"after 0\.1 s had neither matched .* of repeats"):
        convert_checkpoint(base, tmp_path / "out", merge=changed(adapter, tmp_path, **config))


EMBEDDING = "base_model.model.model.embed_tokens"


def edited(adapter, tmp_path, edit):
    """A copy of an adapter with other tensors."""
    copy = changed(adapter, tmp_path)
    tensors = load_file(copy / WEIGHTS)
    edit(tensors)
    save_file(tensors, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize(
    ("edit", "kind", "said"),
    [
        (lambda t: t.pop(A), CheckpointError, "q_proj has no lora_A.weight"),
        (
            lambda t: t.update({A: np.full_like(t[A], np.nan)}),
            CheckpointError,
            "NaN or infinite numbers",
        ),
        (
            lambda t: t.update({A.replace("layers.0", "layers.9"): t.pop(A)}),
            CheckpointError,
            "no matrices of the model: model.layers.9.self_attn.q_proj",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[A].copy()}),
            UnsupportedModelError,
            "the model's own is [133, 24]: a resized vocabulary",
        ),
        (lambda t: t.update({A: t[A].astype(np.int8)}), CheckpointError, "is int8 [4, "),
        (lambda t: t.update({A: np.full_like(t[A], 3e38)}), CheckpointError, "not finite"),
        (lambda t: t.clear(), CheckpointError, "has no tensors"),
        (
            lambda t: t.update({A.replace("model.layers", "layers"): t[A].copy()}),
            CheckpointError,
            "no matrices of the model: layers.0.self_attn.q_proj; take the model that the adapter "
            "was trained for or, if that is this one, merge it with PEFT",
        ),
        (
            lambda t: t.update(
                {f"{EMBEDDING}.lora_{x}.weight": t[n] for x, n in zip("AB", (A, B), strict=True)}
            ),
            CheckpointError,
            "no matrices of the model: model.embed_tokens",
        ),
    ],
)
def test_tensors_that_are_not_an_adapter_of_this_model_are_refused(
    base, adapter, tmp_path, edit, kind, said
):
    with pytest.raises(kind) as error:
        convert_checkpoint(base, tmp_path / "out", merge=edited(adapter, tmp_path, edit))
    assert said in str(error.value)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_base_that_is_quantized_is_refused(base, adapter, tmp_path):
    convert_checkpoint(base, tmp_path / "q", quantize="int8")
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        convert_checkpoint(tmp_path / "q", tmp_path / "out", merge=adapter)
    published = tmp_path / "published"
    write(published, next(iter(IN_PLACE)))
    with pytest.raises(UnsupportedModelError, match="take the plain checkpoint of this model"):
        convert_checkpoint(published, tmp_path / "out", merge=adapter)


def test_a_head_that_is_the_embedding_too_is_refused(adapter, tmp_path):
    dense_forms.save(tmp_path / "tied", "ministral3")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]
    adapted(tmp_path / "tied", tmp_path / "adapter", r=2, target_modules=["q_proj"])

    def edit(tensors):
        tensors.update({A.replace("model.layers.0.self_attn.q_proj", "lm_head"): tensors[A]})

    copy = edited(tmp_path / "adapter", tmp_path, edit)
    with pytest.raises(UnsupportedModelError, match="changes lm_head, which the model uses twice"):
        convert_checkpoint(tmp_path / "tied", tmp_path / "out", merge=copy)


def test_a_folder_that_has_no_adapter_is_told(base, adapter, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder, expected an adapter's folder"):
        convert_checkpoint(base, tmp_path / "out", merge=tmp_path / "nowhere")
    copy = changed(adapter, tmp_path)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="an adapter's pickle is not read; load it"):
        convert_checkpoint(base, tmp_path / "out", merge=copy)


def test_links_of_an_adapter_are_followed_where_that_is_allowed(base, adapter, tmp_path):
    copy, outside = changed(adapter, tmp_path), tmp_path / "outside"
    (copy / WEIGHTS).rename(outside)
    (copy / WEIGHTS).symlink_to(outside)
    with pytest.raises(CheckpointError, match="or allow it with follow_links=True"):
        convert_checkpoint(base, tmp_path / "out", merge=copy)
    done = convert_checkpoint(base, tmp_path / "out", merge=copy, follow_links=True)
    assert f"{copy}: links followed outside the folder: {WEIGHTS} to {outside}" in done.notes


def test_what_cannot_be_merged(base, adapter, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="missing, expected an adapter's folder"):
        convert_checkpoint(base, tmp_path / "out", merge=base)
    words = ["convert", str(base), str(tmp_path / "out"), "--merge", str(adapter)]
    assert main([*words, "--delete-source", "--yes"]) == 2
    assert "--delete-source and --merge: the model without the adapter" in capsys.readouterr().err
    assert main(words) == 0
    assert (tmp_path / "out" / MERGED).is_file()
