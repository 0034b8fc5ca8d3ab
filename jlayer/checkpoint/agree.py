"""Whether the tensors that files hold are those of the model that the config describes.

Compares names, shapes and dtypes, which the converter and running in place have in common; opens no
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from jlayer.checkpoint.encoded import NONE_ENCODED, name_of_piece
from jlayer.checkpoint.foreign import refuse_quantized_tensors
from jlayer.checkpoint.names import Names
from jlayer.checkpoint.quantization import (
    Quantization,
    piece_dtypes,
    published_quantization,
    stored_tensors,
)
from jlayer.encodings.published import SHAPE_END
from jlayer.encodings.registry import ENCODINGS, piece_name, split_piece
from jlayer.errors import CheckpointError
from jlayer.families.base import EMBEDDING, HEAD
from jlayer.families.left import is_left
from jlayer.families.quantized import SECTION
from jlayer.families.registry import (
    is_beside,
    is_dropped,
    is_latent_matrix,
    is_matrix,
    is_of_an_expert,
    is_of_another_part,
    layer_of,
    published_tensors,
    stacked_tensors,
)
from jlayer.sizes import counted, human
from jlayer.spec import ITEM_BYTES, ModelConfig

EXTRA = "not of this model"
UNSUPPORTED_DTYPE = f"dtype not supported (supported: {', '.join(ITEM_BYTES)})"
_OTHER_SHAPE = "shape (fetch weights and config of one version)"
_LISTED = 200  # names in one message
_TOLD = 3  # of those of single experts; and of problems that all matrices may have


def find_misplaced(
    index: str,
    tables: Mapping[str, Mapping],
    files: Mapping,
    weight_map: Mapping[str, str],
    spelling: Names,
    *,
    extra_allowed: bool = False,
) -> list[str]:
    """Where the index says otherwise than the tables of the files, of tensors that are needed."""
    holders = {}
    for shard, table in tables.items():
        for name in table:
            holders.setdefault(spelling.published(name), []).append(files[shard].name)
    wrong = []
    for name, shard in weight_map.items():
        found = holders.get(spelling.published(name), [])
        if files[shard].name in found or _is_needless(name, found, spelling, extra_allowed):
            continue
        where = f"in {' and '.join(found)}" if found else "nowhere"
        wrong.append(f"{name} is in {shard}, but it is {where}")
    return gathered(f"{index} says", wrong)


def _is_needless(name, found, spelling, extra_allowed):
    """Whether an entry of an index may be wrong: nothing is read for it."""
    if spelling.is_computed(name):
        return not found or not spelling.is_used(name)
    return extra_allowed and not spelling.is_used(name)


def settle_head(
    folder: str,
    cfg: ModelConfig,
    tables: Mapping[str, Mapping],
    notes: list[str],
    *,
    are_equal: Callable[[tuple, tuple], bool],
) -> ModelConfig:
    """The config as the tensors are: where it says that the head is the embedding, and the two are
    stored with different numbers, both count, as in transformers.

    `are_equal`: whether two places with what lies there, of one dtype and shape, hold equal bytes.
    """
    (embeddings, heads) = (
        [table[leaf.published] for table in tables.values() if leaf.published in table]
        for leaf in (EMBEDDING, HEAD)
    )
    if not cfg.tie_word_embeddings or not embeddings or not heads:
        return cfg
    infos = [info for _, info in (embeddings[0], heads[0])]
    if infos[0].shape != infos[1].shape or any(info.dtype not in ITEM_BYTES for info in infos):
        return cfg  # refused as copies that cannot be such
    if infos[0].dtype == infos[1].dtype and are_equal(embeddings[0], heads[0]):
        return cfg
    notes.append(
        f"{folder}: tie_word_embeddings is true, but {HEAD.published} is stored and differs from "
        f"{EMBEDDING.published}; both are used, as in transformers"
    )
    return replace(cfg, tie_word_embeddings=False)


def check_tensors(
    folder: str,
    cfg: ModelConfig,
    tables: Mapping[str, Mapping],
    problems: list[str],
    notes: list[str],
    *,
    quantization: Quantization | None = None,
    extra_label: str | None,
) -> dict[str, list]:
    """The model's tensors, each with all its copies; raises with all that is wrong.

    `tables`: by file, name -> a place (with `name` and `file`) and what the file says of the tensor
    there (with `dtype` and `shape`). `quantization`: what of them is encoded. `extra_label`: how to
    refuse tensors that the model has no use for; None to leave them out.
    """
    shapes, found = published_tensors(cfg), {}
    expected, dtypes = stored_tensors(shapes, quantization), piece_dtypes(shapes, quantization)
    for table in tables.values():
        for name, place in table.items():
            found.setdefault(name, []).append(place)
    if cfg.tie_word_embeddings and HEAD.published in found:
        # A tied head is a copy of the embedding, to be compared with it, or is there in its place.
        found.setdefault(EMBEDDING.published, []).extend(found.pop(HEAD.published))
    extra = sorted(name for name in found if name not in expected and not is_dropped(cfg, name))
    missing = [name for name in expected if name not in found]
    other_dtype = _of_other_dtype(found, expected, dtypes)
    if missing or other_dtype:
        infos = {name: copies[0][1] for name, copies in found.items() if name not in dtypes}
        _refuse_quantized(folder, infos, expected)
    problems = [
        *problems,
        *gathered("missing", _few_of_experts(map(_missing, _as_published(cfg, missing)))),
        *gathered(_OTHER_SHAPE, _misshapen(found, expected)),
        *gathered("copies that differ", _unequal(found, expected)),
        *gathered(UNSUPPORTED_DTYPE, other_dtype),
        *gathered("dtype of what is encoded", _of_other_piece(found, dtypes)),
        *gathered("encoded, which is not supported of it", _not_to_be_encoded(cfg, quantization)),
        *gathered(f"encoded, but left out by {SECTION}", _left_but_encoded(cfg, quantization)),
        *_of_another_kind(cfg, quantization),
        *refused_extra(folder, extra, notes, label=extra_label),
    ]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    notes += _doubled(found, expected)
    notes += _left_out(folder, cfg, found)
    notes += _of_inputs(folder, cfg, found)
    notes += _plain_all_the_same(folder, cfg, quantization)
    return {name: found[name] for name in expected}


def refused_extra(
    folder: str, extra: list[str], notes: list[str], *, label: str | None
) -> list[str]:
    """Tensors that belong nowhere, as a problem; or as a note, where `label` is None."""
    if extra and label is None:
        notes.append(f"{folder}: left out, since {EXTRA}: {listed(extra)}")
        return []
    return gathered(label, extra)


def gathered(label: str | None, names: Iterable[str]) -> list[str]:
    """One problem of all that is wrong in the same way, or none."""
    names = list(names)
    return [f"{label}: {listed(names)}"] if names else []


def first_few(problems: Iterable[object]) -> list[str]:
    """The first ones, and the number of the others: what is wrong with every matrix would be told
    hundreds of times."""
    problems = list(map(str, problems))
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    return [*problems[:_TOLD], *more]


def listed(names: Iterable[str]) -> str:
    """Names from outside, as they may stand in a message."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _left_out(folder, cfg, found):
    """A note of the parts that a text has no use for, with their sizes: of a multimodal model, and
    layers that guess further tokens."""
    parts: dict[str, list[int]] = {}
    for name, copies in found.items():
        if is_of_another_part(cfg, name):
            info = copies[0][1]
            part = _part_of(name)
            n_bytes = math.prod(info.shape) * ITEM_BYTES.get(info.dtype, 1)
            parts.setdefault(part, []).append(n_bytes)
    if parts:
        sizes = (
            f"{part} ({counted(len(n), 'tensor')}, {human(sum(n))})" for part, n in parts.items()
        )
        yield (
            f"{folder}: only the text's part runs; left out: {', '.join(sizes)}; they are in no "
            "converted folder, so --delete-source would delete them for good"
        )


