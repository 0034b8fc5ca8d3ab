"""All layers of a small model in one program: its weights are stacked, and a scan goes over the
block.

The pools of all layers are one array, layer after layer: so a scan that carries it writes a few
rows in place, where one that takes a pool a layer in and gives it out again would copy them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlayer.families.base import LayerKind
from jlayer.families.registry import head_input, layer_kinds
from jlayer.model.cache import LayerCache, Rows
from jlayer.model.ops import final_logits, scaled
from jlayer.model.products import embedded, product
from jlayer.model.stages import block, call
from jlayer.spec import ModelConfig


@struct.dataclass
class WholeModel:
    """The weights of a model whose layers are all of one kind. A matrix is an array or one of
    `products`' forms, and each of its arrays has the layers in front. Those in bfloat16 are their
    bits: XLA slices no bfloat16 on a CPU, it would turn the stacks to float32 first."""

    table: object  # the embedding [V, D]
    layers: dict  # by leaf, [L, ...]
    final: dict  # by leaf: the final norm
    head: object  # [V, D]; None: the embedding


def one_kind(cfg: ModelConfig) -> LayerKind | None:
    """The kind of all layers; None where there are several."""
    kinds = set(layer_kinds(cfg))
    return kinds.pop() if len(kinds) == 1 else None


def likeliest(
    model: WholeModel,
    ids,
    pools: LayerCache,
    rows: Rows,
    wanted,
    *,
    cfg: ModelConfig,
    dtype: str,
    most: int,
    most_ids: int,
):
    """The likeliest next tokens of some rows, of the first `most_ids`.

    ids [R], pools [L*P, K, H], `rows` with pool rows below P, wanted [W] rows of the chunk ->
    (ids int32 [W, most], logits float32 [W, most], likeliest first; the pools with these rows).
    """
    kind = one_kind(cfg)
    hidden = embedded(model.table, ids, width=cfg.hidden_size, dtype=dtype)
    hidden = scaled(hidden, cfg.embedding_scale)
    size = jax.tree.leaves(pools)[0].shape[0] // cfg.num_hidden_layers

    def layer(carry, given):
        hidden, pools = carry
        bits, number = given
        weights = jax.tree.map(from_bits, bits)
        hidden, pools = block(kind)(weights, hidden, pools, _of_layer(rows, number, size, cfg))
        return (hidden, pools), None

    numbers = jnp.arange(cfg.num_hidden_layers, dtype=jnp.int32)
    (hidden, pools), _ = jax.lax.scan(layer, (hidden, pools), (model.layers, numbers))
    flow = {"hidden": hidden.at[wanted].get(mode="clip")}
    flow |= call(head_input(cfg), flow, model.final)
    products = product(flow["x"], model.table if model.head is None else model.head)
    logits = final_logits(products, cfg.logits)
    values, found = largest(logits[:, :most_ids], most)
    return found, values, pools


def to_bits(array):
    """bfloat16 as uint16; anything else as it is."""
    return array.view(jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array):
    """Inside a program: what went into `to_bits`."""
    is_bits = array.dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(array, jnp.bfloat16) if is_bits else array


BLOCK = 512


def largest(values, count: int):
    """`jax.lax.top_k` of [W, V], in two rounds where V is large: first of the blocks whose maxima
    are largest, which hold all that is wanted (H200, 64 rows of 128k: 0.58 ms against 1.38). Of
    equal values any may come."""
    n_rows, width = values.shape
    n_blocks = -(-width // BLOCK)
    if n_blocks < 2 * count:
        return jax.lax.top_k(values, count)
    padding = n_blocks * BLOCK - width
    lowest = jnp.finfo(values.dtype).min
    blocks = jnp.pad(values, ((0, 0), (0, padding)), constant_values=lowest)
    blocks = blocks.reshape(n_rows, n_blocks, BLOCK)
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), count)
    some = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(n_rows, -1)
    found, places = jax.lax.top_k(some, count)
    numbers = jnp.take_along_axis(chosen, places // BLOCK, axis=1)
    return found, numbers * BLOCK + places % BLOCK


def _of_layer(rows, number, size, cfg):
    """`rows` for the pools of all layers: a layer's own rows; what was beyond a pool is beyond them
    all."""

    def shifted(places):
        beyond = size * cfg.num_hidden_layers
        return jnp.where(places < size, places + number * size, beyond)

    return rows.replace(
        write=shifted(rows.write),
        table=shifted(rows.table),
        fresh=None if rows.fresh is None else shifted(rows.fresh),
    )
