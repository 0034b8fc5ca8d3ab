"""AutoModel: the object a user holds. Opens a folder, plans, owns the executor, and answers with
logits or tokens."""

from __future__ import annotations

import os
import weakref
from functools import partial

import jax
import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.hub import local_folder
from jlayer.checkpoint.store import Store
from jlayer.config import RunConfig, read_generation_config
from jlayer.engine import device as devices
from jlayer.engine.forward import Forward, Residents
from jlayer.engine.programs import Programs
from jlayer.engine.report import Clock, anonymous_bytes, available_bytes
from jlayer.errors import UsageError
from jlayer.interrupts import deferred
from jlayer.plan.plan import DEFAULT_DISK, Machine, Plan, make_plan, refit
from jlayer.plan.tiles import norm_parts
from jlayer.stream.direct import RowReader, disk_speed
from jlayer.stream.embedding import Embedding
from jlayer.stream.executor import Executor, Totals, Watch
from jlayer.stream.schedule import Tier


class AutoModel:
    """Named as in transformers, for scripts that only change an import."""

    @staticmethod
    def from_pretrained(
        ref: str | os.PathLike,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        dtype: str | None = None,
        draft: str | None = None,
        offline: bool = False,
        watch: Watch | None = None,
        **options,
    ) -> Model:
        """Opens a folder to be streamed: a layered one, or a published one as it is.

        A hub id (`owner/name[@revision]`) is fetched first, unless it is in the cache; `offline`
        takes only what is there.

        `device_memory` and `host_memory` are promises for the whole process (bytes, or words such
        as "4GiB"); by default 4 GiB, or what is free if less, and 80% of what the system says is
        available. `dtype` is what activations are computed in, by default the weights' own. `watch`
        is told what opening does, and becomes the model's own. Further options: `device` ("cpu" or
        "gpu"), `context`.

        Raises CheckpointError, UnsupportedModelError, UsageError, DoesNotFitError, NetworkError or
        StorageError.
        """
        if draft is not None:
            raise UsageError(f"draft: found {draft!r}; speculation is not there yet, leave it out")
        run = RunConfig.from_options(
            device_memory=device_memory, host_memory=host_memory, dtype=dtype, **options
        )
        folder = local_folder(ref, offline=offline)
        with deferred():  # each phase of opening is a safe point
            return Model(folder, run, watch)


