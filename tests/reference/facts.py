"""The facts of a config.json as Transformers reads them, and as they are read here.

Transformers is asked for the model itself, without memory for its weights: what counts is what its
layers do, not what its config says.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache
from transformers.core_model_loading import revert_weight_conversion

from jlayer.config import model_config
from jlayer.encodings.registry import split_piece
from jlayer.errors import CheckpointError
from jlayer.families.decoder import experts_of_layers
from jlayer.families.registry import published_tensors, stacked_tensors
from jlayer.model.ops import rope_frequencies

REFUSALS = (
    *(TypeError, KeyError, ValueError, ZeroDivisionError, AttributeError, IndexError),
    *(NotImplementedError, AssertionError, RuntimeError, StrictDataclassError),
)
SLIDING, LINEAR = "sliding_attention", "linear_attention"
CHUNKED = "chunked_attention"
# Families without types of layers, all of whose layers have the config's window.
WINDOW_IN_ALL = (
    *("mistral", "ministral3", "phi3", "starcoder2"),
    *("mixtral", "qwen3_moe", "phimoe"),
)
# Which layers turn queries and keys, where not all do.
IS_TURNED = {
    "llama4_text": lambda layer: bool(layer.use_rope),
    "smollm3": lambda layer: bool(layer.use_rope),
    "exaone4": lambda layer: layer.sliding_window is None or layer.is_sliding,
    "cohere2": lambda layer: layer.sliding_window is not None,
}
# What a router of Transformers may have, and what of ours it is.
OF_ROUTERS = {
    "top_k": "n_chosen",
    "norm_topk_prob": "renormalizes",
    "routed_scaling_factor": "scale",
    "num_group": "n_groups",
    "topk_group": "n_chosen_groups",
    "norm_min": "least_sum",
    "router_jitter_noise": "jitter",
    "scalar_root_size": "input_scale",
}
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "NoneType": "silu",  # gpt-oss has its own, made of it
}


def reference_model(raw, folder):
    """(config, that of its text, model on no device), or None where Transformers refuses."""
    (folder / "config.json").write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            whole = transformers.AutoConfig.from_pretrained(folder)
            config = whole.get_text_config()
            with torch.device("meta"):
                return whole, config, transformers.AutoModelForCausalLM.from_config(config)
        except REFUSALS:
            return None


def facts_there(raw, folder):
    """By name; None where Transformers refuses the config, the model, or its rotary embedding."""
    found = reference_model(raw, folder)
    if found is None:
        return None
    whole, config, model = found
    body = model.model

    def own(name, default):
        """A number of the family's; a key of another's means nothing."""
        return getattr(config, name) if hasattr(type(config), name) else default

    try:
        rotary = type(body.rotary_emb)(config)
        kept = [
            getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers
        ]
    except REFUSALS:
        return None
    if not all(
        hasattr(layer, "self_attn") or hasattr(layer, "linear_attn") for layer in body.layers
    ):
        return None  # of a type that it has not
    types = own("layer_types", None) or [None] * config.num_hidden_layers
    layers = [
        _layer_there(config, layer, layer_type)
        for layer, layer_type in zip(body.layers, types, strict=True)
    ]
    windows = [window for *_, window in layers]
    if SLIDING in types and config.sliding_window is None:
        return None  # its mask cannot be made
    # The cache of a family without windows is cut nevertheless, where its config names one.
    cuts = [cut for cut, window in zip(kept, windows, strict=True) if cut and window is None]
    tensors = model.state_dict()
    if any(_experts_there(layer) for layer in body.layers):
        try:
            tensors = revert_weight_conversion(model, tensors)  # as they are published
        except REFUSALS:  # of no experts
            return None
    tensors = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if whole.tie_word_embeddings:
        del tensors["lm_head.weight"]
    eps = {
        getattr(module, "variance_epsilon", getattr(module, "eps", None))
        for name, module in model.named_modules()
        if "norm" in name and not list(module.children())
    }
    said = {
        "tensors": tensors,
        "eps": eps - {None} or {1e-5},  # OLMo's is in its code
        "tied": whole.tie_word_embeddings,
        "longest": min([config.max_position_embeddings, *cuts]),
        "dtype": whole.dtype and str(whole.dtype),
        "activation": _activation_there(_mlp(body.layers[0])),
        "experts": [_experts_there(layer) for layer in body.layers],
        "scale of logits": own("logit_scale", 1) / own("logits_scaling", 1),
        "cap of logits": own("final_logit_softcapping", None),
        # Gemma 3 has the key, and its attention does not look at it.
        "cap of scores": (config.model_type == "gemma2" and config.attn_logit_softcapping) or None,
        "clip": own("clip_qkv", None),
        "residual": own("residual_multiplier", 1.0),
        "layers": layers,
    }
    return said, [name != LINEAR and _frequencies_there(rotary, name) for name in types]


def _mlp(layer):
    if hasattr(layer, "router"):
        return layer  # Gemma 4, which has both
    names = ("mlp", "block_sparse_moe", "feed_forward")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _experts_there(layer):
    """What the router of a layer has, by our names; {} where it has none."""
    mlp = _mlp(layer)
    router = getattr(mlp, "gate", None) or getattr(mlp, "router", None)
    if not hasattr(mlp, "experts"):
        return {}
    return {
        ours: getattr(router, name) for name, ours in OF_ROUTERS.items() if hasattr(router, name)
    }


def _activation_there(mlp):
    names, mlp = ("act_fn", "activation_fn", "act"), getattr(mlp, "experts", mlp)
    function = next((getattr(mlp, name) for name in names if hasattr(mlp, name)), None)
    return ACTIVATIONS[type(function).__name__]


def _layer_there(config, layer, layer_type):
    if layer_type == LINEAR:
        return LINEAR, None
    attention = layer.self_attn
    slides = layer_type == SLIDING or (layer_type is None and config.model_type in WINDOW_IN_ALL)
    is_turned = IS_TURNED.get(config.model_type, lambda layer: True)(attention)
    window = config.sliding_window if slides else None
    if layer_type == CHUNKED:
        window = config.attention_chunk_size
    if window is not None and window >= config.max_position_embeddings:
        window = None  # no text is longer
    return attention.head_dim, round(float(attention.scaling), 9), is_turned, window


def _frequencies_there(rotary, layer_type):
    lead = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
    frequencies = getattr(rotary, f"{lead}inv_freq").numpy()
    return frequencies, getattr(rotary, f"{lead}attention_scaling")


def facts_here(raw):
    """As `facts_there`; a refusal as its message."""
    try:
        cfg = model_config(raw, where="config.json")
    except CheckpointError as error:
        return str(error)
    forms = {form.name: form for form in cfg.attentions}
    layers = [forms.get(name) for name in cfg.layer_types]
    layers = layers or [cfg.attention] * cfg.num_hidden_layers
    norms = [cfg.norm, *(form.head_norms.norm for form in cfg.attentions if form.head_norms)]
    norms += [cfg.delta.norm] if cfg.delta else []
    said = {
        "tensors": _as_saved(cfg),
        "eps": {norm.eps for norm in norms},
        "tied": cfg.tie_word_embeddings,
        "longest": cfg.max_position_embeddings,
        "dtype": cfg.dtype and f"torch.{cfg.dtype}",
        "activation": cfg.mlp.activation,
        "experts": [one and one.router for one in experts_of_layers(cfg)],
        "scale of logits": cfg.logits.scale,
        "cap of logits": cfg.logits.cap,
        "cap of scores": cfg.attention.cap,
        "clip": cfg.attention.clip,
        "residual": cfg.residual_scale,
        "layers": [
            (one.head_dim, round(one.scale, 9), one.rope is not None, one.window)
            if one
            else (LINEAR, None)
            for one in layers
        ],
    }
    return said, [
        one and one.rope and (rope_frequencies(one.rope, one.head_dim), one.rope.attention_factor)
        for one in layers
    ]


def _as_saved(cfg):
    """The shapes of all tensors, by the names that Transformers saves: experts in one tensor where
    it knows no other form."""
    shapes, stacks = dict(published_tensors(cfg)), stacked_tensors(cfg)
    if stacks and cfg.experts.stacks[0].is_only:
        for name, stack in stacks.items():
            shapes[name] = stack.shape
            for part, *_ in stack.parts:
                shapes.pop(split_piece(part)[0], None)
    return shapes


def differences(raw, folder):
    """What differs, as lines; a list of one line where only one of both refuses."""
    there, here = facts_there(raw, folder), facts_here(raw)
    if there is None:
        return [] if isinstance(here, str) else ["refused by Transformers alone"]
    if isinstance(here, str):
        return [f"refused here alone: {here}"]
    (said_there, turned_there), (said_here, turned_here) = there, here
    said_here["experts"] = [
        {name: getattr(ours, name) for name in theirs} if ours else {}
        for ours, theirs in zip(said_here["experts"], said_there["experts"], strict=True)
    ]
    lines = [
        f"{name}: {_shown(said_here[name], said_there[name])} here, "
        f"{_shown(said_there[name], said_here[name])} there"
        for name in said_there
        if said_here[name] != said_there[name]
    ]
    for number, (ours, theirs) in enumerate(zip(turned_here, turned_there, strict=True)):
        if ours and not _same(ours, theirs):
            lines.append(f"layer {number}: turned by {ours} here, {theirs} there")
    return lines


def _shown(one, other):
    """Of long facts what the other has not."""
    if isinstance(one, dict):
        return {key: value for key, value in one.items() if other.get(key) != value}
    return one


def _same(ours, theirs):
    (frequencies, factor), (expected, expected_factor) = ours, theirs
    return (
        frequencies.shape == expected.shape
        and np.allclose(frequencies, expected, rtol=5e-7)  # the last bit of float32
        and abs(factor - expected_factor) < 1e-12
    )
