"""What the GGUF file of a model holds: metadata, and of each tensor its type."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from jlayer.config import model_config, own_quantization
from jlayer.convert.progress import Progress
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.transform.gguf import GgufFile, Written
from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.grouped import Q
from jlayer.encodings.registry import piece_name
from jlayer.errors import UnsupportedModelError
from jlayer.families.layout import FROM_GGUF
from jlayer.families.registry import is_matrix, is_of_an_expert, published_tensors
from jlayer.gguf.config import config_of
from jlayer.gguf.reader import GgufTensor, Head
from jlayer.gguf.settings import (
    adds_one,
    factors_of,
    file_name,
    heads_of,
    refuse_differences,
    settings_of,
    settings_of_factors,
)
from jlayer.gguf.vocabulary import vocabulary_of
from jlayer.gguf.writer import NewTensor

# What a user calls a type -> its name among ours.
TYPES = {"f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
# llama.cpp's number of the type that most of a file is in (LlamaFileType); of types that it mixes
# with others that of its usual mix.
_FILE_TYPES = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 32,
    "gguf_mxfp4": 38,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
}


def gguf_file(
    source: CheckedSource, small: Mapping[str, bytes], *, kind: str | None, progress: Progress
) -> GgufFile:
    """The file of a model. `small`: the content of its small files by name. `kind`: of its
    matrices, a name in TYPES; None: each stays as it is stored.

    Raises CheckpointError or UnsupportedModelError.
    """
    cfg, where = source.cfg, source.folder
    values = settings_of(cfg, where=where)
    tensors = _tensors(source, TYPES[kind] if kind else None)
    _refuse_what_is_lost(cfg, values, tensors, where)
    values |= settings_of_factors(cfg)
    n_bytes = Counter()
    for row in tensors.values():
        n_bytes[row.tensor.type] += row.tensor.n_bytes
    values["general.file_type"] = _FILE_TYPES[n_bytes.most_common(1)[0][0]]
    values |= vocabulary_of(small, vocab_size=cfg.vocab_size, where=where)
    return GgufFile(values, tensors, source.tensors, progress=progress)


def _tensors(source, kind):
    cfg, where, found, of_many = source.cfg, source.folder, {}, {}
    _refuse_other_type(source, kind)
    parts: dict[str, list[Written]] = {}
    for name, shape in published_tensors(cfg).items():
        own, row = file_name(cfg, name, where=where), _written(source, name, shape, kind)
        parts.setdefault(own, []).append(row)
        found[own] = row
        if is_of_an_expert(name) or len(parts[own]) > 1:
            of_many[own] = parts[own]
    for own, rows in of_many.items():
        found[own] = _joined(own, rows, where)
    for own, numbers in factors_of(cfg).items():
        found[own] = Written(NewTensor("float32", (len(numbers),)), numbers=numbers)
    return found


def _refuse_other_type(source, kind):
    """Raises UnsupportedModelError where a type is asked for of what is in blocks already."""
    encodings = source.quantization.table.encodings if source.quantization else ()
    if kind and encodings:
        raise UnsupportedModelError(
            f"{source.folder}: its matrices are in blocks already ({', '.join(encodings)}), which "
            "are written as they are; leave out the type"
        )


def _written(source, name, shape, kind):
    """What is written of a published tensor. What was converted from GGUF stays in its type; else
    vectors, and what is used whole, become float32, as in files of llama.cpp."""
    cfg, tensors = source.cfg, source.tensors.tensors
    encoding = source.quantization and source.quantization.table.of_tensor(name)
    if encoding:
        return Written(NewTensor(encoding, shape), (piece_name(name, Q),))
    own = tensors[name].dtype
    is_from_gguf = own_quantization(json.loads(source.config_bytes)) == FROM_GGUF
    others = own if is_from_gguf else "float32"
    kind_of = (kind or own) if is_matrix(name, shape) else others
    if kind_of in BLOCKS and shape[1] % BLOCKS[kind_of].weights:
        raise UnsupportedModelError(
            f"{source.tensors.where(name)}: tensor {name} has rows of {shape[1]} numbers, and "
            f"{kind_of} needs a multiple of {BLOCKS[kind_of].weights}; choose f16 or bf16"
        )
    return Written(
        NewTensor(kind_of, shape),
        (name,),
        heads=heads_of(cfg, name),
        adds_one=adds_one(cfg, name),
    )


def _joined(own, rows, where):
    """One tensor of all experts, or of the norms of all heads. Raises UnsupportedModelError where
    they differ."""
    first, *others = (row.tensor for row in rows)
    if any(other != first for other in others):
        types = ", ".join(sorted({row.tensor.type for row in rows}))
        raise UnsupportedModelError(
            f"{where}: the experts of {own} are not alike ({types}), and a file has them in one "
            "tensor; keep the file or folder that was converted"
        )
    stored = tuple(name for row in rows for name in row.stored)
    return Written(NewTensor(first.type, (len(rows), *first.shape)), stored)


def _refuse_what_is_lost(cfg, values, tensors, where):
    """Reads the metadata back as that of a file is read, and compares."""
    infos = {
        name: GgufTensor(where, row.tensor.type, row.tensor.shape, 0, row.tensor.n_bytes)
        for name, row in tensors.items()
        if not row.numbers  # they are read from a file
    }
    read = model_config(config_of(Head(where, values, infos)), where=where)
    refuse_differences(cfg, read, where=where)