def _of_inputs(folder, cfg, found):
    """A note of the tensors that a form of encoding has beside the weights."""
    beside = sorted(n for n in found if is_beside(cfg, n) and not n.endswith(SHAPE_END))
    if beside:
        what = "that are no weights" if len(beside) > 1 else "that is no weight"
        yield (
            f"{folder}: left out {counted(len(beside), 'tensor')} {what}, by "
            f"{cfg.quantized.method} (scales of inputs): {beside[0]}, ..."
        )


def _plain_all_the_same(folder, cfg, quantization):
    """A note of matrices that are plain numbers, where the config says that they are encoded."""
    said, table = published_quantization(cfg), quantization.table if quantization else NONE_ENCODED
    plain = [
        name
        for name in (published_tensors(cfg) if said else ())
        if said.table.of_tensor(name) and not table.of_tensor(name)
    ]
    if plain:
        yield (
            f"{folder}: {SECTION} says that {len(plain)} matrices are encoded that are plain "
            f"numbers here, such as {plain[0]}; they are taken as they are"
        )


def _part_of(name):
    layer = layer_of(name)
    if layer is not None:
        return "indexer" if ".indexer." in name else f"layer {layer}"
    return next(word for word in name.split(".") if word not in ("model", "module"))


def _refuse_quantized(folder, infos, expected):
    strange = {
        name: info
        for name, info in infos.items()
        if name not in expected or info.dtype not in ITEM_BYTES
    }
    matrices = {name: info.dtype for name, info in strange.items() if len(info.shape) == 2}
    refuse_quantized_tensors(folder, strange, matrices)


