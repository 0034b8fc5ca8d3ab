"""The memory that each thing of a run needs, as closed formulas.

For the temporaries of compiled programs the formulas are upper bounds; a test compares them with
XLA's own figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from jlayer.families.registry import counted_kinds, final_norm_leaves, windows_of
from jlayer.parts import Attention, Delta, Latent, head_sizes
from jlayer.pieces import (
    DELTA_BLOCK,
    attention_pieces,
    delta_bytes,
    expanded_bytes,
    expands,
    latent_bytes,
)
from jlayer.plan.dealing import deals_heads
from jlayer.plan.experts import passing, stacked_bytes
from jlayer.plan.low_rank import hosted_low_rank_bytes, lengths_bytes, low_rank_bytes
from jlayer.plan.machine import Machine
from jlayer.plan.need import Need
from jlayer.plan.shapes import (
    CHUNK_ROWS,
    PoolSizes,
    Shapes,
    lane_rows,
    pool_sizes,
    power_of_two,
    rows_for,
    window_capacity,
)
from jlayer.plan.tiles import Tier, Weights
from jlayer.plan.tiling import Tiling
from jlayer.spec import ALIGNMENT, ITEM_BYTES, ModelConfig, Place, resident_dtype

# Outputs of the head in transfer at a time: on the device, and as copies on the host.
OUTGOING = 3
LOGIT_BYTES = 5  # of a returned logit: a float32, and the flag of the check that it is finite
# Threads that draw tokens of many lanes at once, and bytes for each logit that one works on.
DRAWERS = 8
DRAWN_BYTES = 32
# What guessing keeps on the host: noise of positions, and the texts that are looked up.
NOISE_BYTES, TEXT_BYTES = 32 << 20, 16 << 20
GUESSING_BYTES = NOISE_BYTES + TEXT_BYTES


def fixed_needs(weights: Weights, machine: Machine, tiling: Tiling, *, ring: int, ahead: int):
    """The needs that do not depend on the runs: the driver's context, slots, norms, libraries."""
    return [
        Need("context", device=machine.context_bytes),
        *slots_needs(machine, tiling, ring=ring, ahead=ahead),
        Need("resident", device=resident_bytes(weights)),
        Need("temporary", device=machine.kind.libraries_of(collectives=machine.collectives)),
        Need("runtime", host=machine.runtime_bytes),
    ]


def slots_needs(machine: Machine, tiling: Tiling, *, ring: int, ahead: int) -> list[Need]:
    """The slots of the ring, and of that of experts if there are some."""
    of_experts = passing((tile for tile, _ in tiling.distinct if tile.expert is not None), ahead)
    counts = [(ring, ahead), (of_experts + ring - ahead, of_experts)]
    sizes = zip(tiling.largest, tiling.most_on_device, counts, strict=False)
    return [
        _slots_need(machine, tiling, size, share, ring=n_slots, ahead=n_tiles)
        for size, share, (n_slots, n_tiles) in sizes
    ]


def _slots_need(machine, tiling, largest, share, *, ring, ahead):
    """The slots of a ring, whose largest tile has so many bytes, and `share` of them on a device.
    On a GPU there is one more than the tiles there at a time, for fragmentation; and a joined tile
    crosses with the slack of its slot."""
    on_device = ahead * share
    if machine.kind.has_link:
        on_device = (ahead + 1) * (share + tiling.slack)
    return Need("slots", device=on_device, host=ring * (largest + tiling.slack))


def run_needs(
    weights: Weights,
    machine: Machine,
    tiling: Tiling,
    load: Shapes,
    *,
    cache: Tier = Tier.DEVICE,
    least_pool: PoolSizes | None = None,
) -> list[Need]:
    """The needs of runs that are alive together and share forward passes: `load`.

    `cache`: where the pools are. `least_pool`: the rows that they have already.
    """
    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    pools = pool_sizes(load, windows_of(cfg), least_pool)
    return [
        _cache_need(cfg, cache, pools, load.n_rows, item_bytes=item, machine=machine),
        Need(
            "activation",
            device=activation_bytes(cfg, load, item_bytes=item, whole=tiling.is_whole)
            + OUTGOING * logits_bytes(cfg, load, tiling),
        ),
        Need("temporary", device=temporary_bytes(weights, load, tiling, platform=machine.platform)),
        Need("embedding", host=_rows_and_logits(weights, machine, load, tiling)),
        Need("embedding", host=landing_bytes(tiling, load) + hosted_low_rank_bytes(tiling, load)),
    ]


