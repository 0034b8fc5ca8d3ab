"""A model without some of its layers: those that are left have the numbers from 0 up, in order.

`fewer_layers` says what the model then is, `config_with_fewer` the config.json of it. What a config
says of its layers by a pattern ("each sixth is full") is written out, layer by layer, under the
keys that go before the pattern in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jlayer.errors import UnsupportedModelError
from jlayer.families.base import LAYER_PREFIX
from jlayer.families.decoder import experts_of_layers
from jlayer.families.fields import Fields
from jlayer.families.find import Watched, find_family
from jlayer.families.left import REGEX
from jlayer.spec import ModelConfig

WITHOUT_ROPE = " without rope"  # how the names of such types of layers end: see smollm3, llama4
COUNT = "num_hidden_layers"
_BEFORE, _AFTER = (re.escape(part) for part in LAYER_PREFIX.split("{layer}"))
_NAME = re.compile(rf"({_BEFORE})([0-9]+)({_AFTER}.+)", re.DOTALL)
# A layer in the name of a module, or in a pattern of such names.
_MODULE = re.compile(r"(?<=layers\.)([0-9]+)(?=\.|$)")
_PATTERN = re.compile(r"layers.{0,4}[0-9\[(]")
# Keys that say something of each layer, or of some by number, which no family here reads.
_OF_LAYERS = re.compile(
    r"per_layer_.*|.*_per_layer|layers?_.*|.*_layers?(_.*)?|.*_interval|.*block.*"
)


class Renumbering:
    """The numbers of the layers that are left. `dropped`: numbers, all below `n_layers`."""

    def __init__(self, n_layers: int, dropped: Sequence[int]):
        self.kept = tuple(n for n in range(n_layers) if n not in set(dropped))
        self._new = {old: new for new, old in enumerate(self.kept)}

    def number(self, layer: int) -> int | None:
        """The new number of a layer; None: it is left out. Those after the last of all, which guess
        further tokens, are left out too."""
        return self._new.get(layer)

    def name(self, tensor: str) -> str | None:
        """The new name of a tensor, or of a piece of it; None: it is left out."""
        match = _NAME.fullmatch(tensor)
        if match is None:
            return tensor
        new = self.number(int(match[2]))
        return None if new is None else f"{match[1]}{new}{match[3]}"

    def names(self, named: Mapping[str, object]) -> dict:
        """The same values by the new names, without those that are left out."""
        renamed = ((self.name(name), value) for name, value in named.items())
        return {name: value for name, value in renamed if name is not None}

    def of(self, values: Sequence) -> list:
        """Of values by layer those that are left."""
        return [values[n] for n in self.kept]


def fewer_layers(cfg: ModelConfig, dropped: Sequence[int]) -> ModelConfig:
    """The same model without the layers of these numbers."""
    left = Renumbering(cfg.num_hidden_layers, dropped)
    types = tuple(left.of(cfg.layer_types)) if cfg.layer_types else ()
    used = tuple(one for one in cfg.attentions if not types or one.name in types)
    return replace(
        cfg,
        num_hidden_layers=len(left.kept),
        attentions=used,
        layer_types=() if len(set(types)) == 1 else types,
        experts=_experts(cfg, left),
    )


def _experts(cfg, left):
    if cfg.experts is None or not cfg.experts.layers:
        return cfg.experts
    have = tuple(left.of(cfg.experts.layers))
    if not any(have):
        return None
    return replace(cfg.experts, layers=() if all(have) else have)


def config_with_fewer(
    raw: dict, cfg: ModelConfig, dropped: Sequence[int], *, read: Callable, where: str
) -> dict:
    """A parsed config.json of the text, without the layers of these numbers. `cfg`: what it was
    read as; `read(raw)`: reads one.

    Raises UnsupportedModelError for what it says of its layers and cannot be renumbered.
    """
    left = Renumbering(cfg.num_hidden_layers, dropped)
    asked = _keys_read(raw, where)
    found = {**raw, COUNT: len(left.kept)}
    check_renumbered(raw, where=where)
    for keys, change in _CHANGES:
        if any(key in asked for key in keys):
            found |= change(raw, cfg, left)
    if isinstance(said := raw.get("quantization_config"), dict):
        found["quantization_config"] = _modules(said, left, where)
    _check(read(found), fewer_layers(cfg, dropped), dropped, where)
    return found


def check_renumbered(raw: dict, *, where: str) -> None:
    """Raises UnsupportedModelError where a config has lists of layers that nobody here knows."""
    for key, value in raw.items():
        if key in _RENUMBERED or key == COUNT:
            continue
        if value and _OF_LAYERS.fullmatch(key) and isinstance(value, list | dict):
            raise UnsupportedModelError(
                f"{where}: {key} is {value!a:.80}, which is of single layers and cannot be "
                "renumbered; remove it if it says nothing of this model, or keep all layers"
            )


def _keys_read(raw, where):
    """The keys that the family of a config reads."""
    family = find_family(raw, where=where)
    watched = Watched({**raw, "model_type": family.model_type})
    family.read(Fields(watched, where))
    return watched.seen


def _types(raw, cfg, left):
    """Types are the names of our forms of attention; where all layers have one, a pattern gives it
    to fewer layers too."""
    said = raw.get("layer_types")
    if said is None and cfg.layer_types:
        said = [name.removesuffix(WITHOUT_ROPE) for name in cfg.layer_types]
    return {} if said is None else {"layer_types": left.of(said)}


def _turned(raw, cfg, left):
    said = raw.get("no_rope_layers")
    if not said and cfg.layer_types:
        said = [int(not name.endswith(WITHOUT_ROPE)) for name in cfg.layer_types]
    return {"no_rope_layers": left.of(said)} if said else {}


def _have_experts(cfg, left):
    return [one is not None for one in left.of(experts_of_layers(cfg))]


def _first_dense(raw, cfg, left):
    """As many of the first layers as are left of those that have no experts."""
    have = _have_experts(cfg, left)
    return {"first_k_dense_replace": have.index(True) if True in have else len(have)}


def _mlp_types(raw, cfg, left):
    have = _have_experts(cfg, left)
    return {"mlp_layer_types": ["sparse" if yes else "dense" for yes in have]}


def _dense_numbers(raw, cfg, left):
    have = _have_experts(cfg, left)
    if all(have) and not raw.get("mlp_only_layers") and raw.get("decoder_sparse_step", 1) == 1:
        return {}
    numbers = [number for number, yes in enumerate(have) if not yes]
    return {"decoder_sparse_step": 1, "mlp_only_layers": numbers}


def _sparse_numbers(raw, cfg, left):
    have = _have_experts(cfg, left)
    return {"moe_layers": [number for number, yes in enumerate(have) if yes]}


def _sparse_range(raw, cfg, left):
    """Where those with experts are not one after another, no range says so: reading it tells."""
    have = _have_experts(cfg, left)
    if True not in have:
        return {}
    last = len(have) - 1 - have[::-1].index(True)
    keys = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
    return dict(zip(keys, (1, have.index(True), last), strict=True))


def _own_configs(raw, cfg, left):
    """By number, of which all have as many digits."""
    said = raw.get("per_layer_config") or {}
    new = {key: left.number(int(key)) for key in said if key.isdecimal()}
    found = {f"{new[key]:0{len(key)}}": said[key] for key in new if new[key] is not None}
    return {"per_layer_config": found} if said else {}


# Any of these keys, read by a family -> what is written instead.
_CHANGES = (
    (("layer_types",), _types),
    (("no_rope_layers",), _turned),
    (("first_k_dense_replace",), _first_dense),
    (("mlp_layer_types",), _mlp_types),
    (("decoder_sparse_step", "mlp_only_layers"), _dense_numbers),
    (("moe_layers",), _sparse_numbers),
    (("per_layer_config",), _own_configs),
    (("moe_layer_start_index", "moe_layer_end_index"), _sparse_range),
)
_RENUMBERED = {key for keys, _ in _CHANGES for key in keys}


def _modules(said, left, where):
    """What a quantization_config says, with the layers in the names of modules renumbered."""
    if isinstance(said, dict):
        pairs = ((_module(key, left, where), value) for key, value in said.items())
        return {key: _modules(value, left, where) for key, value in pairs if key is not None}
    if isinstance(said, list):
        found = [_modules(value, left, where) for value in said]
        return [value for value in found if value is not None]
    return _module(said, left, where) if isinstance(said, str) else said


def _module(name, left, where):
    """The name of a module with its layer's new number; None: of a layer that is left out."""
    if (match := _MODULE.search(name)) is not None and not name.startswith(REGEX):
        new = left.number(int(match[1]))
        return None if new is None else name[: match.start()] + str(new) + name[match.end() :]
    if _PATTERN.search(name):
        raise UnsupportedModelError(
            f"{where}: quantization_config has the pattern {name!a:.80}, which names layers by "
            "number and cannot be renumbered; keep all layers"
        )
    return name


def _check(found, expected, dropped, where):
    """What is written must be read as what the model is."""
    # Names of modules are patterns by now, and a tie is settled by the weights.
    unlike = ("quantized", "tie_word_embeddings", "dtype", "additions")
    for name, value in vars(expected).items():
        if name not in unlike and vars(found)[name] != value:
            raise UnsupportedModelError(
                f"{where}: without layers {', '.join(map(str, dropped))}, no config of a "
                f"{expected.model_type} says what the others are ({name}); keep one of them"
            )