def _of_other_dtype(found, expected, dtypes):
    return [
        f"{place.name} in {place.file.name} is {info.dtype}"
        for name, copies in found.items()
        for place, info in copies
        if name in expected and name not in dtypes and info.dtype not in ITEM_BYTES
    ]


def _of_other_piece(found, dtypes):
    told = {
        f"{place.name} in {place.file.name} is {info.dtype}, expected {dtypes[name]}": None
        for name, copies in found.items()
        for place, info in copies
        if name in dtypes and info.dtype != dtypes[name]
    }
    return list(told)  # once, though all experts are in one tensor


def _not_to_be_encoded(cfg, quantization):
    """Tensors that are encoded, and used in a way that needs plain numbers, or rows by
    themselves."""
    table = quantization.table if quantization else NONE_ENCODED
    for name, shape in published_tensors(cfg).items() if table else ():
        encoding = table.of_tensor(name)
        if encoding is None:
            continue
        pieces = ENCODINGS[encoding].pieces(shape)
        by_row = all(ENCODINGS[encoding].rows_per(piece) == 1 for piece in pieces)
        is_rows = name != EMBEDDING.published or by_row
        if not is_rows or not (is_matrix(name, shape) or is_latent_matrix(name)):
            yield f"{name} ({encoding})"


def _left_but_encoded(cfg, quantization):
    """Tensors that are encoded, though the config says that their modules are not."""
    if quantization and cfg.quantized and cfg.quantized.left:
        for name in published_tensors(cfg):
            module = name.removesuffix(".weight")
            if quantization.table.of_tensor(name) and is_left(cfg.quantized, module):
                yield name


def _of_another_kind(cfg, quantization):
    """The first few matrices with codes of another kind than the config names, or other groups: a
    header that lies would have them taken for other numbers."""
    named = cfg.quantized.encodings if cfg.quantized else ()
    table = quantization.table if quantization and named else NONE_ENCODED
    shapes = published_tensors(cfg) if table else {}
    found = {name: table.of_tensor(name) for name in shapes}
    others = [
        f"{name} ({encoding})"
        for name, encoding in found.items()
        if encoding is not None
        and _kind_of(encoding, shapes[name]) not in [_kind_of(n, shapes[name]) for n in named]
    ]
    return gathered(f"encoded, but not as {SECTION} says ({', '.join(named)})", first_few(others))


@lru_cache(maxsize=1024)
def _kind_of(name, shape):
    """What tells the encodings of a matrix apart, but for the dtype of their scales."""
    row = ENCODINGS[name]
    pieces = row.pieces(shape)
    axes = {piece: axes if math.prod(axes) > 1 else (1,) for piece, (_, axes) in pieces.items()}
    return type(row), pieces[row.main], axes


def _missing(name):
    return f"{name} (tie_word_embeddings is false)" if name == HEAD.published else name


def _as_published(cfg, missing):
    """The names of missing tensors as they are published: pieces by their form, and tensors of all
    experts in the place of their parts where the family has no others, and no part is there."""
    if not missing or not cfg.experts or not all(stack.is_only for stack in cfg.experts.stacks):
        return [name_of_piece(cfg, name) for name in missing]
    left = dict.fromkeys(missing)
    pieces = dict.fromkeys(split_piece(name)[1] for name in missing)
    for name, stack in stacked_tensors(cfg).items():
        for piece in pieces:
            parts = [piece_name(part, piece) for part, *_ in stack.parts]
            if left.keys() >= set(parts):
                for part in parts:
                    del left[part]
                left[piece_name(name, piece)] = None
    return [name_of_piece(cfg, name) for name in left]


def _few_of_experts(names):
    """The names, with three of those of single experts alone and the number of the others: a model
    may have 70,000 of them."""
    names = list(names)
    of_experts = list(filter(is_of_an_expert, names))
    told = set(of_experts[:_TOLD])
    left_out = len(of_experts) - len(told)
    names = [name for name in names if name in told or not is_of_an_expert(name)]
    return [*names, f"and {left_out} more of single experts"] if left_out else names


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
