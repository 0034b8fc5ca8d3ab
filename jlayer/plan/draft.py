"""The memory of a draft model: a small one that guesses tokens, kept on the device whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from jlayer.encodings.registry import encoding
from jlayer.families.registry import (
    head_leaf,
    is_matrix,
    layer_kinds,
    layer_of,
    published_tensors,
)
from jlayer.plan.machine import Machine
from jlayer.plan.memory import (
    activation_bytes,
    cache_bytes,
    most_attention_bytes,
    widest_product,
)
from jlayer.plan.need import Need
from jlayer.plan.shapes import CHUNK_ROWS, Shapes, power_of_two
from jlayer.plan.tiles import Weights
from jlayer.spec import ITEM_BYTES, ModelConfig

# The rows of a draft's program: as many as a chunk of the prompts, and at least those of a level of
# its trees.
LEAST_ROWS = 64
# Copies of the logits, padded to blocks, that choosing the largest makes.
LOGITS_COPIES, LOGITS_BLOCK = 3, 512
SCALE_BYTES = 4  # of a row of a matrix that is kept as int8


def draft_forms(weights: Weights, platform: str) -> dict[str, int]:
    """Published tensor -> its bytes in the form that a draft has in memory.

    On a GPU a plain matrix is int8 with one float32 scale a row, which XLA multiplies without
    writing it out; on a CPU it stays as it is stored. A quantized one keeps its pieces. Vectors,
    and what else is used uncut, have the compute dtype. A table that is the head too is there once.
    """
    return {
        name: _bytes(weights, name, shape, platform)
        for name, shape in published_tensors(weights.cfg).items()
    }


def draft_bytes(weights: Weights, platform: str) -> int:
    """Bytes of all weights of a draft in memory."""
    return sum(draft_forms(weights, platform).values())


def draft_need(weights: Weights, machine: Machine, load: Shapes, *, pool: int) -> Need:
    """All that a draft needs for the runs of `load`: weights, a pool of as many rows (`pool`) as
    the model's own, and an upper bound of its program's temporaries."""
    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    rows = min(CHUNK_ROWS[-1], max(LEAST_ROWS, power_of_two(load.chunk)))
    return Need(
        "draft",
        device=_weight_bytes(weights, machine.platform)
        + cache_bytes(cfg, pool, item_bytes=item)
        + _row_bytes(cfg, load, rows, item_bytes=item, platform=machine.platform)
        + _most_entry_bytes(cfg, pool, item_bytes=item),
    )


def _weight_bytes(weights, platform):
    """All weights, and the copies of some that its program makes. A plan asks for them with each of
    a thousand lengths and numbers of lanes; they are the same for all."""
    known = _known_bytes.setdefault(weights, {})
    if platform not in known:
        forms = draft_forms(weights, platform)
        copies = _layer_bytes(weights.cfg, forms) + _decoded_bytes(weights, platform)
        known[platform] = sum(forms.values()) + copies
    return known[platform]


_known_bytes: WeakKeyDictionary[Weights, dict[str, int]] = WeakKeyDictionary()


def _bytes(weights, name, shape, platform):
    form = encoding(weights.form_of(name))
    if not is_matrix(name, shape):
        return math.prod(shape) * ITEM_BYTES[weights.dtype]
    if form.is_plain and platform == "gpu":
        return math.prod(shape) + SCALE_BYTES * shape[0]
    return form.n_bytes(shape)


def _row_bytes(cfg: ModelConfig, load, rows, *, item_bytes, platform):
    """What `rows` rows hold: hidden states and products, float32; attention, and its tables; and of
    a level of trees, or of the last tokens of prompts, the logits, from which the largest are
    chosen in blocks."""
    shapes = Shapes(
        batch=load.batch,
        capacities=load.capacities,
        entries=load.entries,
        chunk=rows,
        n_rows=rows,
    )
    numbers = rows * (2 * cfg.hidden_size + 4 * widest_product(cfg))
    wanted = max(LEAST_ROWS, min(rows, power_of_two(load.batch)))
    numbers += wanted * LOGITS_COPIES * (cfg.vocab_size + LOGITS_BLOCK)
    return (
        4 * numbers
        + most_attention_bytes(cfg, shapes, platform=platform)
        + activation_bytes(cfg, shapes, item_bytes=item_bytes, whole=True)
    )


def _layer_bytes(cfg, forms: Mapping[str, int]):
    """A layer's weights, as the scan over all layers copies them out."""
    sizes = dict.fromkeys(range(cfg.num_hidden_layers), 0)
    for name, n_bytes in forms.items():
        if (layer := layer_of(name)) is not None:
            sizes[layer] += n_bytes
    return max(sizes.values())


def _most_entry_bytes(cfg, pool, *, item_bytes):
    """A layer's part of the pool, which the scan copies out too."""
    kinds = set(layer_kinds(cfg))
    return max(kind.cache.n_bytes(n_rows=pool, item_bytes=item_bytes) for kind in kinds)


def _decoded_bytes(weights: Weights, platform):
    """Decoded copies of the matrices of a layer, or of the head, whichever takes more."""
    cfg, sizes = weights.cfg, {}
    head = head_leaf(cfg).published
    for name, shape in published_tensors(cfg).items():
        form, layer = encoding(weights.form_of(name)), layer_of(name)
        is_used = layer is not None or name == head
        if not is_used or len(shape) == 1:
            continue
        if form.is_plain and platform == "gpu":
            # A product reads int8 as it is in 16 bits; in float32 it may be written out first.
            copy = math.prod(shape) * ITEM_BYTES["float32"] * (weights.dtype == "float32")
        else:
            copy = form.decoded_bytes(*shape, dtype=weights.dtype, platform=platform)
        sizes[layer] = sizes.get(layer, 0) + copy
    return max(sizes.values(), default=0)
