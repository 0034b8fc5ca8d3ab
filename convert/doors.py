"""From a published folder to a source that is checked: config, index, headers, tensors.

Reads no weights. What only the weights can tell (a head that should equal the embedding, numbers
that are none) is found while they are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from convert import meta
from convert.disk import is_there, resolve
from convert.joined import JoinedSource
from convert.read import FileSource, Place, Source, SourceFile, TensorInfo, identity_of
from convert.torchfile import read_table as read_pickle
from jlayer.config import ModelConfig, model_config
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.families import EMBEDDING, HEAD, is_dropped, published_tensors
from jlayer.spec import ITEM_BYTES
from jlayer.strict import parse_json_object, read_small_file, regular_status
from jlayer.weights.header import MAX_TENSORS, read_header
from jlayer.weights.layout import CONFIG, INDEX, SIDE_FILES

SINGLE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
_PICKLE = re.compile(r".+\.(bin|pth|pt)")
_MODEL_PICKLE = re.compile(r"(pytorch_model.*\.bin|consolidated.*\.pth)")
# Files by which quantisers say what they did, where they do not say it in the config.
_QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_DRIVE = re.compile(r"[A-Za-z]:")
_LISTED = 200  # names in one message


@dataclass(frozen=True)
class CheckedSource:
    """A source whose config, files and tensors agree. `notes` is what the user should hear.

    Of `side_files`, those that the source does not have are given as their bytes.
    """

    folder: str
    cfg: ModelConfig
    config_bytes: bytes
    tensors: Source
    side_files: dict[str, SourceFile | bytes]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Form:
    """Weights under their published names: in one file, or in several that an index tells."""

    single: str
    index: str
    read: Callable[[SourceFile], dict[str, tuple[Place, TensorInfo]]]


def open_source(folder: str, *, allow_extra: bool = False) -> CheckedSource:
    """The checkpoint in `folder`, checked in the order config, index and headers, tensors.

    Taken are, in this order, safetensors, pytorch_model.bin, and Meta's consolidated.NN.pth.
    Raises CheckpointError, UnsupportedModelError or StorageError.
    """
    names = names_in(folder)
    _refuse_quantizer_files(folder, names)
    published = any(name in names for form in _FORMS for name in (form.single, form.index))
    if not published and any(meta.PART.fullmatch(name) for name in names):
        return _open_meta(folder, names, allow_extra)
    notes: list[str] = []
    config_bytes, cfg = _read_config(folder)
    form, shards, weight_map = _find_shards(folder, names, notes)
    files = _shard_files(folder, shards)
    tables = {shard: form.read(file) for shard, file in files.items()}
    misplaced = _misplaced(form.index, tables, files, weight_map)
    tensors = _check_tensors(folder, cfg, tables, misplaced, allow_extra, notes)
    side_files = _side_files(folder, names)
    return CheckedSource(folder, cfg, config_bytes, tensors, side_files, tuple(notes))


def _open_meta(folder, names, allow_extra):
    """The checkpoint that Meta published: parts of every tensor, and params.json as its config."""
    file = regular_file(folder, meta.PARAMS)
    params = meta.read_params(_json_of(file), where=file.path)
    n_parts = 1 + max(int(found[1]) for found in map(meta.PART.fullmatch, names) if found)
    files = _shard_files(folder, [f"consolidated.{n:02d}.pth" for n in range(n_parts)])
    tables = {part: read_pickle(file) for part, file in files.items()}
    facts = meta.facts_of(list(tables.values()))
    config, notes = meta.derive_config(params, facts, where=file.path)
    side_files = _side_files(folder, names)
    if meta.TOKENIZER in side_files:
        tokenizer = side_files[meta.TOKENIZER]
        raw = read_small_file(tokenizer.real)
        ids = meta.special_ids(raw, vocab_size=config["vocab_size"], where=tokenizer.path)
        config |= ids
        side_files.setdefault(GENERATION_CONFIG, _encoded(ids))
    else:
        notes.append(f"{folder}: no {meta.TOKENIZER}; Meta keeps it one folder up: copy it here")
    config_bytes, cfg = _encoded(config), model_config(config, where=file.path)
    if CONFIG in names:
        derived = cfg
        config_bytes, cfg = _read_config(folder)
        side_files, notes = _side_files(folder, names), []
        differences = meta.differences(cfg, derived)
        if differences:
            raise CheckpointError(
                f"{os.path.join(folder, CONFIG)}: not of {meta.PARAMS} and the weights beside it: "
                f"{', '.join(differences)}; take the wrong one away"
            )
    tensors = _check_parts(folder, cfg, tables, facts, allow_extra, notes)
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
    status = regular_status(path)
    real, home = resolve(path), resolve(folder)
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


def _read_config(folder):
    config = regular_file(folder, CONFIG)
    config_bytes = read_small_file(config.real)
    raw = parse_json_object(config_bytes, what=config.path)
    return config_bytes, model_config(raw, where=config.path)


def _side_files(folder, names):
    found = {name: regular_file(folder, name) for name in SIDE_FILES if name in names}
    if GENERATION_CONFIG in found:
        _json_of(found[GENERATION_CONFIG])
    return found


def _encoded(config):
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


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
    """The form of the weights, their files' names and, of an index, which tensor it says lies in
    which file."""
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    found = [form for form in _FORMS if {form.single, form.index} & names]
    if not found:
        others = sorted(name for name in names if name.endswith(".safetensors")) + pickles
        raise CheckpointError(
            f"{folder}: no {SINGLE} and no {INDEX}, no {_BIN.single} and no consolidated.00.pth"
            f"{f', only {_listed(others)}' if others else ''}"
        )
    form = found[0]
    if form is _SAFETENSORS and any(_MODEL_PICKLE.fullmatch(name) for name in pickles):
        notes.append(f"{folder}: has safetensors and pickles; the safetensors are taken")
    if form is _BIN and any(meta.PART.fullmatch(name) for name in pickles):
        notes.append(f"{folder}: has {_BIN.single} and consolidated.*.pth; the former is taken")
    if form.single in names:
        if form.index in names:  # transformers does likewise
            notes.append(f"{folder}: has {form.single} and {form.index}; {form.single} is taken")
        return form, [form.single], {}
    weight_map = _weight_map(regular_file(folder, form.index))
    return form, sorted(set(weight_map.values())), weight_map


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
    missing = [shard for shard in shards if not is_there(os.path.join(folder, shard), follow=False)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} weight files missing: {_listed(missing)}; "
            "fetch them"
        )
    return {shard: regular_file(folder, shard) for shard in shards}


def _read_safetensors(file):
    try:
        header = read_header(file.real)
    except (CheckpointError, StorageError) as error:
        # The name that the user knows, not that of a blob in some cache.
        raise type(error)(str(error).replace(file.real, file.path, 1)) from None
    return {
        name: (Place(name, file, entry.offset), TensorInfo(entry.dtype, entry.shape))
        for name, entry in header.tensors.items()
    }


_SAFETENSORS = _Form(SINGLE, INDEX, _read_safetensors)
_BIN = _Form("pytorch_model.bin", "pytorch_model.bin.index.json", read_pickle)
_FORMS = (_SAFETENSORS, _BIN)


def _check_tensors(folder, cfg, tables, problems, allow_extra, notes):
    """The model's tensors with every place where each lies; raises with all that is wrong."""
    expected, found = published_tensors(cfg), {}
    for table in tables.values():
        for name, place in table.items():
            found.setdefault(name, []).append(place)
    if cfg.tie_word_embeddings and {EMBEDDING.published, HEAD.published} <= found.keys():
        # A tied head that is stored again is a copy: compared while the embedding is read.
        found[EMBEDDING.published] += found.pop(HEAD.published)
    extra = sorted(name for name in found if name not in expected and not is_dropped(cfg, name))
    problems = [
        *problems,
        *_gathered("missing", [_missing(name) for name in expected if name not in found]),
        *_gathered("shape", _misshapen(found, expected)),
        *_gathered("copies that differ", _unequal(found, expected)),
        *_gathered(_DTYPE, _of_other_dtype(found, expected)),
        *_extra(folder, extra, allow_extra, notes),
    ]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    notes += _doubled(found, expected)
    infos = {name: found[name][0][1] for name in expected}
    places = {name: tuple(place for place, _ in found[name]) for name in expected}
    return FileSource(infos, places)