class Model:
    """A model that is streamed tile by tile. Close it, or use it in a `with`, to end its readers'
    threads."""

    def __init__(self, ref: str | os.PathLike, run: RunConfig, watch: Watch | None = None):
        clock = Clock()
        self.folder = os.fspath(ref)
        self.watch, self.totals = watch or Watch(), Totals()
        self.watch.phase("reading headers")
        self._store = Store(self.folder)
        self.config = self._store.cfg
        self.run = run
        self.generation_config = read_generation_config(self.folder)
        self.dtype = run.dtype or self._store.float_dtype
        self._check_context()
        self.watch.phase("starting the device")
        host_budget = run.host_memory or available_bytes() * 4 // 5
        self.device, budget, context_bytes = devices.choose(
            run.device,
            run.device_memory,
            pinned_bytes=min(host_budget, self._store.weight_bytes if run.keeps_layers else 0),
        )
        self.watch.phase("measuring the disk and the link")
        self._machine = Machine(
            platform="cpu" if self.device.platform == "cpu" else "gpu",
            device_budget=budget,
            host_budget=host_budget,
            context_bytes=context_bytes,
            baseline_bytes=anonymous_bytes(),
            disk_speed=disk_speed(self._store.files) or DEFAULT_DISK,
            link_speed=devices.link_speed(self.device),
        )
        self.plan = self.plan_for(batch=1, longest=1, context=run.context or 1)
        self.plan.check()
        self._executor: Executor | None = None
        self._owned = _Owned()
        self._end = weakref.finalize(self, self._owned.close)
        self._embedding = Embedding(self._store)
        self._owned.opened.append(self._embedding)
        self._checks = self._make_checks()
        self.watch.phase("reading norms and biases")
        self._residents = self._put_residents()
        self._programs = Programs(
            self.config, dtype=self.dtype, device=self.device, watch=self.watch
        )
        self.host_peak_bytes = anonymous_bytes()
        self.device_peak_bytes = 0
        self._tokenizer = None
        self._text = None
        self.load_s = clock.lap()

    def plan_for(
        self,
        *,
        batch: int,
        longest: int,
        context: int,
        every: bool = False,
        together: bool = False,
    ) -> Plan:
        """The plan of a run whose longest sweep carries `longest` tokens of each of `batch`
        sequences; `every`: with the logits of all of them; `together`: in one array.

        What streams already goes on as it is where the run fits it; else the best plan anew.
        """
        options = {
            "dtype_of": self._store.dtype_of,
            "dtype": self.dtype,
            "batch": batch,
            "longest": longest,
            "context": context,
            "every": every,
            "together": together,
        }
        if self._executor_plan is not None:
            same = refit(self._executor_plan, self.config, **options)
            if same.fits:
                return same
        return make_plan(self.config, self._machine, keeps_layers=self.run.keeps_layers, **options)

    _executor_plan: Plan | None = None

    def _make_checks(self):
        """Of what tiles bring, and of vectors. A table that no tile streams is read once beside the
        first sweep, whose logits wait for it."""
        expected = self._store.expected()
        for name in [] if self.config.tie_word_embeddings else self._embedding.tensors:
            if name in expected:
                table = Checks({name: expected.pop(name)})
                self._embedding.begin_whole(name, partial(table.add, name))
        return Checks(expected)

    def _put_residents(self):
        """Every layer's norms and the final one, read and put once, in the run's dtype, which is
        what a norm multiplies by. All vectors are checked here, those that come with tiles too."""
        vectors = {name: self._read_vector(name) for name in self._store.vectors}

        def put(part):
            return jax.device_put(vectors[part.tensor].astype(self.dtype), self.device)

        layers = [
            {part.leaf: put(part) for part in norm_parts(self.config, self._store.dtype_of, layer)}
            for layer in range(self.config.num_hidden_layers)
        ]
        return Residents(layers, put(self._store.norm_part()))

    def _read_vector(self, name):
        segment = self._store.segment_of(name)
        rows = RowReader(segment, n_rows=1, identity=self._store.identities[segment.file])
        try:
            (raw,) = rows.read(np.zeros(1, np.int64))
        finally:
            rows.close()
        self._checks.add(name, raw, n_rows=1)
        return raw.view(np.dtype(self._store.dtype_of(name))).copy()

    @property
    def context_limit(self) -> int:
        """The most positions a sequence may have: --context where given, else the model's own
        limit."""
        return self.run.context or self.config.max_position_embeddings

    @property
    def tokenizer(self):
        """The published tokenizer as transformers gives it (loaded on first use, which imports
        transformers)."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return self._tokenizer

    @property
    def text(self):
        """The tokenizer that generation itself uses: small, and without transformers."""
        if self._text is None:
            from jlayer.text.tokenizer import Tokenizer

            self._text = Tokenizer.from_folder(self.folder)
        return self._text

    def forward(self, *, batch: int, **run) -> Forward:
        """Room for a run of `batch` sequences, described as to `plan_for`; checked against the
        promises before any allocation."""
        if not self._end.alive:
            raise UsageError("this model is closed; open it again with AutoModel.from_pretrained")
        self.plan = self.plan_for(batch=batch, **run)
        self.plan.check()
        return Forward(
            self._executor_for(self.plan),
            self._programs,
            self._embedding,
            self._residents,
            self.plan,
            batch=batch,
        )

    def _executor_for(self, plan):
        """The executor that streams as `plan` says: the one there is, or a new one in its place."""
        old = self._executor_plan
        if old is not None and (old.tiles, old.tiers) == (plan.tiles, plan.tiers):
            return self._executor
        if self._executor is not None:
            self._executor.close()
            self._owned.opened.remove(self._executor)
        self._executor = Executor(
            self._store,
            plan.tiles,
            plan.tiers,
            ring=plan.ring,
            ahead=plan.ahead,
            device=self.device,
            totals=self.totals,
            watch=self.watch,
            checks=self._checks,
        )
        self._owned.opened.append(self._executor)
        self._executor_plan = plan
        return self._executor

    def logits(self, input_ids) -> np.ndarray:
        """Logits of every position: ids [B, T] or [T] -> float32 [B, T, V] on the host.

        Raises UsageError: no tokens, rows of different lengths, ids outside the vocabulary, longer
        than the context.
        """
        ids = as_id_lists(input_ids)
        if len({len(row) for row in ids}) > 1:
            raise UsageError(
                f"input_ids: rows of lengths {[len(row) for row in ids]}, expected equal ones"
            )
        for row in ids:
            self.check_ids(row)
        self.check_length(len(ids[0]), 0)
        n_tokens = len(ids[0])
        forward = self.forward(
            batch=len(ids), longest=n_tokens, context=n_tokens, every=True, together=True
        )
        return forward.sweep(ids, [0] * len(ids), every=True)

    def generate(self, input_ids, **options):
        """New tokens after `input_ids`, as transformers' `generate` gives them; see
        `jlayer.api`."""
        from jlayer.api import generate_ids

        return generate_ids(self, input_ids, **options)

    def check_ids(self, ids: list[int]):
        """Raises UsageError unless `ids` are some tokens of the vocabulary."""
        if not ids:
            raise UsageError(
                "prompt: empty, and this model has no beginning token to start from; give some text"
            )
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(
                    f"prompt: id {token} is outside the vocabulary of {self.config.vocab_size}"
                )

    def check_length(self, n_prompt: int, n_new: int):
        """Raises UsageError where prompt and new tokens exceed the context."""
        limit = self.context_limit
        if n_prompt > limit:
            raise UsageError(
                f"prompt: {n_prompt} tokens, longer than the context of {limit}; shorten it"
            )
        if n_prompt + n_new > limit:
            raise UsageError(
                f"max_new_tokens: {n_new} after a prompt of {n_prompt} tokens exceed the context "
                f"of {limit}; ask for at most {limit - n_prompt}"
            )

    def _check_context(self):
        limit = self.config.max_position_embeddings
        if self.run.context and self.run.context > limit:
            raise UsageError(
                f"context: {self.run.context} tokens, the model's own limit is {limit}"
            )

    @property
    def compiles(self) -> dict[str, int]:
        """Backend compiles by input shape, so far."""
        return self._programs.compiles

    @property
    def sweep_bytes(self) -> int:
        """Weight bytes that a sweep uses."""
        return sum(tile.n_bytes for tile in self.plan.tiles)

    def files_of(self, tier: Tier) -> list[str]:
        """Paths of the files that the tiles of a tier come from."""
        tiles = [t for t, own in zip(self.plan.tiles, self.plan.tiers, strict=True) if own is tier]
        segments = [segment for tile in tiles for segment in self._store.place(tile)[0]]
        return list(dict.fromkeys(segment.file for segment in segments))

    @property
    def model_bytes(self) -> int:
        return self._store.weight_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear of the folder and that is no error."""
        return self._store.notes

    @property
    def device_name(self) -> str:
        """The device in words, as the driver names it."""
        return f"{self.device.platform}:{self.device.id} ({self.device.device_kind})"

    def note_peaks(self, forward: Forward):
        """Looks at memory; called after each sweep, and the largest figures seen are the peaks."""
        self.host_peak_bytes = max(self.host_peak_bytes, anonymous_bytes())
        weights = self.totals.most_live_bytes + self.plan.tier_bytes(Tier.DEVICE)
        held = weights + forward.held_bytes + self._programs.temporary_bytes
        self.device_peak_bytes = max(self.device_peak_bytes, held)

    def memory(self) -> dict:
        """Budgets and peaks as `generate --json` prints them. A CPU has no allocator to ask: there
        the sum is accounted."""
        stats = self.device.memory_stats()
        context = self._machine.context_bytes
        measured = context + stats["peak_bytes_in_use"] if stats else None
        return {
            "device_budget_bytes": self._machine.device_budget,
            "device_peak_bytes": measured or self.device_peak_bytes,
            "device_peak_how": "measured" if measured else "accounted",
            "host_budget_bytes": self._machine.host_budget,
            "host_peak_bytes": self.host_peak_bytes,
            "host_peak_how": "measured",
        }

    def close(self):
        """Ends the reader's thread and closes the files."""
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def as_id_lists(input_ids, *, name: str = "input_ids") -> list[list[int]]:
    """Ids as lists, numpy, jax or torch give them, [B, T] or [T], as B lists of ints.

    Raises UsageError where they are no integers or of more than two dimensions.
    """
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(rows, (list, tuple)) and all(type(token) is int for token in rows):
        rows = [rows]
    ok = isinstance(rows, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and all(type(token) is int for token in row) for row in rows
    )
    if not ok or not rows:
        raise UsageError(f"{name}: expected integers of shape [B, T] or [T]")
    return [list(row) for row in rows]


class _Owned:
    """What a model has open, apart from it, so that it is closed too when the model is just
    dropped."""

    def __init__(self):
        self.opened = []

    def close(self):
        while self.opened:
            self.opened.pop().close()
