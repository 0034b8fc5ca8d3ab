"""The input shapes of a run.

They are taken from short lists, so a model of 80 layers, a long prompt, a thousand tokens and many
lanes compile no more programs than a model of two layers and a short prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from jlayer.families.base import CacheSpec

# One row is slow on a CPU: XLA then multiplies at a few percent of its speed.
LEAST_ROWS = 2
# The rows of a chunk, padded: those that go through a tile at once.
CHUNK_ROWS = (LEAST_ROWS, 8, 16, 32, 64, 128, 256, 512)
# Lanes with fewer tokens than others share their chunk, if that has no more rows than this.
SHARED_ROWS = 128
# Rows of prompts that share a forward pass, where there is room for them: those who come together
# begin together.
PROMPT_ROWS = 2048
MIN_CAPACITY = 64
# Above this, capacity grows in steps: doubling the cache of a 70B model would cost gigabytes.
CAPACITY_STEP = 1024


@dataclass(frozen=True)
class Member:
    """`count` tokens of a lane in a chunk, from its token `first` in this forward pass on."""

    lane: int
    first: int
    count: int


@dataclass(frozen=True)
class Pane:
    """The rows of a chunk as `lanes` times `tokens` of each; the chunk is padded to `n_rows`."""

    lanes: int
    tokens: int
    members: tuple[Member, ...] = ()

    @property
    def n_rows(self) -> int:
        return rows_for(self.lanes * self.tokens)


@dataclass(frozen=True)
class RunShape:
    """The request of a run.

    `batch`: its lanes, a text each. `longest`: the most tokens of a lane that are to be computed at
    a time, as a prompt; they may take several forward passes. `context`: the most positions of a
    lane. `all_logits`: logits for every token, not only the last; `single_array`: as one host
    array. `scores`: logits for every token, which may take several forward passes. `sweeps`: about
    how many forward passes it will take. `entries`: the most cache entries of all its lanes
    together, and `rides`: the rows of all their prompts, padding included, where lanes share some.
    `nodes`: the most guessed tokens of all its lanes together that ride in one forward pass, as
    trees below the next tokens; each lane has an equal share. `vectors`: tokens of its prompts that
    are given as embeddings, which the host holds.
    """

    batch: int = 1
    longest: int = 1
    context: int = 1
    all_logits: bool = False
    single_array: bool = False
    scores: bool = False
    sweeps: int = 1
    entries: int | None = None
    rides: int | None = None
    nodes: int = 0
    vectors: int = 0

    def __post_init__(self):
        assert lane_rows(self) <= CHUNK_ROWS[-1], "the tree of a lane is in one chunk"

    @property
    def least_chunk(self) -> int:
        """The least rows of a chunk: those of a tree, which is in one chunk."""
        return rows_for(lane_rows(self))

    @lru_cache(maxsize=8192)  # a plan looks at those of every live run, many times  # noqa: B019
    def shapes(self, most: int = CHUNK_ROWS[-1], rows: int | None = None) -> Shapes:
        """Its input shapes, with at most `most` rows a chunk (at least `least_chunk`), and about
        `rows` a forward pass."""
        whole = rows is None or self.all_logits
        share = self.longest if whole else max(1, min(self.longest, rows // self.batch))
        prefill = _alike(self.batch, share, most)
        decode = _alike(self.batch, lane_rows(self), most, whole=True)
        n_rows, n_decode_rows = _rows_of(prefill), _rows_of(decode)
        n_chunks, prefills = sum(prefill.values()), -(-self.longest // share)
        if self.rides is not None and self.rides < self.batch * self.longest:
            n_rows = min(n_rows, self.rides)
            n_chunks = min(n_chunks, -(-n_rows // max(prefill)))
            prefills = -(-self.rides // n_rows)
        return Shapes(
            batch=self.batch,
            capacities=(capacity_for(self.context),),
            entries=(self.entries or self.batch * self.context) + self.nodes,
            chunk=max(*prefill, *decode),
            n_rows=max(n_rows, n_decode_rows),
            n_chunks=n_chunks,
            n_decode_chunks=sum(decode.values()),
            prefills=prefills,
            all_logits=self.all_logits or self.scores,
            single_array=self.single_array,
            nodes=self.nodes,
            vectors=self.vectors,
        )


@dataclass(frozen=True)
class Shapes:
    """The compiled shapes of a run, or of several that share forward passes.

    `batch`: lanes. `capacities`: entries of their tables. `entries`: cache entries of all lanes,
    guessed tokens included. `chunk`: the most rows of a chunk. `n_rows`: rows of its longest
    forward pass, padding included, in `n_chunks` chunks. `n_decode_chunks`: chunks of a pass with
    the next token, and the guessed ones, of each lane. `prefills`: forward passes for its prompts.
    `nodes`: the most guessed tokens in a pass. `vectors`: tokens that the host holds embeddings of.
    """

    batch: int
    capacities: tuple[int, ...]
    entries: int
    chunk: int
    n_rows: int
    n_chunks: int = 1
    n_decode_chunks: int = 1
    prefills: int = 1
    all_logits: bool = False
    single_array: bool = False
    nodes: int = 0
    vectors: int = 0

    @property
    def wanted(self) -> int:
        """The most rows of a pass whose logits are wanted, unless it is all: those of each lane's
        last token, and of every guessed one."""
        return self.batch + self.nodes

    @property
    def capacity(self) -> int:
        """The most entries of a table."""
        return max(self.capacities)


def together(runs: Sequence[Shapes], most: int = CHUNK_ROWS[-1], prompt_rows: int = 0) -> Shapes:
    """The shapes of runs that share forward passes: the longest of one, or prompts of several up to
    `prompt_rows`, beside the next token and the guessed ones of every lane."""
    if len(runs) == 1:
        return runs[0]
    lanes = sum(run.batch for run in runs)
    decode = tree_panes(tuple(lane_rows(run) for run in runs for _ in range(run.batch)), most)
    return replace(
        max(runs, key=lambda run: run.n_rows),
        batch=lanes,
        capacities=tuple(sorted({size for run in runs for size in run.capacities})),
        entries=sum(run.entries for run in runs),
        n_decode_chunks=len(decode),
        chunk=max(*(run.chunk for run in runs), *(pane.n_rows for pane in decode)),
        n_rows=sum(pane.n_rows for pane in decode)
        + max(
            *(run.n_rows for run in runs),
            min(prompt_rows, sum(run.n_rows for run in runs)),
        ),
        all_logits=any(run.all_logits for run in runs),
        single_array=any(run.single_array for run in runs),
        nodes=sum(run.nodes for run in runs),
        vectors=sum(run.vectors for run in runs),
    )


@lru_cache(maxsize=256)
def tree_panes(lengths: tuple[int, ...], most: int) -> list[Pane]:
    """The panes of lanes with trees of so many tokens, in chunks of at most `most` rows."""
    return pack(lengths, most, whole=range(len(lengths)))


def lane_rows(run: RunShape | Shapes) -> int:
    """The rows of a lane in a forward pass without prompts: its next token, and its share of the
    guessed ones."""
    return 1 + run.nodes // run.batch


def rows_for(n_rows: int) -> int:
    """`n_rows` rounded up to the rows of a chunk."""
    return next(size for size in CHUNK_ROWS if size >= n_rows)


def pack(
    lengths: Sequence[int],
    most: int = CHUNK_ROWS[-1],
    shared: int = SHARED_ROWS,
    *,
    whole: Collection[int] = (),
) -> list[Pane]:
    """Arranges lanes with so many tokens each in chunks of at most `most` rows.

    A long lane fills chunks of its own first; what is left of it shares one with others that are
    about as long, and with shorter ones in a chunk of up to `shared` rows: a second chunk takes
    longer than their padding. The chunks of a lane come in the order of its tokens. `whole`: lanes
    that are never split, since their tokens are a tree.
    """
    panes, rests = [], []
    for lane, n_tokens in enumerate(lengths):
        first = 0
        for size in () if lane in whole else chunks(n_tokens, most)[:-1]:
            panes.append(Pane(1, size, (Member(lane, first, size),)))
            first += size
        assert n_tokens - first <= most, "a tree is longer than a chunk"
        if n_tokens:
            rests.append(Member(lane, first, n_tokens - first))
    rests.sort(key=lambda member: -_tokens_for(member.count))  # stable: lanes stay in order
    groups = [
        (tokens, list(members))
        for tokens, members in groupby(rests, key=lambda member: _tokens_for(member.count))
    ]
    while groups:
        tokens, members = groups.pop(0)
        while groups:
            together_rows = power_of_two(len(members) + len(groups[0][1])) * tokens
            if together_rows > min(most, shared):
                break
            members += groups.pop(0)[1]
        at_once = max(1, most // tokens)
        for begin in range(0, len(members), at_once):
            some = tuple(sorted(members[begin : begin + at_once], key=lambda each: each.lane))
            panes.append(Pane(power_of_two(len(some)), tokens, some))
    return panes


class PackedRows:
    """Counts the rows of the panes that `pack` makes of more and more lanes, none of which shares a
    chunk with others of another length. `rank`: what must run before others is packed by itself."""

    def __init__(self, most: int = CHUNK_ROWS[-1]):
        self._most = most
        self._counts: Counter[tuple[int, int]] = Counter()  # lanes by rank and tokens of their rest
        self.n_rows = 0

    def beside(self, n_tokens: int, rank: int = 0) -> int:
        """The rows with one lane more."""
        full, tokens = _split(n_tokens, self._most)
        count = self._counts[rank, tokens]
        return self.n_rows + full + self._group(count + 1, tokens) - self._group(count, tokens)

    def add(self, n_tokens: int, rank: int = 0) -> None:
        self.n_rows = self.beside(n_tokens, rank)
        self._counts[rank, _split(n_tokens, self._most)[1]] += 1

    def _group(self, count, tokens):
        at_once = max(1, self._most // tokens)
        whole, rest = divmod(count, at_once)
        n_rows = whole * rows_for(power_of_two(at_once) * tokens)
        return n_rows + (rows_for(power_of_two(rest) * tokens) if rest else 0)


def _split(n_tokens, most):
    """(the rows of a lane's chunks of its own, the tokens of the pane with the rest of it)."""
    full = chunks(n_tokens, most)[:-1]
    return sum(map(rows_for, full)), _tokens_for(n_tokens - sum(full))


def _rows_of(panes: Counter) -> int:
    return sum(rows * count for rows, count in panes.items())


def _alike(n_lanes, n_tokens, most, *, whole=False):
    """Rows of a pane -> how many such panes `pack` makes of lanes with equally many tokens, which
    are split or `whole`."""
    full = () if whole else chunks(n_tokens, most)[:-1]
    panes = Counter({rows_for(size): full.count(size) * n_lanes for size in set(full)})
    tokens = _tokens_for(n_tokens - sum(full))
    assert tokens <= most, "a tree is longer than a chunk"
    at_once = max(1, most // tokens)
    for lanes, count in ((at_once, n_lanes // at_once), (n_lanes % at_once, 1)):
        if lanes and count:
            panes[rows_for(power_of_two(lanes) * tokens)] += count
    return panes


def chunks(n_tokens: int, most: int = CHUNK_ROWS[-1]) -> tuple[int, ...]:
    """Splits the tokens of a lane into chunks; the sizes are from CHUNK_ROWS, up to `most`.

    Padding costs arithmetic, and every chunk a dispatch. So a rest that is little more than half a
    size is split once; a larger one is padded.
    """
    whole, rest = divmod(n_tokens, most)
    sizes = [most] * whole
    if rest:
        padded = rows_for(rest)
        half = padded // 2
        if half >= 64 and rest <= half + half // 4:
            sizes += [half] if rest == half else [half, rows_for(rest - half)]
        else:
            sizes.append(padded)
    return tuple(sizes)


def _tokens_for(count: int) -> int:
    """The tokens of a pane for so many: a single one stays single."""
    return 1 if count == 1 else rows_for(count)


def power_of_two(count: int) -> int:
    """The power of two that is `count` or the next above it."""
    return 1 << (count - 1).bit_length()


def capacity_for(n_positions: int) -> int:
    """`n_positions` rounded up to a capacity: doubled from MIN_CAPACITY, then in CAPACITY_STEP
    steps."""
    if n_positions > CAPACITY_STEP:
        return -(-n_positions // CAPACITY_STEP) * CAPACITY_STEP
    capacity = MIN_CAPACITY
    while capacity < n_positions:
        capacity *= 2
    return capacity


SLOTS = 2  # of a lane, in layers with a state


@dataclass(frozen=True)
class PoolSizes:
    """The rows of the pools: of layers that see everything, and of those with each window of the
    model; and the slots of layers with a state."""

    n_rows: int = 0
    windows: tuple[int, ...] = ()
    slots: int = 0

    def of(self, cache: CacheSpec, windows: Sequence[int]) -> int:
        """Of layers with this cache; `windows`: all that the model has."""
        if cache.kind == "state":
            return self.slots
        return self.n_rows if cache.window is None else self.windows[windows.index(cache.window)]


def pool_sizes(load: Shapes, windows: Sequence[int], least: PoolSizes | None = None) -> PoolSizes:
    """The rows of the pools for these runs, at least as many as there are. A lane has two slots: a
    pass reads its state from one and writes the next to the other, so that one that fails has
    changed nothing."""
    n_rows = pool_rows(load.entries)

    # What lanes see, and what a pass writes: of a long prompt no more than a chunk sees, and the
    # chunk itself (`engine.pool.Window`).
    def rows(size):
        written = min(load.n_rows, load.batch * (size + load.chunk))
        return min(n_rows, pool_rows(load.batch * size + written))

    own = [rows(min(size, load.capacity)) for size in windows]
    slots = SLOTS * power_of_two(load.batch)
    if least is None or not least.n_rows:
        return PoolSizes(n_rows, tuple(own), slots)
    both = tuple(map(max, own, least.windows))
    return PoolSizes(max(n_rows, least.n_rows), both, max(slots, least.slots))


def window_capacity(window: int, capacity: int) -> int:
    """The entries of a table for layers with a window: what a chunk's rows see of earlier ones."""
    return min(capacity, capacity_for(window))


def pool_rows(entries: int) -> int:
    """The rows of a pool for so many cache entries: steps of an eighth of the power of two below,
    and at least MIN_CAPACITY. So a pool that grows is compiled for few sizes."""
    step = max(MIN_CAPACITY, (1 << (max(entries, 1).bit_length() - 1)) // 8)
    return max(1, -(-entries // step)) * step
