"""A model's GGUF files: one, or the parts that llama.cpp's splitter has made of one.

The parts are named X-00001-of-00003.gguf. The first has the metadata, and each says which it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace

from jlayer.errors import CheckpointError, StorageError
from jlayer.gguf.reader import MAX_TENSORS, Head, read_head, short

SUFFIX = ".gguf"
MAX_PARTS = 1000
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
# Files that lie beside a model and hold another part than the text's, or no model.
_SIBLING = re.compile(r"(.*[-_.])?(mmproj|imatrix|vocab-only)([-_.].*)?\.gguf", re.IGNORECASE)
# Other weights, which go before GGUF files in a folder.
_WEIGHTS = re.compile(r".+\.(safetensors|bin|pth|pt)|manifest\.json|_METADATA")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def is_gguf(ref: str | os.PathLike) -> bool:
    """Whether `ref` is the path of a GGUF file, by its name."""
    return os.fspath(ref).lower().endswith(SUFFIX) and os.path.isfile(ref)


def models_in(names: Collection[str]) -> list[str]:
    """Of names, or of paths, those of GGUF models: of a split one the first part."""
    found = [name for name in sorted(names) if name.lower().endswith(SUFFIX)]
    found = [name for name in found if not _SIBLING.fullmatch(os.path.basename(name))]
    parts = {name: _PART.fullmatch(name) for name in found}
    return [name for name in found if parts[name] is None or int(parts[name][2]) == 1]


def models_called(said: str | None, names: Collection[str]) -> list[str]:
    """Of the models among `names` those that `said` means: the name of a file, or how it ends, as
    "Q4_K_M" of "X-Q4_K_M.gguf", in capitals or not. None: all."""
    found = models_in(names)
    if said is None or said in found:
        return found if said is None else [said]
    return [name for name in found if f"-{_stem(name)}".lower().endswith(_ends(said))]


def parts_of(path: str) -> list[str]:
    """The paths of all parts of the model whose first part is at `path`, by their names."""
    match = _PART.fullmatch(os.path.basename(path))
    if match is None or int(match[3]) > MAX_PARTS:
        return [path]
    return [_part(path, match, number) for number in range(int(match[3]))]


def model_at(ref: str | os.PathLike) -> str:
    """The file of the GGUF model that a folder holds, where it holds no other weights; else `ref`
    as it is. Raises CheckpointError where a folder holds several, to be named by their files."""
    ref = os.fspath(ref)
    if not os.path.isdir(ref):
        return ref
    try:
        names = os.listdir(ref)
    except OSError as error:
        raise StorageError(f"{ref}: cannot be read ({error.strerror})") from None
    found = models_in(names) if holds_gguf_alone(names) else []
    if len(found) > 1:
        raise CheckpointError(
            f"{ref}: holds {len(found)} GGUF models ({_listed(found)}); name the file of one"
        )
    return os.path.join(ref, found[0]) if found else ref


def holds_gguf_alone(names: Collection[str]) -> bool:
    """Whether there are GGUF models among these files, and no other weights."""
    return bool(models_in(names)) and not any(map(_WEIGHTS.fullmatch, names))


def one_model(said: str | None, names: Collection[str], *, ref: str) -> str:
    """The one GGUF model that is meant of a repository's files: see `models_called`. Raises
    CheckpointError, with a list of them, where there are several or none."""
    found = models_called(said, names)
    if len(found) == 1:
        return found[0]
    there = found or models_in(names)
    if not there:
        raise CheckpointError(f"{ref}: holds no GGUF model; name a repository that does")
    counted = f"{len(found)} GGUF models" + (" of this name" if said and found else "")
    raise CheckpointError(
        f"{ref}: {'holds ' + counted if found else 'no GGUF model of this name'} "
        f"({_listed(there, 40)}); name one by its file, or by how its name ends: "
        f"{ref.partition(':')[0].partition('@')[0]}:{_stem(there[0]).rpartition('-')[2]}"
    )


def _listed(names, most=5):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(ascii, names[:most]))}{more}"


def open_head(path: str | os.PathLike) -> Head:
    """The head of a model, with the tensors of all its parts.

    `path`: of the only file, or of the first part. Raises CheckpointError (a part is missing, is
    of another model, or is named as the whole), UnsupportedModelError or StorageError.
    """
    path = os.fspath(path)
    first, match = read_head(path), _PART.fullmatch(os.path.basename(path))
    count = first.values.get(_COUNT, 1)
    if match is None and count == 1:
        return first
    if match is None or type(count) is not int or int(match[3]) != count or count > MAX_PARTS:
        raise CheckpointError(
            f"{path}: {_COUNT} is {short(count)}, expected the number in the file's name, "
            f"X-00001-of-0000N{SUFFIX}, up to {MAX_PARTS}; give it its own name back"
        )
    paths = parts_of(path)
    if int(match[2]) != 1:
        raise CheckpointError(f"{path}: a part of a model; name the first one, {paths[0]}")
    heads = [first, *map(read_head, paths[1:])]
    for number, head in enumerate(heads):
        said = (head.values.get(_NUMBER), head.values.get(_COUNT))
        if said != (number, count):
            raise CheckpointError(
                f"{head.path}: {_NUMBER} and {_COUNT} are {short(list(said))}, expected "
                f"{[number, count]}; fetch the file again"
            )
    return replace(first, tensors=_joined(heads), parts=tuple(paths))


def _stem(name):
    """A model's name without the ending, and without the number of a part."""
    name = os.path.basename(name)
    match = _PART.fullmatch(name)
    return match[1] if match else name[: -len(SUFFIX)]


def _ends(said):
    return tuple(f"{before}{said.lower()}" for before in "-.")


def _part(path, match, number):
    name = f"{match[1]}-{number + 1:05d}-of-{match[3]}{SUFFIX}"
    return os.path.join(os.path.dirname(path), name)


def _joined(heads):
    tensors = {}
    for head in heads:
        twice = next((name for name in head.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"{head.path}: tensor {twice} is in {tensors[twice].path} too; which is meant "
                "cannot be known"
            )
        tensors |= head.tensors
    expected = heads[0].values.get(_TENSORS)
    if len(tensors) > MAX_TENSORS or (expected is not None and expected != len(tensors)):
        raise CheckpointError(
            f"{heads[0].path}: {_TENSORS} is {short(expected)}, and the parts have {len(tensors)}; "
            "fetch them again"
        )
    return tensors
