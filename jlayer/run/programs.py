"""What is compiled: one program for each input shape, before the first weight is on the device, and
counted.

Which shapes there are, `jlayer.weights.budget` says, since the plan's sums come from the same
lists.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jlayer.config import ModelConfig
from jlayer.model.block import block
from jlayer.model.cache import LayerCache, cache_struct
from jlayer.model.layers import head
from jlayer.model.params import layer_struct
from jlayer.weights.store import Part, Tile

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

    def __init__(self, cfg: ModelConfig, *, dtype: str, device: jax.Device):
        self.cfg, self.dtype, self.device = cfg, dtype, device
        self.compiles: dict[str, int] = {}
        self.temporary_bytes = 0  # the largest of all programs so far, as XLA says
        self._compiled: dict = {}

    def block(self, tile: Tile, *, batch: int, tokens: int, capacity: int):
        """(layer, hidden [B, T, D], cache, positions [B, T]) -> (hidden, cache); the cache passed
        in is consumed."""
        dtypes = {part.leaf: part.dtype for part in tile.parts}

        def build():
            args = (
                layer_struct(self.cfg, dtypes),
                self._struct((batch, tokens, self.cfg.hidden_size), self.dtype),
                self._cache_struct(batch, capacity),
                self._struct((batch, tokens), "int32"),
            )
            return jax.jit(functools.partial(block, cfg=self.cfg), donate_argnums=2), args

        label = f"block {batch}x{tokens} cache {capacity}"
        return self._get(("block", batch, tokens, capacity, *dtypes.items()), label, build)

    def head(self, tile: Tile, norm: Part, *, batch: int, tokens: int, last: int):
        """(norm, rows [v, D], hidden [B, T, D]) -> float32 logits [B, last, v] of the last
        columns."""
        (rows,) = tile.parts

        def build():
            def last_columns(norm, rows, hidden):
                return head(norm, rows, hidden[:, tokens - last :], eps=self.cfg.rms_norm_eps)

            args = (
                self._struct(norm.shape, norm.dtype),
                self._struct(rows.shape, rows.dtype),
                self._struct((batch, tokens, self.cfg.hidden_size), self.dtype),
            )
            return jax.jit(last_columns), args

        label = f"head {batch}x{tokens} last {last} rows {rows.shape[0]}"
        return self._get(("head", batch, tokens, last, rows.shape, rows.dtype), label, build)

    def empty_cache(self, *, batch: int, capacity: int):
        """() -> a LayerCache of zeros, freshly allocated on the device."""

        def build():
            struct = self._cache_struct(batch, capacity)

            def make():
                return LayerCache(
                    k=jnp.zeros(struct.k.shape, struct.k.dtype),
                    v=jnp.zeros(struct.v.shape, struct.v.dtype),
                )

            sharding = jax.sharding.SingleDeviceSharding(self.device)
            return jax.jit(make, out_shardings=sharding), ()

        return self._get(("cache", batch, capacity), f"cache {batch}x{capacity}", build)

    def _get(self, key, label, build):
        if key not in self._compiled:
            before = backend_compiles()
            function, args = build()
            program = function.lower(*self._placed(args)).compile()
            self._compiled[key] = program
            self.temporary_bytes = max(
                self.temporary_bytes, program.memory_analysis().temp_size_in_bytes
            )
            self.compiles[label] = self.compiles.get(label, 0) + backend_compiles() - before
        return self._compiled[key]

    def _placed(self, args):
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args
        )

    def _struct(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def _cache_struct(self, batch, capacity):
        return cache_struct(self.cfg, batch=batch, capacity=capacity, dtype=self.dtype)