def landing_bytes(tiling: Tiling, shapes: Shapes) -> int:
    """Bytes of host memory for what the host's cores multiply: float32, a place for each stage of a
    layer and for the head."""
    heights: dict[tuple, dict[str, int]] = {}
    for tile, _ in tiling.distinct:
        if tile.for_host:
            kind = tile.kind.name if tile.kind else ""
            own = heights.setdefault((kind, tile.stage.name), {})
            for part in (part for part in tile.parts if part.has_rows and part.of is None):
                end = part.first_row + part.n_rows
                own[part.matrix] = max(own.get(part.matrix, 0), end)
    wanted = shapes.n_rows if shapes.all_logits else shapes.wanted
    return sum(
        4 * power_of_two(max(2, shapes.n_rows if kind else wanted)) * sum(own.values())
        for (kind, _), own in heights.items()
    )


def kept_needs(tiling: Tiling, tiers: Sequence[Tier]) -> list[Need]:
    """The needs of the tiles that stay on the device or in host memory."""
    on_device = zip(tiling.device_sizes, tiers, strict=True)
    in_host = [size for size, tier in zip(tiling.sizes, tiers, strict=True) if tier is Tier.HOST]
    return [
        Need(
            "resident",
            device=sum(size for size, tier in on_device if tier is Tier.DEVICE),
            host=sum(in_host) + len(in_host) * tiling.slack,
        )
    ]


def resident_bytes(weights: Weights) -> int:
    """Bytes of the small leaves that stay on the device, in the compute dtype."""
    cfg = weights.cfg
    counted = [(final_norm_leaves(cfg), 1)]
    counted += [(kind.kept_in(Place.DEVICE), n_layers) for kind, n_layers in counted_kinds(cfg)]
    return sum(
        n * math.prod(leaf.shape(cfg)) * ITEM_BYTES[resident_dtype(leaf, weights.dtype)]
        for leaves, n in counted
        for leaf in leaves
    )


def cache_bytes(cfg: ModelConfig, pools: PoolSizes | int, *, item_bytes: int) -> int:
    """Bytes of the pools of all layers, of these sizes; of one size for all if it is a number."""
    return sum(
        _pool_bytes(cfg, kind, pools, item_bytes) * n_layers
        for kind, n_layers in counted_kinds(cfg)
    )


def _pool_bytes(cfg, kind, pools, item_bytes):
    is_number = isinstance(pools, int)
    n_rows = pools if is_number else pools.of(kind.cache, windows_of(cfg))
    return kind.cache.n_bytes(n_rows=n_rows, item_bytes=item_bytes)


# Pools in host memory come to the device one after another: one is used, the next is on its way.
POOLS_ON_DEVICE = 2


def _cache_need(cfg, tier, pools, n_rows, *, item_bytes, machine):
    """The pools: of each host, and each device, those of its own heads where they are dealt out. In
    host memory each has a page of slack, and what a forward pass writes comes back from two layers
    at a time."""

    def own(kind, pools, n):
        """What one of `n` has of it, as the heads are dealt out to all devices."""
        is_dealt = deals_heads(kind.attention, machine.all_devices)
        return _pool_bytes(cfg, kind, pools, item_bytes) // (n if is_dealt else 1)

    def on_a_device(kind, pools):
        return own(kind, pools, machine.all_devices)

    counted = counted_kinds(cfg)
    if tier is Tier.DEVICE:
        return Need("cache", device=sum(n * on_a_device(kind, pools) for kind, n in counted))
    on_host = sum(n * own(kind, pools, machine.n_hosts) for kind, n in counted)
    largest = max(on_a_device(kind, pools) for kind in _kinds(cfg))
    written = n_rows * max(_pool_bytes(cfg, kind, 1, item_bytes) for kind in _kinds(cfg))
    back = n_rows * max(own(kind, 1, machine.n_hosts) for kind in _kinds(cfg))
    slack = cfg.num_hidden_layers * 2 * ALIGNMENT
    return Need(
        "cache",
        device=POOLS_ON_DEVICE * (largest + written),
        host=on_host + slack + POOLS_ON_DEVICE * back,
    )


def activation_bytes(cfg: ModelConfig, shapes: Shapes, *, item_bytes: int, whole: bool) -> int:
    """Bytes that the rows of a forward pass hold between programs.

    Whole layers keep only hidden states. Tiles also keep a stage's input and its products so far,
    of all rows, and the joined products of one chunk.
    """
    width, n_rows = cfg.hidden_size, shapes.n_rows
    tables = _tables_bytes(shapes, windows_of(cfg))
    tables += 4 * n_rows * (cfg.additions is not None and cfg.additions.choose)
    if whole:
        return n_rows * 2 * width * item_bytes + tables
    each = 3 * width + _widest_stage(cfg)
    joined = shapes.chunk * widest_product(cfg) * item_bytes
    each = each * item_bytes + _experts_bytes(cfg, item_bytes) + _latent_bytes(cfg, item_bytes)
    return n_rows * each + tables + joined


