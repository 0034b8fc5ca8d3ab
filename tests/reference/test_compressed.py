"""Models that compressed-tensors has quantized to integers and to 4 bits, and ModelOpt, run as they
are published, with the logits of Transformers for what they stand for. Their formulas are written
out here."""

import json
import shutil

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources.open import open_source
from jlayer.encodings.tables import E2M1
from jlayer.errors import CheckpointError
from tests.campaigns import slow_but
from tests.encoded import compressed_tensors
from tests.reference.fp8_forms import reference_logits, save_encoded
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 12))


def grouped(weight, size):
    """[rows, groups, size], with zeros after the last input."""
    padding = -weight.shape[1] % size
    return torch.nn.functional.pad(weight, (0, padding)).reshape(len(weight), -1, size)


def ungrouped(groups, width):
    return groups.reshape(len(groups), -1)[:, :width].contiguous()


def nibbles(codes):
    """Two codes a byte, the first one in the low half."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).contiguous()


def integers(bits, size, *, dtype=torch.bfloat16, packed=True):
    """A function of a weight: integers of so many bits, with a scale for `size` inputs."""

    def tensors_of(weight):
        width, most = weight.shape[1], 2 ** (bits - 1)
        groups = grouped(weight, size or width)
        scale = (groups.abs().amax(-1) / (most - 0.5)).to(dtype)
        wide = scale.float()[..., None]
        codes = (groups / wide).round().clamp(-most, most - 1)
        plain = ungrouped(codes * wide, width)
        codes = ungrouped(codes, width).to(torch.int32)
        if not packed:
            return {".weight": codes.to(torch.int8), ".weight_scale": scale}, plain
        codes = codes + most
        held = nibbles(codes) if bits == 4 else codes.to(torch.uint8)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        words = held.view(torch.int32)
        return {".weight_packed": words, ".weight_scale": scale, ".weight_shape": shape}, plain

    return tensors_of


def nearest(numbers):
    """The codes of the nearest levels of e2m1; a positive zero for zero."""
    levels = torch.tensor(E2M1)
    return (numbers[..., None] - levels).abs().argmin(-1)


def mxfp4(weight):
    groups = grouped(weight, 32)
    exponent = groups.abs().amax(-1).clamp(min=2.0**-60).log2().floor() - 2
    codes = nearest(groups / exponent.exp2()[..., None])
    plain = torch.tensor(E2M1)[codes] * exponent.exp2()[..., None]
    scale = (exponent + 127).to(torch.uint8)
    packed = nibbles(ungrouped(codes, weight.shape[1]))
    return {".weight_packed": packed, ".weight_scale": scale}, ungrouped(plain, weight.shape[1])


def nvfp4(weight):
    """The scale of 16 inputs is a float8, divided by that of the matrix."""
    groups = grouped(weight, 16)
    whole = (448 * 6 / weight.abs().amax()).reshape(1)
    scale = (whole * groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    wide = (scale.float() / whole)[..., None]
    codes = nearest(groups / wide)
    plain = ungrouped(torch.tensor(E2M1)[codes] * wide, weight.shape[1])
    packed = nibbles(ungrouped(codes, weight.shape[1]))
    held = {".weight_packed": packed, ".weight_scale": scale, ".weight_global_scale": whole}
    return held | {".input_global_scale": torch.ones(1)}, plain


def nvfp4_modelopt(weight):
    """The same times the scale of the matrix."""
    held, _ = nvfp4(weight)
    whole = 1 / held[".weight_global_scale"]
    levels = torch.tensor(E2M1)
    codes = torch.stack([held[".weight_packed"] & 15, held[".weight_packed"] >> 4], -1)
    wide = (held[".weight_scale"].float() * whole)[..., None]
    plain = levels[codes.reshape(len(codes), -1, 16).int()] * wide
    found = {".weight": held[".weight_packed"], ".weight_scale": held[".weight_scale"]}
    found |= {".weight_scale_2": whole.reshape(()), ".input_scale": torch.tensor(1.0)}
    return found, ungrouped(plain, weight.shape[1])


def fp8_modelopt(weight):
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale


def modelopt(algorithm, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "float", "dynamic": False, **weights}}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.*.mlp.gate"],
        "producer": {"name": "modelopt", "version": "0.29.0"},
    }


INT = {"type": "int", "strategy": "group"}
FORMS = {
    "int4 in groups": (
        compressed_tensors("pack-quantized", num_bits=4, group_size=32, **INT),
        integers(4, 32),
    ),
    "int4, the last group short": (
        compressed_tensors("pack-quantized", num_bits=4, group_size=128, **INT),
        integers(4, 128, dtype=torch.float32),
    ),
    "int8 packed": (
        compressed_tensors("pack-quantized", num_bits=8, group_size=64, **INT),
        integers(8, 64, dtype=torch.float16),
    ),
    "int8 by channel": (
        compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
        integers(8, None, packed=False),
    ),
    "mxfp4": (
        compressed_tensors("mxfp4-pack-quantized", num_bits=4, group_size=32, type="float"),
        mxfp4,
    ),
    "nvfp4": (
        compressed_tensors("nvfp4-pack-quantized", num_bits=4, group_size=16, type="float"),
        nvfp4,
    ),
    "nvfp4 of modelopt": (modelopt("NVFP4", num_bits=4, group_size=16), nvfp4_modelopt),
    "fp8 of modelopt": (modelopt("FP8", num_bits=8), fp8_modelopt),
}
ENCODINGS = {
    "int4 in groups": "packed4_g32_bfloat16",
    "int4, the last group short": "packed4_g128_float32",
    "int8 packed": "packed8_g64_float16",
    "int8 by channel": "int8_row_bfloat16",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "nvfp4 of modelopt": "nvfp4_modelopt",
    "fp8 of modelopt": "fp8_tensor",
}
SIZES = {"hidden_size": 160, "intermediate_size": 320, "head_dim": 32}  # of whole groups of 32

LOGITS = [*((form, "qwen3") for form in FORMS), ("int4 in groups", "qwen3_moe")]
FIRST = [
    *((form, "qwen3") for form in ("int4, the last group short", "nvfp4", "fp8 of modelopt")),
    ("int4 in groups", "qwen3_moe"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """form -> (a published folder, the logits of IDS by Transformers)."""
    found = {}

    def of(form, name="qwen3"):
        if (form, name) not in found:
            folder = tmp_path_factory.mktemp("compressed")
            published, plain = save_encoded(folder, name, *FORMS[form], sizes=SIZES)
            found[form, name] = published, reference_logits(plain, IDS)
        return found[form, name]

    return of


def logits(folder):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        return model.logits(IDS)


@pytest.mark.parametrize("case", slow_but(LOGITS, FIRST), ids="-".join)
def test_logits_of_a_prompt_as_published_and_converted(made, tmp_path, case):
    (form, _), (folder, expected) = case, made(*case)
    convert_checkpoint(folder, tmp_path / "layered")
    for each in (folder, tmp_path / "layered"):
        q = "model.layers.1.self_attn.q_proj.weight"
        assert Store(each).form_of(q) == ENCODINGS[form]
        atol = TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(logits(each), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("form", slow_but(["nvfp4", "fp8 of modelopt"], ("fp8 of modelopt",)))
def test_a_scale_for_all_rows_comes_with_each_tile_and_is_checked(
    made, tmp_path, monkeypatch, form
):
    folder, expected = made(form)
    layered, q = tmp_path / "layered", "model.layers.1.mlp.up_proj.weight"
    convert_checkpoint(folder, layered)
    set_tile_bytes(monkeypatch, 4096)
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(logits(layered), expected, rtol=0, atol=atol)
    entry = read_manifest(layered).files["layer-00001.safetensors"]
    place = next(
        place for name, place in entry.tensors.items() if name.startswith(q) and place.shape == (1,)
    )
    path = layered / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tensor {q}\..*scale: damaged"):
        logits(layered)


GROUP = {"num_bits": 4, "group_size": 32, **INT}
WRONG = {
    "a group of another size": (
        compressed_tensors("pack-quantized", **{**GROUP, "group_size": 48}),
        "group_size is 48, supported: 32, 64, 128",
    ),
    "a group of another size in nvfp4": (
        compressed_tensors("nvfp4-pack-quantized", num_bits=4, group_size=32, type="float"),
        "group_size is 32, supported: 16",
    ),
    "zeros of their own": (
        compressed_tensors("pack-quantized", **{**GROUP, "symmetric": False}),
        "run once they are repacked; run: jlayer convert",
    ),
    "inputs in another order": (
        compressed_tensors("pack-quantized", actorder="group", **GROUP),
        "run once they are repacked; run: jlayer convert",
    ),
    "no weights": (
        {**compressed_tensors("pack-quantized"), "config_groups": {"a": {"input_activations": {}}}},
        "config_groups: a: weights is missing: only weights that are quantized are supported",
    ),
    "another algorithm": (modelopt("W4A8_AWQ"), "quant_algo 'W4A8_AWQ' is not supported; supp"),
    "too many stars": (
        {**modelopt("NVFP4"), "ignore": ["*a*b*c*d*e"]},
        "ignore has .*, supported: up to 4 stars",
    ),
    "a group of another size in modelopt": (
        modelopt("NVFP4", group_size=32),
        "group_size is 32, supported: 16",
    ),
    "three bits": (
        compressed_tensors("pack-quantized", **{**GROUP, "num_bits": 3}),
        "num_bits is 3, supported",
    ),
}


@pytest.mark.parametrize(("config", "words"), WRONG.values(), ids=WRONG)
def test_configs_of_another_form_are_refused(made, tmp_path, config, words):
    folder, _ = made("int4 in groups")
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=words):
        Store(tmp_path / "changed")


@pytest.mark.parametrize("open_it", [Store, open_source])
def test_scales_that_are_divided_by_0_are_refused(made, tmp_path, open_it):
    """All weights of the matrix would be infinite, or no numbers."""
    from safetensors.torch import load_file, save_file

    folder, _ = made("nvfp4")
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if name.endswith(".weight_global_scale")]
    tensors[names[0]].zero_()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{names[0]} in model.safetensors is 0: .* again"):
        open_it(tmp_path / "changed")


K = "model.layers.0.self_attn.k_proj"
CHANGED = {
    "no scale": (".weight_scale", None, rf"missing: {K}.weight_scale$"),
    "no codes": (".weight_packed", None, rf"missing: {K}.weight_packed$"),
    "a word short": (".weight_packed", np.s_[:, :-1], rf"{K}.weight_packed in .* \[64, 76\], by"),
    "a group short": (
        ".weight_scale",
        np.s_[:, :-1],
        rf"shape \(fetch .* of one version\): {K}.weight_scale in .* \[64, 4\], by",
    ),
}


@pytest.mark.parametrize(("end", "part", "words"), CHANGED.values(), ids=CHANGED)
def test_tensors_that_do_not_fit_are_refused(made, tmp_path, end, part, words):
    from safetensors.torch import load_file, save_file

    folder, _ = made("int4 in groups")
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(K + end)
    if part is not None:
        tensors[K + end] = tensor[part].contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words):
        Store(tmp_path / "changed")
