"""Ids come in as arrays of any library, and what is given back is of the same; nothing is imported
for it that is not there already."""

import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

import jax.numpy as jnp
import numpy as np
import pytest

from jlayer import AutoModel, UsageError

ROW = [5, 17, 99, 3]
GREEDY = {"max_new_tokens": 3, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tiny):
    with AutoModel.from_pretrained(tiny, device="cpu", dtype="float32") as opened:
        yield opened


class Exchanged:
    """No more than DLPack."""

    def __init__(self, values):
        self._own = np.array(values)

    def __dlpack__(self, **options):
        return self._own.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._own.__dlpack_device__()


class OfStandard(Exchanged):
    """Of a library that follows the standard of array libraries."""

    @classmethod
    def from_dlpack(cls, other):
        return cls(np.from_dlpack(other))

    def __array_namespace__(self):
        space = types.SimpleNamespace(from_dlpack=self.from_dlpack)
        space.astype = lambda array, dtype: OfStandard(array._own.astype(dtype))
        return space

    @property
    def dtype(self):
        return self._own.dtype


class Elsewhere:
    """On a device that the host cannot read."""

    def __dlpack__(self, **options):
        raise BufferError("not on the host")

    def __dlpack_device__(self):
        return 2, 0


def of_library(name, monkeypatch, makes):
    """A stand-in of a library's tensor. CuPy's refuses to be copied by the way."""

    class Tensor(Exchanged):
        dtype = "int64"

    if name == "cupy":
        Tensor.tolist = lambda self: self._own.tolist()
        Tensor.get = lambda self: self._own
    else:
        Tensor.__array__ = property(lambda self: self._own.__array__)
    Tensor.__module__ = f"{name}.python.framework"

    def make(values, dtype=None):
        found = Tensor(values)
        found.asked_for = dtype
        return found

    library = types.SimpleNamespace(**{makes: make}, __spec__=ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, library)
    return Tensor


def read(array):
    found = array if hasattr(array, "__array__") else np.from_dlpack(array)
    return np.asarray(found).tolist()


def test_torch_and_jax(model):
    torch = pytest.importorskip("torch")
    expected, vector = model.generate([ROW], **GREEDY), model.encode([ROW])
    for make, kind in ((torch.tensor, torch.Tensor), (jnp.array, type(jnp.zeros(1)))):
        for ids in (make([ROW]), make(ROW)):
            found, embedded = model.generate(ids, **GREEDY), model.encode(ids)
            assert isinstance(found, kind)
            assert isinstance(embedded, kind)
            assert (found.ndim, found.dtype) == (ids.ndim, ids.dtype)
            assert np.asarray(found).reshape(1, -1).tolist() == expected
            np.testing.assert_array_equal(np.asarray(embedded).reshape(1, -1), vector)
            assert str(embedded.dtype).endswith("float32")
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    given = {"input_ids": torch.tensor([[0, *ROW]]), "attention_mask": mask}
    assert isinstance(model.encode(given), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "makes"), [("tensorflow", "convert_to_tensor"), ("cupy", "asarray")]
)
def test_stand_ins_of_tensorflow_and_cupy(model, monkeypatch, name, makes):
    kind = of_library(name, monkeypatch, makes)
    found = model.generate(kind([ROW]), attention_mask=kind([[1] * 4]), **GREEDY)
    assert type(found) is kind
    assert found.asked_for == "int64"
    assert read(found) == model.generate([ROW], **GREEDY)
    assert type(model.encode(kind([ROW]))) is kind
    made = np.linspace(-1, 1, 96, dtype=np.float32).reshape(1, 4, 24)
    found = model.generate(inputs_embeds=kind(made), **GREEDY)
    assert type(found) is kind
    assert found.asked_for is None
    assert read(found) == model.generate(inputs_embeds=made, **GREEDY).tolist()


def test_what_has_dlpack_alone(model):
    expected = model.generate([ROW], **GREEDY)
    found = model.generate(Exchanged([ROW]), **GREEDY)
    assert isinstance(found, np.ndarray), "there is no way back into a type that has none"
    assert found.tolist() == expected
    found = model.generate(OfStandard(np.array([ROW], np.int32)), **GREEDY)
    assert isinstance(found, OfStandard)
    assert found.dtype == np.int32
    assert np.from_dlpack(found).tolist() == expected
    assert model.logits(Exchanged([ROW])).shape == (1, 4, 133)
    assert model.encode([Exchanged(ROW), Exchanged(ROW[:2])]).shape == (2, 24)


def test_what_cannot_be_read_is_refused(model):
    with pytest.raises(UsageError, match=r"Elsewhere: an array that cannot be read on the host"):
        model.generate(Elsewhere(), **GREEDY)
    with pytest.raises(UsageError, match="expected integers"):
        model.generate(Exchanged([[0.5]]), **GREEDY)


def test_no_library_is_imported_for_it():
    code = (
        "import sys, jlayer.api, jlayer.engine.arrays as a, numpy as np\n"
        "a.as_kind(np.array([1]), np.array([2]), like_ids=True), a.as_lists(np.array([1]))\n"
        "print(*{'torch', 'tensorflow', 'cupy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