def _experts_bytes(cfg, item_bytes):
    """Bytes that a token has in a layer with experts: their input, what each is multiplied by, and
    their sum before and after one is added."""
    if cfg.experts is None:
        return 0
    return cfg.hidden_size * (item_bytes + 2 * 4) + cfg.experts.router.n_experts * 4


def _latent_bytes(cfg, item_bytes):
    """Bytes that a token has in a layer with latent attention until its query is there: what its
    entry is made of."""
    entries = [kind.latent.entry for kind in _kinds(cfg) if kind.latent and kind.latent.q_rank]
    return max(entries, default=0) * item_bytes


def _tables_bytes(shapes, windows):
    """Bytes of what attention knows of each row: see `model.cache.Rows`. Lanes are padded to a
    power of two; the rows of a chunk see each other by a matrix for each lane."""
    sizes = [window_capacity(size, shapes.capacity) + 1 for size in windows]
    tables = 2 * shapes.batch * (shapes.capacity + 1 + sum(sizes)) * 4
    each = 2 * 4 + 1 + 4 * len(windows)
    return each * shapes.n_rows + tables + 2 * shapes.chunk**2


@lru_cache(maxsize=64)
def _widest_stage(cfg):
    """Numbers per token of the largest stage: its input and its products; or, if they go to the
    cache, its products, and as many again or what it gives."""
    return max(
        _stage_width(cfg, kind, stage, following)
        for kind in _kinds(cfg)
        for stage, following in zip(kind.stages, (*kind.stages[1:], None), strict=True)
    )


def _stage_width(cfg, kind, stage, following):
    if not stage.groups:
        return 0
    products = sum(_height(cfg, kind, group.leaves[0]) for group in stage.groups)
    if _uses_cache(stage):
        return products + max(products, _width(cfg, kind, following))
    return _width(cfg, kind, stage) + products


def _width(cfg, kind, stage):
    """Numbers per token of a stage's input."""
    return kind.leaf(stage.leaves[0]).shape(cfg)[1]


@lru_cache(maxsize=64)
def widest_product(cfg: ModelConfig) -> int:
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
    return [kind for kind, _ in counted_kinds(cfg)]


def logits_bytes(cfg: ModelConfig, shapes: Shapes, tiling: Tiling) -> int:
    """Bytes of the logits of one program of the head: of every row, or of the wanted ones."""
    n_rows = shapes.chunk if shapes.all_logits else rows_for(min(shapes.wanted, shapes.chunk))
    return n_rows * tiling.head_rows * 4


def temporary_bytes(weights: Weights, shapes: Shapes, tiling: Tiling, *, platform: str) -> int:
    """An upper bound for the temporaries of any one program of a run, in bytes.

    The float32 values alive at once in attention or in the MLP; and the copies of the tile's
    matrices that are decoded, or cast to the compute dtype, or stacked, before the product.
    """
    cfg = weights.cfg
    from_attention = most_attention_bytes(cfg, shapes, platform=platform)
    n_rows = shapes.chunk
    stacked = stacked_bytes(tiling, platform, n_rows=n_rows, hidden=cfg.hidden_size)
    added = max(
        low_rank_bytes(tile.share, n_rows) + lengths_bytes(tile.share, platform)
        for tile, _ in tiling.distinct
    )
    decoded = tiling.decoded_bytes + stacked + added
    if tiling.is_whole:
        # The products of the blocks of a decoded matrix are copied once more, to order them.
        is_plain = all(part.encoding.is_plain for part in tiling.shapes[0].parts)
        mlp = (3 if is_plain else 4) * 4 * n_rows * widest_product(cfg)
        return decoded + max(from_attention, mlp) + 2 * 4 * n_rows * cfg.hidden_size
    widest = max(cfg.hidden_size, widest_product(cfg))
    product = 3 * 4 * n_rows * tiling.most_rows + 4 * n_rows * widest
    return max(decoded + product, from_attention, 4 * 4 * n_rows * widest)


def most_attention_bytes(cfg: ModelConfig, shapes: Shapes, *, platform: str) -> int:
    """Bytes of the temporaries of what mixes tokens, of the kind of layers that takes most."""
    return max(_mixer_bytes(kind, shapes, platform) for kind in _kinds(cfg))


def _mixer_bytes(kind, shapes, platform):
    if kind.latent:
        return latent_temporary_bytes(kind.latent, shapes)
    if kind.delta:
        return delta_temporary_bytes(kind.delta, shapes)
    return attention_temporary_bytes(kind.attention, shapes, platform=platform)


def latent_temporary_bytes(latent: Latent, shapes: Shapes) -> int:
    """Bytes of the temporaries of latent attention: the largest of all panes that a chunk may be.
    It has no flash attention."""
    lanes = power_of_two(shapes.batch)
    return _most_latent_bytes(latent, shapes.chunk, lanes, shapes.capacities)


