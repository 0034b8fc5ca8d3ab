"""What the GGUF file of a model holds: metadata, and of each tensor its type."""

from __future__ import annotations

from collections.abc import Mapping

from jlayer.config import model_config
from jlayer.convert.progress import Progress
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.transform.gguf import GgufFile, Written
from jlayer.encodings.blocks import BLOCKS
from jlayer.errors import UnsupportedModelError
from jlayer.families.registry import is_matrix, published_tensors
from jlayer.gguf.config import config_of
from jlayer.gguf.names import FACTORS
from jlayer.gguf.reader import GgufTensor, Head
from jlayer.gguf.settings import factors_of, file_name, heads_of, refuse_differences, settings_of
from jlayer.gguf.vocabulary import vocabulary_of
from jlayer.gguf.writer import NewTensor

# What a user calls a type -> its name among ours.
TYPES = {"f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
# llama.cpp's number of the type that most tensors have (LlamaFileType).
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}


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
    matrix = next(iter(tensors.values())).tensor.type  # the embedding's
    values["general.file_type"] = _FILE_TYPES[matrix]
    values |= vocabulary_of(small, vocab_size=cfg.vocab_size, where=where)
    return GgufFile(values, tensors, source.tensors, progress=progress)


def _tensors(source, kind):
    cfg, found = source.cfg, {}
    for name, shape in published_tensors(cfg).items():
        own = source.tensors.tensors[name].dtype
        kind_of = (kind or own) if is_matrix(name, shape) else "float32"
        if kind_of in BLOCKS and shape[1] % BLOCKS[kind_of].weights:
            raise UnsupportedModelError(
                f"{source.tensors.where(name)}: tensor {name} has rows of {shape[1]} numbers, "
                f"and {kind_of} needs a multiple of {BLOCKS[kind_of].weights}; choose f16 or bf16"
            )
        found[file_name(cfg, name)] = Written(NewTensor(kind_of, shape), name, heads_of(cfg, name))
    factors = factors_of(cfg)
    if factors is not None:
        found[FACTORS] = Written(NewTensor("float32", (len(factors),)), numbers=factors)
    return found


def _refuse_what_is_lost(cfg, values, tensors, where):
    """Reads the metadata back as that of a file is read, and compares."""
    infos = {
        name: GgufTensor(where, row.tensor.type, row.tensor.shape, 0, row.tensor.n_bytes)
        for name, row in tensors.items()
        if name != FACTORS  # its numbers are in a file
    }
    read = model_config(config_of(Head(where, values, infos)), where=where)
    refuse_differences(cfg, read, where=where)
