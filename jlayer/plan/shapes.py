"""The input shapes of a run.

They are taken from short lists, so a model of 80 layers, a long prompt and a thousand tokens
compile no more programs than a model of two layers and a short prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

# One column is slow on a CPU: XLA then multiplies at a few percent of its speed.
LEAST_COLUMNS = 2
CHUNK_TOKENS = (LEAST_COLUMNS, 8, 64, 512)
MIN_CAPACITY = 64
# Above this, capacity grows in steps: doubling the cache of a 70B model would cost gigabytes.
CAPACITY_STEP = 1024


@dataclass(frozen=True)
class RunShape:
    """The request of a run.

    `batch`: sequences. `longest`: the most tokens of a sequence that enter in one forward pass.
    `context`: the most positions of a sequence. `all_logits`: logits for every token, not only the
    last; `single_array`: as one host array. `sweeps`: about how many forward passes it will take.
    """

    batch: int = 1
    longest: int = 1
    context: int = 1
    all_logits: bool = False
    single_array: bool = False
    sweeps: int = 1

    def shapes(self, most: int = CHUNK_TOKENS[-1]) -> Shapes:
        """The input shapes of its longest forward pass, with at most `most` tokens a chunk."""
        sizes = chunks(self.longest, most)
        return Shapes(
            batch=self.batch,
            capacity=capacity_for(self.context),
            chunk=max(sizes),
            n_columns=sum(sizes),
            n_chunks=len(sizes),
            all_logits=self.all_logits,
            single_array=self.single_array,
        )


@dataclass(frozen=True)
class Shapes:
    """The compiled shapes of a run.

    `capacity`: cached positions of a sequence. `n_columns`: tokens of a sequence in its longest
    forward pass, padding included. `chunk`: the most of them that go through a tile at once.
    `n_chunks`: the number of chunks.
    """

    batch: int
    capacity: int
    chunk: int
    n_columns: int
    n_chunks: int = 1
    all_logits: bool = False
    single_array: bool = False


def chunks(n_tokens: int, most: int = CHUNK_TOKENS[-1]) -> tuple[int, ...]:
    """Splits `n_tokens` columns into chunks; the sizes are from CHUNK_TOKENS, up to `most`.

    Padding costs arithmetic, and every chunk a dispatch. So a rest of up to half a size is split
    into smaller chunks; a larger rest is padded to the size.
    """
    sizes, rest = [], n_tokens
    usable = [size for size in CHUNK_TOKENS if size <= most]
    for size, smaller in zip(reversed(usable), [*reversed(usable[:-1]), 0], strict=True):
        sizes += [size] * (rest // size)
        rest %= size
        if rest > (size // 2 if smaller >= 64 else smaller):
            return (*sizes, size)
    return tuple(sizes)


def capacity_for(n_positions: int) -> int:
    """`n_positions` rounded up to a capacity: doubled from MIN_CAPACITY, then in CAPACITY_STEP
    steps."""
    if n_positions > CAPACITY_STEP:
        return -(-n_positions // CAPACITY_STEP) * CAPACITY_STEP
    capacity = MIN_CAPACITY
    while capacity < n_positions:
        capacity *= 2
    return capacity
