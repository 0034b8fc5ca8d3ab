"""How codes of 4 bits or fewer become weights: by a table in a register with AVX-512, else by
arithmetic or by choosing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jlayer.cores.sums import every, every_float, spelled
from jlayer.cores.text import FLOATS, INTS, LANES, Function

# Codes as integers, in 16 lanes -> their weights.
Decode = Callable[[str], str]


def numbers(values) -> str:
    """Integers, as a constant."""
    return f"<{', '.join(f'i32 {value}' for value in values)}>"


def floats(values) -> str:
    """Floats, as a constant."""
    return f"<{', '.join(f'float {spelled(value)}' for value in values)}>"


def looked_up(code: Function, codes: str, table: str) -> str:
    """What each code stands for: `table` has a number for each of 16. With AVX-512 alone."""
    kinds = f"{FLOATS} {table}, {INTS} {codes}"  # only the low 4 bits of a lane count
    return code.let(f"call {FLOATS} @llvm.x86.avx512.permvar.sf.512({kinds})")


def evenly(code: Function, mask: int, scale: str, minimum: str, *, has_avx512: bool) -> Decode:
    """The weights of codes, of the bits in `mask` alone: the code times `scale`, plus `minimum`,
    rounded once. Both are numbers in all lanes."""
    if has_avx512:
        table = code.fma(floats([n & mask for n in range(16)]), scale, minimum)
        return lambda codes: looked_up(code, codes, table)

    def weights(codes):
        number = code.let(f"sitofp {INTS} {code.math('and', codes, every(mask), INTS)} to {FLOATS}")
        return code.fma(number, scale, minimum)

    return weights


def by_level(
    code: Function, levels: Sequence[float], scale: str | None, *, has_avx512: bool
) -> Decode:
    """The level of each code of 4 bits, times a scale if there is one."""
    if has_avx512:
        table = times(code, floats(levels), scale)
        return lambda codes: looked_up(code, codes, table)

    def chosen(codes):
        left, kind = [every_float(level) for level in levels], f"<{LANES} x i1>"
        for bit in range(4):
            shifted = code.math("shl", codes, every(31 - bit), INTS)
            is_set = code.let(f"icmp slt {INTS} {shifted}, zeroinitializer")
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [
                code.let(f"select {kind} {is_set}, {FLOATS} {odd}, {FLOATS} {even}")
                for even, odd in pairs
            ]
        return times(code, left[0], scale)

    return chosen


def times(code: Function, numbers: str, scale: str | None) -> str:
    """Numbers times a scale, if there is one."""
    return numbers if scale is None else code.math("fmul", numbers, scale, FLOATS)
