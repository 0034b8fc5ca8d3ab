"""A draft model: small enough to be on the device whole, it guesses what a large one will draw.

It shares the numbering of pool rows with the model that it guesses for: an entry has a row in the
pools of both, so what is accepted there is kept here, and what is rejected is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlayer.checkpoint.store import Store
from jlayer.engine import draft_weights
from jlayer.engine.batch import Part
from jlayer.engine.packing import pack, packed_bytes, unpack
from jlayer.engine.programs import Programs
from jlayer.errors import StorageError, UnsupportedModelError
from jlayer.model.cache import LayerCache, cache_struct
from jlayer.model.whole import likeliest, one_kind
from jlayer.plan.shapes import LEAST_ROWS, power_of_two
from jlayer.plan.tiles import Weights
from jlayer.run_config import RunConfig
from jlayer.streaming.devices import Devices
from jlayer.streaming.guard import first_line
from jlayer.streaming.watch import Watch
from jlayer.text.same import check_same_tokens

# The likeliest tokens that are looked at after each guess. (In trees of 512 nodes more change
# nothing.)
CANDIDATES = 96


@dataclass(frozen=True)
class Likeliest:
    """The likeliest next tokens of some rows, likeliest first: ids int32 [W, C], and their logits
    float32 [W, C]."""

    ids: np.ndarray
    logits: np.ndarray


class DraftModel:
    """A small model on the device: its weights, its pools, and its one program.

    `model`: its weights, once they are loaded. `pools`: the entries of all layers, None while there
    are no lanes. Raises what opening a folder raises, and UnsupportedModelError where it cannot be
    one.
    """

    def __init__(self, folder: str, *, dtype: str | None = None, follow_links: bool = False):
        """`dtype`: the compute dtype; None: its weights' own."""
        self.store = Store(folder, follow_links=follow_links)
        self.folder = folder
        self.cfg = self.store.cfg
        self.dtype = dtype or self.store.float_dtype
        self.weights = Weights(self.cfg, self.store.form_of, self.dtype)
        if self.cfg.experts is not None:
            raise UnsupportedModelError(
                f"draft: {folder} has experts, and a draft is kept on the device whole; take a "
                "dense one"
            )
        if one_kind(self.cfg) is None:
            raise UnsupportedModelError(
                f"draft: {folder} has layers of several kinds; take one whose layers are alike"
            )
        self.model = self.pools = self._programs = None
        self._written = np.zeros(0, bool)

    def load(self, device: jax.Device, *, most_ids: int, watch: Watch) -> None:
        """Puts its weights on the device. `most_ids`: ids from there on are never guessed.

        Raises CheckpointError or StorageError."""
        self._device, self._most_ids = device, most_ids
        self._programs = Programs(
            self.cfg, dtype=self.dtype, devices=Devices([device]), watch=watch
        )
        try:
            self.model = draft_weights.load(self.store, self.weights, device)
        except jax.errors.JaxRuntimeError as error:
            raise _device_failed(error) from error

    @property
    def context_limit(self) -> int:
        """The most positions of a sequence."""
        return self.cfg.max_position_embeddings

    @property
    def compiles(self) -> dict[str, int]:
        return {} if self._programs is None else self._programs.compiles

    @property
    def n_bytes(self) -> int:
        """Bytes on the device now, weights and pools."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.model, self.pools)))

    @property
    def temporary_bytes(self) -> int:
        return 0 if self._programs is None else self._programs.temporary_bytes

    @property
    def n_rows(self) -> int:
        """The rows of its pools; 0 where there are none."""
        return len(self._written)

    def n_known(self, rows: np.ndarray) -> int:
        """Of a sequence whose entries have these pool rows: how many of the first have been
        computed here."""
        known = self._written[rows[rows < len(self._written)]]
        return len(known) if known.all() else int(np.argmin(known))

    def forget(self, rows: np.ndarray) -> None:
        """These pool rows have been taken for other tokens."""
        self._written[rows[rows < len(self._written)]] = False

    @property
    def n_layers(self) -> int:
        return self.cfg.num_hidden_layers

    @property
    def entry_bytes(self) -> int:
        """Of the entries of a token, in all layers."""
        struct = self._struct(1)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(struct))

    def entries(self, layer: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of a layer's entries in these pool rows, which are known: see `n_known`."""
        at = layer * self.n_rows + rows
        return {name: np.asarray(leaf[at]) for name, leaf in vars(self.pools).items()}

    def place(self, layer: int, rows: np.ndarray, entries: Mapping[str, np.ndarray]) -> None:
        """Writes a layer's entries into these pool rows; those of the last layer make them known.
        Raises StorageError."""
        padded = np.full(power_of_two(len(rows)), self.n_layers * self.n_rows, np.int32)
        padded[: len(rows)] = layer * self.n_rows + rows
        more = len(padded) - len(rows)
        new = {
            name: np.pad(array, ((0, more), *[(0, 0)] * (array.ndim - 1)))
            for name, array in entries.items()
        }
        try:
            given = jax.device_put({"rows": padded, "entries": LayerCache(**new)}, self._device)
            self.pools = jax.block_until_ready(self._placing(given)(given, self.pools))
        except jax.errors.JaxRuntimeError as error:
            self.drop()
            raise _device_failed(error) from error
        if layer == self.n_layers - 1:
            self._written[rows] = True

    def _placing(self, given):
        """({rows, entries}, pools) -> pools."""

        def place(given, pools):
            def into(entry, new):
                return entry.at[given["rows"]].set(new, mode="drop")

            return jax.tree.map(into, pools, given["entries"])

        struct = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), given)
        label = f"draft placed {len(given['rows'])} of {self.n_rows}"
        return self._programs.get(label, (), place, (struct, self._struct(self.n_rows)))

    def drop(self) -> None:
        """Frees the pools."""
        self.pools, self._written = None, np.zeros(0, bool)

    def close(self) -> None:
        """Frees its weights and pools."""
        self.drop()
        self.model = None

    def compile(self, part: Part) -> None:
        """Compiles the program for chunks of this shape."""
        self._program(part.size, _n_wanted(part))

    def guess(self, parts: Sequence[Part]) -> Likeliest:
        """Runs chunks one after another, whose rows' entries are written -> the likeliest tokens
        after their wanted rows, by place. Raises StorageError where the device fails."""
        try:
            running = [self._run(part) for part in parts]
            pairs = zip(running, parts, strict=True)
            found = np.concatenate([np.asarray(one)[: len(part.wanted)] for one, part in pairs])
        except jax.errors.JaxRuntimeError as error:
            self.drop()  # the pools were to be reused, and may be gone
            raise _device_failed(error) from error
        except BaseException:
            self.drop()
            raise
        found = found[np.argsort(np.concatenate([part.places for part in parts]))]
        return Likeliest(found[:, 0], np.ascontiguousarray(found[:, 1]).view(np.float32))

    def _run(self, part):
        self.reserve(part.size.pool)
        n_wanted = _n_wanted(part)
        program = self._program(part.size, n_wanted)
        wanted = np.zeros(n_wanted, np.int32)
        wanted[: len(part.wanted)] = part.wanted
        given = {"ids": np.maximum(part.tokens, 0), "rows": part.rows, "wanted": wanted}
        small = jax.device_put(pack(given), self._device)
        found, self.pools = program({"model": self.model, "small": small}, self.pools)
        self._written[part.rows.write[part.tokens >= 0]] = True
        return found

    def _program(self, size, n_wanted):
        """({the model, the small arrays in one}, pools) -> (int32 [W, 2, C]: ids, and the bits of
        their logits; pools)."""
        most_ids = self._most_ids
        most = min(CANDIDATES, self.cfg.vocab_size, most_ids)
        small = {
            "ids": jax.ShapeDtypeStruct((size.rows,), "int32"),
            "rows": size.rows_struct,
            "wanted": jax.ShapeDtypeStruct((n_wanted,), "int32"),
        }

        def function(given, pools):
            known = unpack(given["small"], small)
            ids, logits, pools = likeliest(
                given["model"],
                known["ids"],
                pools,
                known["rows"].replace(flash=self._programs.flash(one_kind(self.cfg))),
                known["wanted"],
                cfg=self.cfg,
                dtype=self.dtype,
                most=most,
                most_ids=most_ids,
            )
            bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
            return jnp.stack([ids, bits], axis=1), pools

        given = {
            "model": jax.tree.map(
                lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), self.model
            ),
            "small": jax.ShapeDtypeStruct((packed_bytes(small),), "uint8"),
        }
        label = f"draft {size.rows} {size.attends()} wanted {n_wanted}"
        return self._programs.get(label, most_ids, function, (given, self._struct(size.pool)))

    def reserve(self, n_rows: int) -> None:
        """Makes the pools, or lets them grow."""
        before = len(self._written)
        if self.pools is not None and before == n_rows:
            return
        n_layers, struct = self.cfg.num_hidden_layers, self._struct(n_rows)
        if self.pools is None:
            self.pools = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._device), struct
            )
            before = 0
        else:
            grow = self._programs.get(
                f"draft pool {before} to {n_rows}",
                (),
                partial(_grown, n_layers=n_layers, n_rows=n_rows),
                (self._struct(before),),
            )
            self.pools = grow(self.pools)
        self._written = np.pad(self._written[:before], (0, n_rows - before))

    def _struct(self, n_rows):
        """The shapes of the pools of all layers, one after another."""
        kind, n_layers = one_kind(self.cfg), self.cfg.num_hidden_layers
        return cache_struct(kind.cache, n_rows=n_layers * n_rows, dtype=self.dtype)


