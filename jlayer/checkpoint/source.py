"""A published folder of safetensors, checked: config, index, headers, tensors, in this order.

The converter and running in place pass the same doors, which are here; where the bytes go from here
is not known. Reads no weights, except where one tensor is stored twice and both must be equal.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jlayer.checkpoint.agree import EXTRA, check_tensors, find_misplaced, listed, settle_head
from jlayer.checkpoint.foreign import refuse_file, refuse_other_forms
from jlayer.checkpoint.layout import CONFIG, INDEX, SIDE_FILES, is_weight_file
from jlayer.checkpoint.names import names_in_use
from jlayer.checkpoint.safetensors import MAX_TENSORS, TensorEntry, read_header
from jlayer.config import model_config, quantized_by, window_of
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.spec import ModelConfig
from jlayer.strict import (
    is_relative_path,
    is_there,
    open_regular,
    parse_json_object,
    read_small_file,
    regular_status,
    resolve,
)

SINGLE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
# Files by which quantisers say what they did, where they do not say it in the config.
_QUANTIZER_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
# Weights that torch.save wrote, by the names under which they are published.
MODEL_PICKLE = re.compile(r"(pytorch_model.*\.bin|consolidated.*\.pth)")
_COMPARED_BYTES = 4 << 20

Identity = tuple[int, ...]


@dataclass(frozen=True)
class SourceFile:
    """A file of a folder as it was when it was checked: as the user knows it, and without links."""

    name: str
    path: str
    real: str
    n_bytes: int
    identity: Identity


class Stored(NamedTuple):
    """Where a copy of a tensor lies: the name that it bears there, and the file."""

    name: str
    file: SourceFile


@dataclass(frozen=True)
class Published:
    """A folder whose config, files and tensors agree: tensor -> its file and entry.

    `fingerprint` tells it from any other, without its weights having been read; `notes` is what the
    user should hear.
    """

    cfg: ModelConfig
    tensors: dict[str, tuple[SourceFile, TensorEntry]]
    fingerprint: str
    notes: tuple[str, ...]


def open_published(folder: str) -> Published:
    """The published checkpoint in `folder`, which is to be run as it is.

    Raises CheckpointError (with the command that converts it, where only that helps),
    UnsupportedModelError or StorageError.
    """
    names = names_in(folder)
    _refuse_layers(folder, names)
    refuse_quantizer_files(folder, names)
    if not {SINGLE, INDEX} & names:
        _refuse_weights(folder, names)
    notes: list[str] = []
    config_bytes, cfg = read_published_config(folder, notes)
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
    cfg = settle_head(folder, cfg, tables, notes, are_equal=_are_equal)
    label = f"{EXTRA} (jlayer convert --allow-extra leaves them out)"
    found = check_tensors(folder, cfg, tables, misplaced, notes, extra_label=label)
    side_files(folder, names)
    for copies in found.values():
        _check_equal(copies)
    tensors = {
        name: (place.file, entry) for name, copies in found.items() for place, entry in copies[:1]
    }
    return Published(cfg, tensors, _fingerprint(config_bytes, stored, files), tuple(notes))


def names_in(folder: str) -> frozenset[str]:
    """What lies in a folder. Raises CheckpointError where there is none, or StorageError."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        refuse_file(folder)
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None


def regular_file(folder: str, name: str) -> SourceFile:
    """A regular file of the folder, by way of a link only where that stays inside.

    Raises CheckpointError (missing, leading outside, not a regular file) or StorageError.
    """
    path = os.path.join(folder, name)
    status = regular_status(path)
    real, home = resolve(path), resolve(folder)
    if not any(real.startswith(root + os.sep) for root in (home, *_blobs(home))):
        raise CheckpointError(
            f"{path}: a link that leads outside the folder, to {real}; put the file itself there"
        )
    return SourceFile(name, path, real, status.st_size, identity_of(status))


