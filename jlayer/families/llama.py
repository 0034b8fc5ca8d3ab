"""One row per architecture: which switches of the shared block it turns, and the leaves that follow
from them.

Names and layout are the published (Hugging Face) ones, so this table is at once the map from disk
to tree, the list of what a complete checkpoint holds, and the source of every shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jlayer.spec import Leaf

if TYPE_CHECKING:
    from jlayer.config import ModelConfig

LAYER_LEAVES = (
    Leaf("input_layernorm", "input_layernorm.weight", ("width",)),
    Leaf("q_proj", "self_attn.q_proj.weight", ("heads", "width")),
    Leaf("k_proj", "self_attn.k_proj.weight", ("kv_heads", "width")),
    Leaf("v_proj", "self_attn.v_proj.weight", ("kv_heads", "width")),
    Leaf("o_proj", "self_attn.o_proj.weight", ("width", "heads")),
    Leaf("post_attention_layernorm", "post_attention_layernorm.weight", ("width",)),
    Leaf("gate_proj", "mlp.gate_proj.weight", ("mlp", "width")),
    Leaf("up_proj", "mlp.up_proj.weight", ("mlp", "width")),
    Leaf("down_proj", "mlp.down_proj.weight", ("width", "mlp")),
    Leaf("q_proj_bias", "self_attn.q_proj.bias", ("heads",), switch="attention_bias"),
    Leaf("k_proj_bias", "self_attn.k_proj.bias", ("kv_heads",), switch="attention_bias"),
    Leaf("v_proj_bias", "self_attn.v_proj.bias", ("kv_heads",), switch="attention_bias"),
    Leaf("o_proj_bias", "self_attn.o_proj.bias", ("width",), switch="attention_out_bias"),
    Leaf("gate_proj_bias", "mlp.gate_proj.bias", ("mlp",), switch="mlp_bias"),
    Leaf("up_proj_bias", "mlp.up_proj.bias", ("mlp",), switch="mlp_bias"),
    Leaf("down_proj_bias", "mlp.down_proj.bias", ("width",), switch="mlp_bias"),
)
EMBEDDING = Leaf("embed_tokens", "model.embed_tokens.weight", ("vocab", "width"))
FINAL_NORM = Leaf("norm", "model.norm.weight", ("width",))
HEAD = Leaf("lm_head", "lm_head.weight", ("vocab", "width"))
LAYER_PREFIX = "model.layers.{layer}."
_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class Family:
    """`dropped`: patterns of published names that carry no weights (tables that are computed), left
    out on purpose."""

    model_type: str
    architecture: str
    layer_leaves: tuple[Leaf, ...]
    dropped: tuple[str, ...] = ()


FAMILIES = {
    row.model_type: row
    for row in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            layer_leaves=LAYER_LEAVES,
            dropped=(
                r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
                r"model\.rotary_emb\.inv_freq",
            ),
        ),
    )
}


def layer_leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """The leaves of one decoder layer, in the family's order."""
    rows = FAMILIES[cfg.model_type].layer_leaves
    return tuple(leaf for leaf in rows if leaf.switch is None or getattr(cfg, leaf.switch))


def final_leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """What follows the layers: the final norm and, unless tied to the embedding, the head."""
    return (FINAL_NORM,) if cfg.tie_word_embeddings else (FINAL_NORM, HEAD)


def head_leaf(cfg: ModelConfig) -> Leaf:
    """The matrix that the head multiplies by: the embedding itself where it is tied."""
    return EMBEDDING if cfg.tie_word_embeddings else HEAD


def layer_tensor_name(leaf: Leaf, layer: int) -> str:
    return LAYER_PREFIX.format(layer=layer) + leaf.published


def published_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a complete checkpoint of this model holds, with its shape, in sweep
    order."""
    found = {EMBEDDING.published: EMBEDDING.shape(cfg)}
    for layer in range(cfg.num_hidden_layers):
        for leaf in layer_leaves(cfg):
            found[layer_tensor_name(leaf, layer)] = leaf.shape(cfg)
    for leaf in final_leaves(cfg):
        found[leaf.published] = leaf.shape(cfg)
    return found


def layer_of(tensor_name: str) -> int | None:
    """The layer that a published name belongs to, or None for what stands outside the layers."""
    match = _LAYER_NAME.fullmatch(tensor_name)
    return int(match.group(1)) if match else None


def is_dropped(cfg: ModelConfig, tensor_name: str) -> bool:
    """Whether a published tensor is left out on purpose (a computed table, or a tied head stored
    again)."""
    if cfg.tie_word_embeddings and tensor_name == HEAD.published:
        return True
    return any(re.fullmatch(pattern, tensor_name) for pattern in FAMILIES[cfg.model_type].dropped)
