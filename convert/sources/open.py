"""Open and validate a source checkpoint of any published form: config, index, headers, tensors.

Reads no weights. What only they can show (NaN, copies that differ) is checked when they are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from jlayer.checkpoint.agree import (
    EXTRA,
    UNSUPPORTED_DTYPE,
    check_tensors,
    find_misplaced,
    first_few,
    gathered,
    listed,
    refused_extra,
    settle_head,
)
from jlayer.checkpoint.bitsandbytes import with_statistics
from jlayer.checkpoint.divisors import refuse_zero_divisors
from jlayer.checkpoint.encoded import as_pieces, form_of, found_encodings, misnamed, table_of
from jlayer.checkpoint.foreign import adapter_notes, refuse_adapter, refuse_other_forms
from jlayer.checkpoint.gguf import open_gguf
from jlayer.checkpoint.layout import BESIDE, CONFIG, INDEX
from jlayer.checkpoint.names import names_in_use
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.source import (
    GENERATION_CONFIG,
    MODEL_PICKLE,
    SINGLE,
    SourceFile,
    find_shards,
    json_of,
    names_in,
    quantization_said,
    read_published_config,
    read_shard,
    refuse_quantizer_files,
    regular_file,
    shard_files,
    side_files,
)
from jlayer.checkpoint.stacked import unstacked
from jlayer.config import model_config
from jlayer.convert.sources import meta, orbax
from jlayer.convert.sources.beside import encode_beside, read_beside
from jlayer.convert.sources.files import (
    FileSource,
    Place,
    Source,
    TensorInfo,
    are_same,
    rows_of,
)
from jlayer.convert.sources.joined import JoinedSource
from jlayer.convert.sources.nested import NestedSource
from jlayer.convert.sources.repacked import RepackedSource, to_repack
from jlayer.convert.sources.torchfile import read_table as read_pickle
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors
from jlayer.gguf.parts import is_gguf
from jlayer.small_files import MadeFiles
from jlayer.spec import ModelConfig
from jlayer.strict import read_small_file

_PICKLE = re.compile(r".+\.(bin|pth|pt)")
_EXTRA = f"{EXTRA} (see --allow-extra)"


@dataclass(frozen=True)
class CheckedSource:
    """A source whose config, files and tensors agree; `notes` are lines for the user.

    `side_files` holds bytes in the place of a file that the source lacks. `quantization`: what of
    the tensors is encoded as published.
    """

    folder: str
    cfg: ModelConfig
    config_bytes: bytes
    tensors: Source
    side_files: dict[str, SourceFile | bytes]
    notes: tuple[str, ...]
    quantization: Quantization | None = None


@dataclass(frozen=True)
class _Form:
    """A form of weights under published names: one file, or several that an index lists."""

    single: str
    index: str
    read: Callable[[SourceFile], dict[str, tuple[Place, TensorInfo]]]


def open_source(folder: str, *, allow_extra: bool = False) -> CheckedSource:
    """Opens the checkpoint in `folder`; checks config, index and headers, tensors, in this order.

    Of several forms it takes the first of safetensors, pytorch_model.bin, Meta's
    consolidated.NN.pth, and Orbax; `folder` may be the path of a GGUF file. An adapter beside
    them is told in a note. Raises CheckpointError, UnsupportedModelError or StorageError.
    """
    if is_gguf(folder):
        return _open_gguf(folder, allow_extra)
    names = names_in(folder)
    refuse_quantizer_files(folder, names, said=quantization_said(folder))
    checked = _open(folder, names, allow_extra)
    return replace(checked, notes=(*adapter_notes(folder, names), *checked.notes))


def _open(folder, names, allow_extra):
    published = any(name in names for form in _FORMS for name in (form.single, form.index))
    if not published and any(meta.PART.fullmatch(name) for name in names):
        return _open_meta(folder, names, allow_extra)
    checkpoint = None if published else orbax.find_checkpoint(folder, names)
    if checkpoint is not None:
        return _open_orbax(folder, names, checkpoint, allow_extra)
    if not published and CONFIG not in names:
        refuse_adapter(folder, names)
    notes: list[str] = []
    config_bytes, cfg = read_published_config(folder, notes)
    form = _find_form(folder, names, notes)
    shards, weight_map = find_shards(folder, names, form.single, form.index, notes)
    files = shard_files(folder, shards)
    stored = {shard: form.read(file) for shard, file in files.items()}
    spelling = names_in_use(cfg, stored.values(), where=folder)
    misplaced = find_misplaced(
        form.index, stored, files, weight_map, spelling, extra_allowed=allow_extra
    )
    tables = {
        shard: spelling.renamed(table, where=files[shard].path) for shard, table in stored.items()
    }
    tables = {
        shard: as_pieces(cfg, table, where=files[shard].path) for shard, table in tables.items()
    }
    misplaced += first_few(misnamed(cfg, tables.values()))
    matrices = {}
    if form_of(cfg) and form_of(cfg).is_repacked:
        tables, matrices = to_repack(cfg, tables, misplaced)
    found = with_statistics(cfg, tables, _bytes_of, where=folder)
    encodings = found.encodings or found_encodings(cfg, found.tables.values())
    refuse_zero_divisors(found.tables, encodings, _bytes_of, where=folder)
    encodings |= {name: matrix.encoding.name for name, matrix in matrices.items()}
    tables = {
        shard: unstacked(cfg, table, rows_of, encodings, where=files[shard].path)
        for shard, table in found.tables.items()
    }
    cfg = settle_head(folder, cfg, tables, notes, are_equal=_are_equal)
    label = None if allow_extra else _EXTRA
    quantization = Quantization.as_found(table_of(cfg, encodings))
    checked = check_tensors(
        folder, cfg, tables, misplaced, notes, quantization=quantization, extra_label=label
    )
    infos = {name: copies[0][1] for name, copies in checked.items()}
    places = {name: tuple(place for place, _ in copies) for name, copies in checked.items()}
    tensors = FileSource(infos, places)
    if matrices or found.nested:
        form, read = (RepackedSource, matrices) if matrices else (NestedSource, found.nested)
        tensors = form(infos, places, read)
    sides, beside = side_files(folder, names), read_beside(cfg, tables.values())
    sides |= {BESIDE: encode_beside(beside)} if beside else {}
    return CheckedSource(folder, cfg, config_bytes, tensors, sides, tuple(notes), quantization)


def _open_gguf(path, allow_extra):
    """Opens a GGUF model: what is beside the weights of other forms is made from its metadata."""
    source = open_gguf(path, allow_extra=allow_extra)
    infos = {
        name: TensorInfo(entry.dtype, entry.shape) for name, (_, entry) in source.tensors.items()
    }
    places = {
        name: (Place(name, file, entry.offset),) for name, (file, entry) in source.tensors.items()
    }
    made = MadeFiles(path).all()
    sides = {name: content for name, content in made.items() if name != CONFIG}
    tensors = FileSource(infos, places)
    return CheckedSource(
        *(path, source.cfg, made[CONFIG], tensors, sides, source.notes, source.quantization)
    )


def _open_meta(folder, names, allow_extra):
    """Opens a checkpoint in Meta's form: parts of every tensor, and params.json as the config."""
    file = regular_file(folder, meta.PARAMS)
    params = meta.read_params(json_of(file), where=file.path)
    n_parts = 1 + max(int(part[1]) for part in map(meta.PART.fullmatch, names) if part)
    files = shard_files(folder, [f"consolidated.{n:02d}.pth" for n in range(n_parts)])
    tables = {part: read_pickle(file) for part, file in files.items()}
    facts = meta.facts_of(list(tables.values()))
    config, notes = meta.derive_config(params, facts, where=file.path)
    sides = side_files(folder, names)
    if meta.TOKENIZER in sides:
        tokenizer = sides[meta.TOKENIZER]
        raw = read_small_file(tokenizer.real)
        ids = meta.special_ids(raw, vocab_size=config["vocab_size"], where=tokenizer.path)
        config |= ids
        sides.setdefault(GENERATION_CONFIG, _encoded(ids))
    else:
        notes.append(f"{folder}: no {meta.TOKENIZER}; Meta keeps it one folder up: copy it here")
    config_bytes, cfg = _encoded(config), model_config(config, where=file.path)
    if CONFIG in names:
        derived = cfg
        sides, notes = side_files(folder, names), []
        config_bytes, cfg = read_published_config(folder, notes)
        differences = meta.differences(cfg, derived)
        if differences:
            raise CheckpointError(
                f"{os.path.join(folder, CONFIG)}: does not agree with {meta.PARAMS} and the "
                f"weights beside it: {', '.join(differences)}; remove the wrong one"
            )
    if cfg.tie_word_embeddings and not facts.tied and any(meta.HEAD in t for t in tables.values()):
        cfg = replace(cfg, tie_word_embeddings=False)
        notes.append(
            f"{folder}: tie_word_embeddings is true in {CONFIG}, but {meta.HEAD} is stored apart; "
            "both are used"
        )
    tensors = _check_parts(folder, cfg, tables, allow_extra, notes)
    return CheckedSource(folder, cfg, config_bytes, tensors, sides, tuple(notes))


