"""The files that a source becomes: their sizes in advance, and their bytes on demand.

Also the checks that need the weights themselves, made while the bytes are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jlayer.checkpoint.digest import TensorDigest
from jlayer.checkpoint.layout import (
    CONFIG,
    INDEX,
    encode_header,
    encode_index,
    file_of,
    order_of_tensors,
)
from jlayer.checkpoint.quantization import Quantization, piece_dtypes, stored_tensors
from jlayer.checkpoint.rows import Host, Span
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.config import OWN_QUANTIZATION
from jlayer.convert.progress import Progress
from jlayer.convert.sources.files import Chunk, Room, Source, SourceFile, file_chunks
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.transform.cast import cast, count_nonfinite
from jlayer.convert.transform.quantize import Quantizer, whole_rows
from jlayer.convert.transform.rows import host_spans, only, stored_spans
from jlayer.encodings.registry import piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.holders import text_only
from jlayer.families.registry import published_tensors

_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}


class Output(Protocol):
    """A file to write; `tensors` is empty where it holds no weights."""

    name: str
    n_bytes: int
    tensors: dict[str, TensorEntry]

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes, from the start at each call, in chunks as `Source.chunks` gives them.

        A chunk may be the memory that `room` lent last.
        """


class WeightFile:
    """A safetensors file of the target.

    `published`: the source tensors that it is made from. `tensors`: what it holds, where a
    quantized tensor is several pieces. `header`: its first bytes. `spans`: which rows of a tensor
    it holds, of those of which it does not hold all; all are read, checked and hashed, so that
    every host knows the source by the same fingerprint. After all `chunks` were read, `digests` has
    the digest of each tensor, and `nonfinite` counts, by tensor, the NaN and infinite numbers that
    `allow_nonfinite` let through.
    """

    def __init__(
        self,
        name: str,
        shapes: dict[str, tuple[int, ...]],
        source: Source,
        *,
        dtype: str | None,
        allow_nonfinite: bool,
        progress: Progress,
        quantization: Quantization | None = None,
        quantizer: Quantizer | None = None,
        spans: Mapping[str, Span] | None = None,
    ):
        kept = quantization and quantization.as_published
        in_source = stored_tensors(shapes, kept)
        self.name, self.published = name, tuple(in_source)
        self.nonfinite: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self._source, self._progress = source, progress
        self._allow_nonfinite = allow_nonfinite
        before = {tensor: source.tensors[tensor].dtype for tensor in in_source}
        self._schemes = {
            tensor: quantization.scheme_of(tensor, shape)
            for tensor, shape in shapes.items()
            if quantization and tensor in in_source and quantization.scheme_of(tensor, shape)
        }
        self._quantizer, self._matrix_spans = quantizer, dict(spans or {})
        self.spans = stored_spans(self._matrix_spans, quantization, shapes)
        self._numbers = _number_formats(shapes, kept)
        after = {tensor: dtype or own for tensor, own in before.items()}
        stored = stored_tensors(shapes, quantization)
        dtypes = after | piece_dtypes(shapes, quantization)
        held = {
            name: (self.spans[name].n, *shape[1:]) if name in self.spans else shape
            for name, shape in stored.items()
        }
        self.header, self.tensors = encode_header(held, dtypes, whole=stored)
        self._order_of_all_rows = self._read_order(order_of_tensors(stored, dtypes))
        self.n_bytes = len(self.header) + sum(entry.n_bytes for entry in self.tensors.values())
        changes = before != after or self._schemes or self.spans
        self._source_header = encode_header(in_source, before)[0] if changes else None
        self._source_digest = None
        self._later_pieces: dict[str, list[bytes]] = {}  # pieces that come later in the file

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes. Raises CheckpointError for numbers that are NaN, or are or become
        infinite."""
        self._source_digest = self._source_header and hashlib.sha256(self._source_header)
        self._later_pieces.clear()
        yield self.header
        for tensor, entry in self.tensors.items():
            span = self.spans.get(tensor)
            first_row = span.first if span and len(entry.shape) > 1 else 0
            digest = TensorDigest(entry.shape, entry.n_bytes, first_row=first_row)
            whole, _ = split_piece(tensor)
            for chunk in (
                self._piece_chunks(whole, tensor)
                if whole in self._schemes
                else self._tensor_chunks(tensor, entry.dtype, room)
                if span is None
                else self._span_chunks(tensor, entry, span)
            ):
                digest.update(chunk)
                yield chunk
            self.digests[tensor] = digest.hexdigest()
        if self._read_order(self.tensors) != self._order_of_all_rows:
            self._source_digest = self._digest_of_all_rows()

    def _read_order(self, stored):
        """The source tensors in the order in which these stored ones are made of them."""
        names = ((split_piece(name)[0], name) for name in stored)
        return list(dict.fromkeys(base if base in self._schemes else own for base, own in names))

    def _digest_of_all_rows(self):
        """The hash of the source's bytes as a file with all rows has them. Read again, for odd
        sizes alone: what it holds is aligned in another order than all rows are."""
        digest = hashlib.sha256(self._source_header)
        for tensor in self._order_of_all_rows:
            for chunk in self._source.chunks(tensor):
                digest.update(chunk)
        return digest

    @property
    def source_bytes(self) -> int:
        """The bytes that are read for it."""
        return sum(self._source.tensors[tensor].n_bytes for tensor in self.published)

    def source_sha256(self, sha256: str) -> str:
        """The SHA-256 that this file would have in the source's dtypes; `sha256` is its own.

        So a source has the same fingerprint whatever it is cast to. A second hash is computed only
        where something changes. Valid after all `chunks` were read.
        """
        return sha256 if self._source_digest is None else self._source_digest.hexdigest()

    def _span_chunks(self, tensor, entry, span):
        """The bytes of some rows of a tensor."""
        chunks, row_bytes = self._tensor_chunks(tensor, entry.dtype, None), entry.n_bytes // span.n
        views = (memoryview(chunk).cast("B") for chunk in chunks)
        return only(views, span.first * row_bytes, entry.n_bytes)

    def _piece_chunks(self, tensor, wanted):
        """The bytes of one piece of a quantized matrix.

        All pieces are computed together. The small ones that come later in the file are kept; where
        odd sizes put them first, the matrix is read twice.
        """
        if wanted in self._later_pieces:
            yield from self._later_pieces.pop(wanted)
            return
        names = list(self.tensors)
        later = [
            name
            for name in names[names.index(wanted) + 1 :]
            if split_piece(name)[0] == tensor and not name.endswith(".q")
        ]
        again = any(split_piece(name)[0] == tensor for name in names[: names.index(wanted)])
        for rows in self._finite_rows(tensor, again=again):
            try:
                made = self._quantizer.quantize(rows, self._schemes[tensor])
            except OverflowError as error:
                raise CheckpointError(f"{self._where(tensor)}: {error}; choose int8") from None
            for name in later:
                self._later_pieces.setdefault(name, []).append(_bytes(made[split_piece(name)[1]]))
            yield _bytes(made[split_piece(wanted)[1]])

    def _finite_rows(self, tensor, *, again):
        """A matrix's rows, some at a time; raises where a number is not finite.

        `again`: they were read before, and are not counted and hashed a second time.
        """
        info = self._source.tensors[tensor]

        def checked():
            for chunk in self._source.chunks(tensor):
                count = count_nonfinite(chunk, info.dtype)
                if count:
                    raise CheckpointError(
                        f"{self._where(tensor)}: NaN or infinite numbers: at least {count}, "
                        "expected 0, since they cannot be quantized; fetch the model again"
                    )
                if not again:
                    self._progress.advance(len(chunk))
                    self._source_digest.update(chunk)
                yield chunk

        span, rows = (
            self._matrix_spans.get(tensor),
            whole_rows(checked(), info.dtype, info.shape[1]),
        )
        return only(rows, span.first, span.n) if span else rows

    def _where(self, tensor):
        return f"{self._source.where(tensor)}: tensor {tensor}"

    def _tensor_chunks(self, tensor, target, room):
        dtype, before, after, n_bytes = self._source.tensors[tensor].dtype, 0, 0, 0
        numbers = self._numbers.get(tensor, dtype)
        for chunk in self._source.chunks(tensor, room if target == dtype else None):
            before += count_nonfinite(chunk, numbers, begin=n_bytes)
            n_bytes += len(chunk)
            self._progress.advance(len(chunk))
            if self._source_digest is not None:
                self._source_digest.update(chunk)
            if target != dtype:
                chunk = cast(chunk, dtype, target)
                after += count_nonfinite(chunk, target)
            yield chunk
        where = self._where(tensor)
        if after > before:
            raise CheckpointError(
                f"{where}: {dtype} numbers beyond the range of {target}: {after - before}, "
                f"expected 0; choose {_WIDER[target]}"
            )
        if before and not self._allow_nonfinite:
            raise CheckpointError(
                f"{where}: NaN or infinite numbers: {before}, expected 0; fetch the model again, "
                "or convert it as it is with --allow-nonfinite"
            )
        if before:
            self.nonfinite[tensor] = before
            self._progress.note(f"{where}: NaN or infinite numbers kept: {before}")


def _number_formats(shapes, kept):
    """What the bytes of published pieces stand for, by name, where their dtypes do not tell; `kept`
    says which tensors are encoded."""
    found = {}
    for name, shape in shapes.items() if kept else ():
        encoding = kept.scheme_of(name, shape)
        for piece in encoding.pieces(shape) if encoding else ():
            found[piece_name(name, piece)] = encoding.number_format(piece)
    return {name: numbers for name, numbers in found.items() if numbers is not None}


@dataclass(frozen=True)
class SideFile:
    """A file beside the weights: the bytes of one that is made here, or one that is copied."""

    name: str
    content: bytes | SourceFile
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.n_bytes

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        if isinstance(self.content, bytes):
            return iter([self.content])
        return file_chunks(self.content)


def files_of(source: Source, output: WeightFile) -> tuple[SourceFile, ...]:
    """The source files that an output is made from."""
    places = (place for tensor in output.published for place in source.places_of(tensor))
    return tuple(dict.fromkeys(place.file for place in places))


def weight_outputs(
    checked: CheckedSource,
    *,
    dtype: str | None,
    quantization: Quantization | None,
    quantizer: Quantizer,
    allow_nonfinite: bool,
    progress: Progress,
    host: Host | None = None,
) -> list[WeightFile]:
    """The weight files of a layered folder, in the order in which a sweep reads them; `host`: with
    the rows that this one reads, see `transform.rows`."""
    spans = host_spans(checked.cfg, quantization, host) if host else {}
    files: dict[str, dict] = {}
    for tensor, shape in published_tensors(checked.cfg).items():
        files.setdefault(file_of(tensor), {})[tensor] = shape
    return [
        WeightFile(
            name,
            shapes,
            checked.tensors,
            dtype=dtype,
            quantization=quantization,
            quantizer=quantizer,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            spans={tensor: spans[tensor] for tensor in shapes if tensor in spans},
        )
        for name, shapes in files.items()
    ]


def side_outputs(
    checked: CheckedSource,
    weights: list[WeightFile],
    *,
    dtype: str | None,
    scheme: str | None,
) -> list[Output]:
    """The files beside the weights: config, tokenizer files, and a new index."""
    return [
        SideFile(
            CONFIG,
            config_of(
                checked.config_bytes,
                dtype=dtype,
                scheme=scheme,
                is_tied=checked.cfg.tie_word_embeddings,
            ),
        ),
        *(SideFile(*item) for item in checked.side_files.items() if item[0] != CONFIG),
        SideFile(INDEX, encode_index({file.name: file.tensors for file in weights})),
    ]


def config_of(
    config_bytes: bytes, *, dtype: str | None, scheme: str | None, is_tied: bool
) -> bytes:
    """The published config with the new dtype and quantization, and without a tie that the weights
    do not have; of a multimodal model that of its text, which is all that is written. The same
    bytes where nothing changes.

    Without its quantization other programs would report the matrices as missing.
    """
    published = json.loads(config_bytes)
    config = dict(text_only(published, where=CONFIG))
    stale = [
        key
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None and str(config[key]).removeprefix("torch.") != dtype
    ]
    quantization = {"quantization_config": {**OWN_QUANTIZATION, "scheme": scheme}}
    changes = (dict.fromkeys(stale, dtype) if dtype else {}) | (quantization if scheme else {})
    if config.get("tie_word_embeddings") and not is_tied:
        changes["tie_word_embeddings"] = False
    if not changes and config == published:
        return config_bytes
    config.update(changes)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _bytes(array):
    return memoryview(np.ascontiguousarray(array).view(np.uint8)).cast("B")


def fingerprint(config_bytes: bytes, source_sha256: dict[str, str]) -> str:
    """Identifies a source, however it is sharded and whatever it is cast to.

    A SHA-256 over the config and the SHA-256 of every weight file in the source's dtypes.
    """
    lines = [f"{CONFIG} {hashlib.sha256(config_bytes).hexdigest()}"]
    lines += [f"{name} {digest}" for name, digest in sorted(source_sha256.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
