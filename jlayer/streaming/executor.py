"""Executes the schedule: here the path of a token and the path of a weight cross.

Handles tiles, slots and steps, not models or tokens. The caller passes a function that uses a
tile's weights: (tile, arrays) -> an output that can be waited for. Another one has the host's cores
multiply a tile where it lies, in the background.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType

import jax
import numpy as np

from jlayer.checkpoint.digest import Checks
from jlayer.checkpoint.store import Store
from jlayer.errors import JlayerError, StorageError
from jlayer.interrupts import deferred
from jlayer.plan.experts import NO_EXPERTS, ExpertRooms, passing
from jlayer.plan.machine import PLATFORMS
from jlayer.plan.tiles import Tier, Tile
from jlayer.streaming.asked import CachesOnHost, Waitable
from jlayer.streaming.cached import PageCache
from jlayer.streaming.devices import Devices
from jlayer.streaming.driver import Driver
from jlayer.streaming.experts import ExpertStream, choices
from jlayer.streaming.guard import PRODUCTS, WEIGHTS, Guard, patience_s
from jlayer.streaming.incoming import Incoming
from jlayer.streaming.schedule import sweeps
from jlayer.streaming.steps import (
    Decision,
    Drop,
    Fetch,
    Free,
    Keep,
    Put,
    PutCache,
    Read,
    Run,
    Take,
)
from jlayer.streaming.turns import Room, Rooms
from jlayer.streaming.watch import Totals, Watch


class Executor:
    """Streams a model's tiles to `devices`, sweep after sweep.

    `tiers`: where each tile is kept. `ring`: number of host slots. `ahead`: tiles on the device at
    a time besides those that stay there. `attending`: see `schedule.sweeps`. A tile that is read
    for the first time is checked against `checks`, in a reader thread. `page_cache`: how it is
    used; what is read in every sweep is never left there. `experts`: how many experts each layer
    that has some keeps on the device and in host memory; what passes of the others has slots of
    its own (`plan.experts.passing`). `repeats`: a tile that comes again in a sweep -> the first
    that is the same; where it stays in host memory, it is there once. `again`: as of the
    schedule. `end`: in place of the watch's.
    """

    def __init__(
        self,
        store: Store,
        tiles: tuple[Tile, ...],
        tiers: tuple[Tier, ...],
        *,
        ring: int,
        ahead: int,
        devices: Devices,
        totals: Totals,
        watch: Watch,
        checks: Checks,
        attending: tuple[int, ...] = (),
        page_cache: PageCache = PageCache.TAKE,
        experts: ExpertRooms = NO_EXPERTS,
        repeats: Mapping[int, int] = MappingProxyType({}),
        again: Mapping[int, int] = MappingProxyType({}),
        end: Callable[[str], None] | None = None,
    ):
        self.tiles, self._repeats, self._again = tiles, repeats, again
        self._devices, self._has_link = devices, PLATFORMS[devices.platform].has_link
        self.totals, self._watch = totals, watch
        self._tiers, self._ring, self._ahead = tiers, ring, ahead
        self._attending, self._caches = attending, None
        self._expert_rooms = experts
        of_experts = (tile for tile in tiles if tile.expert is not None)
        self._expert_ahead = passing(of_experts, ahead)
        self._expert_ring = self._expert_ahead and self._expert_ahead + ring - ahead
        self.experts = self._expert_stream()
        has_rooms = self._has_link and self.experts is not None and len(devices) == 1
        self._rooms = Rooms(devices.put, Driver()) if has_rooms else None
        self.incoming = Incoming(
            store,
            tiles,
            ring=ring,
            expert_ring=self._expert_ring,
            pin=self._has_link,
            checks=checks,
            totals=totals,
            watch=watch,
            page_cache=page_cache,
            repeats=repeats,
            again=again,
        )
        self._keep(tiers)
        self._on_device: dict[int, object] = {}  # tile -> its arrays on the device, or its room
        self._passing: set[int] = set()  # the tiles on the device that do not stay
        self._outputs: dict[int, object] = {}  # passing tile -> the output of its run
        self._hosted: frozenset[int] = frozenset()  # the tiles that the host's cores multiply
        self._n_tiles = len(tiles)  # how many a sweep goes through
        self._multiplying: list[Waitable] = []  # of this sweep
        self._last_output = None
        self._lists = None  # the next lists of steps; None: no read or put is in progress
        self._refusal: JlayerError | None = None
        compiles = partial(getattr, watch, "n_compiling")
        self.guard = Guard(self._under_way, end or watch.end, is_excused=compiles)
        self._is_closed = False

    def retier(
        self,
        tiers: tuple[Tier, ...],
        attending: tuple[int, ...] = (),
        experts: ExpertRooms = NO_EXPERTS,
    ) -> None:
        """Changes the tiers of the tiles, where caches are, and how many experts are kept, from the
        next sweep on.

        A tile of the host tier that stays there is not read again, nor is an expert.
        """
        self._abandon()
        self._keep(tiers)
        self._tiers, self._attending = tiers, attending
        if self.experts and experts != self._expert_rooms:
            self._expert_rooms = experts
            self.incoming.drop_rooms(self.experts.resize(experts))
            self.experts.restart(self.incoming.there)

    def _keep(self, tiers):
        """Of experts the schedule decides which stay."""
        certain = [n for n, tile in enumerate(self.tiles) if tile.expert is None]
        self.incoming.keep(
            (n for n in certain if tiers[n] is Tier.HOST and n not in self._repeats),
            read_once=(n for n in certain if tiers[n] is Tier.DEVICE),
        )

    def _expert_stream(self):
        found = choices(self.tiles)
        if not found:
            return None
        rooms = self._expert_rooms
        if not rooms.on_device:
            rooms = ExpertRooms((0,) * len(found), (0,) * len(found))
        return ExpertStream(
            found,
            rooms=rooms,
            ring=range(self._ring, self._ring + self._expert_ring),
            ahead=self._expert_ahead,
            totals=self.totals,
        )

    def refuse(self, error: JlayerError) -> None:
        """Makes a sweep in another thread fail with this error at its next step."""
        self._refusal = error

    @property
    def has_guesses(self) -> bool:
        """Whether there is room on the device for experts that are put by guess."""
        return self._expert_rooms.guessed > 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held for weights now."""
        return self.incoming.n_bytes

    @property
    def reads_directly(self) -> bool:
        return self.incoming.reads_directly

    def read_early(self) -> None:
        """Starts reading what will stay in host memory, until `fill`: nothing is put on the device
        yet, so programs can be compiled meanwhile."""
        if self._lists is None:
            self.incoming.read_early()

    def fill(self, hosted: frozenset[int] = frozenset(), n_tiles: int | None = None):
        """Starts the reads and puts that come before the first sweep, unless already started.
        `hosted`, `n_tiles`: see `sweep`."""
        n_tiles = len(self.tiles) if n_tiles is None else n_tiles
        if (hosted, n_tiles) != (self._hosted, self._n_tiles):
            if self._lists is not None:
                self._abandon()
            self._hosted, self._n_tiles = hosted, n_tiles
        if self._lists is None:
            self.incoming.begin()
            self._lists = sweeps(
                self._tiers[: self._n_tiles],
                ring=self._ring,
                ahead=self._ahead,
                in_place=(*self.incoming.there, *self._repeats),
                attending=self._attending,
                hosted=self._hosted,
                experts=self.experts,
                again=self._again,
            )
            with self._safely() as signals:
                self._interpret(next(self._lists), None, signals)

    def sweep(
        self,
        run: Callable[[Tile, object], object],
        caches: CachesOnHost | None = None,
        *,
        multiply: Callable[[Tile, dict, bool], Waitable] | None = None,
        hosted: frozenset[int] = frozenset(),
        n_tiles: int | None = None,
        decide: Callable[[Tile, Tile | None], Decision] | None = None,
        guesses: bool = False,
        run_together: Callable[[Sequence[Tile], Sequence], object] | None = None,
        n_rows: int = 1,
    ):
        """One sweep: a forward pass over all tiles in order; `run` uses each. `caches`: those that
        are in host memory, for the steps that move them; without it they stay there. `hosted`: the
        tiles that `multiply` (tile, arrays by leaf, whether they stay there) uses instead, as they
        lie in host memory. `n_tiles`: over so many of the first tiles alone, where no experts are
        decided. `decide`: (a layer's first tile with an expert, the same of the next layer if its
        experts are to be guessed) -> which are used; without it all of them are. `guesses`: whether
        guesses may be asked for. `run_together` uses experts that are one tile each, as many as one
        call does; without it `run` uses each. `n_rows`: that pass, for how long a device may take.

        After an error or an interrupt no read is in progress and no tile is on the device.
        """
        self.fill(hosted, n_tiles)
        self.guard.patience_s = self._patience_s(n_rows)
        self._caches, self._multiply, self._decide = caches, multiply, decide
        self._run_together = run_together
        self._multiplying.clear()
        if self.experts:
            self.experts.guesses = guesses and decide is not None
        with self._safely() as signals:
            self._interpret(next(self._lists), run, signals)
            self.incoming.check_unchanged()
        self.totals.sweeps += 1

    def _patience_s(self, n_rows):
        n_bytes = self._ahead * max(tile.n_bytes for tile in self.tiles)
        platform = "cpu" if self._hosted else self._devices.platform  # whose cores are waited for
        return patience_s(platform, n_bytes, n_rows, n_hosts=self._devices.n_hosts)

    def slot(self, number: int) -> np.ndarray:
        """The memory of a host slot, by number modulo the ring; only before `fill`."""
        assert self._lists is None
        return self.incoming.slot(number)

    def settle(self):
        """Waits for the reads in progress: the disk is then idle until the next sweep."""
        self.incoming.settle()

    @contextmanager
    def _safely(self):
        """Defers signals to the end of a step and cyclic garbage collection to the end of the
        sweep; after an error, abandons all work in progress."""
        collects = gc.isenabled()
        gc.disable()
        self.guard.restart()
        try:
            with deferred() as signals:
                try:
                    yield signals
                except BaseException:
                    self._abandon()
                    raise
        finally:
            if collects:
                gc.enable()

    def _interpret(self, steps, run, signals):
        decision = None
        with suppress(StopIteration):
            while True:
                step = steps.send(decision)
                signals.check()
                self._check_refusal()
                decision = self._told(step, run, signals)

    def _told(self, step, run, signals):
        """Executes a step, and tells who watches; returns the decision that it asks for."""
        if self._watch.on_step:
            self._watch.on_step(step, self.tiles[step.tile])
        with self.guard.step(self.tiles[step.tile]):
            result = self._take(step, run, signals)
            if self._watch.on_taken:
                self._watch.on_taken(step, result)
        return result if isinstance(step, Fetch) else None

    def _under_way(self):
        """What devices may be at, for the guard, in the order in which it was asked of them: a tile
        is waited for by the products of those after it."""
        on_device, outputs = dict(self._on_device), dict(self._outputs)
        for tile, held in on_device.items():
            yield self.tiles[tile].name, WEIGHTS, held
            if tile in outputs:
                yield self.tiles[tile].name, PRODUCTS, outputs[tile]
        if self._last_output is not None:
            yield "the last tile", PRODUCTS, self._last_output

    def _take(self, step, run, signals):
        """Executes a step; returns its result for `Watch.on_taken`."""
        match step:
            case Read(tile, slot):
                return self.incoming.read(tile, slot)
            case Put(tile, _, stays, guessed):
                self._on_device[tile] = self._put(tile, stays or guessed, signals)
                if not stays:
                    self._note_passing(tile)
                return self._on_device[tile]
            case Drop(tile):
                self._drop(tile)
                self._passing.discard(tile)
            case Keep(tile):
                self._passing.remove(tile)
            case Fetch(tile, guess):
                if self._decide is None:
                    return Decision(range(len(self.experts.choices[tile].tiles)))
                following = None if guess is None else self.tiles[guess]
                decision = self._decide(self.tiles[tile], following)
                if self._rooms:
                    self._rooms.note_end()  # what was decided hangs on all that ran before
                return decision
            case Run(tile, "host"):
                self._outputs[tile] = self._run_on_host(tile, signals)
                return self._outputs[tile]
            case Run(first, _, also):
                tiles = (first, *also)
                self._last_output = self._use(tiles, run)
                self._outputs |= {
                    tile: self._last_output for tile in tiles if tile in self._passing
                }
                return self._last_output
            case PutCache(tile):
                if self._caches is not None:
                    self.totals.put_bytes += self._caches.put(self.tiles[tile].layer)
            case Take(tile):
                if self._caches is not None:
                    self._caches.take(self.tiles[tile].layer)
            case Free(tile, _, None):
                jax.block_until_ready(self._on_device[tile])
            case Free(tile, slot, after):
                # Wait for the output, not the transfer: on the CPU the slot itself is the weight.
                output = self._outputs.pop(after)
                if tile in self._hosted:
                    output.wait()
                    return
                if isinstance(self._on_device[tile], Room):
                    if slot is not None:
                        jax.block_until_ready(self._on_device[tile])
                else:
                    jax.block_until_ready(output)
                self._drop(tile)
                self._passing.remove(tile)

    def _use(self, tiles, run):
        """Has tiles used on the device: several in one call, if there is one for that."""
        used = [self.tiles[tile] for tile in tiles]
        held = [self._on_device[tile] for tile in tiles]
        in_rooms = isinstance(held[0], Room)
        arrays = self._rooms.arrays_of(held) if in_rooms else held
        if self._run_together and used[0].is_whole_expert:
            output = self._run_together(used, arrays)
        else:
            output = [run(*pair) for pair in zip(used, arrays, strict=True)][-1]
        if in_rooms:
            self._rooms.ran(held, output)
        return output

    def _drop(self, tile):
        held = self._on_device.pop(tile)
        if isinstance(held, Room):
            self._rooms.give_back(held)

    def _run_on_host(self, tile, signals):
        self.totals.host_product_bytes += self.tiles[tile].n_bytes
        arrays = self.incoming.by_leaf(tile, self._while_waiting(signals))
        result = self._multiply(self.tiles[tile], arrays, self.incoming.stays(tile))
        self._multiplying.append(result)
        return result

    def _while_waiting(self, signals):
        def check():
            self.guard.go_on()  # it is the disk that is late
            signals.check()
            self._check_refusal()

        return check

    def _put(self, tile, outlives_slot, signals):
        views = self.incoming.wait_for(tile, self._while_waiting(signals))
        if outlives_slot and not self._has_link:
            # Without a link the arrays would be views of the slot, which is written again.
            views = {leaf: array.copy() for leaf, array in views.items()}
        self.totals.put_bytes += self.tiles[tile].n_bytes
        if self._rooms and self.tiles[tile].expert is not None:
            return self._rooms.fill(views)
        return self._devices.put_tile(self.tiles[tile], views)

    def _note_passing(self, tile):
        self._passing.add(tile)
        totals = self.totals
        totals.most_live_tiles = max(totals.most_live_tiles, len(self._passing))
        n_bytes = sum(self.tiles[each].n_bytes for each in self._passing)
        totals.most_live_bytes = max(totals.most_live_bytes, n_bytes)

    def _check_refusal(self):
        if self._refusal is not None:
            raise self._refusal

    def _abandon(self):
        self.incoming.stop()
        # Dispatched runs may still use a slot: wait before a slot is written again. Their failure
        # is already being reported.
        for result in self._multiplying:
            result.leave()
        self._multiplying.clear()
        with suppress(StorageError), self.guard.step("what is under way"):
            held = list(self._on_device.values())
            jax.block_until_ready((self._last_output, held))
            if self._rooms:
                self._rooms.clear(each for each in held if isinstance(each, Room))
        self._on_device.clear()
        self._passing.clear()
        self._outputs.clear()
        self._last_output = None
        self._lists = None
        if self.experts:
            self.experts.restart(self.incoming.there)

    def close(self):
        """Stops the reader threads and closes the files. The executor cannot be used afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        self._abandon()
        self.guard.close()
        self.incoming.close()
        if self._rooms:
            self._rooms.close()
