"""What a machine does without a forward pass around it, measured on all hosts of a model at the
same time: all weights moving, one layer with its weights on the devices, disks and links alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import jax

from jlayer.engine.batch import Part
from jlayer.engine.deciding import collected, decided, step
from jlayer.engine.device import link_speed
from jlayer.engine.home import Home
from jlayer.engine.messages import packed_parts
from jlayer.engine.sweep import Sweeper
from jlayer.interrupts import check
from jlayer.plan.tiles import Tier, Tile
from jlayer.streaming.devices import Devices
from jlayer.streaming.direct import disk_speed
from jlayer.streaming.executor import Executor

LEAST, MOST, ENOUGH_S = 3, 15, 0.6  # runs of a layer, and their seconds
ROUNDS = 3  # of the links together


def stream(executor: Executor) -> None:
    """A pass in which all weights move, and nothing is multiplied."""
    with step("stream"):
        executor.sweep(lambda tile, arrays: arrays)


def layer_seconds(engine: Home, executor: Executor, parts: Sequence[Part]) -> list[float]:
    """Seconds of the first layer, from its input to its output, again and again; before the first
    weight is read. `parts`: the chunks of a pass whose programs are compiled."""
    with step("layer", lambda: [packed_parts(parts)]):
        tiles = [tile for tile in executor.tiles if tile.layer == 0]
        arrays = _stand_ins(engine, executor, tiles)

        def run():
            return _run(engine.sweeper, executor, parts, tiles, arrays)

        run()  # what is done for the first time
        seconds, began = [], time.perf_counter()
        while decided("once more", lambda: _is_wanted(len(seconds), time.perf_counter() - began)):
            seconds.append(run())
            check()
        return seconds


def _is_wanted(count, spent):
    return count < LEAST or (count < MOST and spent < ENOUGH_S)


def _run(sweeper: Sweeper, executor, parts, tiles, arrays):
    passing = sweeper.begin(executor, parts)
    jax.block_until_ready([chunk.flow["hidden"] for chunk in passing])
    began = time.perf_counter()
    for tile, its_arrays in zip(tiles, arrays, strict=True):
        sweeper.advance(tile, its_arrays, passing)
    jax.block_until_ready([chunk.flow["hidden"] for chunk in passing])
    return time.perf_counter() - began


def _stand_ins(engine, executor, tiles):
    """Arrays for each tile, with the present contents of the slots.

    On the device each tile gets its own arrays while there is room, so that they are read from
    memory as weights are; then tiles of one shape share them.
    """
    plan, devices, last, stand_ins = engine.plan, engine.programs.devices, {}, []
    room = plan.device.slots_bytes + plan.tier_bytes(Tier.DEVICE)
    room -= sum({tile.signature: tile.n_bytes for tile in tiles}.values())
    for number, tile in enumerate(tiles):
        known = tile.signature in last
        # A CPU's arrays are the slots themselves.
        if not known or not devices.has_link or room >= tile.n_bytes:
            room -= tile.n_bytes if known else 0
            last[tile.signature] = _in_slot(devices, executor.slot(number), tile)
        stand_ins.append(last[tile.signature])
    return stand_ins


def _in_slot(devices: Devices, slot, tile: Tile):
    at = 0

    def take(struct):
        nonlocal at
        sharding, shape = struct.sharding or devices.everywhere, struct.shape
        if not sharding.is_fully_replicated:  # the other hosts have their own rows of it
            shape = (shape[0] // devices.n_hosts, *shape[1:])
        n_bytes = math.prod(shape) * struct.dtype.itemsize
        raw, at = slot[at : at + n_bytes], at + n_bytes
        return devices.put_own(raw.view(struct.dtype).reshape(shape), sharding)

    return jax.block_until_ready(jax.tree.map(take, devices.struct_of(tile)))


def lanes_of_hosts(engine: Home, files: Sequence[str]) -> list[dict]:
    """Of each host, in order, bytes/s: "disk", None where it is not measured; "links", each alone,
    and "together", empty and None for a CPU. All hosts measure at the same time. `files`: of the
    weights."""
    with step("lanes"):
        devices = engine.programs.devices
        collected("disks begin", None)
        found = {"disk": disk_speed(files), "links": [], "together": None}
        if devices.has_link:
            found["links"] = [link_speed(Devices([one])) for one in devices.own]
            collected("links begin", None)
            found["together"] = max(link_speed(devices) for _ in range(ROUNDS))
        return collected("lanes", found)