def _check_parts(folder, cfg, tables, facts, allow_extra, notes):
    """The same for tensors that lie in parts."""
    tied = cfg.tie_word_embeddings
    infos, parts, problems = meta.assemble(tables, published_tensors(cfg), tied=tied)
    stored_apart = tied and not facts.tied and any(meta.HEAD in table for table in tables.values())
    listed = [
        *_gathered("missing", problems["missing"]),
        *_gathered("shape", problems["shape"]),
        *_gathered(_DTYPE, problems["dtype"]),
        *_gathered(
            f"tie_word_embeddings is true in {CONFIG}, but apart", [meta.HEAD][:stored_apart]
        ),
        *_extra(folder, problems["extra"], allow_extra, notes),
    ]
    if listed:
        raise CheckpointError(f"{folder}: {'; '.join(listed)}")
    return JoinedSource(infos, parts, head_dim=cfg.head_dim)


_DTYPE = f"dtype not supported (supported: {', '.join(ITEM_BYTES)})"


def _of_other_dtype(found, expected):
    return [
        f"{place.name} in {place.file.name} is {info.dtype}"
        for name, copies in found.items()
        for place, info in copies
        if name in expected and info.dtype not in ITEM_BYTES
    ]


def _extra(folder, extra, allow_extra, notes):
    if extra and allow_extra:
        notes.append(f"{folder}: left out, since not of this model: {_listed(extra)}")
        return []
    return _gathered("not of this model (see --allow-extra)", extra)


def _misplaced(index, tables: Mapping, files, weight_map):
    """Where the index says otherwise than the files."""
    holders = {}
    for shard, table in tables.items():
        for name in table:
            holders.setdefault(name, []).append(files[shard].name)
    wrong = []
    for name, shard in weight_map.items():
        found = holders.get(name, [])
        if files[shard].name not in found:
            where = f"in {' and '.join(found)}" if found else "nowhere"
            wrong.append(f"{name} is in {shard}, but it is {where}")
    return _gathered(f"{index} says", wrong)


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