def _open_orbax(folder, names, checkpoint, allow_extra):
    """Opens a tree of published names that Orbax saved; config.json is there or one folder up."""
    home = folder
    if CONFIG not in names:
        home = os.path.dirname(os.path.abspath(folder))
        if CONFIG not in names_in(home):
            raise CheckpointError(
                f"{os.path.join(folder, CONFIG)}: missing, and missing one folder up; put "
                "the model's config.json there"
            )
    notes: list[str] = []
    config_bytes, cfg = read_published_config(home, notes)
    tensors = orbax.OrbaxSource(checkpoint)
    spelling = names_in_use(cfg, [checkpoint.arrays], where=folder)
    table, problems = tensors.table(cfg.num_hidden_layers, spelling)
    label = None if allow_extra else _EXTRA
    tables = {orbax.METADATA: table}
    cfg = settle_head(folder, cfg, tables, notes, are_equal=tensors.are_equal)
    tensors.take(check_tensors(folder, cfg, tables, problems, notes, extra_label=label))
    sides = side_files(home, names_in(home))
    return CheckedSource(folder, cfg, config_bytes, tensors, sides, tuple(notes))


def _encoded(config):
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _find_form(folder, names, notes):
    """The form of the weights; safetensors where there are several."""
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    forms = [form for form in _FORMS if {form.single, form.index} & names]
    if not forms:
        refuse_other_forms(folder, names)
        others = sorted(name for name in names if name.endswith(".safetensors")) + pickles
        raise CheckpointError(
            f"{folder}: no {SINGLE} and no {INDEX}, no {_BIN.single} and no consolidated.00.pth"
            f"{f', only {listed(others)}' if others else ''}"
            "; name the folder that holds a model's weights"
        )
    form = forms[0]
    if form is _SAFETENSORS and any(MODEL_PICKLE.fullmatch(name) for name in pickles):
        notes.append(f"{folder}: has safetensors and pickles; the safetensors are taken")
    if form is _BIN and any(meta.PART.fullmatch(name) for name in pickles):
        notes.append(f"{folder}: has {_BIN.single} and consolidated.*.pth; the former is taken")
    return form


