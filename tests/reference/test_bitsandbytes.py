"""Models that bitsandbytes has quantized, saved by Transformers, run as they are and converted:
with bitsandbytes' own weights bit for bit, and with the logits that Transformers has of them."""

import shutil
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.layout import read_manifest
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources.open import open_source
from jlayer.convert.verify import verify_folder
from jlayer.cores.decode import decoded
from jlayer.encodings.registry import ENCODINGS, piece_name
from jlayer.families.registry import published_tensors
from jlayer.streaming.direct import Reader, aligned_buffer, aligned_span
from tests.campaigns import slow_but
from tests.reference.bitsandbytes_forms import FORMS, dequantized, reference_logits, save
from tests.reference.fp8_forms import save_encoded
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
# Importing it takes seconds, which a worker that runs none of these need not spend.
is_missing = find_spec("bitsandbytes") is None
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(is_missing, reason="bitsandbytes is not installed"),
]

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 12))
LOGITS = [
    *(("llama", form) for form in ("fp4", "int8")),
    *(("qwen3", form) for form in ("head too", "some left")),
    ("phi3", "nested in bfloat16"),
    *((name, "nested") for name in ("gemma3_text", "qwen3_moe", "deepseek_v3")),
]

PHI3 = ("phi3", "int8")
FIRST = [("llama", "fp4"), ("qwen3", "some left"), ("qwen3_moe", "nested")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, form) -> a folder that Transformers saved."""
    home, found = tmp_path_factory.mktemp("bitsandbytes"), {}

    def of(*case, dtype="float32"):
        if (case, dtype) not in found:
            found[case, dtype] = save(home, *case, dtype=dtype)
        return found[case, dtype]

    return of


def assert_close(folder, expected, **options):
    options = {"device": "cpu", "dtype": "float32"} | options
    with AutoModel.from_pretrained(folder, **options) as model:
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("case", slow_but(LOGITS, FIRST), ids="-".join)
def test_logits_of_a_prompt_as_published(made, case):
    folder = made(*case)
    assert_close(folder, reference_logits(folder, IDS))


@pytest.mark.parametrize("case", slow_but([("qwen3", "nested"), PHI3], [PHI3]), ids="-".join)
def test_logits_once_converted_and_in_place_by_ranges_of_rows(made, tmp_path, monkeypatch, case):
    folder = made(*case)
    expected = reference_logits(folder, IDS)
    assert convert_checkpoint(folder, tmp_path / "layered").status == "converted"
    assert verify_folder(tmp_path / "layered").findings == ()
    assert_close(tmp_path / "layered", expected)
    set_tile_bytes(monkeypatch, 1 << 14)
    assert_close(folder, expected, host_share=0.5)


BLOCKS = {"experts one by one": ("qwen3_moe", 128, False), "nested": ("qwen3", 32, True)}


@pytest.mark.parametrize("case", slow_but(BLOCKS, ("experts one by one",)))
def test_blocks_of_other_sizes_and_experts_one_by_one(tmp_path, case):
    """As earlier versions of Transformers saved them, quantized by bitsandbytes' own function."""
    name, size, is_nested = BLOCKS[case]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def tensors_of(weight):
        options = {"blocksize": size, "compress_statistics": is_nested, "quant_type": "nf4"}
        codes, state = quantize_4bit(weight, **options)
        held = {f".weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
        return {".weight": codes, **held}, dequantize_4bit(codes, state)

    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    more = {"moe_intermediate_size": 128} if name == "qwen3_moe" else {}
    said = {"quant_method": "bitsandbytes", **FORMS["nf4"]}
    folder, plain = save_encoded(tmp_path, name, said, tensors_of, sizes=sizes | more)
    up = "experts.3.up_proj" if more else "up_proj"
    assert Store(folder).form_of(f"model.layers.1.mlp.{up}.weight") == f"nf4_g{size}"
    assert_close(folder, reference_logits(plain, IDS))


def pieces_of(checked, name, form, shape):
    """The pieces of a matrix as they are converted."""
    found = {}
    for piece in ENCODINGS[form].pieces(shape):
        info = checked.tensors.tensors[piece_name(name, piece)]
        chunks = [bytes(chunk) for chunk in checked.tensors.chunks(piece_name(name, piece))]
        found[piece] = np.frombuffer(b"".join(chunks), info.dtype).reshape(info.shape)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_bitsandbytes_own(made, form):
    """Bit for bit; what is left is plain in both."""
    folder = made("qwen3", form)
    checked, expected = open_source(folder), dequantized(folder)
    for name, shape in published_tensors(checked.cfg).items():
        encoding = checked.quantization.table.of_tensor(name)
        assert (encoding is not None) == (name in expected)
        if encoding is not None:
            weights = decoded(encoding, pieces_of(checked, name, encoding, shape), shape[1])
            np.testing.assert_array_equal(weights, expected[name].numpy())
    checked.tensors.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_a_model_in_16_bits_are_theirs_once_rounded(made, dtype):
    """bitsandbytes rounds what it decodes to the dtype that the weights had."""
    folder = made("qwen3", "nested", dtype=dtype)
    checked, name = open_source(folder), "model.layers.1.mlp.down_proj.weight"
    weights = decoded("nf4", pieces_of(checked, name, "nf4", (192, 320)), 320)
    expected = dequantized(folder)[name]
    rounded = weights.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
    np.testing.assert_array_equal(rounded, expected.float().numpy())
    assert (rounded != weights).any()
    checked.tensors.close()


@pytest.mark.parametrize("most_bytes", [1 << 20, 100])
def test_nested_scales_are_the_same_whichever_rows_are_read(made, monkeypatch, most_bytes):
    """In place as they are converted: blocks of 256 scales cross the rows, of 5."""
    monkeypatch.setattr("jlayer.streaming.direct.CODES_REQUEST_BYTES", most_bytes)
    folder, name = made("qwen3", "nested"), "model.layers.0.mlp.down_proj.weight"
    checked, store = open_source(folder), Store(folder)
    expected = pieces_of(checked, name, "nf4", (192, 320))["scale"]
    checked.tensors.close()
    reader = Reader(store.files, store.identities)
    try:
        for first, count in ((0, 192), (0, 1), (51, 2), (77, 115), (191, 1)):
            segment = store.rows_segment(f"{name}.scale", first_row=first, n_bytes=20 * count)
            buffer = aligned_buffer(aligned_span(segment)[1])
            at = reader.read(segment, buffer)
            found = buffer[at : at + segment.n_bytes].view(np.float32).reshape(count, 5)
            np.testing.assert_array_equal(found, expected[first : first + count])
    finally:
        reader.close()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert store.weight_bytes < stored < 1.5 * store.weight_bytes  # statistics, and a header


@pytest.mark.parametrize("form", ["in float32", "int8"])
def test_pickles_are_converted_to_the_same_tensors(made, tmp_path, form):
    from safetensors.torch import load_file

    folder = made("qwen3", form)
    (tmp_path / "pickled").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    found = []
    for source, target in ((folder, "layered"), (tmp_path / "pickled", "same")):
        convert_checkpoint(source, tmp_path / target)
        files = read_manifest(tmp_path / target).files
        found.append({name: file.sha256 for name, file in files.items() if file.tensors})
    assert found[0] == found[1]


def test_a_note_says_that_inputs_are_not_rounded(made):
    with AutoModel.from_pretrained(made("llama", "int8"), device="cpu") as model:
        (note,) = model.notes
    assert "asks for the inputs of matrices to be quantized as well; here weights alone are" in note
