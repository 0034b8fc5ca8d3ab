"""What the families read of a config.json in the same way: sizes, kinds of layers, activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.families.fields import Fields
from jlayer.families.rope import FULL, SLIDING
from jlayer.parts import Attention, HeadNorms, Mlp, Norm, Rope
from jlayer.spec import ModelConfig

# Published names of activations, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
CHUNKED = "chunked_attention"
# Types of layers that limit what a layer attends to -> the key that says how far.
_WINDOWS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
# Parts of multimodal checkpoints, and layers that guess further tokens: a text has no use for them.
OTHER_PARTS = (
    r"(.+\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|embed_vision"
    r"|embed_audio)\..+",
    r"(model\.)?mtp[._].+",
)
# Keys that change a model of any family in transformers -> the values at which they do not.
# (transformers reads another file than config.json where configuration_files names one.)
_NEUTRAL = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "kv_sharing_modes": (None,),
    "configuration_files": (None, []),
    "use_bidirectional_attention": (None, "vision", False),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes that all layers share, and the most positions."""

    heads: int
    kv_heads: int
    head_dim: int
    longest: int

    def check_shared_out(self, fields: Fields) -> None:
        """Raises CheckpointError unless the heads share out the width."""
        width = fields.integer("hidden_size")
        if self.heads * self.head_dim != width:
            raise CheckpointError(
                f"{fields.where}: head_dim is {self.head_dim}, expected hidden_size {width} "
                f"divided by num_attention_heads {self.heads}"
            )


def read_sizes(
    fields: Fields,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    longest: int = 2048,
) -> Sizes:
    """`kv_heads`, `head_dim`: of the family, where the file is silent; None: as many heads of keys
    and values as of queries, and the width divided by the heads. Raises CheckpointError."""
    where = fields.where
    heads = fields.integer("num_attention_heads")
    default = kv_heads if kv_heads and "num_key_value_heads" not in fields.raw else heads
    found = fields.integer("num_key_value_heads", default=default, null_is_absent=True)
    hidden = fields.integer("hidden_size")
    if heads % found:
        raise CheckpointError(
            f"{where}: num_attention_heads is {heads}, "
            f"not a multiple of num_key_value_heads {found}"
        )
    if head_dim is None and not fields.has("head_dim") and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    if head_dim is None or "head_dim" in fields.raw:
        head_dim = fields.integer("head_dim", default=hidden // heads, null_is_absent=True)
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: head_dim is {head_dim} (hidden_size {hidden}, heads {heads}); "
            "rotary embedding needs an even one"
        )
    return Sizes(heads, found, head_dim, fields.integer("max_position_embeddings", default=longest))


def attention(sizes: Sizes, rope: Rope | None, **switches) -> Attention:
    """The attention of a family with these switches; its scale is H^-1/2 unless they say so."""
    head_dim = switches.pop("head_dim", sizes.head_dim)
    given = {"n_heads": sizes.heads, "n_kv_heads": sizes.kv_heads, "scale": head_dim**-0.5}
    return Attention(**{**given, "head_dim": head_dim, "rope": rope, **switches})


def config(
    fields: Fields,
    sizes: Sizes,
    attentions: Sequence[Attention],
    *,
    layer_types: Sequence[str] = (),
    tied: bool = False,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    norm: Norm | None = None,
    mlp: Mlp | None = None,
    **switches,
) -> ModelConfig:
    """A ModelConfig with these switches. `layer_types`: of each layer the name of its attention;
    forms that no layer has are dropped. `tied`, `activation`: where the file is silent. `norm`:
    None: an RMS norm with `rms_norm_eps`; `mlp`: None: a gated one. Raises CheckpointError or
    UnsupportedModelError."""
    for name, values in _NEUTRAL.items():
        fields.refuse_unless(name, *values)
    _check_length(fields)
    used = [one for one in attentions if not layer_types or one.name in layer_types]
    for one in used:
        _check(fields, one)
    used = tuple(
        # A window that no text is longer than is none.
        replace(one, window=None) if one.window and one.window >= sizes.longest else one
        for one in used
    )
    if len(set(layer_types)) == 1:
        layer_types = ()
    act = fields.choice(activation_key, ACTIVATIONS, default=activation)
    return ModelConfig(
        model_type=str(fields.raw.get("model_type") or "llama"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        max_position_embeddings=switches.pop("longest", sizes.longest),
        attentions=used,
        layer_types=tuple(layer_types),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=tied),
        norm=norm or rms_norm(fields),
        mlp=replace(mlp or Mlp(), activation=act),
        **switches,
    )


