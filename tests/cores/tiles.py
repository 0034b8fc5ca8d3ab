"""Intel's tiles in software, so that every processor with AVX-512's bfloat16 runs the kernels that
use them. One thread at a time: the eight registers are memory of a module."""

from jlayer.cores.cores import Compiler
from jlayer.cores.text import FLOATS, INTS, Function

# The instructions that are replaced, and their arguments: tile registers, a pointer, a stride.
ROWS, ROW_BYTES = 16, 64
TILE_BYTES = ROWS * ROW_BYTES
INSTRUCTIONS = ("ldtilecfg", "sttilecfg", "tileloadd64", "tilestored64", "tdpbf16ps")
HIGH = f"<{', '.join(['i32 -65536'] * 16)}>"
SIXTEEN = f"<{', '.join(['i32 16'] * 16)}>"


class SoftwareTiles(Compiler):
    """A compiler for a processor that seems to have tiles."""

    def __init__(self, features=""):
        super().__init__(features)
        self.has_amx = True

    def compiled(self, text, *names):
        if "@llvm.x86.tileloadd64" in text:
            lines = [line for line in text.splitlines() if not line.startswith(_DECLARED)]
            text = "\n".join([*lines, _functions()])
            for name in INSTRUCTIONS:
                text = text.replace(f"@llvm.x86.{name}(", f"@soft_{name}(")
        return super().compiled(text, *names)


_DECLARED = tuple(f"declare void @llvm.x86.{name}(" for name in INSTRUCTIONS)


def _functions():
    move = [("i8", "number"), ("ptr", "memory"), ("i64", "stride")]
    load, store = Function("soft_tileloadd64", move), Function("soft_tilestored64", move)
    for code, is_load in ((load, True), (store, False)):
        tile = _tile(code, "%number")

        def row(number, _, code=code, tile=tile, is_load=is_load):
            here = code.at(tile, code.math("mul", number, ROW_BYTES))
            there = code.at("%memory", code.math("mul", number, "%stride"))
            source, target = (there, here) if is_load else (here, there)
            code.do(f"store {INTS} {code.load(INTS, source)}, ptr {target}, align 1")

        code.loop(0, ROWS, 1, row)
    nothing = [f"define void @soft_{name}(ptr %at) {{\n  ret void\n}}" for name in INSTRUCTIONS[:2]]
    tiles = f"@tiles = internal global [{8 * TILE_BYTES} x i8] zeroinitializer, align 64"
    return "\n".join([tiles, *nothing, load.text(), store.text(), _dots()])


def _dots():
    """sums[m, n] += a[m, 2 k] * b[k, 2 n] + a[m, 2 k + 1] * b[k, 2 n + 1]."""
    names = ("sums", "a", "b")
    code = Function("soft_tdpbf16ps", [("i8", name) for name in names])
    sums, a, b = (_tile(code, f"%{name}") for name in names)

    def row(m, _):
        at = code.math("mul", m, ROW_BYTES)
        place = code.at(sums, at)

        def pair(k, found):
            both = code.load("i32", a, code.math("add", at, code.math("shl", k, 2)))
            left = _two(code, code.spread(both, "i32"))
            right = _two(code, code.load(INTS, b, code.math("mul", k, ROW_BYTES)))
            for one, other in zip(left, right, strict=True):
                found = [code.fma(one, other, found[0])]
            return found

        (total,) = code.loop(0, ROWS, 1, pair, [code.load(FLOATS, place)])
        code.store(FLOATS, total, place)

    code.loop(0, ROWS, 1, row)
    return code.text()


def _two(code, pairs):
    """The first and the second numbers of 16 pairs of bfloat16, as floats."""
    first = code.math("shl", pairs, SIXTEEN, INTS)
    second = code.math("and", pairs, HIGH, INTS)
    return [code.let(f"bitcast {INTS} {some} to {FLOATS}") for some in (first, second)]


def _tile(code, number):
    at = code.math("mul", code.let(f"zext i8 {number} to i64"), TILE_BYTES)
    return code.at("@tiles", at)
