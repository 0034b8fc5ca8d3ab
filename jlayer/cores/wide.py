"""Kernels for many columns: rows are decoded to bfloat16 once, and multiplied by all columns.

The columns are bfloat16 too, as the device gives them, so a weight is rounded as a program of the
device rounds it. Weights become tiles of 16 rows and 32 inputs. Their products with 16 columns at a
time are those of Intel's AMX, a tile of sums in one instruction, or of AVX-512's dot products of
pairs.

The columns are packed: see `packing`.
"""

from __future__ import annotations

from jlayer.cores import lines
from jlayer.cores.grouped import Row
from jlayer.cores.jobs import offset
from jlayer.cores.kernels import NAME, tables
from jlayer.cores.lines import LINE_BYTES, LINES, PAIRS
from jlayer.cores.packing import COLUMNS
from jlayer.cores.text import DECLARATIONS, FLOATS, Function
from jlayer.encodings.grouped import SCALE
from jlayer.encodings.registry import encoding

# Rows of a tile of weights, and of sums; inputs of a tile of weights.
TILE_ROWS = 16
TILE_INPUTS = 32
TILE_BYTES = 1024
# Groups of columns of one call: as many sums as there are registers for, of two tiles of rows for
# up to FEW_GROUPS, else of one.
MOST_GROUPS, FEW_GROUPS = 4, 2
# A kernel takes so many rows at a time: at least these must be there.
ROWS = 2 * TILE_ROWS
# Inputs that PART_ROWS rows go through before the next inputs, for more groups: so the columns'
# part stays near. Dot products decode so many inputs at a time.
PART, PART_ROWS = 512, 128
WHOLE = 1 << 40
# Bytes of a row that are asked for ahead.
AHEAD = 1024
# Sums that the dot products of pairs keep in registers: rows times groups of columns.
DOT_SUMS = 16
# Rows whose lines are decoded by one turn of a loop, at most so many lines of all of them.
TURN_LINES = 32


def is_native(form: str, n_rows: int, width: int) -> bool:
    """Whether there is a kernel for a matrix."""
    if form not in LINES or n_rows < ROWS:
        return False
    row = LINES[form]
    return width % (row.unit * (2 if row.is_in_halves else 1)) == 0


