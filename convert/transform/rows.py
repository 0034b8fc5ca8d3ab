"""Which rows of a model one of several hosts reads, and these alone of a stream of all rows.

The rows of every matrix are dealt out that a layer or the head multiplies, and its bias with them.
What functions read uncut (norms, routers, what makes keys and values of a latent) and the table of
embeddings are whole on every host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import lcm
from typing import TypeVar

from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.rows import Host, Span
from jlayer.encodings.registry import piece_name
from jlayer.families.registry import (
    final_leaves,
    head_leaf,
    layer_kinds,
    layer_tensor_name,
    published_tensors,
)
from jlayer.plan.dealing import host_rows
from jlayer.spec import ModelConfig

Rows = TypeVar("Rows", bound=Sequence)


def host_spans(cfg: ModelConfig, quantization: Quantization | None, host: Host) -> dict[str, Span]:
    """Published matrix or bias -> the rows that a host reads, of those of which it does not read
    all. Matrices of one group are cut alike, in whole units of rows of all their encodings."""
    shapes, found = published_tensors(cfg), {}
    for names in _dealt(cfg):
        encodings = [quantization and quantization.scheme_of(name, shapes[name]) for name in names]
        encodings = [encoding for encoding in encodings if encoding]
        if not all(encoding.by_rows for encoding in encodings):
            continue
        n_rows, row_unit = shapes[names[0]][0], lcm(*(each.row_unit for each in encodings))
        rows = host_rows(n_rows, row_unit=row_unit, host=host.number, hosts=host.n)
        if rows is not None:
            found |= dict.fromkeys(names, Span(rows.start, rows.stop - rows.start, n_rows))
    return found


def stored_spans(
    spans: dict[str, Span], quantization: Quantization | None, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Span]:
    """The same of the stored tensors, which may be pieces of published ones: `X.weight.q`, say. A
    piece that is for all rows is whole on every host."""
    found = {}
    for name, span in spans.items():
        encoding = quantization and quantization.scheme_of(name, shapes[name])
        if encoding is None:
            found[name] = span
            continue
        for piece in encoding.pieces(shapes[name]):
            if per := encoding.rows_per(piece):
                first, n, whole = span.first // per, -(-span.n // per), -(-span.whole // per)
                found[piece_name(name, piece)] = Span(first, n, whole)
    return found


def only(chunks: Iterable[Rows], first: int, n: int) -> Iterator[Rows]:
    """`n` items from number `first` on, of a stream that comes in sequences of any lengths; all of
    the stream is taken."""
    at = 0
    for chunk in chunks:
        begin, end = max(first - at, 0), min(first + n - at, len(chunk))
        at += len(chunk)
        if begin < end:
            yield chunk[begin:end]


def _dealt(cfg) -> Iterator[list[str]]:
    """The published names of what is cut by the same rows: the matrices of a group, and their
    biases."""
    for layer, kind in enumerate(layer_kinds(cfg)):
        for stage, expert in kind.passes():
            for group in stage.groups:
                leaves = [leaf for name in group.leaves for leaf in kind.with_bias(name)]
                yield [layer_tensor_name(cfg, leaf, layer, expert) for leaf in leaves]
    if not cfg.tie_word_embeddings:  # else rows of it are looked up too, on every host
        head = head_leaf(cfg)
        beside = [leaf for leaf in final_leaves(cfg) if leaf.of == head.name]
        yield [leaf.published for leaf in (head, *beside)]
