"""The on-disk format: file names, which tensor lies where, alignment, manifest, format version.

The converter and the runtime both follow these rules and define none of their own. No JAX here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from jlayer.checkpoint.quantization import Quantization, stored_tensors
from jlayer.checkpoint.rows import Host, Span
from jlayer.checkpoint.safetensors import TensorEntry, encode_tensors
from jlayer.encodings.base import WHOLE
from jlayer.encodings.grouped import Q
from jlayer.encodings.registry import piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.base import EMBEDDING
from jlayer.families.registry import layer_of, published_tensors
from jlayer.spec import PUBLISHED_DTYPE, STORED_BYTES, STORED_DTYPES, ModelConfig
from jlayer.strict import is_relative_path, parse_json_object, read_small_file

FORMAT = "jlayer"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
DIGEST = "xxh3_128_rows"  # the key of a tensor's digest: see `digest`
ROWS = "rows"  # the key of what is said of rows, where not all of them are there
SEAL = "sha256"  # the key of a sealed file's own hash, taken over its other keys
EMBED_FILE = "embed.safetensors"
FINAL_FILE = "final.safetensors"
CONFIG = "config.json"
# The files of a source that are kept beside its weights, if present: these, and files with the name
# of a template, a tokenizer or a licence (below). No other: a README is about the published files.
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What a published form of encoding has beside the weights: see `convert.sources.beside`.
BESIDE = "quantization_tensors.json"
MERGED = "merged_adapters.json"  # which adapters the weights have in them
PRUNED = "pruned_layers.json"  # which layers were left out of the model, and why these
TEMPLATES = "additional_chat_templates"  # the one folder of which files are kept
# Names that a tokenizer or processor of transformers reads, and jlayer does not.
_READ_BY_OTHERS = frozenset(
    """
    audio_tokenizer_config.json bpe.codes byte_maps.json dict.txt emoji.json entity_vocab.json
    image_processor_config.json normalizer.json preprocessor_config.json processor_config.json
    prophetnet.tokenizer sentencepiece.bpe.model sentencepiece.model source.spm spiece.model
    spm.model spm_char.model target.spm target_vocab.json tekken.json tiktoken.model vocab-src.json
    vocab-tgt.json vocab.bpe vocab.txt video_preprocessor_config.json word_pronunciation.json
    word_shape.json
    """.split()  # noqa: SIM905 - so many names are read better as a paragraph
)
# "tokenizer.4.0.0.json" is for releases of transformers from that one on.
_OF_A_VERSION = re.compile(
    r"(tokenizer|config)\.[\w.-]+\.json|tokenizer\.model\.[\w.-]+|[\w.-]+\.tiktoken", re.ASCII
)
_DOCUMENT = re.compile(
    r"(?<![a-z0-9])(licen[sc]es?|notices?|copying|copyright|patents|authors"
    r"|use[ _-]policy|terms[ _-]of[ _-](use|service))(?![a-z0-9])",
    re.IGNORECASE,
)
_DOCUMENT_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf", ".json", ".rtf")
_LAYER_FILE = re.compile(r"layer-[0-9]{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH3_128 = re.compile(r"[0-9a-f]{32}")


def layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def file_of(tensor: str) -> str:
    """The file that holds a published tensor, or a piece of it."""
    layer = layer_of(tensor)
    if layer is not None:
        return layer_file(layer)
    return EMBED_FILE if split_piece(tensor)[0] == EMBEDDING.published else FINAL_FILE


def weight_files(
    cfg: ModelConfig, quantization: Quantization | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Every weight file of a complete folder, in sweep order: name -> its tensors' shapes."""
    files = {}
    for tensor, shape in stored_tensors(published_tensors(cfg), quantization).items():
        files.setdefault(file_of(tensor), {})[tensor] = shape
    return files


def is_weight_file(name: str) -> bool:
    """Whether `name` is a name of a weight file in this format."""
    return name in (EMBED_FILE, FINAL_FILE) or _LAYER_FILE.fullmatch(name) is not None


def is_document(name: str) -> bool:
    """Whether a file has the name of a licence or notice: for people alone, no run reads it."""
    suffix = os.path.splitext(name)[1].lower()
    is_named_so = _DOCUMENT.search(name) is not None and suffix in _DOCUMENT_SUFFIXES
    return is_named_so and is_relative_path(name) and "/" not in name


