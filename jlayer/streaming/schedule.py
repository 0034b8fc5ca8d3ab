"""A plan as the steps of each sweep: one forward pass over all layers.

The executor interprets them; they can also be summed, drawn and tested. A fixed set of tiles
stays on the device and another in host memory; the others pass through a ring of host slots in
every sweep. Reads run ahead while the ring has free slots, puts while the device has room. While a
tile runs, the next tiles are being read and put; after the last tile follow those of the next
sweep. The first sweep also fills the fixed sets.

Some tiles may be multiplied where they lie, by the host's cores, beside the device: these are read
as the others are, and never put.

Which experts a layer uses is decided as a sweep goes: see `experts`. While the decision is waited
for, what is certain is on its way: the tiles after the experts. Where there is nothing of that,
experts that the layer is guessed to use are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from jlayer.plan.tiles import Tier
from jlayer.streaming.experts import ExpertStream, followers
from jlayer.streaming.steps import Decision, Fetch, Free, Put, PutCache, Read, Run, Step, Take

# With so many tiles on the device at a time, the next one is called before one is waited for: that
# takes the host as long as a small tile takes to cross the link.
MANY_AHEAD = 3


def sweeps(
    tiers: Sequence[Tier],
    *,
    ring: int,
    ahead: int,
    in_place: Collection[int] = (),
    attending: Sequence[int] = (),
    hosted: Collection[int] = (),
    experts: ExpertStream | None = None,
    again: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Generator[Step, Decision | None]]:
    """Yields the steps before the first sweep, then the steps of each sweep, without end; those of
    a sweep are to be taken to their end, and each in its turn.

    A Fetch asks for a Decision, which is sent back.

    `ring`: number of host slots. `ahead`: the most tiles that are put before they run, the running
    one included. `in_place`: tiles of the host tier that are already in host memory. `attending`:
    where caches are in host memory, the tile of each layer whose run uses its cache. There are two
    caches on the device at a time: one in use, and the next one on its way. `hosted`: the tiles
    that the host's cores multiply, none of them of the device tier. `experts`: their tiles have no
    tier and no slot of the ring. `again`: a tile that passes -> one before it with the same bytes,
    whose slot is kept for it, so that it is not read; the ring has more slots than are kept for
    tiles at any moment.
    """
    state = _Stream(
        *(tiers, experts),
        ring=ring,
        ahead=ahead,
        in_place=in_place,
        attending=attending,
        hosted=hosted,
        again=again,
    )
    yield from_list(state.begin())
    while True:
        yield state.sweep()


def from_list(steps: Sequence[Step]) -> Generator[Step, Decision | None]:
    """The steps of a list, which asks for no decision."""
    yield from steps


class _Stream:
    """The state of the stream: the tiles read, put and freed so far, in endless order.

    A move is one trip of a tile to where it is multiplied; moves are numbered.
    """

    def __init__(self, tiers, experts, *, ring, ahead, in_place, attending, hosted, again):
        self._tiers, self._ahead, self._ring = list(tiers), ahead, ring
        self._experts = experts
        self._choices = experts.choices if experts else {}
        on_link = [n for n, tier in enumerate(tiers) if tier is not Tier.DEVICE and n not in hosted]
        is_free = experts and not attending  # caches from host memory take the link
        self._followers = followers(self._choices.values(), on_link) if is_free else {}
        decided = {n for choice in self._choices.values() for n in range(choice.first, choice.end)}
        self._certain = [i for i in range(len(self._tiers)) if i not in decided]
        self._passing = [i for i in self._certain if self._tiers[i] is not Tier.DEVICE]
        self._in_place = frozenset(in_place)
        self._hosted = frozenset(hosted)
        # Tile that uses a cache -> the next one that does; None: the first one.
        self._next_cache = dict(pairwise((None, *attending)))
        self._attending = frozenset(attending)
        self._free = deque(range(ring))
        self._slots: dict[int, int | None] = {}  # move -> its slot, from read to free
        self._again, self._kept_for = again, frozenset(again.values())
        self._kept: dict[int, int] = {}  # tile that was put -> its slot, kept for a later one
        self._moves = self._all_moves()
        self._to_read: deque[tuple[int, int]] = deque()  # (move, tile) seen, not yet read
        self._to_put: deque[tuple[int, int]] = deque()  # (move, tile) seen, not yet put
        self._on_device: deque[tuple[int, int]] = deque()  # (move, tile) put, not yet called
        self._ran: deque[tuple[int, int]] = deque()  # (move, tile) called, not yet freed
        self._on_host: deque[tuple[int, int]] = deque()  # (move, tile) of the host, not yet run

    def _all_moves(self) -> Iterator[tuple[int, int, bool]]:
        """Yields (number, tile, whether it is read) of every move, in order."""
        number, first = 0, True
        while self._passing:
            for tile in self._passing:
                is_kept = self._tiers[tile] is Tier.HOST
                in_place = is_kept and (not first or tile in self._in_place)
                in_place = in_place or tile in self._again
                yield number, tile, not in_place
                number += 1
            first = False

    def begin(self):
        """The steps before the first sweep.

        Tiles that stay on the device are placed first, so that others leave no gaps between them.
        """
        return [*self._place_residents(), *self._read_ahead(), *self._put_ahead(self._ahead - 1)]

    def _place_residents(self):
        residents = [i for i in self._certain if self._tiers[i] is Tier.DEVICE]
        steps = [Read(tile, slot) for slot, tile in enumerate(residents[: self._ring])]
        for index, tile in enumerate(residents):
            slot = index % self._ring
            steps += [Put(tile, slot, stays=True), Free(tile, slot, after=None)]
            steps += [Read(later, slot) for later in residents[index + self._ring :][:1]]
        return steps

    def sweep(self):
        """The steps of a sweep, with what is read and put ahead of the next one."""
        yield from self._put_cache(None)
        tile = 0
        while tile < len(self._tiers):
            if tile in self._choices:
                guess = self._experts.to_guess(self._followers.get(tile))
                decision = yield Fetch(tile, guess)
                yield from self._experts.steps(tile, decision)
                tile = self._choices[tile].end
                continue
            if tile in self._hosted:
                yield from self._run_on_host(tile)
                tile += 1
                continue
            if self._tiers[tile] is Tier.DEVICE:
                yield from self._run(tile)
                tile += 1
                continue
            if not self._on_device or self._on_device[0][1] != tile:
                yield from self._put_ahead(1)  # in a ring of one slot it could not be put earlier
            yield from self._run(tile)
            after = tile + 1
            # The host's cores begin before anything waits for this tile.
            while after in self._hosted and self._tiers[after] is Tier.HOST:
                yield from self._run_on_host(after)
                after += 1
            yield from self._free_ran()  # those before it
            self._ran.append(self._on_device.popleft())
            yield from self._put_ahead(self._ahead)
            is_next = self._on_device and self._on_device[0][1] == after
            if self._ahead < MANY_AHEAD or not is_next:
                yield from self._free_ran()
            yield from self._read_ahead()
            tile = after
        if self._experts:
            yield from self._experts.end()

    def _free_ran(self):
        """Waits for the tiles that have been called, and frees them."""
        while self._ran:
            number, tile = self._ran.popleft()
            slot = self._slots.pop(number)
            slot = None if tile in self._kept_for else slot
            yield Free(tile, slot, after=tile)
            if slot is not None:
                self._free.append(slot)

    def _run(self, tile, on="device"):
        if tile not in self._attending:
            return [Run(tile, on)]
        return [Run(tile, on), Take(tile), *self._put_cache(tile)]

    def _run_on_host(self, tile):
        """The run of a tile where it lies; what was in a slot is freed after it."""
        steps = []
        if not self._on_host:
            self._next()
        number, queued = self._on_host[0]
        assert queued == tile, "moves are in order"
        if number not in self._slots:  # in a ring of few slots it could not be read earlier
            steps += self._read_ahead()
        self._on_host.popleft()
        slot = self._slots.pop(number)
        steps += self._run(tile, "host")
        if slot is not None:
            steps.append(Free(tile, slot, after=tile))
            self._free.append(slot)
        return steps + self._read_ahead()

    def _put_cache(self, after):
        """The step for the cache that is used next after that of tile `after`."""
        tile = self._next_cache.get(after)
        return [] if tile is None else [PutCache(tile)]

    def _next(self):
        """Queues one more move; False if no tile ever moves."""
        move = next(self._moves, None)
        if move is None:
            return False
        number, tile, is_read = move
        (self._on_host if tile in self._hosted else self._to_put).append((number, tile))
        if is_read:
            self._to_read.append((number, tile))
        elif tile not in self._again:
            self._slots[number] = None
        return True

    def _queue_a_put(self):
        """Queues moves until one is a put; less than a sweep ahead."""
        while not self._to_put and self._n_under_way < len(self._passing):
            if not self._next():
                return False
        return bool(self._to_put)

    def _read_ahead(self):
        """Reads while the ring has free slots, in order: no read overtakes an earlier one."""
        steps = []
        while self._to_read or self._look_for_a_read():
            number, tile = self._to_read[0]
            has_room = self._tiers[tile] is Tier.HOST  # it needs no slot
            if not has_room and not self._free:
                break
            self._to_read.popleft()
            self._slots[number] = None if has_room else self._free.popleft()
            steps.append(Read(tile, self._slots[number]))
        return steps

    def _look_for_a_read(self):
        """Queues moves until one needs a read; less than a sweep ahead, so that no tile is moved
        twice at a time."""
        while not self._to_read and self._n_under_way < len(self._passing):
            if not self._next():
                return False
        return bool(self._to_read)

    @property
    def _n_under_way(self):
        on_device = len(self._on_device) + len(self._ran)
        return len(self._to_put) + on_device + len(self._on_host)

    def _put_ahead(self, limit):
        """Puts until `limit` tiles are on the device, or until the next tile has no slot yet."""
        steps = []
        limit = min(limit, len(self._passing) - len(self._hosted))
        while len(self._on_device) + len(self._ran) < limit and (
            self._to_put or self._queue_a_put()
        ):
            number, tile = self._to_put[0]
            if tile in self._again:
                self._slots[number] = self._kept.pop(self._again[tile])
            if number not in self._slots:
                steps += self._read_ahead()
                if number not in self._slots:
                    break
            self._to_put.popleft()
            if tile in self._kept_for:
                self._kept[tile] = self._slots[number]
            steps.append(Put(tile, self._slots[number]))
            self._on_device.append((number, tile))
        return steps
