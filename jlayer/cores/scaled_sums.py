"""The sums of kernels for codes with scales: of groups of a row's inputs, or of all of them."""

from __future__ import annotations

import numpy as np

from jlayer.cores.grouped import Form, Row
from jlayer.cores.sums import Block, added, end_of_steps, joined, n_chains, spelled, zeros
from jlayer.cores.text import FLOATS, LANES

# Up to so many columns a group's scale multiplies its sums, else its weights.
SCALED_LATE = 2
# Inputs in one turn of the loop: at least so many, and where all inputs of a row have one scale.
_LEAST, _TURN = 64, 128


def scaled_sums(form: Form, block: Block, start: str, stop: str) -> list[str]:
    """For each row and column a vector whose lanes add up to the product of some inputs."""
    return _Sums(block, form).of_inputs(start, stop)


class _Sums:
    """The sums of a kernel of some form. `step`: inputs in one turn of the loop."""

    def __init__(self, block: Block, form: Form):
        self.block, self.code, self.form = block, block.code, form
        self.step = max(_LEAST, form.group) if form.has_groups else _TURN
        # A table is scaled as soon as a sum is.
        self.is_late = form.is_scaled_late and len(block.columns) <= SCALED_LATE
        self.rows = [
            Row(*pointers, block.table)
            for pointers in zip(block.rows, block.scales, block.zeros, strict=True)
        ]

    def of_inputs(self, start, stop):
        code, n_seen = self.code, len(self.block.rows) if self.form.has_none else 0
        n_sums = len(zeros(self.block))
        if not self.form.has_groups:
            self.of_row = self._decoders("0", is_scaled=False)

        def turn(count, sums_of):
            def body(item, carried):
                seen = self._seen(carried[n_sums:], item, count)
                return [*sums_of(item, carried[:n_sums]), *seen]

            return body

        whole = end_of_steps(code, start, stop, self.step)
        carried = [*zeros(self.block), *["zeroinitializer"] * n_seen]
        carried = code.loop(start, whole, self.step, turn(self.step, self._of_step), carried)
        carried = code.loop(whole, stop, LANES, turn(LANES, self._of_lanes), carried)
        sums, seen = carried[:n_sums], carried[n_sums:]
        if not self.form.has_groups:
            sums = self._scaled(sums, self._scales("0"))
        return self._with_nones(joined(self.block, sums), seen)

    def _of_step(self, item, sums):
        begin = self.form.bytes_of(self.code, item)
        for line in range(0, self.form.n_bytes(self.step), 64):
            self.block.prefetch(begin, line)
        if not self.form.has_groups:
            return self._added(sums, item, self.step, self.of_row)
        for first in range(0, self.step, self.form.group):
            sums = self._of_group(self.code.math("add", item, first), sums)
        return sums

    def _of_group(self, item, sums):
        count = self.form.group
        if not self.is_late:
            return self._added(sums, item, count, self._decoders(item))
        decoders = self._decoders(item, is_scaled=False)
        parts = self._added(zeros(self.block), item, count, decoders)
        return self._scaled(parts, self._scales(item), sums)

    def _of_lanes(self, item, sums):
        decoders = self._decoders(item) if self.form.has_groups else self.of_row
        return self._added(sums, item, LANES, decoders)

    def _decoders(self, item, *, is_scaled=True):
        """Of each row, for the inputs of a group."""
        has_avx512 = self.block.has_avx512
        return [
            self.form.decoder_of(self.code, row, item, is_scaled=is_scaled, has_avx512=has_avx512)
            for row in self.rows
        ]

    def _scales(self, item):
        found = [self.form.group_scale(self.code, row, item) for row in self.rows]
        return [self.form.last(self.code, scale) for scale in found]

    def _added(self, sums, item, count, decoders):
        """The sums after `count` more inputs."""
        code, block, n_vectors = self.code, self.block, min(self.form.at_once, count // LANES)
        for first in range(0, count, LANES * n_vectors):
            here = code.math("add", item, first)
            found = [self.form.codes(code, row, here, n_vectors) for row in self.rows]
            for number in range(n_vectors):
                pairs = zip(decoders, found, strict=True)
                weights = [decode(vectors[number]) for decode, vectors in pairs]
                at = code.math("add", here, LANES * number)
                sums = added(block, sums, weights, at, first // LANES + number)
        return sums

    def _scaled(self, parts, scales, totals=None):
        """Some sums times the scale of their row, added to others."""
        n = len(self.block.columns) * n_chains(self.block)
        totals = totals or zeros(self.block)
        return [
            self.code.fma(part, scales[number // n], total)
            for number, (part, total) in enumerate(zip(parts, totals, strict=True))
        ]

    def _seen(self, seen, item, count):
        """See `_more_seen`; after so many more inputs."""
        step = min(count, _SEEN)
        for first in range(0, count if seen else 0, step):
            here = self.code.math("add", item, first)
            pairs = zip(seen, self.block.rows, strict=True)
            seen = [_more_seen(self.code, *pair, here, step) for pair in pairs]
        return seen

    def _with_nones(self, sums, seen):
        """The sums, of rows that have a byte of no number NaN."""
        nones, n = [_none_if_seen(self.code, some) for some in seen], len(self.block.columns)
        if not nones:
            return sums
        return [
            self.code.math("fadd", total, nones[number // n], FLOATS)
            for number, total in enumerate(sums)
        ]


# Bytes that are looked at together for codes of no number.
_SEEN = 64
_LINE = f"<{_SEEN} x i8>"


def _more_seen(code, seen, row, item, count):
    """For each place of a line the largest byte so far, without its sign and doubled, with those of
    `count` more inputs: 254 is that of no number."""
    bytes_ = code.load(f"<{count} x i8>", row, item)
    if count < _SEEN:
        lanes = ", ".join(f"i32 {min(lane, count)}" for lane in range(_SEEN))
        kind = f"<{count} x i8>"
        words = f"{kind} {bytes_}, {kind} zeroinitializer, <{_SEEN} x i32> <{lanes}>"
        bytes_ = code.let(f"shufflevector {words}")
    doubled = code.math("add", bytes_, bytes_, _LINE)
    before = code.let(f"bitcast {FLOATS} {seen} to {_LINE}")
    most = code.let(f"call {_LINE} @llvm.umax.v{_SEEN}i8({_LINE} {doubled}, {_LINE} {before})")
    return code.let(f"bitcast {_LINE} {most} to {FLOATS}")


def _none_if_seen(code, seen):
    """NaN in all lanes where there was a byte of no number, else zero."""
    bytes_ = code.let(f"bitcast {FLOATS} {seen} to {_LINE}")
    none = f"<{', '.join(['i8 -2'] * _SEEN)}>"
    found = code.let(f"icmp eq {_LINE} {bytes_}, {none}")
    any_ = code.let(f"icmp ne i64 {code.let(f'bitcast <{_SEEN} x i1> {found} to i64')}, 0")
    return code.spread(code.let(f"select i1 {any_}, float {spelled(np.nan)}, float 0.0"))
