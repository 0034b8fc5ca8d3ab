"""What is exported of an encoded folder is what was published: every tensor with its dtype, its
shape and its bytes, and the config."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlayer.convert import convert_checkpoint, seal_folder, verify_folder
from jlayer.convert.export import export_checkpoint
from jlayer.convert.sources.words import apart as taken_apart
from jlayer.convert.sources.words import together
from jlayer.convert.target.disk import TEMPORARY
from jlayer.errors import CheckpointError, UnsupportedModelError
from tests.bitsandbytes_files import save as save_bitsandbytes
from tests.convert.checkpoints import edit_json, edit_tensors, files_of, read_tensors, split
from tests.convert.kills import killed
from tests.reference import (
    dense_forms,
    fp8_forms,
    gpt_oss_forms,
    latent_forms,
    mixture_forms,
    repacked_forms,
    test_compressed,
)
from tests.reference.test_stacked import apart, cfg_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ENCODED = {
    **{f"fp8, {form}": ("qwen3", form) for form in fp8_forms.FORMS},
    "fp8, experts": ("qwen3_moe", "grid"),
    "fp8, latent": ("deepseek_v3", "grid"),
}
COMPRESSED = tuple(test_compressed.FORMS)
# Families whose experts are published as one tensor alone; of some of them inputs come first.
STACKED = ("granitemoe", "gemma4", "llama4", "mistral4")
# Of all forms that are repacked the one whose layout is made again.
PACKED = ("packed", "packed by row", "packed of 8 bits", "packed sorted")
# Models that Transformers has saved, of all families that run here.
FAMILIES = {
    "dense": (dense_forms.save, tuple(dense_forms.DENSE)),
    "mixtures": (mixture_forms.save, tuple(mixture_forms.MIXTURES)),
    "latent": (latent_forms.save, tuple(latent_forms.FORMS)),
}
BESIDE = "quantization_tensors.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name of a form -> a folder as it is published; read only."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("published")
            if name in ENCODED:
                made[name], _ = fp8_forms.save(folder, *ENCODED[name])
            elif name == "gpt-oss":
                made[name] = gpt_oss_forms.write(folder, *gpt_oss_forms.drawn())
            elif name == "gpt-oss, plain":
                made[name] = plain_gpt_oss(folder)
            elif name in PACKED:
                made[name], _ = repacked_forms.save(folder, "qwen3_moe", name)
            elif name in COMPRESSED:
                form = test_compressed.FORMS[name]
                made[name], _ = fp8_forms.save_encoded(
                    folder, "qwen3", *form, sizes=test_compressed.SIZES
                )
            else:
                saved = latent_forms.save if name == "mistral4" else mixture_forms.save
                made[name] = saved(folder, name)
        return made[name]

    return of


def plain_gpt_oss(folder):
    from transformers import AutoModelForCausalLM, GptOssConfig

    config, _ = gpt_oss_forms.drawn()
    del config["quantization_config"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def exported(source, folder, **options):
    convert_checkpoint(source, folder / "layered")
    export_checkpoint(folder / "layered", folder / "out", format="huggingface", **options)
    return folder / "out"


@pytest.mark.parametrize(
    "name", [*ENCODED, *COMPRESSED, *PACKED, "gpt-oss", "gpt-oss, plain", *STACKED]
)
def test_every_tensor_is_as_it_was_published(published, tmp_path, name):
    source = published(name)
    out = exported(source, tmp_path)
    found, expected = read_tensors(out), read_tensors(source)
    assert found.keys() == expected.keys()
    assert [tensor for tensor in expected if found[tensor] != expected[tensor]] == []
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (out / BESIDE).exists()


def test_what_is_beside_the_weights_is_kept_when_a_converted_folder_is_converted(
    published, tmp_path
):
    """And when its source is removed, and when it is left without a prefix."""
    source = shutil.copytree(published("nvfp4"), tmp_path / "source")
    edit_tensors(
        source / "model.safetensors",
        lambda tensors: tensors.update(
            {
                name.removeprefix("model."): tensors.pop(name)
                for name in list(tensors)
                if not name.startswith("lm_head")
            }
        ),
    )
    convert_checkpoint(source, tmp_path / "first", delete_source=True)
    assert verify_folder(tmp_path / "first").findings == ()
    out = exported(tmp_path / "first", tmp_path)
    assert read_tensors(out) == read_tensors(published("nvfp4"))


@pytest.mark.parametrize("name", ["nvfp4 of modelopt", "gpt-oss", "llama4", "packed sorted"])
def test_an_export_that_was_stopped_keeps_what_is_finished_and_right(published, tmp_path, name):
    """A byte is changed in a shard: of each kind of tensors that are made in another way."""
    options = {"format": "huggingface", "shard_bytes": 20_000}
    convert_checkpoint(published(name), tmp_path / "layered")
    export_checkpoint(tmp_path / "layered", tmp_path / "whole", **options)
    aside = shutil.copytree(tmp_path / "whole", tmp_path / f"out{TEMPORARY}")
    (aside / "config.json").unlink()
    parts = {
        "nvfp4 of modelopt": "input_scale",
        "gpt-oss": "_blocks",
        "llama4": "experts.down",
        "packed sorted": "weight_packed",
    }
    damaged = [path for path in sorted(aside.glob("*.safetensors")) if flip(path, parts[name])]
    n_shards = len(list(aside.glob("*.safetensors")))
    done = export_checkpoint(tmp_path / "layered", tmp_path / "out", **options)
    assert done.n_resumed == n_shards - len(damaged) > 0 < len(damaged)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def flip(path, part):
    """Changes a bit of a tensor of a file, one with this in its name; whether there is one."""
    raw = bytearray(path.read_bytes())
    header, data = split(path)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if part in name]
    if ends:
        raw[len(raw) - len(data) + ends[0] - 1] ^= 1
        path.write_bytes(raw)
    return bool(ends)


@pytest.mark.parametrize("name", ["gpt-oss", "nvfp4"])
def test_an_export_killed_at_any_moment_leaves_none_or_all_of_it(published, tmp_path, name):
    layered = tmp_path / "layered"
    convert_checkpoint(published(name), layered)
    export_checkpoint(layered, tmp_path / "whole", format="huggingface")
    states = killed("export huggingface", layered, tmp_path / "whole")
    assert len(states) > 10
    assert set(states) == {"none", "new"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [5, 8, 16])
def test_words_are_put_together_as_they_are_taken_apart(bits, n):
    codes = np.random.default_rng(n).integers(0, 1 << bits, (n, 3), dtype=np.uint8)
    found = together(codes, bits)
    assert found.shape == (-(-n * bits // 32), 3)
    again = taken_apart(found, bits)
    assert np.array_equal(again[:n], codes)
    assert not again[n:].any()


REPACKED = ("gptq", "gptq asymmetric", "gptq sorted", "awq", "hqq", "eetq")


@pytest.mark.parametrize("form", REPACKED)
def test_what_was_repacked_is_refused_with_what_to_keep(tmp_path, form):
    source, _ = repacked_forms.save(tmp_path, "llama", form)
    convert_checkpoint(source, tmp_path / "layered")
    method = form.split()[0]
    for kind in ("huggingface", "orbax", "gguf"):
        target = tmp_path / ("out.gguf" if kind == "gguf" else "out")
        with pytest.raises(UnsupportedModelError) as caught:
            export_checkpoint(tmp_path / "layered", target, format=kind)
        assert f"repacked from {method} when it was converted" in str(caught.value)
        assert "keep the published folder" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not target.exists()


@pytest.mark.parametrize("is_8bit", [False, True])
def test_what_bitsandbytes_quantized_is_refused_too(tmp_path, is_8bit):
    """It was written without the statistics and texts that its readers need."""
    save_bitsandbytes(tmp_path / "source", is_8bit=is_8bit)
    convert_checkpoint(tmp_path / "source", tmp_path / "layered")
    with pytest.raises(UnsupportedModelError, match=r"taken from bitsandbytes.*keep the published"):
        export_checkpoint(tmp_path / "layered", tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()


def test_other_formats_are_refused_by_name(published, tmp_path):
    convert_checkpoint(published("fp8, grid"), tmp_path / "fp8")
    convert_checkpoint(published("llama4"), tmp_path / "llama4")
    for folder, kind, words in (
        ("fp8", "orbax", r"\(fp8_128x128\), which orbax has no place for; export with --format h"),
        ("fp8", "gguf", r"\(fp8_128x128\), which gguf has no place for; export with --format hugg"),
        ("llama4", "orbax", "llama4_text cannot be exported to Orbax: its experts are published"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            export_checkpoint(tmp_path / folder, tmp_path / f"out.{kind}", format=kind)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_a_model_that_lacks_a_part_since_it_was_converted_is_refused(tmp_path, name):
    convert_checkpoint(latent_forms.save(tmp_path / "source", name), tmp_path / "layered")
    for kind in ("huggingface", "orbax"):
        with pytest.raises(UnsupportedModelError, match=f"a {name} cannot be exported: its ind"):
            export_checkpoint(tmp_path / "layered", tmp_path / "out", format=kind)


def test_a_config_that_says_nothing_of_encodings_is_refused(published, tmp_path):
    convert_checkpoint(published("fp8, grid"), tmp_path / "layered")
    edit_json(tmp_path / "layered" / "config.json", quantization_config=None)
    seal_folder(tmp_path / "layered")
    with pytest.raises(CheckpointError, match=r"config.json: says nothing of .* \(fp8_128x128\)"):
        export_checkpoint(tmp_path / "layered", tmp_path / "out", format="huggingface")


def test_experts_that_are_not_alike_cannot_be_one_tensor(published, tmp_path):
    """They may lie one by one in a folder of another program."""
    source = shutil.copytree(published("granitemoe"), tmp_path / "source")
    tensors = apart(cfg_of(source), load_file(source / "model.safetensors"))
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"are not alike \(float16, float32\)"):
        exported(source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("forms", FAMILIES)
def test_every_family_is_exported_as_transformers_has_saved_it(tmp_path, forms):
    save, names = FAMILIES[forms]
    for name in names:
        if name in ("deepseek_v32", "glm_moe_dsa"):
            continue  # refused, above
        source = save(tmp_path / name / "source", name)
        (tmp_path / name).mkdir(exist_ok=True)
        out = exported(source, tmp_path / name)
        assert read_tensors(out) == read_tensors(source), name
        shutil.rmtree(tmp_path / name)


def test_a_damaged_file_of_what_is_beside_the_weights_is_told(published, tmp_path):
    layered = tmp_path / "layered"
    convert_checkpoint(published("nvfp4"), layered)
    held = json.loads((layered / BESIDE).read_text())
    name = next(iter(held))
    dtype, *rest = held[name]
    _, data = rest
    for change, words in (
        (["float64", *rest], "is 'float64', supported in an export"),
        ([dtype, [3], data], "has 4 bytes, expected 12"),
        ([dtype, [-1], data], "is damaged"),
        ([dtype, [1], "?"], "is damaged"),
        ([dtype, 1, data], "is damaged"),
        ([[], [1], data], "is damaged"),
        ([*rest], "is damaged"),
        ({}, "is damaged"),
    ):
        (layered / BESIDE).write_text(json.dumps({**held, name: change}))
        with pytest.raises(CheckpointError, match="changed since it was converted"):
            export_checkpoint(layered, tmp_path / "out", format="huggingface")
        seal_folder(layered)
        with pytest.raises(CheckpointError, match=words):
            export_checkpoint(layered, tmp_path / "out", format="huggingface")
