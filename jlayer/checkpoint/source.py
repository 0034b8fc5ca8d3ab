"""Opens and checks a published folder of safetensors: config, index, headers, tensors.

The converter and running in place share these checks. No weights are read, except to compare two
copies of one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jlayer.checkpoint.agree import (
    EXTRA,
    check_tensors,
    find_misplaced,
    first_few,
    listed,
    settle_head,
)
from jlayer.checkpoint.divisors import refuse_zero_divisors
from jlayer.checkpoint.encoded import as_pieces, found_encodings, is_repacked, misnamed, table_of
from jlayer.checkpoint.foreign import adapter_notes, refuse_file, refuse_other_forms
from jlayer.checkpoint.layout import CONFIG, INDEX, is_weight_file
from jlayer.checkpoint.links import real_path
from jlayer.checkpoint.names import names_in_use
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.safetensors import (
    MAX_TENSORS,
    InputsFirstEntry,
    TensorEntry,
    read_header,
)
from jlayer.checkpoint.sides import side_names
from jlayer.checkpoint.stacked import unstacked
from jlayer.config import config_notes, model_config, quantization_named, quantized_by
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.spec import ModelConfig
from jlayer.strict import (
    close,
    is_relative_path,
    is_there,
    open_regular,
    parse_json_object,
    read_small_file,
    regular_status,
)

if TYPE_CHECKING:
    from jlayer.checkpoint.nested import Nested

SINGLE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
# Files that quantizers write instead of an entry in the config.
_QUANTIZER_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
# Whose file lies beside the weights of other methods too: GPTQModel quantizes to AWQ as well.
_ALSO_WRITES = {"gptq": ("awq",)}
# Published names of weights written by torch.save.
MODEL_PICKLE = re.compile(r"(pytorch_model.*\.bin|consolidated.*\.pth)")
_COMPARED_BYTES = 4 << 20

Identity = tuple[int, ...]


@dataclass(frozen=True)
class SourceFile:
    """A file of a folder when it was checked: its `path` for messages, `real` without links."""

    name: str
    path: str
    real: str
    n_bytes: int
    identity: Identity


class Stored(NamedTuple):
    """The place of a copy of a tensor: its name there, and the file."""

    name: str
    file: SourceFile


@dataclass(frozen=True)
class Published:
    """A folder whose config, files and tensors agree; `quantization`: what of it is encoded.

    `fingerprint` distinguishes it from any other folder, without reading weights. `notes`: for the
    user. `nested`: what the codes of some scales stand for, by the name of the piece.
    """

    cfg: ModelConfig
    quantization: Quantization | None
    tensors: dict[str, tuple[SourceFile, TensorEntry]]
    fingerprint: str
    notes: tuple[str, ...]
    nested: dict[str, Nested] = field(default_factory=dict)


def open_published(folder: str) -> Published:
    """Opens the published checkpoint in `folder`, to run it without converting.

    Raises CheckpointError (with the convert command, if only that helps), UnsupportedModelError or
    StorageError.
    """
    names = names_in(folder)
    _refuse_layers(folder, names)
    refuse_quantizer_files(folder, names, said=quantization_said(folder))
    if not {SINGLE, INDEX} & names:
        _refuse_weights(folder, names)
    notes = adapter_notes(folder, names)
    config_bytes, cfg = read_published_config(folder, notes)
    if is_repacked(cfg):
        raise CheckpointError(repacked_first(folder, cfg.quantized.method))
    shards, weight_map = find_shards(folder, names, SINGLE, INDEX, notes)
    files = shard_files(folder, shards)
    stored = {
        shard: {name: (Stored(name, file), entry) for name, entry in read_shard(file).items()}
        for shard, file in files.items()
    }
    spelling = names_in_use(cfg, stored.values(), where=folder)
    misplaced = find_misplaced(INDEX, stored, files, weight_map, spelling)
    tables = {
        shard: spelling.renamed(table, where=files[shard].path) for shard, table in stored.items()
    }
    tables = {
        shard: as_pieces(cfg, table, where=files[shard].path) for shard, table in tables.items()
    }
    misplaced += first_few(misnamed(cfg, tables.values()))
    from jlayer.checkpoint.bitsandbytes import with_statistics  # numpy: not for a command's help

    with _reading() as read:
        found = with_statistics(cfg, tables, read, where=folder)
        encodings = found.encodings or found_encodings(cfg, found.tables.values())
        refuse_zero_divisors(found.tables, encodings, read, where=folder)
    tables = {
        shard: unstacked(cfg, table, rows_of, encodings, where=files[shard].path)
        for shard, table in found.tables.items()
    }
    cfg = settle_head(folder, cfg, tables, notes, are_equal=_are_equal)
    label = f"{EXTRA} (jlayer convert --allow-extra leaves them out)"
    quantization = Quantization.as_found(table_of(cfg, encodings))
    copies_of = check_tensors(
        folder, cfg, tables, misplaced, notes, quantization=quantization, extra_label=label
    )
    side_files(folder, names)
    tensors = {}
    for name, copies in copies_of.items():
        _check_equal(copies)
        place, entry = copies[0]
        tensors[name] = (place.file, entry)
    fingerprint = _fingerprint(config_bytes, stored, files)
    return Published(cfg, quantization, tensors, fingerprint, tuple(notes), found.nested)


def names_in(folder: str) -> frozenset[str]:
    """The names in a folder. Raises CheckpointError if there is no folder, or StorageError."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        refuse_file(folder)
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None


