"""The kernels: some rows of a matrix of one form, times some columns, in LLVM's language.

Weights are decoded to float32 in registers and multiplied by float32 columns. A kernel keeps a
running sum for each of its rows and columns; a row past the end is the last one again, which writes
the same numbers.
"""

from __future__ import annotations

from jlayer.cores.block_loop import BlockLoop
from jlayer.cores.block_sums import BLOCK_SUMS
from jlayer.cores.decode import e8m0_values, float8_values, halved_values, levels, scale_values
from jlayer.cores.grouped import GROUPED
from jlayer.cores.jobs import offset
from jlayer.cores.scaled_sums import scaled_sums
from jlayer.cores.sums import (
    Block,
    added,
    end_of_steps,
    every,
    every_float,
    joined,
    spelled,
    zeros,
)
from jlayer.cores.text import DECLARATIONS, FLOATS, INTS, LANES, Function
from jlayer.encodings.grouped import SCALE
from jlayer.encodings.int4 import CUBE, INT4, ZERO
from jlayer.encodings.registry import encoding

NAME = "kernel"
# Columns at a time -> rows at a time: as many running sums as the registers hold, with AVX-512 and
# without, where each sum takes two or four registers.
BLOCKS = {True: {8: 2, 4: 4, 2: 4, 1: 4}, False: {4: 1, 2: 2, 1: 2}}
MOST_ROWS = 4
# Vectors of a row in one turn of the loop.
UNROLL = 4
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}
# Inputs of a row are a multiple of so many, by form.
STEPS = {
    INT4.name: 4 * LANES,
    **dict.fromkeys((*GROUPED, *ITEM), LANES),
    **{form: encoding(form).width_unit for form in BLOCK_SUMS},
}
# What a part of the columns takes: it stays in a core's nearest cache, of 32 or 48 KiB.
PART_BYTES = 32 << 10
WHOLE_ROWS = 1 << 40


def is_native(form: str, width: int) -> bool:
    """Whether there is a kernel for rows of this width."""
    return form in STEPS and width % STEPS[form] == 0


def kernel(form: str, n_columns: int, *, has_avx512: bool) -> str:
    """The module with the kernel of a form for so many columns."""
    n_rows = BLOCKS[has_avx512][n_columns]
    arguments = ("first", "end", "column", "start")
    code = Function(NAME, [("ptr", "job"), *(("i64", name) for name in arguments)])

    def field(name, kind="i64"):
        return code.load(kind, "%job", offset(name), align=8)

    main, main_stride = field("main", "ptr"), field("main_stride")
    scale, scale_stride = field("scale", "ptr"), field("scale_stride")
    extra, extra_stride = field("extra", "ptr"), field("extra_stride")
    table = GROUPED[form].begin(code, extra) if form in GROUPED else "null"
    x, x_stride = field("x", "ptr"), field("x_stride")
    y, y_stride = field("y", "ptr"), field("y_stride")
    places = [code.math("add", "%column", number) for number in range(n_columns)]
    columns = [code.at(x, code.math("mul", place, x_stride)) for place in places]
    results = [code.at(y, code.math("mul", place, y_stride)) for place in places]
    last = code.math("sub", "%end", 1)
    length, far = field("length"), code.math("mul", main_stride, n_rows)
    stop = code.smaller(code.math("add", "%start", field("part")), length)
    is_first = code.let("icmp eq i64 %start, 0")
    room = code.let(f"alloca [{128 * n_rows} x i8], align 64")

    def scale_row(row):
        """The row of scales of a row of the matrix."""
        per = encoding(form).rows_per(SCALE)
        return code.math("udiv", row, per) if per > 1 else row if per else 0

    def rows_from(first, _):
        rows = [code.smaller(code.math("add", first, number), last) for number in range(n_rows)]
        # Past the end lie another thread's rows, which it asks for itself.
        follows = code.let(f"icmp slt i64 {code.math('add', first, n_rows)}, %end")
        block = Block(
            code,
            [code.at(main, code.math("mul", row, main_stride)) for row in rows],
            [code.at(scale, code.math("mul", scale_row(row), scale_stride)) for row in rows],
            [code.at(extra, code.math("mul", row, extra_stride)) for row in rows],
            table,
            columns,
            length,
            code.let(f"select i1 {follows}, i64 {far}, i64 0"),
            has_avx512,
            room,
        )
        totals = code.totals(_sums(form, block, "%start", stop))
        places = [code.at(result, code.math("shl", row, 2)) for row in rows for result in results]
        # All are read before any is written: the last row may be there twice.
        before = [code.load("float", place, align=4) for place in places]
        for place, old, new in zip(places, before, totals, strict=True):
            old = code.let(f"select i1 {is_first}, float 0.0, float {old}")
            code.do(f"store float {code.math('fadd', old, new, 'float')}, ptr {place}, align 4")

    code.loop("%first", "%end", n_rows, rows_from)
    return DECLARATIONS + tables() + code.text()


def length(form: str, width: int) -> int:
    """Inputs of a row as a kernel counts: int4 walks its two halves side by side."""
    return width // 2 if form == INT4.name else width


