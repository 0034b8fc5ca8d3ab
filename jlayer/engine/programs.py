"""What is compiled: one program for each input shape, before the first weight is on the device, and
counted.

Which shapes there are, `jlayer.plan.plan` says, since the plan's sums come from the same
lists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlayer.config import ModelConfig
from jlayer.encodings.quantization import BLOCK_BYTES
from jlayer.families.llama import EMBEDDING, head_leaf, layer_leaves
from jlayer.interrupts import deferred
from jlayer.model.cache import LayerCache, cache_struct
from jlayer.model.ops import head, linear, rms_norm
from jlayer.model.params import Layer
from jlayer.model.products import InBlob, Quantized, dequantize, join_pieces
from jlayer.model.stages import attend, block, join, mlp_in, project
from jlayer.plan.blob import blob_of
from jlayer.plan.tiles import Part, Tile
from jlayer.stream.executor import Watch

_backend_compiles = 0


def _count_compiles(event, duration, **_):
    global _backend_compiles
    if event.endswith("backend_compile_duration"):
        _backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def backend_compiles() -> int:
    """Programs that XLA has compiled in this process so far, for whatever reason."""
    return _backend_compiles


class Programs:
    """Compiled programs of one model on one device, by shape; `compiles` counts them by a readable
    label."""

    def __init__(
        self, cfg: ModelConfig, *, dtype: str, device: jax.Device, watch: Watch | None = None
    ):
        self.cfg, self.dtype, self.device = cfg, dtype, device
        self._watch = watch or Watch()
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0  # the largest of all programs so far, as XLA says
        self._norm = jax.ShapeDtypeStruct((cfg.hidden_size,), dtype)
        self._block_bytes = BLOCK_BYTES["cpu" if device.platform == "cpu" else "gpu"]
        self._compiled: dict = {}

    def block(self, tile: Tile, *, batch: int, tokens: int, capacity: int):
        """(matrices, norms, hidden [B, T, D], cache, positions [B, T]) -> (hidden, cache); consumes
        the cache."""

        def function(matrices, norms, hidden, cache, positions):
            layer = Layer(**self._weights(tile, matrices), **norms)
            return block(layer, hidden, cache, positions, self.cfg)

        norms = {"input_layernorm": self._norm, "post_attention_layernorm": self._norm}
        args = (
            struct_of(tile, self.device.platform),
            norms,
            self._hidden(batch, tokens),
            self._cache(batch, capacity),
            jax.ShapeDtypeStruct((batch, tokens), "int32"),
        )
        label = f"block {batch}x{tokens} cache {capacity}"
        return self._get((label, tile.signature), function, args, donated=3)

    def embed(self, parts: list[Part], *, batch: int, tokens: int):
        """(rows of the embedding [B, T, ...] by leaf) -> hidden [B, T, D]."""
        leaf, width = EMBEDDING.name, self.cfg.hidden_size

        def function(rows):
            flat = {name: array.reshape(-1, array.shape[-1]) for name, array in rows.items()}
            weights = join_pieces(flat, block_bytes=self._block_bytes)[leaf]
            if isinstance(weights, Quantized):
                weights = dequantize(weights, width)
            return weights.astype(self.dtype).reshape(batch, tokens, width)

        args = {
            part.leaf: jax.ShapeDtypeStruct((batch, tokens, part.shape[1]), part.dtype)
            for part in parts
        }
        return self._get((f"embed {batch}x{tokens}",), function, (args,))

    def enter(self, *, batch: int, tokens: int):
        """(hidden, norm) -> the attention's input [B, T, D]."""

        def function(hidden, norm):
            return rms_norm(hidden, norm, eps=self.cfg.rms_norm_eps)

        label = f"norm {batch}x{tokens}"
        return self._get((label,), function, (self._hidden(batch, tokens), self._norm))

    def rows(self, tile: Tile, *, batch: int, tokens: int):
        """(x [B, T, in], arrays by leaf) -> products [B, T, rows] in the order of the tile's
        matrices.

        Of gate and up the one product that the MLP goes on with.
        """
        names = list(tile.heights)

        def function(x, arrays):
            arrays = self._weights(tile, arrays)
            if tile.stage == "gate_up":
                gate, up = names
                biases = (arrays.get(f"{gate}_bias"), arrays.get(f"{up}_bias"))
                return (mlp_in(x, arrays[gate], arrays[up], *biases, cfg=self.cfg),)
            return tuple(linear(x, arrays[name], arrays.get(f"{name}_bias")) for name in names)

        width = next(leaf for leaf in layer_leaves(self.cfg) if leaf.name == names[0]).shape(
            self.cfg
        )[1]
        args = (self._struct(batch, tokens, width), struct_of(tile, self.device.platform))
        heights = "+".join(map(str, tile.heights.values()))
        label = f"{tile.stage} rows {heights} {batch}x{tokens}"
        return self._get((label, tile.signature), function, args)

    def attend(self, widths: dict[str, tuple[int, ...]], *, batch: int, tokens: int, capacity: int):
        """(products by leaf, cache, positions) -> (attended [B, T, N*H], cache); consumes the
        cache."""

        def function(products, cache, positions):
            q, k, v = (join(products[name]) for name in ("q_proj", "k_proj", "v_proj"))
            return attend(q, k, v, cache, positions, self.cfg)

        products = {
            name: [self._struct(batch, tokens, width) for width in own]
            for name, own in widths.items()
        }
        args = (
            products,
            self._cache(batch, capacity),
            jax.ShapeDtypeStruct((batch, tokens), "int32"),
        )
        label = f"attend {batch}x{tokens} cache {capacity}"
        return self._get((label, *widths.items()), function, args, donated=1)

    def project(self, widths: tuple[int, ...], *, batch: int, tokens: int):
        """(hidden, products, norm) -> (hidden, the MLP's input)."""

        def function(hidden, products, norm):
            return project(hidden, join(products), norm, self.cfg)

        products = [self._struct(batch, tokens, width) for width in widths]
        label = f"project {batch}x{tokens}"
        args = (self._hidden(batch, tokens), products, self._norm)
        return self._get((label, widths), function, args)

    def join(self, widths: tuple[int, ...], *, batch: int, tokens: int):
        """(products) -> the MLP's inner activation [B, T, F]."""
        args = ([self._struct(batch, tokens, width) for width in widths],)
        return self._get((f"join {batch}x{tokens}", widths), join, args)

    def leave(self, widths: tuple[int, ...], *, batch: int, tokens: int):
        """(hidden, products of the MLP's way out) -> hidden."""

        def function(hidden, products):
            return hidden + join(products)

        products = [self._struct(batch, tokens, width) for width in widths]
        args = (self._hidden(batch, tokens), products)
        return self._get((f"leave {batch}x{tokens}", widths), function, args)

    def head(self, tile: Tile, *, batch: int, tokens: int, last: int):
        """(norm, some rows [v, D] by leaf, hidden [B, T, D]) -> float32 logits [B, last, v] of the
        last columns."""
        leaf = head_leaf(self.cfg).name

        def function(norm, arrays, hidden):
            rows = self._weights(tile, arrays)[leaf]
            return head(norm, rows, hidden[:, tokens - last :], eps=self.cfg.rms_norm_eps)

        args = (self._norm, struct_of(tile, self.device.platform), self._hidden(batch, tokens))
        label = f"head {batch}x{tokens} last {last} rows {tile.heights[leaf]}"
        return self._get((label, tile.signature), function, args)

    def empty_cache(self, *, batch: int, capacity: int):
        """() -> a LayerCache of zeros, freshly allocated on the device."""
        struct = self._cache(batch, capacity)

        def make():
            return LayerCache(
                k=jnp.zeros(struct.k.shape, struct.k.dtype),
                v=jnp.zeros(struct.v.shape, struct.v.dtype),
            )

        return self._get((f"cache {batch}x{capacity}",), make, ())

    def _weights(self, tile, put):
        """A tile's weights by leaf, inside a program, out of what was put of it."""
        parts = _parts_in(put, tile, self.device.platform)
        return join_pieces(parts, block_bytes=self._block_bytes)

    def _get(self, key, function, args, donated=()):
        """The compiled program under `key`, whose first word is the label it is counted by."""
        if key not in self._compiled:
            with deferred(), self._watch.compiling(key[0]):
                self._compile(key, function, args, donated)
        return self._compiled[key]

    def _compile(self, key, function, args, donated):
        before = backend_compiles()
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args
        )
        jitted = jax.jit(function, donate_argnums=donated, out_shardings=sharding)
        program = jitted.lower(*placed).compile()
        self._compiled[key] = program
        temporary = program.memory_analysis().temp_size_in_bytes
        self.temporary_bytes = max(self.temporary_bytes, temporary)
        self.compiles[key[0]] = self.compiles.get(key[0], 0) + backend_compiles() - before

    def _struct(self, batch, tokens, width):
        return jax.ShapeDtypeStruct((batch, tokens, width), self.dtype)

    def _hidden(self, batch, tokens):
        return self._struct(batch, tokens, self.cfg.hidden_size)

    def _cache(self, batch, capacity):
        return cache_struct(self.cfg, batch=batch, capacity=capacity, dtype=self.dtype)


def struct_of(tile: Tile, platform: str):
    """What is put of a tile on a device, without the numbers: arrays by leaf, or a blob."""
    blob = blob_of(tile, platform)
    if blob:
        return jax.ShapeDtypeStruct((blob.n_bytes,), "uint8")
    return {part.leaf: jax.ShapeDtypeStruct(part.shape, part.dtype) for part in tile.parts}


def _parts_in(put, tile: Tile, platform: str) -> dict:
    """The inverse, inside a program: a tile's parts by leaf, out of what was put of it."""
    blob = blob_of(tile, platform)
    if not blob:
        return put
    return {
        part.leaf: InBlob(put, offset, part.shape, part.dtype)
        for part, offset in zip(tile.parts, blob.offsets, strict=True)
    }
