"""Damaged folders of every quantized form: a sample of what benchmarks/fuzz_quantized.py does by
the thousand, and what it once found."""

import copy

import pytest

from benchmarks import fuzz_quantized
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError
from tests.campaigns import slow_but
from tests.convert.quantized_kinds import KINDS
from tests.reference.repacked_forms import FORMS as REPACKED

Q_PROJ, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fuzz_quantized.Folders(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_has_the_weights_of_its_formula(folders, tmp_path, kind):
    """So that a damaged one that is read says something."""
    folder = folders.sound(kind)
    judged = fuzz_quantized.judge(folder, tmp_path / "t", in_place=kind not in REPACKED)
    assert judged == "read"


def test_other_weights_are_seen(folders):
    folder = folders.sound("symmetric")
    found = {name: array.copy() for name, array in fuzz_quantized.weights_of(folder).items()}
    found["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    with pytest.raises(AssertionError, match=r"up_proj.weight: 1 other weights"):
        fuzz_quantized.check_weights(found, folder)


@pytest.mark.parametrize("count", slow_but((250, 20_000), (250,)))
def test_a_damaged_folder_is_refused_in_one_line_or_has_the_weights_that_lie_there(count):
    found = fuzz_quantized.fuzz(count, seed=count)
    assert found["problems"] == []
    assert found["outcomes"]["refused"] > count / 2
    assert found["outcomes"]["read"] > count / 8


def weights(said):
    return said["config_groups"]["group_0"]["weights"]


def said(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


def of_weights(*left, **changes):
    """Changes what the group of modules says of its weights; `left`: keys that are taken away."""

    def edit(config, tensors):
        own = weights(config["quantization_config"])
        for key in left:
            del own[key]
        own.update(changes)

    return edit


def seen_as(name, word, shape):
    """The header says so of as many bytes of a tensor."""

    def edit(config, tensors):
        sizes = {"F32": 4, "BF16": 2}
        n_bytes = sizes.get(word, 1) * shape[0] * shape[1]
        tensors[name] = (word, shape, tensors[name][2][:n_bytes])

    return edit


def with_tensor(name, word, shape, n_bytes):
    return lambda config, tensors: tensors.update({name: (word, shape, bytes(n_bytes))})


def shorter_scales(config, tensors):
    for name, (word, shape, data) in list(tensors.items()):
        if name.endswith(".scales"):
            tensors[name] = (word, (shape[0], shape[1] - 1), data[: -2 * shape[0]])


NOT_AS_SAID = "encoded, but not as quantization_config says"
# What once ended in a traceback, was read as other weights, or told in lines without end.
FOUND = {
    "a format that is an object": (
        "symmetric",
        said(format={"a": 1}),
        "format {'a': 1} is not supp",
    ),
    "a format that is a list": ("packed by row", said(format=["x"]), "format ['x'] is not supp"),
    "a version that is an object": (
        *("gptq", said(checkpoint_format={"a": 1})),
        "checkpoint_format is {'a': 1}, supported: gptq, gptq_v2",
    ),
    "bits that are none": (
        "symmetric",
        of_weights(num_bits=None),
        "num_bits is None, supported: 8",
    ),
    "bits left out": (
        *("symmetric", of_weights("num_bits")),
        f"{NOT_AS_SAID} (packed8_g32_bfloat16): {Q_PROJ}.weight (packed4_g32_bfloat16), ",
    ),
    "a group in words": ("symmetric", of_weights(group_size="32"), "group_size is '32', supported"),
    "a piece of another form": (
        *("eetq", with_tensor(f"{GATE}.weight.zero", "F32", (1,), 4)),
        f"{GATE}.weight.zero in model.safetensors is no part of a matrix of eetq",
    ),
    "a layout that is no byte": (
        *("int8 of bitsandbytes", with_tensor(f"{GATE}.weight_format", "BOOL", (), 1)),
        f"{GATE}.weight_format in model.safetensors is bool [], supported: uint8 [0]",
    ),
    "scales of e8m0 as numbers": (
        *("mxfp4", seen_as(f"{Q_PROJ}.weight_scale", "F32", (128, 1))),
        f"{NOT_AS_SAID} (mxfp4): {Q_PROJ}.weight (packed4_g128_float32)",
    ),
    "numbers of float8 as integers": (
        *("float by channel", seen_as(f"{Q_PROJ}.weight", "I8", (128, 128))),
        f"{NOT_AS_SAID} (fp8_row_bfloat16): {Q_PROJ}.weight (int8_row_bfloat16)",
    ),
    "scales of larger groups": (
        *("symmetric of 8 bits", seen_as(f"{Q_PROJ}.weight_scale", "BF16", (128, 1))),
        f"{NOT_AS_SAID} (packed8_g64_bfloat16): {Q_PROJ}.weight (packed8_g128_bfloat16)",
    ),
    "a grid that was cut off to one scale": (
        *("fp8", seen_as(f"{GATE}.weight_scale_inv", "F32", (1, 1))),
        f"{NOT_AS_SAID} (fp8_128x128, fp8_row_bfloat16): {GATE}.weight (fp8_tensor)",
    ),
    "what is wrong with every matrix": ("gptq", shorter_scales, "; and 4 more"),
}


@pytest.mark.parametrize(("kind", "edit", "words"), FOUND.values(), ids=FOUND)
def test_what_was_found_is_refused(folders, tmp_path, kind, edit, words):
    config, tensors = copy.deepcopy(folders.whole[kind][0]), dict(folders.whole[kind][1])
    edit(config, tensors)
    folder = folders.written(config, tensors)
    attempts = [lambda: convert_checkpoint(folder, tmp_path / "target")]
    if kind not in REPACKED:
        attempts.append(lambda: Store(folder))
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_bits_that_are_a_whole_number_are_taken_however_they_are_written(folders):
    config, tensors = copy.deepcopy(folders.whole["symmetric"][0]), folders.whole["symmetric"][1]
    weights(config["quantization_config"]).update(num_bits=4.0, group_size=32.0)
    assert Store(folders.written(config, tensors)).form_of(f"{Q_PROJ}.weight")[:7] == "packed4"
