"""From a published folder to a source that is checked: config, index, headers, tensors.

Reads no weights. What only the weights can tell (a head that should equal the embedding, numbers
that are none) is found while they are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from convert.read import Place, SafetensorsSource, SourceFile, TensorInfo, identity_of
from jlayer.config import ModelConfig, model_config
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.families import EMBEDDING, HEAD, is_dropped, published_tensors
from jlayer.strict import parse_json_object, read_small_file, regular_status
from jlayer.weights.header import MAX_TENSORS, Header, read_header
from jlayer.weights.layout import CONFIG, INDEX, SIDE_FILES

SINGLE = "model.safetensors"
_PICKLE = re.compile(r".+\.(bin|pth|pt)")
_MODEL_PICKLE = re.compile(r"(pytorch_model.*\.bin|consolidated.*\.pth)")
# Files by which quantisers say what they did, where they do not say it in the config.
_QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_DRIVE = re.compile(r"[A-Za-z]:")
_LISTED = 200  # names in one message


@dataclass(frozen=True)
class CheckedSource:
    """A source whose config, files and tensors agree. `notes` is what the user should hear."""

    folder: str
    cfg: ModelConfig
    config_bytes: bytes
    tensors: SafetensorsSource
    side_files: dict[str, SourceFile]
    notes: tuple[str, ...]


def open_source(folder: str, *, allow_extra: bool = False) -> CheckedSource:
    """The checkpoint in `folder`, checked in the order config, index and headers, tensors.

    Raises CheckpointError, UnsupportedModelError or StorageError.
    """
    notes: list[str] = []
    names = names_in(folder)
    config = regular_file(folder, CONFIG)
    config_bytes = read_small_file(config.real)
    raw = parse_json_object(config_bytes, what=config.path)
    cfg = model_config(raw, where=config.path)
    _refuse_quantizer_files(folder, names)
    shards, weight_map = _find_shards(folder, names, notes)
    files = _shard_files(folder, shards)
    headers = {shard: _header(file) for shard, file in files.items()}
    tensors = _check_tensors(folder, cfg, files, headers, weight_map, allow_extra, notes)
    side_files = {name: regular_file(folder, name) for name in SIDE_FILES if name in names}
    if "generation_config.json" in side_files:
        _json_of(side_files["generation_config.json"])
    return CheckedSource(folder, cfg, config_bytes, tensors, side_files, tuple(notes))


def names_in(folder: str) -> frozenset[str]:
    """What lies in a folder. Raises CheckpointError where there is none, or StorageError."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None


def regular_file(folder: str, name: str) -> SourceFile:
    """A regular file of the folder, by way of a link only where that stays inside.

    Raises CheckpointError (missing, leading outside, not a regular file) or StorageError.
    """
    path = os.path.join(folder, name)
    real = os.path.realpath(path)
    home = os.path.realpath(folder)
    status = regular_status(path)
    if not any(real.startswith(root + os.sep) for root in (home, *_blobs(home))):
        raise CheckpointError(
            f"{path}: a link that leads outside the folder, to {real}; put the file itself there"
        )
    return SourceFile(name, path, real, status.st_size, identity_of(status))


def check_shard_name(name: object, *, where: str) -> None:
    """Raises CheckpointError unless `name` is a plain path below the folder; opens nothing."""
    printable = isinstance(name, str) and name.isprintable()  # no NUL, no lone surrogate
    parts = name.split("/") if printable else [""]
    plain = all(part not in ("", ".", "..") and len(os.fsencode(part)) <= 255 for part in parts)
    if not plain or "\\" in name or _DRIVE.match(name):
        raise CheckpointError(
            f"{where}: names the file {ascii(name)[:200]}, expected one in the folder itself "
            "(no absolute path, '..', backslash or drive letter)"
        )


def _json_of(file):
    return parse_json_object(read_small_file(file.real), what=file.path)


def _blobs(home):
    """Where the files of a hub cache lie: snapshots/REVISION/NAME links to ../../blobs/HASH."""
    before, found, _ = home.rpartition(f"{os.sep}snapshots{os.sep}")
    return [os.path.join(before, "blobs")] if found else []


def _refuse_quantizer_files(folder, names):
    for name, method in _QUANTIZER_FILES.items():
        if name in names:
            raise UnsupportedModelError(
                f"{os.path.join(folder, name)}: weights quantised by {method} are not supported; "
                "take the model's unquantised checkpoint"
            )