def is_side_file(name: str) -> bool:
    """Whether a file of this name is kept beside the weights; "/" stands only after TEMPLATES."""
    folder, _, own = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and own.endswith(".jinja") and is_relative_path(own)
    known = (
        name in SIDE_FILES
        or name in _READ_BY_OTHERS
        or name in (BESIDE, MERGED, PRUNED)
        or is_document(name)
    )
    return known or _OF_A_VERSION.fullmatch(name) is not None


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry of one file; `tensors` is empty for a file without weights.

    `digests`: tensor -> the digest of its rows, see `digest`. `spans`: tensor -> which rows of it
    are here, of those of which not all are.
    """

    n_bytes: int
    sha256: str
    tensors: dict[str, TensorEntry]
    digests: dict[str, str]
    spans: dict[str, Span] = field(default_factory=dict)

    @property
    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> its shape with all rows."""
        shapes = {name: entry.shape for name, entry in self.tensors.items()}
        return shapes | {name: span.whole_shape(shapes[name]) for name, span in self.spans.items()}


@dataclass(frozen=True)
class Manifest:
    """The contents of a finished folder. No time, machine or run, so equal input gives equal bytes.

    `host`: whose rows alone it holds, see `checkpoint.rows`; None: all.
    """

    family: str
    source_fingerprint: str
    files: dict[str, FileEntry]
    quantization: Quantization | None = None
    host: Host | None = None

    @property
    def spans(self) -> dict[str, Span]:
        """Tensor -> which rows of it are in the folder, of those of which not all are."""
        return {name: span for file in self.files.values() for name, span in file.spans.items()}


def order_of_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    held: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """The order of tensors in a file: matrices first, largest first, then norms and biases.

    So large tensors begin aligned, and small ones are together at the end. Tensors of equal size
    are sorted by name. The pieces of a quantized matrix are neighbours, the main one first, so that
    one request reads them. If mixed dtypes would put a tensor at an offset that is no
    multiple of its element size, which no reader can view, wider dtypes come first. `held`: the
    shapes of what a file holds of them, some rows; it has the order of all rows.
    """

    def key(name):
        base, piece = split_piece(name)
        if piece == WHOLE or piece_name(base, Q) not in shapes:  # other names may end in `.scale`
            return (len(shapes[name]) < 2, -_n_bytes(shapes[name], dtypes[name]), name, "")
        return (False, -n_bytes_of[base], base, piece if piece != Q else "")

    n_bytes_of = Counter()
    for name in shapes:
        n_bytes_of[split_piece(name)[0]] += _n_bytes(shapes[name], dtypes[name])
    order, at = sorted(shapes, key=key), 0
    for name in order:
        if at % STORED_BYTES[dtypes[name]]:
            return sorted(order, key=lambda name: -STORED_BYTES[dtypes[name]])
        at += _n_bytes((held or shapes)[name], dtypes[name])
    return order