@lru_cache(maxsize=1024)
def _most_latent_bytes(latent: Latent, chunk, lanes, capacities):
    return max(
        _latent_pane_bytes(latent, min(chunk // tokens, lanes), tokens, capacity)
        for tokens in (1, *CHUNK_ROWS)
        if tokens <= chunk
        for capacity in capacities
    )


def _latent_pane_bytes(latent, lanes, tokens, capacity):
    n_rows = rows_for(lanes * tokens)
    if expands(latent, tokens=tokens):
        return expanded_bytes(latent, n_rows=n_rows, lanes=lanes, tokens=tokens, capacity=capacity)
    among = _pane_bytes(latent.among_latents, n_rows, lanes, tokens, capacity, flash=False)
    return latent_bytes(latent, n_rows=n_rows, among=among)


def delta_temporary_bytes(delta: Delta, shapes: Shapes) -> int:
    """Bytes of the temporaries of a gated DeltaNet: the largest of all panes that a chunk may be.
    A tree is behind no more of the lane's own tokens than a block has (`speculation`)."""
    lanes = power_of_two(shapes.batch)
    longest = min(shapes.chunk, rows_for(min(CHUNK_ROWS[-1], DELTA_BLOCK + lane_rows(shapes))))
    return max(
        delta_bytes(
            delta, lanes=min(shapes.chunk // tokens, lanes), tokens=tokens, is_chain=is_chain
        )
        for tokens in (1, *CHUNK_ROWS)
        for is_chain in (True, False)
        if tokens <= (shapes.chunk if is_chain or not shapes.nodes else longest)
    )


def attention_temporary_bytes(attention: Attention, shapes: Shapes, *, platform: str) -> int:
    """Bytes of attention's temporaries: the largest of all panes that a chunk may be. A plan does
    not know the card: with or without flash attention, whichever takes more."""
    lanes, capacities = power_of_two(shapes.batch), shapes.capacities
    if attention.window is not None:
        capacities = tuple(window_capacity(attention.window, each) for each in capacities)
    return _most_pane_bytes(attention, shapes.chunk, lanes, capacities, platform)


@lru_cache(maxsize=1024)
def _most_pane_bytes(attention: Attention, chunk, lanes, capacities, platform):
    return max(
        _pane_bytes(attention, chunk, min(chunk // tokens, lanes), tokens, capacity, flash=flash)
        for tokens in (1, *CHUNK_ROWS)
        if tokens <= chunk
        for capacity in capacities
        for flash in ((True, False) if platform == "gpu" else (False,))
    )


def _pane_bytes(attention, n_rows, lanes, tokens, capacity, *, flash):
    """For all rows the heads. For one piece of the lanes and entries the scores, float32 (before
    and after the exponential, masked, and in the compute dtype), and the gathered keys and values,
    which may be cast to float32.

    With flash attention these stay as they are; there are scores of the chunk's own entries only,
    which are gone before others are gathered. Its splits have queries and mixed values of 16 bits,
    and the latter as float32."""
    sizes = head_sizes(attention)
    pieces = attention_pieces(attention, lanes=lanes, tokens=tokens, capacity=capacity, flash=flash)
    committed, fresh = capacity // pieces.committed, tokens // pieces.fresh
    score = 4 * pieces.lanes * attention.n_heads * tokens
    gathered = 2 * (2 if pieces.splits else 4) * pieces.lanes * committed * sizes["kv_heads"]
    values = pieces.lanes * tokens * sizes["heads"]
    heads = 4 * 4 * n_rows * (sizes["heads"] + sizes["kv_heads"])
    if pieces.splits:
        of_piece = max(7 * score * fresh // 2, gathered + 8 * pieces.splits * values)
        return of_piece + 3 * 4 * values + heads
    return 7 * score * max(committed, fresh) // 2 + gathered + heads


def _rows_and_logits(weights, machine, shapes, tiling):
    """Host bytes of embedding rows for the device, of prompts of embeddings, of logits that come
    back, and of guessing."""
    cfg, item = weights.cfg, ITEM_BYTES[weights.dtype]
    rows = shapes.n_rows * cfg.hidden_size * (item + 8)
    rows += shapes.vectors * cfg.hidden_size * item
    drawn = (4 * shapes.wanted + DRAWN_BYTES * min(shapes.batch, DRAWERS)) * cfg.vocab_size
    copies = OUTGOING if machine.kind.has_link else 1
    logits = shapes.all_logits * copies * logits_bytes(cfg, shapes, tiling)
    kept = shapes.single_array * shapes.n_rows * cfg.vocab_size * LOGIT_BYTES
    return rows + drawn + logits + kept + (GUESSING_BYTES if shapes.nodes else 0)