def draft_for(store: Store, run: RunConfig, dtype: str) -> DraftModel | None:
    """The draft model that the options name; None without one. `store`: of the model that it
    guesses for. Raises UsageError where it has other tokens, and what opening a folder raises."""
    if run.draft is None:
        return None
    draft = DraftModel(run.draft, dtype=dtype, follow_links=run.follow_links)
    check_same_tokens(
        store.folder,
        run.draft,
        vocab_size=store.cfg.vocab_size,
        draft_vocab_size=draft.cfg.vocab_size,
    )
    return draft


def _n_wanted(part):
    if part.size.fresh:  # some steps have fewer nodes than fit: not a program for each number
        return part.size.rows
    return part.n_wanted or LEAST_ROWS  # the part of a prompt whose logits nobody wants


def _grown(pools: LayerCache, *, n_layers, n_rows):
    def grown(entry):
        of_layers = entry.reshape(n_layers, -1, *entry.shape[1:])
        more = n_rows - of_layers.shape[1]
        padded = jnp.pad(of_layers, ((0, 0), (0, more), *[(0, 0)] * (entry.ndim - 1)))
        return padded.reshape(n_layers * n_rows, *entry.shape[1:])

    return jax.tree.map(grown, pools)


def _device_failed(error):
    return StorageError(f"the draft model: the device failed ({first_line(error)})")