def steps(n_columns: int) -> list[tuple[int, int]]:
    """How so many columns are multiplied: (groups of a call, its first column)."""
    groups = -(-n_columns // COLUMNS)
    firsts = range(0, groups, MOST_GROUPS)
    return [(min(MOST_GROUPS, groups - first), COLUMNS * first) for first in firsts]


def kernel(form: str, n_groups: int, *, has_amx: bool) -> str:
    """The module with the kernel of a form for so many groups of columns."""
    arguments = ("first", "end", "column", "start")
    code = Function(NAME, [("ptr", "job"), *(("i64", name) for name in arguments)])
    found = (_Tiles if has_amx else _Dots)(code, form, n_groups)
    return DECLARATIONS + lines.DECLARATIONS + WIDE_DECLARATIONS + tables() + found.text()


class _Wide:
    """A kernel as it is written.

    `n_tiles`: tiles of rows at a time. `part`: inputs that `block_rows` rows go through before the
    next inputs. They are those of a way to multiply, which has `_add(row, start, stop, sums,
    follows)`: it adds the products of some inputs of the tiles' rows with all columns to the sums.
    `follows`: bytes from an input to the one that comes after this part.
    """

    n_tiles: int
    part: int
    block_rows: int

    def __init__(self, code: Function, form: str, n_groups: int):
        self.code, self.form, self.n_groups = code, form, n_groups
        self.lines = LINES[form]
        self.main, self.main_stride = self.field("main", "ptr"), self.field("main_stride")
        self.scale, self.scale_stride = self.field("scale", "ptr"), self.field("scale_stride")
        self.extra, self.extra_stride = self.field("extra", "ptr"), self.field("extra_stride")
        self.table = self.lines.begin(code, self.extra)
        self.length = self.field("length")
        n_halves = 2 if self.lines.is_in_halves else 1
        # Inputs of a part, as they are counted: of int4, whose two halves are walked side by side,
        # those of a half.
        self.least_part = PART // n_halves
        self.group_bytes = code.math("mul", self.length, 2 * COLUMNS * n_halves)
        group = code.math("mul", code.math("lshr", "%column", 4), self.group_bytes)
        x = code.at(self.field("x", "ptr"), group)
        self.xs = [code.at(x, code.math("mul", self.group_bytes, n)) for n in range(n_groups)]

    def field(self, name: str, kind: str = "i64") -> str:
        """A field of the job."""
        return self.code.load(kind, "%job", offset(name), align=8)

    def room(self, n_bytes: int) -> str:
        """Memory of this call."""
        return self.code.let(f"alloca [{n_bytes} x i8], align 64")

    def text(self) -> str:
        """The function."""
        code = self.code
        self.sums = self.room(self.block_rows * COLUMNS * self.n_groups * 4)
        self.turned, self.row_room = self.room(TILE_BYTES), self.room(self.lines.room_bytes)
        self.columns = code.smaller(
            code.math("sub", self.field("columns"), "%column"), COLUMNS * self.n_groups
        )
        # The last rows of a matrix are taken together with some before them, which are then
        # computed twice: the same numbers are written again.
        self.last = code.math("sub", self.field("rows"), self.n_tiles * TILE_ROWS)
        self._begin()
        code.loop("%first", "%end", self.block_rows, self._block)
        self._end()
        return code.text()

    def _begin(self):
        pass

    def _end(self):
        pass

    def _block(self, first, _):
        """All products of the rows from `first` on."""
        code, rows = self.code, self.n_tiles * TILE_ROWS
        part_bytes = 0 if self.part == WHOLE else self.lines.n_bytes(self.part)
        end = code.smaller(code.math("add", first, self.block_rows), "%end")
        zero = f"store {FLOATS} zeroinitializer, ptr"
        n_bytes = self.block_rows * COLUMNS * self.n_groups * 4
        code.loop(0, n_bytes, 64, lambda at, _: code.do(f"{zero} {code.at(self.sums, at)}"))

        def tile(row):
            """(its first row, its sums)"""
            at = code.math("mul", code.math("sub", row, first), COLUMNS * self.n_groups * 4)
            return code.smaller(row, self.last), code.at(self.sums, at)

        def part(start, _):
            stop = code.smaller(code.math("add", start, self.part), self.length)

            def some(row, _):
                here, sums = tile(row)
                # The rows that follow go through the same part, or these begin with the next one.
                follow = code.math("add", row, rows)
                is_last = code.let(f"icmp sge i64 {follow}, {end}")
                down = code.let(f"select i1 {is_last}, i64 {first}, i64 {follow}")
                down = code.math("mul", code.math("sub", down, here), self.main_stride)
                right = code.let(f"select i1 {is_last}, i64 {part_bytes}, i64 0")
                self._add(here, start, stop, sums, code.math("add", down, right))

            code.loop(first, end, rows, some)

        code.loop(0, self.length, self.part, part)
        code.loop(first, end, rows, lambda row, _: self._write(*tile(row)))

    def decode(self, row: str, item: str, ahead: str, places, n_rows: int) -> None:
        """Writes the lines of a unit of inputs from `item` on, of `n_rows` rows from `row` on.
        `places`: of the first row's lines. `ahead`: bytes to what is asked for meanwhile."""
        code, lines, per = self.code, self.lines, encoding(self.form).rows_per(SCALE)
        at = code.math("add", lines.bytes_of(code, item), ahead)
        main = code.at(self.main, code.math("mul", row, self.main_stride))
        zero = code.at(self.extra, code.math("mul", row, self.extra_stride))
        for number in range(n_rows):
            if number:
                main, zero = code.at(main, self.main_stride), code.at(zero, self.extra_stride)
            for line in range(0, lines.n_bytes(lines.unit), LINE_BYTES):
                code.prefetch(main, code.math("add", at, line), locality=2)
            if number == 0 or per > 1:
                of_scale = code.math("add", row, number)
                of_scale = code.math("udiv", of_scale, per) if per else "0"
                scale = code.at(self.scale, code.math("mul", of_scale, self.scale_stride))
            elif per:
                scale = code.at(scale, self.scale_stride)
            here = [code.at(place, LINE_BYTES * number) for place in places]
            found = Row(main, scale, zero, self.table)
            lines.write(code, found, item, here, length=self.length, room=self.row_room)

    def in_columns(self, item: str, line: str | int) -> str:
        """Bytes from the begin of a group of packed columns to the inputs of a line of a unit."""
        step = self.length if self.lines.is_in_halves else TILE_INPUTS
        inputs = self.code.math("add", item, self.code.math("mul", step, line))
        return self.code.math("shl", inputs, 5)

    def _write(self, row, sums):
        """Writes the sums of some rows where the products belong, a column after another. Sums are
        [groups, tiles of rows, 16, 16]."""
        code = self.code
        y, y_stride = self.field("y", "ptr"), self.field("y_stride")
        y = code.at(y, code.math("mul", "%column", y_stride))
        for group in range(self.n_groups):
            left = code.math("sub", self.columns, COLUMNS * group)
            columns = code.smaller(left, COLUMNS)
            of_group = code.at(y, code.math("mul", y_stride, COLUMNS * group))
            for tile in range(self.n_tiles):
                found = code.at(sums, (group * self.n_tiles + tile) * TILE_BYTES)
                rows = [code.load(FLOATS, found, 64 * n, align=64) for n in range(TILE_ROWS)]
                for column, some in enumerate(code.turned(rows)):
                    code.store(FLOATS, some, code.at(self.turned, 64 * column))
                target = code.math("shl", code.math("add", row, tile * TILE_ROWS), 2)
                target = code.at(of_group, target)

                def write(column, _, target=target):
                    value = code.load(FLOATS, self.turned, code.math("shl", column, 6), align=64)
                    place = code.at(target, code.math("mul", column, y_stride))
                    code.do(f"store {FLOATS} {value}, ptr {place}, align 4")

                code.loop(0, columns, 1, write)


class _Tiles(_Wide):
    """By AMX. Of the eight tile registers up to four are sums; the others are one or two tiles of
    weights and some of columns."""

    def __init__(self, code, form, n_groups):
        super().__init__(code, form, n_groups)
        is_few = n_groups <= FEW_GROUPS
        self.n_tiles = 2 if is_few else 1
        self.part = WHOLE if is_few else self.least_part
        self.block_rows = self.n_tiles * TILE_ROWS if is_few else PART_ROWS
        self.line_bytes = self.n_tiles * TILE_BYTES  # of a line of all rows
        # In each turn 32 inputs of all rows are multiplied, and a part of the rows is decoded.
        self.turns = self.lines.unit // TILE_INPUTS

    def _begin(self):
        code = self.code
        self.tiles = self.room(2 * self.lines.n_lines * self.line_bytes)
        self.before = self.room(64)  # a library may rely on what it has configured in this thread
        code.do(f"call void @llvm.x86.sttilecfg(ptr {self.before})")
        code.do("call void @llvm.x86.ldtilecfg(ptr @config)")

    def _end(self):
        self.code.do(f"call void @llvm.x86.ldtilecfg(ptr {self.before})")

    def _add(self, row, start, stop, sums, follows):
        code = self.code
        places = [code.at(sums, n * TILE_BYTES) for n in range(self.n_groups * self.n_tiles)]
        for number, place in enumerate(places):
            code.load_tile(number, place)
        rows = self._plain_rows if self.form == "bfloat16" else self._decoded_rows
        rows(row, start, stop, follows)
        for number, place in enumerate(places):
            code.store_tile(number, place)

    def _ahead(self, item, follows):
        """Bytes from an item to what is asked for meanwhile: of the same row, or of the rows that
        follow."""
        code = self.code
        if self.part != WHOLE:
            return follows
        row_bytes = self.lines.bytes_of(code, self.length)
        at = code.math("add", self.lines.bytes_of(code, item), AHEAD)
        is_there = code.let(f"icmp slt i64 {at}, {row_bytes}")
        rows = code.math("mul", self.main_stride, self.n_tiles * TILE_ROWS)
        rows = code.math("sub", code.math("add", rows, AHEAD), row_bytes)
        return code.let(f"select i1 {is_there}, i64 {AHEAD}, i64 {rows}")

    def _plain_rows(self, row, start, stop, follows):
        """Weights in bfloat16 go from where they lie into the tile registers."""
        code = self.code
        row = code.at(self.main, code.math("mul", row, self.main_stride))
        starts = [code.math("mul", self.main_stride, TILE_ROWS * n) for n in range(self.n_tiles)]

        def step(item, _):
            source = code.at(row, self.lines.bytes_of(code, item))
            ahead = self._ahead(item, follows)
            for number in range(self.n_tiles * TILE_ROWS):
                more = code.math("mul", self.main_stride, number)
                code.prefetch(source, code.math("add", more, ahead), locality=2)
            tiles = [code.at(source, at) for at in starts]
            self._multiply(tiles, self.main_stride, self.in_columns(item, 0))

        code.loop(start, stop, TILE_INPUTS, step)

    def _decoded_rows(self, row, start, stop, follows):
        """Units are decoded a step ahead of those that are multiplied, some rows for each tile: so
        both are done at the same time."""
        code, unit, n_lines = self.code, self.lines.unit, self.lines.n_lines
        turn_lines, turn_rows = n_lines // self.turns, self.n_tiles * TILE_ROWS // self.turns

        def lines_of(item):
            """Where the lines of a unit lie."""
            turn = code.math("and", code.math("udiv", item, unit), 1)
            return code.at(self.tiles, code.math("mul", turn, n_lines * self.line_bytes))

        def step(item, _):
            before = code.math("sub", item, unit)

            def turn(number, _):
                def multiply(*_):
                    place = lines_of(before)
                    for more in range(turn_lines):
                        line = code.math("add", code.math("mul", number, turn_lines), more)
                        tile = code.at(place, code.math("mul", line, self.line_bytes))
                        tiles = [code.at(tile, n * TILE_BYTES) for n in range(self.n_tiles)]
                        self._multiply(tiles, LINE_BYTES, self.in_columns(before, line))

                def decode(*_):
                    first = code.math("mul", number, turn_rows)
                    place = code.at(lines_of(item), code.math("mul", first, LINE_BYTES))
                    places = [code.at(place, n * self.line_bytes) for n in range(n_lines)]
                    ahead = self._ahead(item, follows)
                    self.decode(code.math("add", row, first), item, ahead, places, turn_rows)

                self._once_if(f"sgt i64 {item}, {start}", multiply)
                self._once_if(f"slt i64 {item}, {stop}", decode)

            code.loop(0, self.turns, 1, turn)

        code.loop(start, code.math("add", stop, 1), unit, step)

    def _once_if(self, comparison, body):
        code = self.code
        yes = code.let(f"icmp {comparison}")
        code.loop(0, code.let(f"zext i1 {yes} to i64"), 1, body)

    def _multiply(self, tiles, stride, in_columns):
        """One step: 32 inputs of the tiles' rows, times all columns."""
        code, first = self.code, self.n_groups * self.n_tiles
        for number, tile in enumerate(tiles):
            code.load_tile(first + number, tile, stride)
        free = first + self.n_tiles
        for group, x in enumerate(self.xs):
            of_columns = free + group % (8 - free)
            code.load_tile(of_columns, code.at(x, in_columns))
            for number in range(self.n_tiles):
                code.add_tiles(group * self.n_tiles + number, first + number, of_columns)


class _Dots(_Wide):
    """By dot products of pairs: lanes are columns. Some inputs of 16 rows are decoded first."""

    def __init__(self, code, form, n_groups):
        super().__init__(code, form, n_groups)
        self.n_tiles, self.block_rows, self.part = 1, TILE_ROWS, self.least_part

    def _begin(self):
        self.tiles = self.room(PART // TILE_INPUTS * TILE_BYTES)

    def _add(self, row, start, stop, sums, follows):
        code, n_lines, unit = self.code, self.lines.n_lines, self.lines.unit
        n_bytes = code.math("shl", code.math("sub", stop, start), 5)
        halves = range(2 if self.lines.is_in_halves else 1)
        halves = [self.part // TILE_INPUTS * TILE_BYTES * half for half in halves]
        begins = halves if self.lines.is_in_halves else range(0, n_lines * TILE_BYTES, TILE_BYTES)
        turn_rows = max(1, min(TILE_ROWS, TURN_LINES // n_lines))

        def decode(item, _):
            at = code.math("shl", code.math("sub", item, start), 5)

            def some(first, _):
                here = code.math("add", at, code.math("mul", first, LINE_BYTES))
                places = [code.at(self.tiles, code.math("add", here, begin)) for begin in begins]
                self.decode(code.math("add", row, first), item, follows, places, turn_rows)

            code.loop(0, TILE_ROWS, turn_rows, some)

        code.loop(start, stop, unit, decode)
        for first in range(0, self.n_groups, 2):
            some = range(first, min(first + 2, self.n_groups))
            step = DOT_SUMS // len(some)

            def rows(number, _, some=some, step=step):
                line = code.math("shl", number, 6)
                places = [
                    code.at(code.at(sums, line), group * TILE_BYTES + 64 * n)
                    for group in some
                    for n in range(step)
                ]
                found = [code.load(FLOATS, place, align=64) for place in places]
                for half, at in enumerate(halves):
                    weights = code.at(self.tiles, code.math("add", line, at))
                    in_columns = self.in_columns(start, half)
                    columns = [code.at(self.xs[group], in_columns) for group in some]
                    found = self._dots(found, weights, columns, n_bytes)
                for place, value in zip(places, found, strict=True):
                    code.store(FLOATS, value, place)

            code.loop(0, TILE_ROWS, step, rows)

    def _dots(self, found, weights, columns, n_bytes):
        """The sums of some rows and groups after the products of all tiles of a half."""
        code, n_rows = self.code, len(found) // len(columns)

        def step(at, found):
            found, tile = list(found), code.at(weights, at)
            for pair in range(TILE_INPUTS // 2):
                here = code.math("add", at, 64 * pair)
                inputs = [code.load(PAIRS, some, here, align=64) for some in columns]
                for row in range(n_rows):
                    both = code.spread(code.load("float", tile, 64 * row + 4 * pair, align=4))
                    both = code.let(f"bitcast {FLOATS} {both} to {PAIRS}")
                    for number, some in enumerate(inputs):
                        at_sum = number * n_rows + row
                        words = f"{FLOATS} {found[at_sum]}, {PAIRS} {some}, {PAIRS} {both}"
                        dots = f"call {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({words})"
                        found[at_sum] = code.let(dots)
            return found

        return code.loop(0, n_bytes, TILE_BYTES, step, found)


# All eight tiles have 16 rows of 64 bytes: palette 1, 15 bytes of no use, bytes of a row, rows.
_CONFIG = ", ".join(f"i8 {n}" for n in [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
WIDE_DECLARATIONS = f"""
@config = private constant [64 x i8] [{_CONFIG}], align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.sttilecfg(ptr)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({FLOATS}, {PAIRS}, {PAIRS})
"""
