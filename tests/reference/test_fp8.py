"""Models whose weights are published in FP8 run as they are, in place and converted, with the
logits of Transformers for what they stand for."""

import json
import math

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.verify import verify_folder
from jlayer.encodings.fp8 import FP8
from jlayer.encodings.registry import ENCODINGS
from jlayer.errors import CheckpointError
from jlayer.families.registry import stacked_tensors
from tests.campaigns import slow_but
from tests.reference.fp8_forms import FORMS, GRID, MODELS, encode, reference_logits, save
from tests.reference.mixture_forms import MIXTURES
from tests.reference.test_stacked import WEIGHTS, cfg_of
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 12))
CASES = [
    *((name, "grid") for name in MODELS),
    *(("qwen3", form) for form in FORMS if form != "grid"),
    ("deepseek_v3", "compressed by channel"),
]

BY_CHANNEL = ("compressed by channel", 20)
FIRST = [("qwen3", "grid"), ("qwen3", "compressed by channel"), ("qwen3_moe", "grid")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, form) -> (a published folder, the logits of IDS by Transformers)."""
    found = {}

    def of(*case):
        if case not in found:
            published, plain = save(tmp_path_factory.mktemp("fp8"), *case)
            found[case] = published, reference_logits(plain, IDS)
        return found[case]

    return of


def logits(folder, **options):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", **options) as model:
        return model.logits(IDS)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("case", slow_but(CASES, FIRST), ids="-".join)
def test_logits_of_a_prompt_as_published_and_converted(made, tmp_path, case):
    folder, expected = made(*case)
    assert_close(logits(folder), expected)
    convert_checkpoint(folder, tmp_path / "layered")
    assert verify_folder(tmp_path / "layered").findings == ()
    assert_close(logits(tmp_path / "layered"), expected)


@pytest.mark.parametrize("name", slow_but(MODELS, ("qwen3", "qwen3_moe")))
def test_tiles_begin_where_a_row_of_scales_does(made, monkeypatch, name):
    folder, expected = made(name, "grid")
    set_tile_bytes(monkeypatch, 4096)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        tiles = model.engine.plan.tiling.tiles
        firsts = {p.first_row for t in tiles for p in t.parts if p.piece == "q" and not t.expert}
        assert firsts - {0}
        assert all(first % 128 == 0 for first in firsts)
        assert_close(model.logits(IDS), expected)


@pytest.mark.parametrize("name", slow_but(["qwen3", "deepseek_v3"], ("qwen3",)))
def test_rows_that_the_hosts_cores_multiply(made, name):
    """Half of them, up to where a row of scales begins."""
    folder, expected = made(name, "grid")
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32", host_share=0.5) as model:
        assert model.engine.plan.host_product_bytes
        assert_close(model.logits(IDS), expected)


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_stand_for_what_transformers_decodes_them_to(form):
    """Bit for bit, in numpy and in JAX: with all codes but NaN, and blocks that are not whole."""
    import jax
    import ml_dtypes

    from jlayer.cores.decode import decoded, some_rows
    from jlayer.model.products import Encoded, dequantize

    torch.manual_seed(0)
    weight = torch.randn(300, 140) * torch.logspace(-3, 3, 140)
    codes, scale, expected = encode(weight, form)
    scale = torch.atleast_1d(scale)
    by = {"grid": "128x128", "block": "128x128", "channel": "row"}.get(form.split()[-1], "tensor")
    dtype = {torch.float32: "", torch.bfloat16: "_bfloat16"}[scale.dtype]
    row = FP8[f"fp8_{by}{dtype}"]
    numbers = scale.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype else scale.numpy()
    pieces = {"q": codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), "scale": numbers}
    shapes = {name: (str(a.dtype), a.shape) for name, a in pieces.items()}
    assert shapes == row.pieces((300, 140))
    found = jax.jit(dequantize, static_argnums=1)(
        Encoded(pieces, encoding=row.name, block_bytes=1 << 20), 140
    )
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())
    some = decoded(row.name, some_rows(row.name, pieces, 120, 50), 140)
    np.testing.assert_array_equal(some, expected.numpy()[120:170])
    assert ENCODINGS[row.name] is row


def test_the_store_says_which_tensor_has_which_encoding(made):
    store = Store(made("deepseek_v3", "grid")[0])
    forms = {name: store.form_of(f"model.layers.1.{name}.weight") for name in (
        "self_attn.kv_b_proj", "mlp.experts.3.up_proj", "mlp.gate", "input_layernorm"
    )}  # fmt: skip
    assert set(forms.values()) == {"fp8_128x128", "float32"}
    assert forms["mlp.gate"] == forms["input_layernorm"] == "float32"
    assert store.form_of("lm_head.weight") == "float32"


def experts_in_fp8(folder, form, width, *, axes=None):
    """Two folders of one model whose experts are in FP8: one by one, and in tensors of all. `axes`:
    of the scales of gates and ups, where each matrix has one, or both of an expert have."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    own = MIXTURES["qwen3_5_moe"].config | {"moe_intermediate_size": width}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_moe_text", **own)
    apart, whole = folder / "apart", folder / "whole"
    AutoModelForCausalLM.from_config(config).save_pretrained(apart)
    tensors = load_file(apart / WEIGHTS)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = encode(tensors[name].float(), form)
        if form == "tensor" and "up_proj" in name and math.prod(axes) == config.num_experts:
            gate = f"{name.replace('up_proj', 'gate_proj')}_scale_inv"
            tensors[f"{name}_scale_inv"] = tensors[gate].clone()
    said = GRID if axes is None else FORMS[form][0]
    raw = json.loads((apart / "config.json").read_text()) | {"quantization_config": said}
    (apart / "config.json").write_text(json.dumps(raw))
    save_file(tensors, apart / WEIGHTS)
    for name, stack in stacked_tensors(cfg_of(apart)).items():
        for end in ("", "_scale_inv"):
            parts = [tensors.pop(part + end) for part, *_ in stack.parts]
            if end and axes is not None:
                own = axes if "gate_up" in name else (len(parts), *(1 for _ in axes[1:]))
                each = torch.stack(parts[:: len(parts) // math.prod(own)])
                tensors[name + end] = each.reshape(own)
                continue
            joined = torch.cat([part.view(torch.uint8) for part in parts])
            joined = joined.view(parts[0].dtype).reshape(stack.shape[0], -1, parts[0].shape[1])
            tensors[name + end] = joined.contiguous()
    whole.mkdir()
    save_file(tensors, whole / WEIGHTS)
    (whole / "config.json").write_text(json.dumps(raw))
    return apart, whole


@pytest.mark.parametrize(
    "case",
    slow_but([("grid", 128), BY_CHANNEL], [BY_CHANNEL]),
    ids="{0[0]}".format,
)
def test_experts_in_one_tensor_are_those_that_lie_one_by_one(tmp_path, case):
    form, width = case
    apart, whole = experts_in_fp8(tmp_path, form, width)
    expected = logits(apart)
    np.testing.assert_array_equal(logits(whole), expected)
    convert_checkpoint(whole, tmp_path / "layered")
    np.testing.assert_array_equal(logits(tmp_path / "layered"), expected)


# [experts] where a gate and its up have one scale together, or [experts, 2] where each has its own,
# as Transformers' FP8Experts has them with a third axis.
@pytest.mark.parametrize("more", slow_but([(), (1,), (1, 1), (2,), (2, 1)], [(), (2, 1)]))
def test_experts_with_one_scale_of_a_matrix_may_be_one_tensor(tmp_path, more):
    n_experts = MIXTURES["qwen3_5_moe"].config["num_experts"]
    apart, whole = experts_in_fp8(tmp_path, "tensor", 20, axes=(n_experts, *more))
    expected = logits(apart)
    np.testing.assert_array_equal(logits(whole), expected)
    convert_checkpoint(whole, tmp_path / "layered")
    np.testing.assert_array_equal(logits(tmp_path / "layered"), expected)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert {Store(folder).form_of(name) for folder in (apart, whole)} == {"fp8_tensor_bfloat16"}


def test_another_number_of_scales_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    n_experts = MIXTURES["qwen3_5_moe"].config["num_experts"]
    _, whole = experts_in_fp8(tmp_path, "tensor", 20, axes=(n_experts, 1, 1))
    tensors = load_file(whole / WEIGHTS)
    name = next(name for name in tensors if name.endswith("gate_up_proj_scale_inv"))
    tensors[name] = torch.ones(n_experts, 3, 1, dtype=torch.bfloat16)
    save_file(tensors, whole / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=rf"tensor {name} is \[{n_experts}, 3, 1\], by config"
    ):
        Store(whole)


def test_experts_whose_scales_are_shared_are_not_cut_apart(tmp_path):
    _, whole = experts_in_fp8(tmp_path, "grid", 128)
    held = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(held | {"moe_intermediate_size": 96}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(whole / WEIGHTS)
    for name in [name for name in tensors if ".experts." in name]:
        if "gate_up" in name and name.endswith("_inv"):
            continue  # two rows of scales for 192 rows
        tensors[name] = tensors[name][:, :192] if "gate_up" in name else tensors[name][..., :96]
        tensors[name] = tensors[name].contiguous()
    save_file(tensors, whole / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"96 rows of a matrix beside .* a multiple of 128"):
        Store(whole)
