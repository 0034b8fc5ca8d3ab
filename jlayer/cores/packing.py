"""Columns as kernels for many of them take them: [groups of 16, pairs of inputs, 16, 2].

So a line of memory holds two inputs of 16 columns.
"""

from __future__ import annotations

from jlayer.cores.text import DECLARATIONS, FLOATS, LANES, Function

NAME = "pack"
COLUMNS = 16  # of a group, as many as a tile of sums has


def packed_shape(n_columns: int, width: int) -> tuple[int, ...]:
    """The shape of packed columns, bfloat16."""
    return -(-n_columns // COLUMNS), width // 2, COLUMNS, 2


def module() -> str:
    """The module with `pack` (the columns, bytes from one to the next, where they are packed, how
    many there are, and pairs of inputs of each): beyond the last column it stands again."""
    arguments = ("stride", "n_columns", "n_pairs")
    code = Function(NAME, [("ptr", "x"), ("ptr", "packed"), *(("i64", n) for n in arguments)])
    last = code.math("sub", "%n_columns", 1)
    group_bytes = code.math("mul", "%n_pairs", 4 * COLUMNS)

    def group(first, _):
        target = code.math("mul", code.math("lshr", first, 4), group_bytes)
        target = code.at("%packed", target)
        places = [code.smaller(code.math("add", first, n), last) for n in range(COLUMNS)]
        columns = [code.at("%x", code.math("mul", place, "%stride")) for place in places]

        def some(pair, _):
            at = code.math("shl", pair, 2)
            rows = code.turned([code.load(FLOATS, column, at) for column in columns])
            line = code.at(target, code.math("shl", pair, 6))
            for number, row in enumerate(rows):
                code.store(FLOATS, row, code.at(line, 64 * number))

        code.loop(0, "%n_pairs", LANES, some)

    code.loop(0, "%n_columns", COLUMNS, group)
    return DECLARATIONS + code.text()