def _find_shards(folder, names, notes):
    """The weight files' names and, of an index, which tensor it says lies in which file."""
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    if SINGLE not in names and INDEX not in names:
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickles ({_listed(pickles)}), which are not read yet; "
                "take the model's safetensors"
            )
        others = _listed(sorted(name for name in names if name.endswith(".safetensors")))
        raise CheckpointError(
            f"{folder}: no {SINGLE} and no {INDEX}{f', only {others}' if others else ''}"
        )
    if any(_MODEL_PICKLE.fullmatch(name) for name in pickles):
        notes.append(f"{folder}: has safetensors and pickles; the safetensors are taken")
    if SINGLE in names:
        if INDEX in names:  # transformers does likewise
            notes.append(f"{folder}: has {SINGLE} and {INDEX}; {SINGLE} is taken")
        return [SINGLE], {}
    weight_map = _weight_map(regular_file(folder, INDEX))
    return sorted(set(weight_map.values())), weight_map


def _weight_map(index):
    found = _json_of(index).get("weight_map")
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


def _shard_files(folder, shards):
    missing = [shard for shard in shards if not os.path.lexists(os.path.join(folder, shard))]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} weight files missing: {_listed(missing)}; "
            "fetch them"
        )
    return {shard: regular_file(folder, shard) for shard in shards}


def _header(file) -> Header:
    try:
        return read_header(file.real)
    except (CheckpointError, StorageError) as error:
        # The name that the user knows, not that of a blob in some cache.
        raise type(error)(str(error).replace(file.real, file.path, 1)) from None


def _check_tensors(folder, cfg, files, headers, weight_map, allow_extra, notes):
    """The model's tensors with every place where each lies; raises with all that is wrong."""
    expected, found = published_tensors(cfg), _locate(files, headers)
    problems = _misplaced(found, files, weight_map)
    if cfg.tie_word_embeddings and {EMBEDDING.published, HEAD.published} <= found.keys():
        # A tied head that is stored again is a copy: compared while the embedding is read.
        found[EMBEDDING.published] += found.pop(HEAD.published)
    extra = sorted(name for name in found if name not in expected and not is_dropped(cfg, name))
    if extra and allow_extra:
        notes.append(f"{folder}: left out, since not of this model: {_listed(extra)}")
    problems += [
        *_gathered("missing", [_missing(name) for name in expected if name not in found]),
        *_gathered("shape", _misshapen(found, expected)),
        *_gathered("copies that differ", _unequal(found, expected)),
        *_gathered("not of this model (see --allow-extra)", [] if allow_extra else extra),
    ]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    notes += _doubled(found, expected)
    infos = {name: found[name][0][1] for name in expected}
    places = {name: tuple(place for place, _ in found[name]) for name in expected}
    return SafetensorsSource(infos, places)


def _locate(files, headers) -> dict[str, list[tuple[Place, TensorInfo]]]:
    found = {}
    for shard, header in headers.items():
        for name, entry in header.tensors.items():
            place = Place(name, files[shard], entry.offset)
            found.setdefault(name, []).append((place, TensorInfo(entry.dtype, entry.shape)))
    return found


def _misplaced(found, files, weight_map):
    wrong = []
    for name, shard in weight_map.items():
        holders = [place.file.name for place, _ in found.get(name, ())]
        if files[shard].name not in holders:
            where = f"in {' and '.join(holders)}" if holders else "nowhere"
            wrong.append(f"{name} is in {shard}, but it is {where}")
    return _gathered(f"{INDEX} says", wrong)


def _missing(name):
    return f"{name} (tie_word_embeddings is false)" if name == HEAD.published else name


def _misshapen(found, expected):
    return [
        f"{place.name} in {place.file.name} is {list(info.shape)}, by config.json {list(shape)}"
        for name, shape in expected.items()
        for place, info in found.get(name, ())
        if info.shape != shape
    ]


def _unequal(found, expected):
    """Copies that cannot be equal, since not even their dtypes are."""
    return [
        " and ".join(f"{place.name} in {place.file.name} ({info.dtype})" for place, info in copies)
        for name, copies in found.items()
        if name in expected and len({info.dtype for _, info in copies}) > 1
    ]


def _doubled(found, expected):
    for name, copies in found.items():
        paths = [place.file.path for place, _ in copies if place.name == name]
        if name in expected and len(paths) > 1:
            yield f"tensor {name} lies in {' and in '.join(paths)}; taken once if they are equal"


def _gathered(label, names):
    return [f"{label}: {_listed(names)}"] if names else []


def _listed(names: Iterable[str]):
    names = [_quoted(name) for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _quoted(name):
    return name if name.isprintable() else ascii(name)
