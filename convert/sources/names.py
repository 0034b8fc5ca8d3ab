"""Foreign tensor names as a table: source pattern with a layer slot, published name, layout rule.

A person can compare it with the listing of a checkpoint. A key matches whole, and exactly one row;
a tensor that is dropped on purpose has a row too. Published names need no table.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from jlayer.convert.sources.rules import JOIN_COLUMNS, JOIN_ROWS, KEEP, UNPERMUTE_ROPE, Rule
from jlayer.families.base import LAYER_PREFIX as LAYER


@dataclass(frozen=True)
class Row:
    """`published` is None for a tensor that is dropped, since it is computed.

    Of several `rules` the one applies that makes the published shape from the parts' shapes.
    """

    pattern: str
    published: str | None
    rules: tuple[Rule, ...] = ()


# Meta's consolidated.NN.pth, divided as the model-parallel layers of fairscale do.
META = (
    # Llama 1 and 2 divide the embedding by columns, Llama 3 by rows.
    Row("tok_embeddings.weight", "model.embed_tokens.weight", (JOIN_COLUMNS, JOIN_ROWS)),
    Row("layers.{layer}.attention_norm.weight", LAYER + "input_layernorm.weight", (KEEP,)),
    Row("layers.{layer}.attention.wq.weight", LAYER + "self_attn.q_proj.weight", (UNPERMUTE_ROPE,)),
    Row("layers.{layer}.attention.wk.weight", LAYER + "self_attn.k_proj.weight", (UNPERMUTE_ROPE,)),
    Row("layers.{layer}.attention.wv.weight", LAYER + "self_attn.v_proj.weight", (JOIN_ROWS,)),
    Row("layers.{layer}.attention.wo.weight", LAYER + "self_attn.o_proj.weight", (JOIN_COLUMNS,)),
    Row("layers.{layer}.ffn_norm.weight", LAYER + "post_attention_layernorm.weight", (KEEP,)),
    Row("layers.{layer}.feed_forward.w1.weight", LAYER + "mlp.gate_proj.weight", (JOIN_ROWS,)),
    Row("layers.{layer}.feed_forward.w3.weight", LAYER + "mlp.up_proj.weight", (JOIN_ROWS,)),
    Row("layers.{layer}.feed_forward.w2.weight", LAYER + "mlp.down_proj.weight", (JOIN_COLUMNS,)),
    Row("norm.weight", "model.norm.weight", (KEEP,)),
    Row("output.weight", "lm_head.weight", (JOIN_ROWS,)),
    Row("rope.freqs", None),
    Row("layers.{layer}.attention.inner_attention.rope.freqs", None),
)
_SLOT = "{layer}"
_NUMBER = "(0|[1-9][0-9]{0,8})"


def find_row(table: tuple[Row, ...], key: str) -> tuple[Row, str | None] | None:
    """The row that a foreign key matches, and the published name; None where no row matches."""
    for row in table:
        match = _compiled(row.pattern).fullmatch(key)
        if match:
            return row, row.published and row.published.replace(_SLOT, "".join(match.groups()))
    return None


def find_source(table: tuple[Row, ...], name: str) -> tuple[Row, str] | None:
    """The row for a published name, and the foreign key; None where there is no row for it."""
    for row in table:
        match = row.published and _compiled(row.published).fullmatch(name)
        if match:
            return row, row.pattern.replace(_SLOT, "".join(match.groups()))
    return None


@functools.cache
def _compiled(pattern):
    return re.compile(re.escape(pattern).replace(re.escape(_SLOT), _NUMBER))
