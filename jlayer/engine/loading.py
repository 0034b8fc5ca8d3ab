"""Arguments of transformers' `from_pretrained`: taken where they mean something here, passed over
where they change nothing, refused with a reason where they would."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping

from jlayer.checkpoint.hub import is_hub_id
from jlayer.config import unknown_name
from jlayer.engine.options import check_given, is_option, option_names
from jlayer.engine.prompts import CHAT_OPTIONS
from jlayer.errors import UsageError

# Name -> (values that ask for nothing, what to do instead). Each would change what is loaded.
REFUSED = {
    "adapter_kwargs": ((None, {}), "give its folder as adapter"),
    "adapter_name": ((None, "default"), "give its folder as adapter"),
    "compression": ((None,), "convert the model with --quantize int4 or int8, and open the result"),
    "config": ((None,), "change config.json in the folder"),
    "delete_original": ((None, False), "jlayer convert has --delete-source"),
    "distributed_config": ((None,), "jlayer uses one device"),
    "from_flax": ((None, False), "convert the model to safetensors"),
    "from_tf": ((None, False), "convert the model to safetensors"),
    "fusion_config": ((None,), "leave it out"),
    "generation_config": ((None,), "give it to generate"),
    "gguf_file": ((None,), "take the model's unquantized checkpoint"),
    "ignore_mismatched_sizes": ((None, False), "the shapes must be those of config.json"),
    "key_mapping": ((None,), "rename the tensors in the checkpoint"),
    "load_in_4bit": ((None, False), "convert the model with --quantize int4, and open the result"),
    "load_in_8bit": ((None, False), "convert the model with --quantize int8, and open the result"),
    "max_memory": ((None,), "say device_memory and host_memory"),
    "output_loading_info": ((None, False), "leave it out"),
    "quantization_config": ((None,), "convert the model with --quantize int4 or int8"),
    "state_dict": ((None,), "save the weights in a folder first"),
    "subfolder": ((None, ""), "give the folder itself"),
    "tp_plan": ((None,), "jlayer uses one device"),
    "tp_size": ((None,), "jlayer uses one device"),
    "variant": ((None, ""), "give a folder that has those files under their usual names"),
}
# The same for a hub id; a folder needs none of them.
REFUSED_FOR_HUB = {
    "cache_dir": ((None,), "set the environment variable HF_HUB_CACHE"),
    "force_download": ((None, False), "remove the model from the hub's cache"),
    "hf_token": ((None, True), "set the environment variable HF_TOKEN"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
    "token": ((None, True), "set the environment variable HF_TOKEN"),
    "use_auth_token": ((None, True), "set the environment variable HF_TOKEN"),
}
# How another program would load or compute the same numbers.
HARMLESS = frozenset(
    """
    _commit_hash _from_auto _from_pipeline allow_all_kernels attn_implementation code_revision
    device_mesh disable_mmap experts_implementation kernel_config layer_shards_saving_path
    low_cpu_mem_usage max_seq_len mirror offload_buffers offload_folder offload_state_dict
    prefetching profiling_mode resume_download tqdm_class trust_remote_code use_kernels
    use_safetensors weights_only
    """.split()  # noqa: SIM905
)
# Those that become options of jlayer's own.
TRANSLATED = ("device_map", "local_files_only", "revision", "torch_dtype")
NAMES = frozenset((*REFUSED, *REFUSED_FOR_HUB, *HARMLESS, *TRANSLATED))
_ANY_DEVICE = (None, "auto", "balanced", "balanced_low_0", "sequential")
_DEVICES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "cuda:0": "gpu", "0": "gpu"}


def translated(ref: str | os.PathLike, options: Mapping) -> tuple[str, dict]:
    """(ref, options of jlayer's own) of what a user of transformers gives `from_pretrained`.

    Names that are unknown stay, for whoever checks the options. Raises UsageError.
    """
    ref, found = os.fspath(ref), dict(options)
    for name in HARMLESS:
        found.pop(name, None)
    for name, (nothing, instead) in {**REFUSED, **REFUSED_FOR_HUB}.items():
        value = found.pop(name, None)
        is_needed = name in REFUSED or is_hub_id(ref)
        if is_needed and not any(value is one or value == one for one in nothing):
            raise UsageError(f"{name}: found {value!r}, which jlayer does not take; {instead}")
    if found.pop("local_files_only", None):
        found["offline"] = True
    revision = found.pop("revision", None)
    if revision is not None and is_hub_id(ref):
        if "@" in ref:
            raise UsageError(f"revision: found {revision!r}, but {ref} names one; keep one")
        ref = f"{ref}@{revision}"
    for own, theirs, take in (
        ("dtype", "torch_dtype", _dtype),
        ("device", "device_map", _device),
    ):
        values = [take(name, found[name]) for name in (own, theirs) if name in found]
        values = [value for value in values if value is not None]
        if len(set(values)) > 1:
            raise UsageError(f"{own}: found {values[0]!r}, but {theirs} says {values[1]!r}")
        found.pop(theirs, None)
        found.pop(own, None)
        if values:
            found[own] = values[0]
    return ref, found


def _dtype(_, value):
    """A dtype's name, be it a word, or a dtype of torch, numpy or jax; None where it is "auto"."""
    if isinstance(value, str):
        return None if value == "auto" else value.removeprefix("torch.")
    name = getattr(value, "__name__", None) or getattr(value, "name", None)
    return name or (None if value is None else str(value).removeprefix("torch."))


def _device(name, value):
    """ "cpu", "gpu", or None where it is left to jlayer. {"": device} is all of the model."""
    if isinstance(value, Mapping) and set(value) == {""}:
        value = value[""]
    if isinstance(value, Mapping):
        raise UsageError(
            f"{name}: found a map of {len(value)} modules; jlayer places the layers itself: "
            "say device_memory and host_memory"
        )
    word = value if value is None else str(value)
    if word in _ANY_DEVICE:
        return None
    if word not in _DEVICES or isinstance(value, bool):
        raise UsageError(f"{name}: found {word!r}, expected cpu, gpu (the first one) or auto")
    return _DEVICES[word]


def check_names(options: Collection[str], run_options: Iterable[str]) -> None:
    """Refuses unknown options before the model is opened; the hint may name a run option. Raises
    UsageError."""
    known = [*run_options, *CHAT_OPTIONS, *option_names()]
    for name in options:
        if not is_option(name):
            raise UsageError(unknown_name("option", name, known))
    check_given(options)
