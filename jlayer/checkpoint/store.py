"""The position of each tensor on disk, as segments of files.

Reads and holds no weights. A layered and a published folder fill the same table, so the streaming
room does not distinguish them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from jlayer.checkpoint.beside import Named, beside
from jlayer.checkpoint.copies import check_copies
from jlayer.checkpoint.digest import Expected, rows_of
from jlayer.checkpoint.foreign import adapter_notes
from jlayer.checkpoint.gguf import open_gguf
from jlayer.checkpoint.layout import (
    CONFIG,
    EMBED_FILE,
    FINAL_FILE,
    MANIFEST,
    Manifest,
    is_layered,
    layer_file,
    read_manifest,
)
from jlayer.checkpoint.links import links_followed, links_note
from jlayer.checkpoint.nested import DECODED_BYTES, Nested
from jlayer.checkpoint.quantization import (
    Quantization,
    piece_dtypes,
    stored_tensors,
)
from jlayer.checkpoint.rows import Host, Span, check_host
from jlayer.checkpoint.safetensors import TensorEntry, read_header
from jlayer.checkpoint.sides import check_side_files, is_side_changed
from jlayer.checkpoint.source import Identity, identity_of, names_in, open_published
from jlayer.config import read_config
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import encoding
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.families.base import EMBEDDING
from jlayer.families.fewer import Renumbering, fewer_layers
from jlayer.families.registry import final_norm_leaves, is_matrix, published_tensors
from jlayer.gguf.parts import is_gguf
from jlayer.spec import ITEM_BYTES, ModelConfig
from jlayer.strict import regular_status

COMPARED_BYTES = 16 << 20  # of a tensor, read at a time


@dataclass(frozen=True, order=True)
class Segment:
    """Consecutive bytes of one file.

    `nested`: they are scales, which are stored there as codes of one byte, fewer bytes; the first
    one has the number `first_code` in its matrix.
    """

    file: str
    offset: int
    n_bytes: int
    nested: Nested | None = field(default=None, compare=False)
    first_code: int = field(default=0, compare=False)

    @property
    def stored(self) -> Segment:
        """The bytes that are read for it."""
        if self.nested is None:
            return self
        return Segment(self.file, self.offset, self.n_bytes // DECODED_BYTES)


class Store:
    """An opened folder of weights: its config, and the header of every file, checked against it.

    A layered folder is also checked against its manifest. A published one has none (`manifest` is
    None) and gets the checks of the converter. `fingerprint` distinguishes models; `identities`
    shows whether a file was changed later; `notes`: for the user. `follow_links`: take what links
    in a published folder lead to outside of it, and name them in a note. (Files of a layered folder
    may lie anywhere: the manifest vouches for them.) `host`: the one that reads its own rows, where
    several run the model; a folder may hold these alone, and rows are numbered as in the whole
    model all the same. `adapter`: the folder of one that is used beside the weights: its tensors
    are among those of the model, under names of their own; `adapters`: (name, folder) of those that
    requests ask for by name. `adapter_names`: of those that have a number, by it; None: the model's
    own. `without_layers`: numbers of layers that are passed over; the others have the numbers and
    the names that they would have in a model without these. Raises CheckpointError if the folder is
    incomplete, damaged, of another form, or holds the rows of another host.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        follow_links: bool = False,
        host: Host | None = None,
        adapter: str | os.PathLike | None = None,
        adapters: Sequence[tuple[str, str | os.PathLike]] = (),
        without_layers: Sequence[int] = (),
    ):
        self.folder = os.fspath(folder)
        self.cfg: ModelConfig
        self.manifest: Manifest | None = None
        self.quantization: Quantization | None = None
        self.notes: tuple[str, ...] = ()
        self.identities: dict[str, Identity]
        self._where: dict[str, tuple[str, TensorEntry]]
        self._nested: dict[str, Nested] = {}  # by the name of a piece that is stored as codes
        self._spans: dict[str, Span] = {}  # of tensors of which only some rows are here
        self.adapter_digest: str | None = None
        self.adapter_names: tuple[str | None, ...] = ()
        self.memory_bytes = 0  # of files that are in memory alone
        self._in_memory: set[str] = set()  # files that are there alone
        self._beside: dict[str, str] = {}  # a tensor of an adapter -> its encoding
        self._left: Renumbering | None = None  # where layers are passed over
        if is_layered(self.folder):
            self._open_layered(host)
        else:
            with links_followed(wanted=follow_links) as taken:
                opened = open_gguf if is_gguf(self.folder) else open_published
                self._take_published(opened(self.folder))
            self.notes = (*self.notes, *links_note(self.folder, taken))
        if without_layers:
            self._pass_over(without_layers)
        if adapter is not None or adapters:
            own = None if adapter is None else os.fspath(adapter)
            others = tuple((name, os.fspath(folder)) for name, folder in adapters)
            named = Named(own, others)
            with links_followed(wanted=follow_links) as taken:
                self._take_adapters(named)
            for each in named.folders:
                inside = [link for link in taken if link[0].startswith(os.path.join(each, ""))]
                self.notes = (*self.notes, *links_note(each, inside))

    def _open_layered(self, host):
        self.cfg, self.manifest = read_config(self.folder), read_manifest(self.folder)
        check_host(self.folder, self.manifest.host, host)
        if self.manifest.family != self.cfg.model_type:
            raise CheckpointError(
                f"{self.folder}: {MANIFEST} is of a {self.manifest.family!a} model, config.json "
                f"says {self.cfg.model_type!r}; put back the config, or convert the source again"
            )
        self.fingerprint = self.manifest.source_fingerprint
        self.quantization, self._spans = self.manifest.quantization, self.manifest.spans
        self._where, self.identities = locate(self.folder, self.cfg, self.manifest)
        self.notes = (
            *check_side_files(self.folder, self.manifest),
            *adapter_notes(self.folder, names_in(self.folder)),
        )

    def _take_published(self, source):
        self.cfg, self.notes, self.fingerprint = source.cfg, source.notes, source.fingerprint
        self.quantization, self._nested = source.quantization, source.nested
        self._where = {name: (file.path, entry) for name, (file, entry) in source.tensors.items()}
        self.identities = {file.path: file.identity for file, _ in source.tensors.values()}

    def _pass_over(self, dropped):
        """Goes on as if the folder had no such layers. Raises UsageError for one that it has not,
        and where none would be left."""
        n = self.cfg.num_hidden_layers
        wrong = [layer for layer in dropped if not 0 <= layer < n]
        if wrong or len(set(dropped)) == n:
            raise UsageError(
                f"without_layers: found {', '.join(map(str, dropped))}, expected some, not all, of "
                f"the numbers of {self.folder}'s layers, 0 to {n - 1}"
            )
        self._left = left = Renumbering(n, dropped)
        if self.quantization:
            self.quantization = self.quantization.with_fewer(self.cfg, left)
        self.cfg = fewer_layers(self.cfg, dropped)
        if self.cfg.delta is not None and not self.cfg.layer_types:
            raise UnsupportedModelError(
                f"without_layers: found {', '.join(map(str, dropped))}, which leaves layers of one "
                f"type of {self.folder}, expected some with full and some with linear attention"
            )
        self._where, self._nested = left.names(self._where), left.names(self._nested)
        self._spans = left.names(self._spans)
        both = f"{self.fingerprint} {left.kept}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def _take_adapters(self, named):
        """With another adapter it has another fingerprint: so are its tokens."""
        found = beside(named, self.cfg)
        self.cfg = replace(self.cfg, additions=found.additions)
        self._where |= found.tensors
        self._memory, self.memory_bytes = found.memory, found.memory_bytes
        self._beside, self.adapter_digest = found.forms, found.digest
        self.adapter_names = named.names
        files = {adapter.file.path: adapter.file.identity for adapter in found.adapters}
        self._in_memory = {path for path, _ in found.tensors.values()} - files.keys()
        of_memory = {path: identity_of(os.stat(path)) for path in self._in_memory}
        self.identities = {**self.identities, **files, **of_memory}
        if os.path.realpath(self.folder) in map(os.path.realpath, named.folders):
            beside_weights = adapter_notes(self.folder, names_in(self.folder))
            self.notes = tuple(note for note in self.notes if note not in beside_weights)
        both = f"{self.fingerprint} {self.adapter_digest}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()
        for adapter in found.adapters:
            check_copies(adapter, self._plain_rows)

    def _plain_rows(self, tensor):
        """(the number of the first row, rows) of a tensor of plain numbers, one range of those that
        are here after another; None for another tensor."""
        import ml_dtypes  # not for a command's help
        import numpy as np

        form = self.form_of(tensor)
        if form not in ITEM_BYTES:
            return None
        path, entry = self._where[tensor]
        first = self._spans[tensor].first if tensor in self._spans else 0
        row_bytes = entry.n_bytes // entry.shape[0]
        at_once = max(1, COMPARED_BYTES // row_bytes)
        kind = np.dtype(getattr(ml_dtypes, form, form))

        def rows():
            with open(path, "rb") as file:
                file.seek(entry.offset)
                for row in range(0, entry.shape[0], at_once):
                    raw = file.read(min(at_once, entry.shape[0] - row) * row_bytes)
                    yield first + row, np.frombuffer(raw, kind).reshape(-1, *entry.shape[1:])

        return rows()

    def adapter_number(self, name: str | None) -> int:
        """The number of the adapter of this name; None: of the model's own; -1: no adapter, or the
        one that all rows are computed with. Raises UsageError."""
        if name in self.adapter_names:
            return self.adapter_names.index(name)
        if name is None:
            return -1
        known = ", ".join(filter(None, self.adapter_names)) or "none"
        raise UsageError(
            f"adapter: found {name!r:.200}, but this model has {known}; open it with "
            "adapters={name: folder}"
        )

    def form_of(self, tensor: str) -> str:
        """The name of a published tensor's encoding on disk: a dtype, or a scheme."""
        return self._forms[tensor]

    @cached_property
    def _forms(self):
        """Encodings by tensor; cached, since a plan asks for every tensor many times."""
        if self.quantization is None:
            return {name: entry.form for name, (_, entry) in self._where.items()} | self._beside
        schemes = {
            name: self.quantization.scheme_of(name, shape)
            for name, shape in published_tensors(self.cfg).items()
            if name not in self._beside
        }
        forms = {
            name: scheme.name if scheme else self._where[name][1].dtype
            for name, scheme in schemes.items()
        }
        return forms | self._beside

    @property
    def float_dtype(self) -> str:
        """The dtype of tensors that are not quantized: the default compute dtype. Beside blocks of
        GGUF norms are float32 whatever the model was made in, so there the config tells it."""
        if self.quantization and not BLOCKS.keys().isdisjoint(self.quantization.table.encodings):
            return self.cfg.dtype or "bfloat16"
        names = (EMBEDDING.published, *(leaf.published for leaf in final_norm_leaves(self.cfg)))
        forms = [self.form_of(name) for name in (*names, *self.vectors)]
        return next(
            (form for form in forms if encoding(form).is_plain), self.cfg.dtype or "bfloat16"
        )

    def segment_of(self, tensor: str) -> Segment:
        """The bytes of a whole tensor, or of all its rows that are here."""
        _, entry = self._where[tensor]
        n_bytes = entry.n_bytes * (DECODED_BYTES if tensor in self._nested else 1)
        first_row = self._spans[tensor].first if tensor in self._spans else 0
        return self.rows_segment(tensor, first_row=first_row, n_bytes=n_bytes)

    def expected(self) -> dict[str, Expected]:
        """The expected digest of each tensor; empty for a published folder, which has none."""
        if self.manifest is None:
            return {}
        found = {
            tensor: Expected(path, listed.digests[tensor], rows_of(listed.tensors[tensor].shape))
            for name, listed in self.manifest.files.items()
            for tensor, path in ((each, os.path.join(self.folder, name)) for each in listed.tensors)
        }
        return self._left.names(found) if self._left else found

    @property
    def files(self) -> list[str]:
        """Paths of the weight files on disk, in the order of use."""
        paths = dict.fromkeys(path for path, _ in self._where.values())
        return [path for path in paths if path not in self._in_memory]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(entry.n_bytes for _, entry in self._where.values())

    @property
    def vectors(self) -> list[str]:
        """The tensors of the model that are no matrices: norms and biases."""
        shapes = published_tensors(self.cfg)
        return [
            name
            for name, shape in shapes.items()
            if not is_matrix(name, shape) and name not in self._beside
        ]

    def rows_segment(self, tensor: str, *, first_row: int, n_bytes: int) -> Segment:
        """The bytes of consecutive rows of a tensor. Raises CheckpointError where the folder has
        other rows alone."""
        file, entry = self._where[tensor]
        row_bytes = entry.n_bytes // entry.shape[0]
        if tensor in self._spans:
            first_row = self._own_row(tensor, first_row, n_bytes // row_bytes)
        before = row_bytes * first_row
        return Segment(file, entry.offset + before, n_bytes, self._nested.get(tensor), before)

    def _own_row(self, tensor, first_row, n_rows):
        span = self._spans[tensor]
        own = span.own_row(first_row, n_rows)
        if own is None:
            raise CheckpointError(
                f"{self.folder}: tensor {tensor}: holds rows {span.first} to {span.end} of "
                f"{span.whole}, expected {first_row} to {first_row + n_rows}; convert the source "
                "again, with the same jlayer on every host"
            )
        return own


def locate(
    folder: str, cfg: ModelConfig, manifest: Manifest
) -> tuple[dict[str, tuple[str, TensorEntry]], dict[str, Identity]]:
    """(tensor -> (file, entry), file -> identity); raises CheckpointError unless each header agrees
    with the manifest, and both with the config, or StorageError."""
    shapes = published_tensors(cfg)
    expected = stored_tensors(shapes, manifest.quantization)
    dtypes = piece_dtypes(shapes, manifest.quantization)
    where, identities, problems, by_config = {}, {}, [], []
    spans = manifest.spans
    weight_files = [EMBED_FILE, *map(layer_file, range(cfg.num_hidden_layers)), FINAL_FILE]
    for name in weight_files:
        if name not in manifest.files:
            by_config.append(f"{name} is not in the manifest")
            continue
        path = os.path.join(folder, name)
        identities[path] = identity_of(regular_status(path))
        header = read_header(path)
        listed = manifest.files[name]
        if header.file_bytes != listed.n_bytes:
            problems.append(
                f"{name} has {header.file_bytes} bytes, the manifest says {listed.n_bytes}"
            )
        elif header.tensors != listed.tensors:
            problems.append(f"{name} holds other tensors than the manifest says")
        where.update({tensor: (path, entry) for tensor, entry in header.tensors.items()})
    for tensor, shape in expected.items():
        if tensor not in where:
            by_config.append(f"{tensor} is missing")
        elif (found := _whole_shape(where[tensor][1], spans.get(tensor))) != shape:
            by_config.append(f"{tensor} has shape {found}, config.json says {shape}")
        elif tensor in dtypes and where[tensor][1].dtype != dtypes[tensor]:
            problems.append(
                f"{tensor} is {where[tensor][1].dtype}, by its quantization {dtypes[tensor]}"
            )
    if problems or by_config:
        is_damaged = problems or not is_side_changed(folder, CONFIG, manifest)
        advice = "convert the source again" if is_damaged else f"put back the old {CONFIG}"
        found = [*problems, *by_config]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(found[:5])}{more}; {advice}")
    return where, identities


def _whole_shape(entry: TensorEntry, span: Span | None):
    return span.whole_shape(entry.shape) if span else entry.shape
