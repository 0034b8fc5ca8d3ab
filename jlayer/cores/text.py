"""Functions written in LLVM's language, with Python as the macro language."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LANES = 16
FLOATS, INTS = f"<{LANES} x float>", f"<{LANES} x i32>"


class Function:
    """One function that returns nothing, as it is written.

    Values are names or constants as LLVM spells them; `let` gives the result of an instruction a
    name. Numbers are i64 unless the instruction says otherwise.
    """

    def __init__(self, name: str, arguments: Sequence[tuple[str, str]]):
        words = ", ".join(f"{kind} %{argument}" for kind, argument in arguments)
        self._lines = [f"define void @{name}({words}) nounwind {{", "entry:"]
        self._block, self._n_names = "entry", 0

    def text(self) -> str:
        """The whole function; nothing may be added after."""
        return "\n".join([*self._lines, "  ret void", "}"])

    def do(self, instruction: str) -> None:
        self._lines.append(f"  {instruction}")

    def let(self, instruction: str) -> str:
        name = self._name("%v")
        self.do(f"{name} = {instruction}")
        return name

    def at(self, pointer: str, n_bytes: str | int) -> str:
        """The pointer moved on."""
        return self.let(f"getelementptr i8, ptr {pointer}, i64 {n_bytes}")

    def load(self, kind: str, pointer: str, n_bytes: str | int = 0, *, align: int = 1) -> str:
        return self.let(f"load {kind}, ptr {self.at(pointer, n_bytes)}, align {align}")

    def store(self, kind: str, value: str, pointer: str) -> None:
        """To a place that lies on a cache line."""
        self.do(f"store {kind} {value}, ptr {pointer}, align 64")

    def load_tile(self, number: int, pointer: str, stride: str | int = 64) -> None:
        """16 lines of 64 bytes into a tile register. `stride`: bytes from a line to the next."""
        self.do(f"call void @llvm.x86.tileloadd64(i8 {number}, ptr {pointer}, i64 {stride})")

    def store_tile(self, number: int, pointer: str) -> None:
        self.do(f"call void @llvm.x86.tilestored64(i8 {number}, ptr {pointer}, i64 64)")

    def add_tiles(self, sums: int, weights: int, columns: int) -> None:
        """Adds the products of two tile registers to one."""
        self.do(f"call void @llvm.x86.tdpbf16ps(i8 {sums}, i8 {weights}, i8 {columns})")

    def math(self, operation: str, left: str | int, right: str | int, kind: str = "i64") -> str:
        return self.let(f"{operation} {kind} {left}, {right}")

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c of vectors."""
        arguments = ", ".join(f"{FLOATS} {value}" for value in (a, b, c))
        return self.let(f"call {FLOATS} @llvm.fma.v{LANES}f32({arguments})")

    def spread(self, value: str, kind: str = "float") -> str:
        """A number in all lanes."""
        lanes = f"<{LANES} x {kind}>"
        one = self.let(f"insertelement {lanes} poison, {kind} {value}, i32 0")
        zeros = f"{INTS} zeroinitializer"
        return self.let(f"shufflevector {lanes} {one}, {lanes} poison, {zeros}")

    def turned(self, vectors: Sequence[str]) -> list[str]:
        """Rows become columns, of 16 vectors: four times the first half's lanes go between those of
        the second half."""
        vectors, half = list(vectors), LANES // 2
        while half:
            mixed = []
            for a, b in zip(vectors[: LANES // 2], vectors[LANES // 2 :], strict=True):
                for first in (0, LANES // 2):
                    pairs = ((lane, lane + LANES) for lane in range(first, first + LANES // 2))
                    lanes = ", ".join(f"i32 {lane}" for pair in pairs for lane in pair)
                    words = f"{FLOATS} {a}, {FLOATS} {b}, {INTS} <{lanes}>"
                    mixed.append(self.let(f"shufflevector {words}"))
            vectors, half = mixed, half // 2
        return vectors

    def totals(self, vectors: Sequence[str]) -> list[str]:
        """The sum of the lanes of each of 16 vectors or a smaller power of two, as floats.

        Two vectors at a time become one of half the lanes each, until a lane is a sum.
        """
        count, left, width = len(vectors), list(vectors), LANES
        while width > 1:
            if len(left) == 1:
                left = [left[0], "poison"]
            pairs = zip(left[::2], left[1::2], strict=True)
            left, width = [self._halved(*pair) for pair in pairs], width // 2
        at = range(count)
        return [self.let(f"extractelement {FLOATS} {left[0]}, i32 {lane}") for lane in at]

    def _halved(self, a, b):
        """The sums of neighbours: first those of `a`, then those of `b`."""
        parts = []
        for odd in range(2):
            lanes = ", ".join(f"i32 {2 * lane + odd}" for lane in range(LANES))
            words = f"{FLOATS} {a}, {FLOATS} {b}, <{LANES} x i32> <{lanes}>"
            parts.append(self.let(f"shufflevector {words}"))
        return self.math("fadd", *parts, FLOATS)

    def smaller(self, left: str | int, right: str | int) -> str:
        return self.let(f"call i64 @llvm.smin.i64(i64 {left}, i64 {right})")

    def prefetch(self, pointer: str, n_bytes: str | int, *, locality: int = 3) -> None:
        """`locality`: 3 brings a line into the nearest cache, 2 into the next one."""
        place = self.at(pointer, n_bytes)
        self.do(f"call void @llvm.prefetch.p0(ptr {place}, i32 0, i32 {locality}, i32 1)")

    def loop(
        self,
        first: str | int,
        end: str | int,
        step: int,
        body: Callable[[str, list[str]], list[str] | None],
        carried: Sequence[str] = (),
    ) -> list[str]:
        """For i from `first` while i < `end`: body(i, vectors) -> the vectors for the next turn, if
        there are some.

        `carried`: the vectors at first. Returns those after the last turn.
        """
        head, inside, done = (self._name(word) for word in ("head", "body", "done"))
        index, following = self._name("%i"), self._name("%i")
        values = [self._name("%c") for _ in carried]
        before = self._block
        self.do(f"br label %{head}")
        place = len(self._lines)
        self._begin(inside)
        results = body(index, values) or ()
        self.do(f"{following} = add i64 {index}, {step}")
        latch = self._block
        self.do(f"br label %{head}")
        opening = [f"{head}:", f"  {index} = phi i64 [{first}, %{before}], [{following}, %{latch}]"]
        for value, start, result in zip(values, carried, results, strict=True):
            phi = f"phi {FLOATS} [{start}, %{before}], [{result}, %{latch}]"
            opening.append(f"  {value} = {phi}")
        more = self._name("%m")
        opening.append(f"  {more} = icmp slt i64 {index}, {end}")
        opening.append(f"  br i1 {more}, label %{inside}, label %{done}")
        self._lines[place:place] = opening
        self._begin(done)
        return values

    def _begin(self, block):
        self._lines.append(f"{block}:")
        self._block = block

    def _name(self, start):
        self._n_names += 1
        return f"{start}{self._n_names}"


DECLARATIONS = f"""
declare {FLOATS} @llvm.fma.v{LANES}f32({FLOATS}, {FLOATS}, {FLOATS})
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <64 x i8> @llvm.umax.v64i8(<64 x i8>, <64 x i8>)
declare {FLOATS} @llvm.x86.avx512.permvar.sf.512({FLOATS}, {INTS})
"""
