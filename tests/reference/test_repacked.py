"""Models in the forms that are repacked (GPTQ, AWQ, HQQ, EETQ, pack-quantized with zeros or sorted
inputs): converted, they have the weights of the format's formula bit for bit, and the logits that
Transformers has with these."""

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.convert.sources.open import open_source
from jlayer.convert.verify import verify_folder
from jlayer.cores.decode import decoded
from jlayer.encodings.registry import ENCODINGS, piece_name
from jlayer.errors import CheckpointError
from tests.campaigns import slow_but
from tests.reference.fp8_forms import reference_logits
from tests.reference.repacked_forms import FORMS, is_encoded, save
from tests.streaming.conftest import set_tile_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
IDS = np.random.default_rng(0).integers(3, 133, (1, 12))
LOGITS = [
    *(("llama", form) for form in ("gptq", "awq", "hqq", "eetq", "packed")),
    *(("llama", form) for form in ("gptq of 2 bits", "awq gemv", "auto-round")),
    *(("qwen3", form) for form in ("gptq sorted", "gptq of 8 bits sorted", "packed sorted")),
    *(("qwen3_moe", form) for form in ("gptq sorted asymmetric", "awq", "gptq of 3 bits")),
]

# Inputs in another order, and experts. What has a kernel for the host's cores goes by ranges.
FIRST = [("qwen3", "gptq sorted"), ("qwen3_moe", "awq")]
HOSTED = [("llama", "hqq")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, form) -> (a published folder, one of plain numbers)."""
    found = {}

    def of(*case):
        if case not in found:
            found[case] = save(tmp_path_factory.mktemp("repacked"), *case)
        return found[case]

    return of


def assert_close(folder, expected, **options):
    options = {"device": "cpu", "dtype": "float32"} | options
    with AutoModel.from_pretrained(folder, **options) as model:
        found = model.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("case", slow_but(LOGITS, FIRST), ids="-".join)
def test_logits_of_a_prompt_once_converted(made, tmp_path, case):
    published, plain = made(*case)
    assert convert_checkpoint(published, tmp_path / "layered").status == "converted"
    assert verify_folder(tmp_path / "layered").findings == ()
    assert_close(tmp_path / "layered", reference_logits(plain, IDS))


@pytest.mark.parametrize("case", slow_but(LOGITS, HOSTED), ids="-".join)
@pytest.mark.parametrize("share", slow_but((0, 0.5), (0.5,)))
def test_logits_by_ranges_of_rows(made, tmp_path, monkeypatch, case, share):
    """Those that the host's cores multiply too."""
    published, plain = made(*case)
    convert_checkpoint(published, tmp_path / "layered")
    set_tile_bytes(monkeypatch, 4096)
    assert_close(tmp_path / "layered", reference_logits(plain, IDS), host_share=share)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_what_the_formula_says(made, monkeypatch, form, chunk_bytes):
    """Bit for bit, read at once and a few rows at a time."""
    from safetensors.numpy import load_file

    for module in ("files", "repacked"):
        monkeypatch.setattr(f"jlayer.convert.sources.{module}.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("jlayer.convert.sources.files.TURNED_BYTES", 4 * chunk_bytes)
    published, plain = made("llama", form)
    checked, n_encoded = open_source(published), 0
    for name, expected in load_file(plain / "model.safetensors").items():
        form_of = checked.quantization.table.of_tensor(name)
        assert (form_of is not None) == is_encoded(name, expected.shape)
        if form_of is None:
            continue
        pieces = {}
        for piece in ENCODINGS[form_of].pieces(expected.shape):
            info = checked.tensors.tensors[piece_name(name, piece)]
            chunks = [bytes(c) for c in checked.tensors.chunks(piece_name(name, piece))]
            pieces[piece] = np.frombuffer(b"".join(chunks), info.dtype).reshape(info.shape)
            n_encoded += len(chunks) > 1
        np.testing.assert_array_equal(decoded(form_of, pieces, expected.shape[1]), expected)
    assert (n_encoded > 0) == (chunk_bytes == 1000)
    checked.tensors.close()


@pytest.mark.parametrize(
    "form",
    ["gptq sorted", "gptq of 3 bits", "awq", "awq gemv", "auto-round", "hqq", "eetq", "packed"],
)
def test_in_place_they_are_refused_with_the_command_that_repacks_them(made, form):
    folder, _ = made("llama", form)
    with pytest.raises(CheckpointError) as caught:
        Store(folder)
    assert f"run: jlayer convert {folder} published-jlayer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interrupted_conversion_is_resumed_to_the_same_bytes(made, tmp_path, monkeypatch):
    from jlayer.convert.sources.repacked import RepackedSource

    folder, _ = made("llama", "awq")
    convert_checkpoint(folder, tmp_path / "whole")
    chunks = RepackedSource.chunks

    def stops(self, name, room=None):
        if ".layers.1." in name:
            raise KeyboardInterrupt
        return chunks(self, name, room)

    monkeypatch.setattr(RepackedSource, "chunks", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, tmp_path / "resumed")
    monkeypatch.setattr(RepackedSource, "chunks", chunks)
    done = convert_checkpoint(folder, tmp_path / "resumed")
    assert done.n_resumed == 2  # the embedding and the first layer
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "resumed")
    )
    assert whole == resumed