def regular_file(folder: str, name: str) -> SourceFile:
    """A regular file of the folder; a link is followed only if it stays inside or is allowed.

    A hub cache's own blobs count as inside. Raises CheckpointError (missing, a link that leads
    outside, not a regular file) or StorageError.
    """
    path = os.path.join(folder, name)
    status = regular_status(path)
    real = real_path(folder, path)
    return SourceFile(name, path, real, status.st_size, identity_of(status))


def identity_of(status: os.stat_result) -> Identity:
    """The values that change if a file changes: device, inode, size, time of the last change."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_shard_name(name: object, *, where: str) -> None:
    """Raises CheckpointError unless `name` is a relative path below the folder. Opens nothing."""
    if not is_relative_path(name):
        raise CheckpointError(
            f"{where}: names the file {ascii(name)[:200]}, expected one in the folder itself "
            "(no absolute path, '..', backslash or drive letter)"
        )


def quantizer_in(names: Iterable[str]) -> str | None:
    """The quantizer that one of the names belongs to; None where there is none."""
    return next((_QUANTIZER_FILES[name] for name in names if name in _QUANTIZER_FILES), None)


def refuse_quantizer_files(folder: str, names: Iterable[str], *, said: str | None = None) -> None:
    """Raises UnsupportedModelError if one of the names belongs to a quantizer. `said`: the method
    that config.json names, whose file may be there: it says the same again."""
    for name, method in _QUANTIZER_FILES.items():
        if name in names and said not in (method, *_ALSO_WRITES.get(method, ())):
            raise UnsupportedModelError(f"{os.path.join(folder, name)}: {quantized_by(method)}")


def quantization_said(folder: str) -> str | None:
    """How the config.json of a folder says that its weights are quantized; None where it does not,
    or cannot be read: what is wrong is told later."""
    try:
        return quantization_named(json_of(regular_file(folder, CONFIG)))
    except (CheckpointError, StorageError):
        return None


def repacked_first(ref: str, method: str) -> str:
    """What to tell of weights that run only after they are converted."""
    name = os.path.basename(os.path.normpath(ref))
    return (
        f"{ref}: weights quantized by {method} run once they are repacked; run: jlayer convert "
        f"{ref} {name}-jlayer"
    )


def read_published_config(folder: str, notes: list[str]) -> tuple[bytes, ModelConfig]:
    """(bytes of config.json, the ModelConfig in it). Raises CheckpointError or StorageError."""
    config = regular_file(folder, CONFIG)
    config_bytes = read_small_file(config.real)
    raw = parse_json_object(config_bytes, what=config.path)
    cfg = model_config(raw, where=config.path)
    notes += config_notes(raw, cfg, where=config.path)
    return config_bytes, cfg


def side_files(folder: str, names: Iterable[str]) -> dict[str, SourceFile]:
    """The side files that are present, checked. Raises CheckpointError or StorageError."""
    files = {name: regular_file(folder, name) for name in side_names(folder, names)}
    if GENERATION_CONFIG in files:
        json_of(files[GENERATION_CONFIG])
    return files


def json_of(file: SourceFile) -> dict:
    """The JSON object in a file, read strictly."""
    return parse_json_object(read_small_file(file.real), what=file.path)


def find_shards(
    folder: str, names: Iterable[str], single: str, index: str, notes: list[str]
) -> tuple[list[str], dict[str, str]]:
    """(names of the weight files, tensor -> file by the index; empty without an index)."""
    if single in names:
        if index in names:  # transformers also takes the single file
            notes.append(f"{folder}: has {single} and {index}; {single} is taken")
        return [single], {}
    weight_map = read_weight_map(regular_file(folder, index))
    return sorted(set(weight_map.values())), weight_map


def read_weight_map(index: SourceFile) -> dict[str, str]:
    """Tensor -> file, as an index has it; every file name is checked to stay below the folder."""
    weight_map = json_of(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.path}: weight_map is not a map of tensors to files")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{index.path}: {len(weight_map)} tensors, over the limit of {MAX_TENSORS}"
        )
    checked = set()
    for name in weight_map.values():
        if not isinstance(name, str) or name not in checked:
            check_shard_name(name, where=index.path)
            checked.add(name)
    return weight_map


def shard_files(folder: str, shards: list[str]) -> dict[str, SourceFile]:
    """The weight files by name. Raises CheckpointError with a list of those missing."""
    missing = [shard for shard in shards if not is_there(os.path.join(folder, shard), follow=False)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} weight files missing: {listed(missing)}; "
            "fetch them"
        )
    return {shard: regular_file(folder, shard) for shard in shards}


def read_shard(file: SourceFile) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by its checked header."""
    try:
        return read_header(file.real).tensors
    except (CheckpointError, StorageError) as error:
        # Show the path that the user gave, not that of a blob in a cache.
        raise type(error)(str(error).replace(file.real, file.path, 1)) from None