def identity_of(status: os.stat_result) -> Identity:
    """What tells that a file is still the same: device, inode, size, time of the last change."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_shard_name(name: object, *, where: str) -> None:
    """Raises CheckpointError unless `name` is a plain path below the folder; opens nothing."""
    if not is_relative_path(name):
        raise CheckpointError(
            f"{where}: names the file {ascii(name)[:200]}, expected one in the folder itself "
            "(no absolute path, '..', backslash or drive letter)"
        )


def refuse_quantizer_files(folder: str, names: Iterable[str]) -> None:
    """Raises UnsupportedModelError where a file says that the weights are quantised."""
    for name, method in _QUANTIZER_FILES.items():
        if name in names:
            raise UnsupportedModelError(f"{os.path.join(folder, name)}: {quantized_by(method)}")


def read_published_config(folder: str, notes: list[str]) -> tuple[bytes, ModelConfig]:
    """config.json, as it is and as it is read. Raises CheckpointError or StorageError."""
    config = regular_file(folder, CONFIG)
    config_bytes = read_small_file(config.real)
    raw = parse_json_object(config_bytes, what=config.path)
    cfg, window = model_config(raw, where=config.path), window_of(raw, where=config.path)
    if window is not None and window == cfg.max_position_embeddings:
        notes.append(
            f"{config.path}: sets a window of {window} tokens, which no {cfg.model_type} has; it "
            f"runs up to {window} tokens, where that changes nothing (set the window to null to "
            "attend to all)"
        )
    return config_bytes, cfg


def side_files(folder: str, names: Iterable[str]) -> dict[str, SourceFile]:
    """What lies beside the weights and matters. Raises CheckpointError or StorageError."""
    found = {name: regular_file(folder, name) for name in SIDE_FILES if name in names}
    if GENERATION_CONFIG in found:
        json_of(found[GENERATION_CONFIG])
    return found


def json_of(file: SourceFile) -> dict:
    """The JSON object in a file, read strictly."""
    return parse_json_object(read_small_file(file.real), what=file.path)


def find_shards(
    folder: str, names: Iterable[str], single: str, index: str, notes: list[str]
) -> tuple[list[str], dict[str, str]]:
    """The names of the files of weights and, of an index, which tensor it says lies in which."""
    if single in names:
        if index in names:  # transformers does likewise
            notes.append(f"{folder}: has {single} and {index}; {single} is taken")
        return [single], {}
    weight_map = read_weight_map(regular_file(folder, index))
    return sorted(set(weight_map.values())), weight_map


def read_weight_map(index: SourceFile) -> dict[str, str]:
    """Tensor -> file, as an index says; every name is that of a file below the folder."""
    found = json_of(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index.path}: weight_map is not a map of tensors to files")
    if len(found) > MAX_TENSORS:
        raise CheckpointError(
            f"{index.path}: {len(found)} tensors, over the limit of {MAX_TENSORS}"
        )
    checked = set()
    for name in found.values():
        if not isinstance(name, str) or name not in checked:
            check_shard_name(name, where=index.path)
            checked.add(name)
    return found


def shard_files(folder: str, shards: list[str]) -> dict[str, SourceFile]:
    """The files of weights by name. Raises CheckpointError with all that are missing."""
    missing = [shard for shard in shards if not is_there(os.path.join(folder, shard), follow=False)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} weight files missing: {listed(missing)}; "
            "fetch them"
        )
    return {shard: regular_file(folder, shard) for shard in shards}


def read_shard(file: SourceFile) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, its header checked."""
    try:
        return read_header(file.real).tensors
    except (CheckpointError, StorageError) as error:
        # The name that the user knows, not that of a blob in some cache.
        raise type(error)(str(error).replace(file.real, file.path, 1)) from None


def _blobs(home):
    """Where the files of a hub cache lie: snapshots/REVISION/NAME links to ../../blobs/HASH, which
    may be a link itself, to a store that all models of the cache share."""
    repository, found, _ = home.rpartition(f"{os.sep}snapshots{os.sep}")
    if not found:
        return []
    cache, name = os.path.split(repository)
    shared = [os.path.join(cache, "blobs")] if name.startswith("models--") else []
    return [os.path.join(repository, "blobs"), *shared]


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
    )


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
        return os.pread(fd, length, offset)
    except OSError as error:
        raise StorageError(
            f"{file.path}: cannot be read at byte {offset} ({error.strerror})"
        ) from None
    finally:
        os.close(fd)


def _fingerprint(config_bytes, tables, files):
    """Over the config, every header, and each file's size and time of the last change.

    Of a hub cache the name of the blob, which is a hash of its content, stands for the time.
    """
    digest = hashlib.sha256(config_bytes)
    for name, table in sorted(tables.items()):
        file = files[name]
        blob = os.path.basename(file.real) if os.path.islink(file.path) else None
        digest.update(repr((name, file.n_bytes, blob or file.identity[-1])).encode())
        for tensor, (_, entry) in table.items():
            digest.update(repr((tensor, *entry)).encode())
    return digest.hexdigest()
