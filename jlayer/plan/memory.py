"""The memory that each thing of a run needs, as closed formulas.

For the temporaries of compiled programs the formulas are upper bounds; a test compares them with
XLA's own figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlayer.families.base import LayerKind
from jlayer.families.registry import family_of, layer_kinds
from jlayer.plan.machine import Machine
from jlayer.plan.need import Need
from jlayer.plan.shapes import LEAST_COLUMNS, Shapes
from jlayer.plan.tiles import Tier, Tiling, Weights
from jlayer.spec import ITEM_BYTES, ModelConfig, Place, axis_sizes, query_pieces

# Outputs of the head in transfer at a time: on the device, and as copies on the host.
OUTGOING = 3
LOGIT_BYTES = 5  # of a returned logit: a float32, and the flag of the check that it is finite


def fixed_needs(weights: Weights, machine: Machine, tiling: Tiling, *, ring: int, ahead: int):
    """The needs that do not depend on the runs: the driver's context, slots, norms, libraries."""
    slot = tiling.tile_bytes + tiling.slack
    # On a GPU one more than the tiles there at a time, for fragmentation; and a joined tile crosses
    # with the slack of its slot.
    slots = (ahead + 1) * slot if machine.kind.has_link else ahead * tiling.tile_bytes
    return [
        Need("context", device=machine.context_bytes),
        Need("slots", device=slots, host=ring * slot),
        Need("resident", device=resident_bytes(weights)),
        Need("temporary", device=machine.kind.library_bytes),
        Need("runtime", host=machine.runtime_bytes),
    ]


def run_needs(
    weights: Weights, machine: Machine, tiling: Tiling, runs: Sequence[Shapes]
) -> list[Need]:
    """The needs of runs that are alive together.

    A cache for each run; the rest for the largest run only, since forward passes take turns.
    """

    def most(function):
        return max(function(shapes) for shapes in runs)

    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    return [
        Need("cache", device=sum(cache_bytes(cfg, run, item_bytes=item) for run in runs)),
        Need(
            "activation",
            device=most(
                lambda run: (
                    activation_bytes(cfg, run, item_bytes=item, whole=tiling.is_whole)
                    + OUTGOING * logits_bytes(cfg, run, tiling)
                )
            ),
        ),
        Need(
            "temporary",
            device=most(
                lambda run: temporary_bytes(weights, run, tiling, platform=machine.platform)
            ),
        ),
        Need("embedding", host=most(lambda run: _rows_and_logits(weights, machine, run, tiling))),
    ]


def kept_needs(tiling: Tiling, tiers: Sequence[Tier]) -> list[Need]:
    """The needs of the tiles that stay on the device or in host memory."""
    kept = list(zip(tiling.shapes, tiers, strict=True))
    return [
        Need(
            "resident",
            device=sum(tile.device_bytes for tile, tier in kept if tier is Tier.DEVICE),
            host=sum(tile.n_bytes + tiling.slack for tile, tier in kept if tier is Tier.HOST),
        )
    ]


def resident_bytes(weights: Weights) -> int:
    """Bytes of the small leaves that stay on the device, in the compute dtype."""
    cfg = weights.cfg
    leaves = [leaf for kind in layer_kinds(cfg) for leaf in kind.kept_in(Place.DEVICE)]
    sizes = axis_sizes(cfg)
    numbers = sum(sizes[leaf.axes[0]] for leaf in (*leaves, family_of(cfg).final_norm))
    return numbers * ITEM_BYTES[weights.dtype]


def cache_bytes(cfg: ModelConfig, shapes: Shapes, *, item_bytes: int) -> int:
    """Bytes of the caches of all layers."""
    return sum(
        kind.cache.n_elements(cfg, batch=shapes.batch, capacity=shapes.capacity) * item_bytes
        for kind in layer_kinds(cfg)
    )


def activation_bytes(cfg: ModelConfig, shapes: Shapes, *, item_bytes: int, whole: bool) -> int:
    """Bytes that the tokens of a forward pass hold between programs.

    Whole layers keep only hidden states. Tiles also keep a stage's input and its products so far,
    of all tokens, and the joined products of one chunk.
    """
    width, columns = cfg.hidden_size, shapes.batch * shapes.n_columns
    if whole:
        return columns * (2 * width * item_bytes + 4)
    each = 3 * width + max(_stage_width(cfg, kind) for kind in _kinds(cfg))
    joined = shapes.batch * shapes.chunk * _widest_product(cfg) * item_bytes
    return columns * (each * item_bytes + 4) + joined


