"""The text's part of multimodal checkpoints that Transformers saved: in place and converted, the
logits of its own text forward; and the converted folder is a text model of Transformers'."""

import json
import shutil
import warnings

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.checkpoint.store import Store
from jlayer.config import read_generation_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.verify import verify_folder
from jlayer.errors import CheckpointError
from tests.convert.checkpoints import edit_json, edit_tensors, numbers, read_tensors, tensor_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 120, (1, 40))  # no token of an image
FULL, SLIDING = "full_attention", "sliding_attention"
TEXT = {
    "vocab_size": 133,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TYPES = {"layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}
GEMMA4_VISION = {key: value for key, value in VISION.items() if key != "image_size"}
# Name -> model type, the text's config, the vision's, what stands beside them.
MODELS = {
    "gemma3": (
        "gemma3",
        {**TYPES, "query_pre_attn_scalar": 7},
        {"model_type": "siglip_vision_model", **VISION},
        {"mm_tokens_per_image": 4, "image_token_index": 131},
    ),
    "gemma3-untied": (
        "gemma3",
        {**TYPES, "query_pre_attn_scalar": 7},
        {"model_type": "siglip_vision_model", **VISION},
        {"mm_tokens_per_image": 4, "image_token_index": 131, "tie_word_embeddings": False},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 8, **VISION},
        {"image_token_index": 131, "tie_word_embeddings": False},
    ),
    "mistral3-of-ministral3": (
        "mistral3",
        {"model_type": "ministral3", "rope_parameters": YARN},
        {"model_type": "pixtral", "head_dim": 8, **VISION},
        {"image_token_index": 131, "tie_word_embeddings": True},
    ),
    "gemma4": (
        "gemma4",
        {
            **TYPES,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
            "num_global_key_value_heads": 3,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 2.0,
        },
        {**GEMMA4_VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        {"image_token_id": 131, "video_token_id": 130, "audio_token_id": 129},
    ),
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "rms_norm_eps": 1e-2,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 24,
    "num_position_embeddings": 16,
}
MODELS["qwen3_5"] = (
    "qwen3_5",
    {**DELTA, "head_dim": 8, "num_hidden_layers": 4},
    QWEN_VISION,
    {
        "image_token_id": 131,
        "video_token_id": 130,
        "vision_start_token_id": 129,
        "vision_end_token_id": 128,
    },
)
MODELS["qwen3_5_moe"] = (
    "qwen3_5_moe",
    {
        **MODELS["qwen3_5"][1],
        "num_experts": 9,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
    },
    *MODELS["qwen3_5"][2:],
)
MODELS["gemma4-experts"] = (
    "gemma4",
    {
        **MODELS["gemma4"][1],
        "enable_moe_block": True,
        "num_experts": 9,
        "top_k_experts": 4,
        "moe_intermediate_size": 14,
    },
    *MODELS["gemma4"][2:],
)
MODELS["llama4"] = (
    "llama4",
    {
        "intermediate_size": 14,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": 4,
        "num_local_experts": 7,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 6,
        "floor_scale": 5,
        "attn_scale": 0.5,
    },
    {
        **VISION,
        "vision_output_dim": 12,
        "projector_input_dim": 12,
        "projector_output_dim": 12,
        "pixel_shuffle_ratio": 0.5,
    },
    {"image_token_index": 131, "boi_token_index": 130, "eoi_token_index": 129},
)
# What Transformers reads as one tensor of all experts alone; a converted folder has them apart.
NOT_ALONE = {"gemma4-experts", "llama4"}
OF_THE_TEXT = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "gemma4-experts": "Gemma4ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gemma3-untied": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "mistral3-of-ministral3": "Ministral3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
}


def save(folder, name):
    """Saves a random model, whose gains are random too."""
    model_type, text, vision, more = MODELS[name]
    if model_type == "gemma4":
        more = {**more, "audio_config": None}
    config = transformers.CONFIG_MAPPING[model_type](
        text_config={**TEXT, **text}, vision_config=vision, **more
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for leaf, tensor in model.state_dict().items():
                mean = 1.0 if leaf.endswith(("norm.weight", "layer_scalar")) else 0.0
                tensor.copy_(torch.randn_like(tensor) * 0.2 + mean)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (folder, the logits of its text by Transformers); read only."""
    found = {}

    def get(name):
        if name not in found:
            folder = save(tmp_path_factory.mktemp(name), name)
            found[name] = folder, logits_there(folder, transformers.AutoModelForImageTextToText)
        return found[name]

    return get


def logits_there(folder, auto):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    if isinstance(model, transformers.Llama4ForConditionalGeneration):
        model = model.language_model  # 5.24 fails where there is no image
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same(folder, expected):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_in_place_and_converted(tmp_path, saved, name):
    source, expected = saved(name)
    assert_same(source, expected)
    target = tmp_path / "target"
    convert_checkpoint(source, target)
    assert_same(target, expected)
    assert not verify_folder(target).findings
    config = config_of(target)
    assert config["architectures"] == [OF_THE_TEXT[name]]
    assert not {"text_config", "vision_config"} & set(config)
    if name in NOT_ALONE:
        return
    alone = logits_there(target, transformers.AutoModelForCausalLM)
    np.testing.assert_allclose(alone, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_a_conversion_of_it_is_unchanged_when_it_is_run_again(tmp_path, saved):
    source, _ = saved("mistral3")
    target = tmp_path / "target"
    assert convert_checkpoint(source, target).status == "converted"
    assert convert_checkpoint(source, target).status == "unchanged"


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_its_source_may_be_deleted_and_the_same_command_run_again(tmp_path, saved, scheme):
    folder, target = shutil.copytree(saved("gemma3")[0], tmp_path / "source"), tmp_path / "target"
    for status in ("converted", "unchanged"):
        summary = convert_checkpoint(folder, target, delete_source=True, quantize=scheme)
        assert summary.status == status
        assert not (folder / "model.safetensors").exists()
    assert config_of(target)["model_type"] == "gemma3_text"


def test_what_is_left_out_is_told_once_with_its_size(tmp_path, saved):
    source, _ = saved("gemma3")
    stored = read_tensors(source)
    notes = [note for note in Store(source).notes if "left out" in note]
    assert len(notes) == 1
    assert "only the text's part runs" in notes[0]
    for part in ("vision_tower", "multi_modal_projector"):
        tensors = [t for name, t in stored.items() if name.startswith(f"{part}.")]
        n_bytes = sum(numbers(tensor).nbytes for tensor in tensors)
        assert tensors
        assert f"{part} ({len(tensors)} tensors, {n_bytes / 1024:.2f} KiB)" in notes[0]
    summary = convert_checkpoint(source, tmp_path / "target")
    assert notes[0] in summary.notes


# Under which the text's layers and its head are published.
SPELLINGS = (
    ("language_model.model.", "language_model.lm_head.weight"),
    ("language_model.model.", "lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("model.", "lm_head.weight"),
)


@pytest.mark.parametrize(("lead", "head"), SPELLINGS)
def test_spellings(tmp_path, saved, lead, head):
    source, expected = saved("mistral3")

    def rename(tensors):
        for name in list(tensors):
            if name.startswith("language_model.model."):
                new = lead + name.removeprefix("language_model.model.")
            elif name.endswith("lm_head.weight"):
                new = head
            else:
                new = name
            tensors[new] = tensors.pop(name)

    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    edit_tensors(tmp_path / "model.safetensors", rename)
    assert_same(tmp_path, expected)


def test_further_parts_are_left_out(tmp_path, saved):
    source, expected = saved("gemma4")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    further = ("model.audio_tower.layers.0.input_layernorm.weight", "mtp.layers.0.norm.weight")

    def add(tensors):
        for name in (*further, "model.visual.blocks.0.norm1.weight"):
            tensors[name] = tensor_of(np.ones((3, 5), np.float32))

    edit_tensors(tmp_path / "model.safetensors", add)
    assert_same(tmp_path, expected)
    (note,) = (note for note in Store(tmp_path).notes if "left out" in note)
    assert "--delete-source" in note
    for part in ("audio_tower", "mtp", "visual", "vision_tower", "embed_vision"):
        assert f"{part} (" in note


def test_a_part_that_nobody_knows_is_refused(tmp_path, saved):
    source, _ = saved("gemma3")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    new = {"smell_tower.weight": tensor_of(np.ones((3, 5), np.float32))}
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(new))
    with pytest.raises(CheckpointError, match=r"smell_tower\.weight"):
        Store(tmp_path)


# What the outer config says of the tie, and the text's, and whether a head is stored -> whether the
# embedding is the head: Transformers looks at the outer one alone, and at what is stored.
TIES = {
    (None, None, False): True,
    (None, False, False): True,
    (None, False, True): False,
    (True, False, False): True,
    (True, False, True): False,
    (False, True, True): False,
}


@pytest.mark.parametrize(("outer", "inner", "stored"), TIES)
def test_whether_the_head_is_the_embedding(tmp_path, saved, outer, inner, stored):
    source, _ = saved("mistral3")
    folder, target = shutil.copytree(source, tmp_path / "source"), tmp_path / "target"
    text = {**config_of(source)["text_config"], "tie_word_embeddings": inner}
    text = {key: value for key, value in text.items() if key[:3] != "tie" or value is not None}
    edit_json(folder / "config.json", tie_word_embeddings=outer, text_config=text)
    if not stored:
        edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(head_of(tensors)))
    assert Store(folder).cfg.tie_word_embeddings is TIES[outer, inner, stored]
    assert_same(folder, logits_there(folder, transformers.AutoModelForImageTextToText))
    convert_checkpoint(folder, target)
    assert config_of(target)["tie_word_embeddings"] is TIES[outer, inner, stored]


def head_of(tensors):
    return next(name for name in tensors if name.endswith("lm_head.weight"))


def test_the_tokens_that_end_a_text_are_those_of_its_part(tmp_path, saved):
    source, _ = saved("gemma3")
    for name in ("config.json", "model.safetensors"):  # and no generation_config.json
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert read_generation_config(tmp_path)["eos_token_id"] == 2
    text = {**config_of(source)["text_config"], "eos_token_id": None}
    edit_json(tmp_path / "config.json", text_config=text, eos_token_id=[5, 6])
    assert read_generation_config(tmp_path)["eos_token_id"] == [5, 6]


def test_plan_takes_its_config(tmp_path, saved, capsys):
    source, _ = saved("gemma3")
    assert main(["plan", str(source / "config.json")]) == 0
    assert "fits" in capsys.readouterr().out


REFUSED = {
    "no-text": ({"text_config": None}, "text_config is missing"),
    "another-text": ({"text_config": {**TEXT, "model_type": "qwen2"}}, "'qwen2' is not supported"),
    "not-an-object": ({"text_config": [1]}, "expected an object"),
    "tied-a-word": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    "quantized": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "another-architecture": ({"architectures": ["LlamaForCausalLM"]}, "remove the wrong one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, saved, name):
    source, _ = saved("gemma3")
    changes, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(source) | changes))
    (tmp_path / "model.safetensors").hardlink_to(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        Store(tmp_path)