def _check(fields, one):
    if one.name == SLIDING and one.window is None:
        raise CheckpointError(
            f"{fields.where}: layer_types has {SLIDING}, but sliding_window is not set; expected "
            "the number of tokens that such a layer attends to"
        )
    factors = one.rope and (one.rope.short_factor, one.rope.long_factor)
    n_pairs = int(one.head_dim * one.rope.partial) // 2 if factors else 0
    if factors and one.rope.type == "longrope" and set(map(len, factors)) != {n_pairs}:
        raise CheckpointError(
            f"{fields.where}: short_factor and long_factor have {len(factors[0])} and "
            f"{len(factors[1])} entries, expected {n_pairs}, one for each pair that is turned"
        )


def rms_norm(fields: Fields, *, eps: float = 1e-6, key: str = "rms_norm_eps", **form) -> Norm:
    """`eps`: where the file is silent."""
    return Norm(eps=fields.positive(key, default=eps), **form)


def head_norms(norm: Norm, **form) -> HeadNorms:
    return HeadNorms(norm, **form)


def layer_types(
    fields: Fields, known: Sequence[str] = (FULL, SLIDING), *, default: Sequence[str]
) -> tuple[str, ...]:
    """The type of each layer, from `layer_types` or else `default`. Raises CheckpointError or
    UnsupportedModelError."""
    found = fields.raw.get("layer_types")
    if found is None:
        return tuple(default)
    if not isinstance(found, list) or not {str(one) for one in found} <= set(known):
        raise UnsupportedModelError(
            f"{fields.where}: layer_types is {str(found)[:200]!a}, supported: {', '.join(known)}"
        )
    _check_length(fields)
    return tuple(found)


def _check_length(fields):
    """Transformers looks at it in every family, also in those that have no types."""
    n_layers, found = fields.integer("num_hidden_layers"), fields.raw.get("layer_types")
    if isinstance(found, list) and len(found) != n_layers:
        raise CheckpointError(
            f"{fields.where}: layer_types has {len(found)} entries, "
            f"expected num_hidden_layers {n_layers}"
        )


def every(n_layers: int, period: int, *, usual: str = SLIDING, last: str = FULL) -> tuple[str, ...]:
    """Types of layers of which each `period`-th differs."""
    return tuple(last if (n + 1) % period == 0 else usual for n in range(n_layers))


def window(
    fields: Fields, key: str = "sliding_window", *, default: int | None = None
) -> int | None:
    """The window of a model's sliding layers: null is none, an absent key is `default`."""
    if key not in fields.raw:
        return default
    return fields.integer(key) if fields.has(key) else None


def stray_window(fields: Fields) -> int | None:
    """How many tokens a config lets the layers of a family attend to that has no windows; None
    where it sets none.

    Such a model attends to all tokens. Where its config names a window nevertheless, transformers
    cuts its cache to it, but not its attention mask: beyond the window its own result depends on
    how the prompt was cut. Within the window all agree, so that is as far as such a model runs.
    """
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        names = _WINDOWS.values()
    else:
        kinds = layer_types(fields, (FULL, *_WINDOWS), default=())
        names = [_WINDOWS[kind] for kind in _WINDOWS if kind in kinds]
    needed = [name for name in names if kinds is not None or fields.has(name)]
    return min(map(fields.integer, needed), default=None)


def forms(full: Attention, window: int | None) -> tuple[Attention, ...]:
    """The attention of full layers, and the same with a window, by their published names."""
    sliding = replace(full, name=SLIDING, window=window)
    return (replace(full, name=FULL), sliding)
