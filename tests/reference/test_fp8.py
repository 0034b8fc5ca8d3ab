"""Models whose weights are published in FP8 run as they are, in place and converted, with the logits
of Transformers for what they stand for."""

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.verify import verify_folder
from jlayer.encodings.fp8 import FP8
from jlayer.encodings.registry import ENCODINGS
from tests.reference.fp8_forms import FORMS, MODELS, encode, reference_logits, save
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


@pytest.mark.parametrize(("name", "form"), CASES)
def test_logits_of_a_prompt_as_published_and_converted(made, tmp_path, name, form):
    folder, expected = made(name, form)
    assert_close(logits(folder), expected)
    convert_checkpoint(folder, tmp_path / "layered")
    assert verify_folder(tmp_path / "layered").findings == ()
    assert_close(logits(tmp_path / "layered"), expected)


@pytest.mark.parametrize("name", MODELS)
def test_tiles_begin_where_a_row_of_scales_does(made, monkeypatch, name):
    folder, expected = made(name, "grid")
    set_tile_bytes(monkeypatch, 4096)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        tiles = model.engine.plan.tiling.tiles
        firsts = {p.first_row for t in tiles for p in t.parts if p.piece == "q" and not t.expert}
        assert firsts - {0}
        assert all(first % 128 == 0 for first in firsts)
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