def part(form: str, n_columns: int) -> int:
    """Inputs, counted so, that all rows go through before the next ones: so the columns' part stays
    near. Few columns take whole rows, as they come from memory."""
    if n_columns < 4:
        return WHOLE_ROWS
    return length(form, PART_BYTES // 4 // min(n_columns, max(BLOCKS[True])))


def _sums(form, block, start, stop):
    """For each row and column a vector whose lanes add up to the product of some inputs."""
    if form == INT4.name:
        return _int4(block, start, stop)
    if form in BLOCK_SUMS:
        return BlockLoop(form, block).sums(start, stop, BLOCK_SUMS[form])
    if form in GROUPED:
        return scaled_sums(GROUPED[form], block, start, stop)
    return _plain(block, form, start, stop)


def _plain(block, form, start, stop):
    code, item_bytes = block.code, ITEM[form]

    def turn(n_vectors):
        def body(item, sums):
            if n_vectors > 1:
                for line in range(0, LANES * n_vectors * item_bytes, 64):
                    block.prefetch(code.math("mul", item, item_bytes), line)
            for number in range(n_vectors):
                here = code.math("add", item, number * LANES)
                at = code.math("mul", here, item_bytes)
                weights = [_decoded(code, form, row, at) for row in block.rows]
                sums = added(block, sums, weights, here, number)
            return sums

        return body

    step = UNROLL * LANES
    whole = end_of_steps(code, start, stop, step)
    sums = code.loop(start, whole, step, turn(UNROLL), zeros(block))
    return joined(block, code.loop(whole, stop, LANES, turn(1), sums))


def _decoded(code, form, row, at):
    """16 weights of a plain form, float32."""
    if form == "float32":
        return code.load(FLOATS, row, at)
    if form == "float16":
        half = code.load(f"<{LANES} x half>", row, at)
        return code.let(f"fpext <{LANES} x half> {half} to {FLOATS}")
    raw = code.load(f"<{LANES} x i16>", row, at)
    wide = code.let(f"zext <{LANES} x i16> {raw} to {INTS}")
    high = code.math("shl", wide, every(16), INTS)
    return code.let(f"bitcast {INTS} {high} to {FLOATS}")


def _int4(block, start, stop):
    """32 bytes at a time: a group of the first half of the inputs, and one of the second."""
    code, has_avx512 = block.code, block.has_avx512
    half = block.length
    n_groups = code.math("lshr", half, 5)
    table = code.let(f"load {FLOATS}, ptr @levels, align 64")

    def scaled(row, group):
        """What decodes a group: the table of levels times its scale, or its scale and a 128th."""
        byte = code.let(f"zext i8 {code.load('i8', block.scales[row], group)} to i64")
        value = code.load("float", "@scales", code.math("shl", byte, 2), align=4)
        value = code.spread(value)
        if has_avx512:
            return code.math("fmul", table, value, FLOATS)
        return value, code.math("fmul", value, every_float(CUBE), FLOATS)

    def weights(codes, factor):
        if has_avx512:  # the permutation looks at the low 4 bits of each lane alone
            kinds = f"{FLOATS} {factor}, {INTS} {codes}"
            return code.let(f"call {FLOATS} @llvm.x86.avx512.permvar.sf.512({kinds})")
        return _levels(code, code.math("and", codes, every(15), INTS), *factor)

    def group(first, sums):
        number = code.math("lshr", first, 5)
        block.prefetch(first)
        low = [scaled(row, number) for row in range(len(block.rows))]
        other = code.math("add", number, n_groups)
        high = [scaled(row, other) for row in range(len(block.rows))]
        for vector in range(2):
            at = code.math("add", first, vector * LANES)
            bytes_ = [code.load(f"<{LANES} x i8>", row, at) for row in block.rows]
            codes = [code.let(f"zext <{LANES} x i8> {some} to {INTS}") for some in bytes_]
            some = [weights(*pair) for pair in zip(codes, low, strict=True)]
            sums = added(block, sums, some, at, 0)
            codes = [code.math("lshr", some, every(4), INTS) for some in codes]
            some = [weights(*pair) for pair in zip(codes, high, strict=True)]
            sums = added(block, sums, some, code.math("add", at, half), 1)
        return sums

    return joined(block, code.loop(start, stop, INT4.group, group, zeros(block)))


def _levels(code, codes, scale, cube):
    """The weights of half bytes by arithmetic, every step of it exact."""
    number = code.let(f"sitofp {INTS} {codes} to {FLOATS}")
    u = code.math("fsub", number, every_float(ZERO), FLOATS)
    return code.math("fmul", u, code.fma(code.math("fmul", u, u, FLOATS), cube, scale), FLOATS)


_TABLES = {
    "levels": levels(),  # these two of int4
    "scales": scale_values(),
    "e8m0": e8m0_values(),
    "float8": float8_values(),
    "halves": halved_values(),  # of gguf_mxfp4
}


def tables() -> str:
    """What half bytes and scales stand for, as constants of a module."""
    lines = []
    for name, values in _TABLES.items():
        words = ", ".join(f"float {spelled(value)}" for value in values)
        kind = f"[{len(values)} x float]"
        lines.append(f"@{name} = private constant {kind} [{words}], align 64")
    return "\n".join(lines) + "\n"
