"""What is wrong with a folder in a form that is repacked is told by the converter in one line; and
what lies beside it, and options, are as of any other."""

import json
import shutil

import numpy as np
import pytest

from jlayer.checkpoint.source import SourceFile
from jlayer.checkpoint.store import Store
from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources.files import Place, TensorInfo
from jlayer.convert.sources.repacked import to_repack
from jlayer.errors import CheckpointError, UnsupportedModelError
from tests.reference.repacked_forms import FORMS, save

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SINGLE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj."
SECTION = "quantization_config"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    found = {}

    def of(form):
        if form not in found:
            found[form], _ = save(tmp_path_factory.mktemp("repacked"), "llama", form)
        return found[form]

    return of


@pytest.fixture
def copy_of(published, tmp_path):
    return lambda form: shutil.copytree(published(form), tmp_path / "source")


def without(end):
    return lambda tensors: tensors.pop(Q_PROJ + end)


def with_(end, change):
    def edit(tensors):
        tensors[Q_PROJ + end] = np.ascontiguousarray(change(tensors[Q_PROJ + end]))

    return edit


def set_at(at, value):
    def change(array):
        array = array.copy()
        array.flat[at] = value
        return array

    return change


# What is done to the tensors of a form -> what is told.
TENSORS = {
    "gptq without scales": ("gptq", without("scales"), ("missing", "q_proj.scales")),
    "gptq without codes": ("gptq", without("qweight"), ("missing", "q_proj.qweight")),
    "gptq without zeros": ("gptq", without("qzeros"), ("missing", "q_proj.qzeros")),
    "asymmetric without zeros": ("gptq asymmetric", without("qzeros"), ("missing", "qzeros")),
    "gptq of another shape": (
        *("gptq", with_("qweight", lambda a: a[:-1])),
        ("q_proj.qweight", "int32 [15, 192]", "[16, 192]"),
    ),
    "gptq of another dtype": ("gptq", with_("qweight", lambda a: a.view("f4")), ("float32",)),
    "scales of another group": (
        "gptq",
        with_("scales", lambda a: a[::2]),
        ("[2, 192]", "[4, 192]"),
    ),
    "a group that is none": (
        *("gptq sorted", with_("g_idx", set_at(3, 4))),
        ("q_proj.g_idx", "group 4", "below 4"),
    ),
    "a group below 0": ("gptq sorted", with_("g_idx", set_at(3, -1)), ("group -1",)),
    "groups of other sizes": (
        *("gptq sorted", with_("g_idx", lambda a: np.where(a == 1, 2, a))),
        ("32 inputs in every group",),
    ),
    "unsorted": ("gptq", with_("g_idx", lambda a: a[::-1]), ("not sorted", "desc_act is false")),
    "sorted without places": ("gptq sorted", without("g_idx"), ("missing", "q_proj.g_idx")),
    "zeros that are not in the middle": (
        *("gptq", with_("qzeros", set_at(0, 0x77777776))),
        ("q_proj.qzeros", "a zero of 7", "expected 8", "sym"),
    ),
    "awq without zeros": ("awq", without("qzeros"), ("missing", "q_proj.qzeros")),
    "awq of another shape": ("awq", with_("qzeros", lambda a: a[:1]), ("q_proj.qzeros", "[1, 24]")),
    "hqq without scales": ("hqq", without("scale"), ("missing", "q_proj.scale")),
    "hqq with scales by columns": (
        *("hqq", with_("scale", lambda a: a.reshape(1, -1))),
        ("q_proj.scale", "[1, 384]", "[384, 1]"),
    ),
    "hqq with zeros of another dtype": (
        *("hqq", with_("zero", lambda a: a.astype(np.float32))),
        ("q_proj.zero", "float32", "float16"),
    ),
    "eetq without scales": ("eetq", without("weight_scales"), ("missing", "q_proj.weight_scales")),
    "eetq of another shape": ("eetq", with_("weight", lambda a: a.T), ("[192, 128]", "[128, 192]")),
    "packed without zeros": ("packed", without("weight_zero_point"), ("weight_zero_point",)),
    "packed with places": (
        "packed",
        lambda tensors: tensors.update({Q_PROJ + "weight_g_idx": np.zeros(128, np.int32)}),
        ("weight_g_idx", "actorder"),
    ),
    "packed with a group that is none": (
        *("packed sorted", with_("weight_g_idx", set_at(0, 9))),
        ("q_proj.weight_g_idx", "group 9"),
    ),
    "packed with zeros of its own": (
        "packed sorted",
        lambda tensors: tensors.update({Q_PROJ + "weight_zero_point": np.zeros((24, 4), "i4")}),
        ("q_proj.weight_zero_point is there, but symmetric is true",),
    ),
    "both plain and packed": (
        "gptq",
        lambda tensors: tensors.update({Q_PROJ + "weight": np.zeros((192, 128), np.float32)}),
        ("q_proj.weight",),
    ),
}