def _are_equal(one, other):
    """Whether two stored tensors of one dtype and shape hold the same bytes."""
    if one[0] == other[0]:
        return True
    sources = [FileSource({"": info}, {"": (place,)}) for place, info in (one, other)]
    try:
        return are_same(*(source.chunks("") for source in sources))
    finally:
        for source in sources:
            source.close()


def _bytes_of(place, info):
    """All of a small tensor."""
    source = FileSource({"": info}, {"": (place,)})
    try:
        return b"".join(map(bytes, source.chunks("")))
    finally:
        source.close()


def _read_safetensors(file):
    return {
        name: (Place(name, file, entry.offset), TensorInfo(entry.dtype, entry.shape))
        for name, entry in read_shard(file).items()
    }


_SAFETENSORS = _Form(SINGLE, INDEX, _read_safetensors)
_BIN = _Form("pytorch_model.bin", "pytorch_model.bin.index.json", read_pickle)
_FORMS = (_SAFETENSORS, _BIN)


def _check_parts(folder, cfg, tables, allow_extra, notes):
    """The model's tensors, joined from parts; raises with everything that is wrong."""
    tied = cfg.tie_word_embeddings
    infos, parts, problems = meta.assemble(tables, published_tensors(cfg), tied=tied)
    wrong = [
        *gathered("missing", problems["missing"]),
        *gathered("shape", problems["shape"]),
        *gathered(UNSUPPORTED_DTYPE, problems["dtype"]),
        *refused_extra(folder, problems["extra"], notes, label=None if allow_extra else _EXTRA),
    ]
    if wrong:
        raise CheckpointError(f"{folder}: {'; '.join(wrong)}")
    return JoinedSource(infos, parts, head_dim=cfg.attention.head_dim)
