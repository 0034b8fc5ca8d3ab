"""from_pretrained as users of transformers call it: names, devices, dtypes, and what is refused."""

import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlayer
from jlayer.engine.loading import HARMLESS, NAMES, REFUSED, REFUSED_FOR_HUB, translated
from jlayer.errors import UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HUB = "owner/name-of-no-folder"
OWN = {"dtype", "device", "offline"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((kind, "float32") for kind in (torch.float32, np.float32, np.dtype("float32"))),
        *((kind, "float32") for kind in (jnp.float32, "float32", "torch.float32")),
        *((kind, "bfloat16") for kind in (torch.bfloat16, ml_dtypes.bfloat16, jnp.bfloat16)),
        (torch.float16, "float16"),
    ],
    ids=str,
)
def test_a_dtype_of_any_library_is_taken(given, name):
    for argument in ("dtype", "torch_dtype"):
        assert translated("x", {argument: given}) == ("x", {"dtype": name})


def test_a_model_opens_as_in_transformers_and_gives_its_tokens(both):
    ids = torch.tensor([[5, 17, 80]])
    expected = both.theirs.generate(ids, max_new_tokens=3).tolist()
    for options in (
        {"dtype": torch.float32, "device_map": "cpu"},
        {"torch_dtype": "auto", "device": "cpu", "trust_remote_code": True, "token": "hf_x"},
        {"device_map": {"": "cpu"}, "revision": "main", "cache_dir": "/nowhere"},
        {"dtype": "auto", "device_map": "auto", "attn_implementation": "eager"},
        {"dtype": None, "device": torch.device("cpu"), "low_cpu_mem_usage": True},
        {"local_files_only": True, "use_safetensors": True, "quantization_config": None},
    ):
        with jlayer.AutoModelForCausalLM.from_pretrained(both.folder, **options) as model:
            assert (model.dtype, model.engine.devices.platform) == ("float32", "cpu")
        found = jlayer.generate(both.folder, ids, max_new_tokens=3, **options)
        assert [[*ids[0].tolist(), *one.token_ids] for one in found] == expected
    opened = jlayer.AutoModel.from_pretrained(pretrained_model_name_or_path=str(both.folder))
    assert opened.config == both.ours.config
    opened.close()


@pytest.mark.parametrize("given", ["cuda", "cuda:0", "gpu", 0, torch.device("cuda", 0), {"": 0}])
def test_the_first_gpu_has_many_names(given):
    for argument in ("device", "device_map"):
        assert translated("x", {argument: given}) == ("x", {"device": "gpu"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:1"}, r"device: found 'cuda:1', expected cpu, gpu"),
        ({"device": True}, "device: found 'True'"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "a map of 2 modules"),
        ({"device": "cpu", "device_map": "cuda"}, "device: found 'cpu', but device_map says 'gpu'"),
        ({"dtype": "float32", "torch_dtype": torch.float16}, "dtype: found 'float32', but torch_d"),
        ({"dtype": torch.float64}, "dtype 'float64' is not known: .*float32"),
        ({"load_in_4bit": True}, "load_in_4bit: found True.* --quantize int4"),
        ({"max_memory": {0: "4GiB"}}, "say device_memory"),
        ({"devise": "cpu"}, "did you mean 'device'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_opened(options, words):
    with pytest.raises(UsageError, match=words):
        jlayer.AutoModel.from_pretrained("/no/such/folder", **options)


@pytest.mark.parametrize("name", sorted({**REFUSED, **REFUSED_FOR_HUB}))
def test_every_refused_argument_says_what_to_do(name):
    nothing, instead = {**REFUSED, **REFUSED_FOR_HUB}[name]
    for neutral in nothing:
        assert translated(HUB, {name: neutral}) == (HUB, {})
    with pytest.raises(UsageError, match=f"{name}: found 'x'.*{re.escape(instead)}"):
        translated(HUB, {name: "x"})


def test_a_folder_needs_nothing_of_the_hub(tmp_path):
    for name in REFUSED_FOR_HUB:
        assert translated(tmp_path, {name: "x"}) == (str(tmp_path), {})
    assert translated(tmp_path, {"revision": "main"}) == (str(tmp_path), {})
    assert translated(HUB, {"revision": "v1"}) == (f"{HUB}@v1", {})
    assert translated(HUB, {"revision": None}) == (HUB, {})
    assert translated(HUB, {"local_files_only": True}) == (HUB, {"offline": True})
    with pytest.raises(UsageError, match="names one; keep one"):
        translated(f"{HUB}@v1", {"revision": "v2"})


def test_every_argument_of_transformers_is_known():
    theirs = inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    source += (
        Path(inspect.getfile(transformers.models.auto.auto_factory))
        .read_text()
        .partition("class _BaseAutoBackboneClass")[0]
    )
    found = set(theirs) | set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source))
    found -= {"model_args", "kwargs", "pretrained_model_name_or_path"}
    assert {"torch_dtype", "device_map", "trust_remote_code", "cache_dir"} < found
    assert found - NAMES - OWN == set()
    assert not HARMLESS & {**REFUSED, **REFUSED_FOR_HUB}.keys()


def test_the_tokenizer_of_a_folder_under_transformers_name(fable):
    theirs = transformers.AutoTokenizer.from_pretrained(fable)
    for options in ({}, {"trust_remote_code": True, "use_fast": True, "token": None}):
        ours = jlayer.AutoTokenizer.from_pretrained(fable, **options)
        assert ours("Once upon a time") == theirs("Once upon a time")
    padded = jlayer.AutoTokenizer.from_pretrained(fable, padding_side="left")
    assert padded.padding_side == "left"
    with pytest.raises(UsageError, match="ref: none given"):
        jlayer.AutoTokenizer.from_pretrained()