@pytest.mark.parametrize("label", TENSORS)
def test_tensors_that_are_not_of_the_form(copy_of, tmp_path, label):
    from safetensors.numpy import load_file, save_file

    form, edit, words = TENSORS[label]
    source = copy_of(form)
    tensors = load_file(source / SINGLE)
    edit(tensors)
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "target")
    for word in (str(source), *words):
        assert word in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


WEIGHTS = {"nbits": 4, "group_size": 64, "axis": 1}
PACKED = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}
CONFIGS = {
    "bits": ("gptq", {"bits": 5}, "bits is 5, supported: 2, 3, 4, 8"),
    "fewer bits than there are": ("gptq", {"bits": 2}, "expected int32 [8, 320]"),
    "group": ("gptq", {"group_size": 48}, "group_size is 48, supported: 32, 64, 128, -1"),
    "format": ("gptq", {"checkpoint_format": "marlin"}, "supported: gptq, gptq_v2"),
    "two formats": ("gptq", {"format": "gptq_v2"}, "checkpoint_format"),
    "dynamic": ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic has other settings"),
    "awq's kernel": ("awq", {"version": "gemv_fast"}, "version is 'gemv_fast', supported: gemm"),
    "another of awq's kernels": (
        "awq",
        {"version": "gemv"},
        "expected bfloat16 or float16 or float32 [128, 16]",
    ),
    "two of awq's kernels": ("awq", {"format": "gemv"}, "version is 'gemm' and format 'gemv'"),
    "awq's bits": ("awq", {"bits": 8}, "bits is 8, supported: 4"),
    "auto-round's form": ("auto-round", {"packing_format": "x"}, "packing_format is 'x', supp"),
    "auto-round's numbers": ("auto-round", {"data_type": "mx_fp"}, "data_type is 'mx_fp'"),
    "gptq's rotations": ("gptq", {"rotation_configs": [{}]}, "rotation_configs is"),
    "auto-round's rotations": ("auto-round", {"rotation_configs": [{}]}, "rotation_configs is"),
    "auto-round's settings of one": (
        *("auto-round", {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}),
        "settings of its own, bits 8",
    ),
    "awq's group": ("awq", {"group_size": 128}, "inputs in groups of 128, expected a multiple"),
    "hqq's axis": (
        *("hqq", {"quant_config": {"weight_quant_params": {**WEIGHTS, "axis": 0}}}),
        "axis is 0, supported: 1",
    ),
    "hqq's bits": (
        *("hqq", {"quant_config": {"weight_quant_params": {**WEIGHTS, "nbits": 3}}}),
        "nbits is 3, supported: 4, 8",
    ),
    "hqq as floats": (
        *("hqq", {"quant_config": {"weight_quant_params": {**WEIGHTS, "view_as_float": True}}}),
        "view_as_float is True",
    ),
    "eetq's weights": ("eetq", {"weights": "int4"}, "weights is 'int4'"),
    "hqq without settings": (
        *("hqq", {"quant_config": {}}),
        "quant_config is missing, supported: settings with weight_quant_params",
    ),
    "packed in two forms": (
        "packed",
        {
            "config_groups": {
                str(bits): {"weights": {**PACKED, "num_bits": bits}} for bits in (4, 8)
            }
        },
        "config_groups has 2 forms of weights, supported with zeros or sorted inputs: one",
    ),
    "packed in a format of its own": (
        "packed",
        {"config_groups": {"a": {"weights": PACKED}, "b": {"weights": PACKED, "format": "x"}}},
        "b: format is 'x', supported: 'pack-quantized'",
    ),
    "awq's modules": (
        *("awq", {"modules_to_not_convert": "lm_head"}),
        "modules_to_not_convert is 'lm_head', expected a list of names",
    ),
    "hqq's modules": ("hqq", {"skip_modules": [1]}, "skip_modules is [1], expected a list of"),
    "eetq's modules": (
        *("eetq", {"modules_to_not_convert": {"a": 1}}),
        "modules_to_not_convert is {'a': 1}, expected a list of names",
    ),
}