def _refuse_layers(folder, names):
    if any(is_weight_file(name) for name in names):
        raise CheckpointError(
            f"{folder}: layers without their manifest.json: not converted, or not to the end; "
            "run its conversion again, which resumes it"
        )


def _refuse_weights(folder, names):
    pickles = sorted(name for name in names if MODEL_PICKLE.fullmatch(name))
    if pickles:
        raise CheckpointError(
            f"{folder}: its weights are pickles ({listed(pickles)}), and only safetensors run in "
            f"place; run: jlayer convert {folder} {os.path.normpath(folder)}-jlayer"
        )
    if "_METADATA" in names:
        raise CheckpointError(
            f"{folder}: an Orbax checkpoint, and only safetensors run in place; run: jlayer "
            f"convert {folder} {os.path.normpath(folder)}-jlayer"
        )
    refuse_other_forms(folder, names)
    others = sorted(name for name in names if name.endswith(".safetensors"))
    raise CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}{f', only {listed(others)}' if others else ''}"
        "; name the folder that holds a model's weights"
    )


def rows_of(
    place: Stored, entry: TensorEntry, first: int, n: int, *, inputs_first: bool
) -> tuple[Stored, TensorEntry]:
    """`n` rows from `first` on, of a tensor [experts, rows, ...]; what a row has is on one axis.
    `inputs_first`: all rows of an expert, of one [experts, columns, rows]."""
    n_experts, *of_expert = entry.shape
    n_rows, *columns = of_expert[::-1] if inputs_first else of_expert
    row_bytes = entry.n_bytes // (n_experts * n_rows)
    shape = (n, math.prod(columns)) if columns else (n,)
    form = InputsFirstEntry if inputs_first else TensorEntry
    return place, form(entry.dtype, shape, entry.offset + first * row_bytes, n * row_bytes)


def refuse_different(copy: Stored, taken: Stored) -> None:
    """Raises CheckpointError: two copies of one tensor are not the same bytes."""
    raise CheckpointError(
        f"{copy.file.path}: tensor {copy.name} differs from {taken.name} in {taken.file.path}, "
        "expected the same bytes, since one of them is to be left out; fetch the model again"
    )


def _check_equal(copies):
    taken, *others = copies
    for other in others:
        if not _are_equal(taken, other):
            refuse_different(other[0], taken[0])


def _are_equal(one, other):
    """Whether two copies of one dtype and shape are the same bytes."""
    (place, entry), (there, again) = one, other
    for at in range(0, entry.n_bytes, _COMPARED_BYTES):
        length = min(_COMPARED_BYTES, entry.n_bytes - at)
        first = _bytes_at(place.file, entry.offset + at, length)
        if first != _bytes_at(there.file, again.offset + at, length):
            return False
    return True


def _bytes_at(file, offset, length):
    fd = open_regular(file.real)
    try:
        return _read_at(fd, file, offset, length)
    finally:
        os.close(fd)


def _read_at(fd, file, offset, length):
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise StorageError(
            f"{file.path}: cannot be read at byte {offset} ({error.strerror})"
        ) from None


@contextlib.contextmanager
def _reading():
    """A function of (place, entry) -> the bytes of a small tensor; a file stays open meanwhile."""
    with contextlib.ExitStack() as stack:
        fds = {}

        def read(place, entry):
            file = place.file
            if file.real not in fds:
                fds[file.real] = open_regular(file.real)
                stack.callback(close, fds[file.real])
            found = _read_at(fds[file.real], file, entry.offset, entry.n_bytes)
            if len(found) != entry.n_bytes:
                raise CheckpointError(
                    f"{file.path}: ends before byte {entry.offset + entry.n_bytes}; it was cut off"
                )
            return found

        yield read


def _fingerprint(config_bytes, tables, files):
    """A hash over the config, every header, and each file's size and time of the last change.

    In a hub cache the blob's name, a hash of its content, replaces the time.
    """
    digest = hashlib.sha256(config_bytes)
    for name, table in sorted(tables.items()):
        file = files[name]
        blob = os.path.basename(file.real) if os.path.islink(file.path) else None
        digest.update(repr((name, file.n_bytes, blob or file.identity[-1])).encode())
        for tensor, (_, entry) in table.items():
            digest.update(repr((tensor, *entry)).encode())
    return digest.hexdigest()