def _stage_width(cfg, kind: LayerKind):
    """Numbers per token of the largest stage of a layer: its input and its products, or its
    products twice if they go to the cache."""
    most = 0
    for stage in kind.stages:
        products = sum(_height(cfg, kind, group.leaves[0]) for group in stage.groups)
        width = kind.leaf(stage.leaves[0]).shape(cfg)[1]
        most = max(most, 2 * products if _uses_cache(stage) else width + products)
    return most


def _widest_product(cfg):
    """Numbers per token of the widest product, of the stages that do not use the cache."""
    return max(
        _height(cfg, kind, group.leaves[0])
        for kind in _kinds(cfg)
        for stage in kind.stages
        if not _uses_cache(stage)
        for group in stage.groups
    )


def _uses_cache(stage):
    return "cache" in stage.finish.reads


def _height(cfg, kind, leaf):
    return kind.leaf(leaf).shape(cfg)[0]


def _kinds(cfg):
    return set(layer_kinds(cfg))


def logits_bytes(cfg: ModelConfig, shapes: Shapes, tiling: Tiling) -> int:
    """Bytes of the logits of one program of the head."""
    if not shapes.all_logits:
        return shapes.batch * LEAST_COLUMNS * cfg.vocab_size * 4
    return shapes.batch * shapes.chunk * tiling.head_rows * 4


def temporary_bytes(weights: Weights, shapes: Shapes, tiling: Tiling, *, platform: str) -> int:
    """An upper bound for the temporaries of any one program of a run, in bytes.

    The float32 values alive at once in attention or in the MLP; and the copies of the tile's
    matrices that are decoded, or cast to the compute dtype, before the product.
    """
    cfg = weights.cfg
    from_attention = attention_temporary_bytes(cfg, shapes)
    b, t = shapes.batch, shapes.chunk
    decoded = max(
        sum(_decoded_bytes(part, weights.dtype, platform) for part in tile.parts)
        for tile, _ in tiling.distinct
    )
    if tiling.is_whole:
        # The products of the blocks of a decoded matrix are copied once more, to order them.
        is_plain = all(part.encoding.is_plain for part in tiling.shapes[0].parts)
        mlp = (3 if is_plain else 4) * 4 * b * t * _widest_product(cfg)
        return decoded + max(from_attention, mlp) + 2 * 4 * b * t * cfg.hidden_size
    rows = max(sum(tile.heights.values()) for tile, _ in tiling.distinct)
    widest = max(cfg.hidden_size, _widest_product(cfg))
    product = 3 * 4 * b * t * rows + 4 * b * t * widest
    return max(decoded + product, from_attention, 4 * 4 * b * t * widest)


def _decoded_bytes(part, dtype, platform):
    """Bytes of the decoded copy of a matrix that a program makes before the product."""
    if not part.n_weights:
        return 0
    n_rows = part.n_weights // part.width
    return part.encoding.decoded_bytes(n_rows, part.width, dtype=dtype, platform=platform)


def attention_temporary_bytes(cfg: ModelConfig, shapes: Shapes) -> int:
    """Bytes of attention's temporaries, all float32: the scores of one piece of the queries (twice:
    before and after the exponential), the cache, the heads."""
    b, t, s = shapes.batch, shapes.chunk, shapes.capacity
    sizes = axis_sizes(cfg)
    pieces = query_pieces(batch=b, tokens=t, n_heads=cfg.num_attention_heads, capacity=s)
    scores = 4 * b * cfg.num_attention_heads * (t // pieces) * s
    return 2 * scores + 2 * 4 * b * s * sizes["kv_heads"] + 4 * 4 * b * t * sizes["heads"]


def _rows_and_logits(weights, machine, shapes, tiling):
    """Host bytes of embedding rows for the device, and of logits that come back."""
    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    rows = shapes.batch * shapes.n_columns * cfg.hidden_size * (item + 8)
    drawn = shapes.batch * LEAST_COLUMNS * cfg.vocab_size * 16
    copies = OUTGOING if machine.kind.has_link else 1
    logits = shapes.all_logits * copies * logits_bytes(cfg, shapes, tiling)
    kept = shapes.single_array * shapes.batch * shapes.n_columns * cfg.vocab_size * LOGIT_BYTES
    return rows + drawn + logits + kept
