"""The files that a source becomes: sizes before anything is written, and bytes on demand.

The checks that need the weights themselves happen here, while the bytes go by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from convert.progress import Progress
from convert.sources.files import Chunk, Room, Source, SourceFile, file_chunks
from convert.sources.open import CheckedSource
from convert.transform.cast import cast, count_nonfinite
from convert.transform.quantize import Quantizer, whole_rows
from jlayer.checkpoint.digest import TensorDigest
from jlayer.checkpoint.layout import CONFIG, INDEX, encode_header, encode_index, file_of
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.config import OWN_QUANTIZATION
from jlayer.encodings.quantization import Quantization, piece_dtypes, split_piece, stored_tensors
from jlayer.errors import CheckpointError
from jlayer.families.llama import published_tensors

_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}


class Output(Protocol):
    """One file to be. `tensors` is empty for what is not weights."""

    name: str
    n_bytes: int
    tensors: dict[str, TensorEntry]

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes, from the start each time, each chunk valid until the next but one.

        A chunk may be what `room` has lent last, filled.
        """


class WeightFile:
    """A file of weights. Once its chunks are through, `digests` has each tensor's, and `nonfinite`
    counts, by tensor, what `allow_nonfinite` has let through. `published` names what it is made of,
    `tensors` what it holds: the same, but for the pieces of what is quantised; `header` are the
    file's first bytes."""

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
    ):
        self.name, self.published = name, tuple(shapes)
        self.nonfinite: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self._source, self._progress = source, progress
        self._allow_nonfinite = allow_nonfinite
        before = {tensor: source.tensors[tensor].dtype for tensor in shapes}
        self._schemes = {
            tensor: quantization.scheme_of(tensor, shape)
            for tensor, shape in shapes.items()
            if quantization and quantization.scheme_of(tensor, shape)
        }
        self._quantizer = quantizer
        after = {tensor: dtype or own for tensor, own in before.items()}
        self.header, self.tensors = encode_header(
            stored_tensors(shapes, quantization), after | piece_dtypes(shapes, quantization)
        )
        self.n_bytes = len(self.header) + sum(entry.n_bytes for entry in self.tensors.values())
        changes = before != after or self._schemes
        self._source_header = encode_header(shapes, before)[0] if changes else None
        self._source_digest = None
        self._waiting: dict[str, list[bytes]] = {}  # pieces that were made before their turn

    def chunks(self, room: Room | None = None) -> Iterator[Chunk]:
        """The file's bytes. Raises CheckpointError for numbers that are or become infinite."""
        self._source_digest = self._source_header and hashlib.sha256(self._source_header)
        self._waiting.clear()
        yield self.header
        for tensor, entry in self.tensors.items():
            digest = TensorDigest(entry.shape, entry.n_bytes)
            whole, piece = split_piece(tensor)
            for chunk in (
                self._tensor_chunks(tensor, entry.dtype, room)
                if piece is None
                else self._piece_chunks(whole, tensor)
            ):
                digest.update(chunk)
                yield chunk
            self.digests[tensor] = digest.hexdigest()

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        return sum(self._source.tensors[tensor].n_bytes for tensor in self.published)

    def source_sha256(self, sha256: str) -> str:
        """The digest that this file, which has `sha256`, would have without change of dtype.

        So a source is known by the same digests whatever it was cast to, at the price of a second
        hash only where it was cast. To be asked once `chunks` are all through.
        """
        return sha256 if self._source_digest is None else self._source_digest.hexdigest()

    def _piece_chunks(self, tensor, wanted):
        """A piece of a quantised matrix. The pieces are made together; those that come later in the
        file wait, being small. (Where odd sizes put them first, the matrix is gone through twice.)
        """
        if wanted in self._waiting:
            yield from self._waiting.pop(wanted)
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
                self._waiting.setdefault(name, []).append(_bytes(made[split_piece(name)[1]]))
            yield _bytes(made[split_piece(wanted)[1]])

    def _finite_rows(self, tensor, *, again):
        """A matrix's numbers, some whole rows at a time. `again`: they were gone through before."""
        info = self._source.tensors[tensor]

        def checked():
            for chunk in self._source.chunks(tensor):
                count = count_nonfinite(chunk, info.dtype)
                if count:
                    raise CheckpointError(
                        f"{self._where(tensor)}: NaN or infinite numbers: at least {count}, "
                        "expected 0, since they cannot be quantised; fetch the model again"
                    )
                if not again:
                    self._progress.advance(len(chunk))
                    self._source_digest.update(chunk)
                yield chunk

        return whole_rows(checked(), info.dtype, info.shape[1])

    def _where(self, tensor):
        return f"{self._source.where(tensor)}: tensor {tensor}"

    def _tensor_chunks(self, tensor, target, room):
        dtype, before, after = self._source.tensors[tensor].dtype, 0, 0
        for chunk in self._source.chunks(tensor, room if target == dtype else None):
            before += count_nonfinite(chunk, dtype)
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
    """The source's files that an output is made of."""
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
) -> list[WeightFile]:
    """The weight files of a layered folder, in sweep order."""
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
    """What lies beside the weights: config, tokenizer files, and the index, made anew."""
    return [
        SideFile(CONFIG, config_of(checked.config_bytes, dtype=dtype, scheme=scheme)),
        *(SideFile(*item) for item in checked.side_files.items() if item[0] != CONFIG),
        SideFile(INDEX, encode_index({file.name: file.tensors for file in weights})),
    ]


def config_of(config_bytes: bytes, *, dtype: str | None, scheme: str | None) -> bytes:
    """The published config with its dtype changed, or its quantisation said, and nothing else; as
    it is where that fits.

    Without a word of it other programs would take the matrices for missing.
    """
    config = json.loads(config_bytes)
    stale = [
        key
        for key in ("dtype", "torch_dtype")
        if config.get(key) is not None and str(config[key]).removeprefix("torch.") != dtype
    ]
    said = {"quantization_config": {**OWN_QUANTIZATION, "scheme": scheme}}
    changes = (dict.fromkeys(stale, dtype) if dtype else {}) | (said if scheme else {})
    if not changes:
        return config_bytes
    config.update(changes)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _bytes(array):
    return memoryview(np.ascontiguousarray(array).view(np.uint8)).cast("B")


def fingerprint(config_bytes: bytes, source_sha256: dict[str, str]) -> str:
    """What tells one source from another, however it was sharded and whatever it is cast to.

    Over the config's bytes and the digest of every weight file in its source's dtype.
    """
    lines = [f"{CONFIG} {hashlib.sha256(config_bytes).hexdigest()}"]
    lines += [f"{name} {digest}" for name, digest in sorted(source_sha256.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