@pytest.mark.parametrize("label", CONFIGS)
def test_settings_that_are_not_supported(copy_of, tmp_path, label):
    form, changes, words = CONFIGS[label]
    source = copy_of(form)
    config = json.loads((source / "config.json").read_text())
    config[SECTION] |= changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "target")
    assert words in str(caught.value)
    assert str(source) in str(caught.value)
    if "inputs in groups" not in words and not words.startswith("expected"):  # of tensors
        assert str(caught.value).endswith(("such as the unquantized one", "with the weights"))


SIZES = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
# Form, sizes, module -> what does not divide.
DIVIDES = {
    "awq's outputs": (
        *("awq", {"head_dim": 36}, "self_attn.q_proj"),
        "has 36 outputs in words of 8, expected a multiple",
    ),
    "awq's inputs": (
        *("awq", {"intermediate_size": 96}, "mlp.down_proj"),
        "has 96 inputs in groups of 64, expected a multiple",
    ),
    "gptq's inputs": (
        *("gptq", {"intermediate_size": 36}, "mlp.down_proj"),
        "has 36 inputs in words of 8, expected a multiple",
    ),
    "gptq's inputs of 8 bits": (
        *("gptq of 8 bits", {"intermediate_size": 38}, "mlp.down_proj"),
        "has 38 inputs in words of 4, expected a multiple",
    ),
    "hqq's groups": (
        *("hqq", {"intermediate_size": 35}, "mlp.gate_proj"),
        "has 35 groups in pairs of 2, expected a multiple",
    ),
    "hqq's inputs": (
        *("hqq", {"intermediate_size": 96}, "mlp.down_proj"),
        "has 96 inputs in groups of 64, expected a multiple",
    ),
    "eetq's outputs": (
        *("eetq", {"intermediate_size": 35}, "mlp.gate_proj"),
        "has 35 outputs in pairs of 2, expected a multiple",
    ),
    "eetq's inputs": (
        *("eetq", {"intermediate_size": 96}, "mlp.down_proj"),
        "has 96 inputs in runs of 64, expected a multiple",
    ),
    "packed inputs": (
        *("packed by row", {"intermediate_size": 35}, "mlp.down_proj"),
        "has 35 inputs in bytes of 2, expected a multiple",
    ),
    "packed groups": (
        *("packed", {"intermediate_size": 48}, "mlp.down_proj"),
        "has 48 inputs in groups of 32, expected a multiple",
    ),
}


@pytest.mark.parametrize(("form", "sizes", "module", "words"), DIVIDES.values(), ids=DIVIDES)
def test_sizes_that_do_not_divide(form, sizes, module, words):
    """Asked of one scale of a matrix: what its codes would be is told as well."""
    sizes = {"intermediate_size": 64, "head_dim": 64} | sizes
    cfg = model_config({**SIZES, **sizes, SECTION: FORMS[form]}, where="here")
    name = f"model.layers.0.{module}.weight"
    place = Place("scale", SourceFile("file", "file", "file", 0, ()), 0)
    table = {f"{name}.scale": (place, TensorInfo("float16", (1, 1)))}
    problems = []
    to_repack(cfg, {"file": table}, problems)
    assert f"{name} {words}" in problems


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_gptqmodels_own_file_may_lie_beside_what_it_writes(copy_of, tmp_path, form):
    source = copy_of(form)
    (source / "quantize_config.json").write_text("{}")
    assert convert_checkpoint(source, tmp_path / "target").status == "converted"
    assert convert_checkpoint(source, tmp_path / "target").status == "unchanged"


def test_they_are_not_quantized_again(published, tmp_path):
    with pytest.raises(UnsupportedModelError, match="convert without --quantize"):
        convert_checkpoint(published("awq"), tmp_path / "target", quantize="int8")


def test_delete_source_keeps_the_files_to_the_end(copy_of, tmp_path):
    source = copy_of("gptq sorted")
    done = convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert done.removed == (SINGLE,)
    assert not (source / SINGLE).exists()
    Store(tmp_path / "target")