def encode_header(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    whole: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[bytes, dict[str, TensorEntry]]:
    """(the bytes of a file before its data, the entry of each tensor in the order of offsets).

    `whole`: the shapes with all rows, where a file holds only some.
    """
    order = order_of_tensors(whole or shapes, dtypes, held=shapes)
    return encode_tensors({name: (dtypes[name], shapes[name]) for name in order})


def encode_index(files: dict[str, dict[str, TensorEntry]]) -> bytes:
    """The bytes of the index by which transformers finds each tensor's file.

    `files`: file name -> its tensors.
    """
    entries = [
        (tensor, name, entry) for name, held in files.items() for tensor, entry in held.items()
    ]
    body = {
        "metadata": {"total_size": sum(entry.n_bytes for _, _, entry in entries)},
        "weight_map": {tensor: name for tensor, name, _ in entries},
    }
    return _encode_json(body)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest: sealed, with sorted keys, so equal content gives equal bytes."""
    files = {
        name: {
            "bytes": entry.n_bytes,
            "sha256": entry.sha256,
            "tensors": {
                tensor: {
                    "dtype": PUBLISHED_DTYPE[place.dtype],
                    "shape": list(place.shape),
                    "offset": place.offset,
                    DIGEST: entry.digests[tensor],
                }
                | _encode_span(entry.spans.get(tensor))
                for tensor, place in entry.tensors.items()
            },
        }
        for name, entry in manifest.files.items()
    }
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": manifest.family,
        "quantization": manifest.quantization and manifest.quantization.as_dict(),
        "source": {"fingerprint": manifest.source_fingerprint},
        "files": files,
    } | ({ROWS: manifest.host.as_dict()} if manifest.host else {})
    return seal(body)


def seal(body: dict) -> bytes:
    """`body` as canonical JSON with the SHA-256 of its content, so that any change shows."""
    assert SEAL not in body
    return _encode_json({**body, SEAL: hashlib.sha256(_encode_json(body)).hexdigest()})


def check_seal(raw: bytes, body: dict, *, what: str) -> None:
    """Raises CheckpointError unless `raw`, parsed as `body`, is the output of `seal`."""
    rest = {name: value for name, value in body.items() if name != SEAL}
    if raw != seal(rest):
        raise CheckpointError(
            f"{what}: damaged: it is not as it was written, as its own SHA-256 shows; "
            "convert the source again"
        )


def is_layered(folder: str | os.PathLike) -> bool:
    """Whether `folder` is a finished layered checkpoint. The manifest is written last."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a layered folder, with its seal and every field checked.

    Raises CheckpointError or StorageError.
    """
    path = os.path.join(folder, MANIFEST)
    content = read_small_file(path)
    raw = parse_json_object(content, what=path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {raw.get('format')!a}, expected {FORMAT!r}")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version is {version!a}, this jlayer reads {FORMAT_VERSION}; "
            "convert the source again, or install the jlayer that wrote it"
        )
    check_seal(content, raw, what=path)
    quantization = _quantization(raw.get("quantization"), path)
    try:
        files = {name: _file_entry(name, entry) for name, entry in raw["files"].items()}
        fingerprint, family = raw["source"]["fingerprint"], raw["family"]
        if not isinstance(family, str) or not _SHA256.fullmatch(fingerprint):
            raise ValueError("family or fingerprint")
        host = Host.from_dict(raw[ROWS]) if ROWS in raw else None
        if host is None and any(entry.spans for entry in files.values()):
            raise ValueError(ROWS)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); convert the source again"
        ) from None
    return Manifest(family, fingerprint, files, quantization, host)


def _quantization(found, path):
    """Parses a manifest's quantization. Raises CheckpointError with the name of an unknown
    scheme."""
    if found is None:
        return None
    try:
        return Quantization.from_dict(found)
    except (KeyError, TypeError, ValueError):
        scheme = found.get("scheme", found) if isinstance(found, dict) else found
        raise CheckpointError(
            f"{path}: quantization {scheme!a} is not known to this jlayer, or not in this form; "
            "install a newer one, or convert the source again"
        ) from None


def _file_entry(name, raw):
    """Parses one file entry of a manifest. `read_manifest` turns any ValueError, KeyError,
    TypeError or AttributeError into a CheckpointError."""
    if not (is_weight_file(name) or is_side_file(name) or name == INDEX):
        raise ValueError(f"file name {name!a}")
    n_bytes, tensors, digests, spans = raw["bytes"], {}, {}, {}
    for tensor, place in raw["tensors"].items():
        dtype, _ = STORED_DTYPES[place["dtype"]]
        shape, offset = tuple(place["shape"]), place["offset"]
        if any(type(n) is not int or n < 0 for n in (*shape, offset)):
            raise ValueError(f"shape or offset of {tensor!a}")
        if not _XXH3_128.fullmatch(place[DIGEST]):
            raise ValueError(f"{DIGEST} of {tensor!a}")
        tensors[tensor] = TensorEntry(dtype, shape, offset, _n_bytes(shape, dtype))
        digests[tensor] = place[DIGEST]
        if ROWS in place:
            spans[tensor] = _span(place[ROWS], shape)
    if type(n_bytes) is not int or n_bytes < 0 or not _SHA256.fullmatch(raw["sha256"]):
        raise ValueError(f"bytes or sha256 of {name!a}")
    return FileEntry(n_bytes, raw["sha256"], tensors, digests, spans)


def _encode_span(span):
    return {ROWS: {"first": span.first, "of": span.whole}} if span else {}


def _span(raw, shape):
    first, whole = raw["first"], raw["of"]
    if type(first) is not int or type(whole) is not int or len(raw) != 2:
        raise ValueError(ROWS)
    return Span(first, shape[0], whole)


def _n_bytes(shape, dtype):
    return math.prod(shape) * STORED_BYTES[dtype]


def _encode_json(body):
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
