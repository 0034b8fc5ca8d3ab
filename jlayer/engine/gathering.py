"""What several devices have of an array -> all of it, on each of them. All of this is inside
programs that every device runs (`Devices.on_each`); `gather` is `Devices.all_gather`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import jax
import jax.numpy as jnp

from jlayer.families.base import Function, Stage
from jlayer.families.decoder import SINKS
from jlayer.model.stages import call, join
from jlayer.plan.dealing import Deal
from jlayer.plan.tiles import Tile
from jlayer.streaming.devices import HEADS, MESH_AXES

Gather = Callable[[jax.Array], jax.Array]


def gathered(products: Mapping[str, jax.Array], stage: Stage, tile: Tile, gather: Gather) -> dict:
    """Products [R, rows] by name, of the rows of a tile that each device has -> of all rows of the
    tile: those of one host after another, where they are dealt out to several. They cross together:
    a collective costs time."""
    deals = {
        group.product: found
        for group in stage.groups
        if group.product in products
        and any(found := _deals(tile, group.leaves[0], tile.heights[group.leaves[0]]))
    }
    if not deals:
        return dict(products)
    joined = jnp.concatenate([products[name] for name in deals], axis=-1)
    each, found, at = gather(joined), dict(products), 0
    for name, (deal, hosts) in deals.items():
        width = products[name].shape[-1]
        own = each[:, :, at : at + width]
        found[name] = jnp.concatenate(_of_hosts(own, deal, hosts, tile.n_devices), axis=-1)
        at += width
    return found


def gathered_in_order(
    products: Mapping[str, jax.Array], stage: Stage, tile: Tile, gather: Gather
) -> dict:
    """`gathered`, of a tile with all rows of its matrices: the products [R, rows] in their
    order."""
    found = gathered(products, stage, tile, gather)
    return {
        group.product: in_order_of_hosts([found[group.product]], tile.hosts_of(group.leaves[0]))
        for group in stage.groups
        if group.product in found
    }


def in_order_of_hosts(parts: Sequence[jax.Array], hosts: Deal | None) -> jax.Array:
    """The products of the tiles of a matrix, as `gathered` gives them, joined: [R, rows]."""
    if hosts is None:
        return join(parts)
    each = [part.reshape(part.shape[0], hosts.n, -1) for part in parts]
    return _in_order(jnp.moveaxis(join(each), 1, 0), hosts)


def gathered_rows(
    leaf: jax.Array, tile: Tile, matrix: str, n_rows: int, gather: Gather
) -> jax.Array:
    """The rows [height, ...] of a leaf that each device has -> all of its rows [rows, ...].
    `n_rows`: those that a host has."""
    deal, hosts = _deals(tile, matrix, n_rows)
    if deal is None and hosts is None:
        return leaf
    each = gather(leaf.reshape(leaf.shape[0], -1).T)
    found = jnp.stack(_of_hosts(each, deal, hosts, tile.n_devices))
    found = found[0] if hosts is None else _in_order(found, hosts)
    return found.T.reshape(found.shape[1], *leaf.shape[1:])


def _deals(tile, matrix, n_rows):
    """How rows of a matrix are dealt out: those of a host to its devices, all to hosts."""
    return tile.deal_of(n_rows), tile.hosts_of(matrix)


def _of_hosts(each, deal, hosts, n_devices):
    """[devices of all, R, height] -> [R, rows] of each host; of the first, where all have the
    same."""
    n_hosts = hosts.n if hosts else 1
    own = (each[host * n_devices : (host + 1) * n_devices] for host in range(n_hosts))
    return [_in_order(found, deal) if deal else found[0] for found in own]


def _in_order(each, deal):
    """[n, R, height] of each device -> [R, rows]."""
    if deal.is_even:
        return jnp.moveaxis(each, 0, 1).reshape(each.shape[1], deal.n_rows)
    own = [each[number, :, deal.repeated(number) :] for number in range(deal.n)]
    return jnp.concatenate(own, axis=-1)


def own_heads(
    finish: Function, flow: Mapping, whole: Mapping, products: Mapping, gather: Gather
) -> dict:
    """`model.stages.call` of the function that attends, of which each device does its own heads.
    Its cache has the keys and values of those."""
    how, products = finish.how, {name: join(parts) for name, parts in products.items()}
    n = jax.lax.axis_size(MESH_AXES[HEADS])
    own = replace(how, n_heads=how.n_heads // n, n_kv_heads=how.n_kv_heads // n)
    widths = _widths_of(how)
    products = {
        name: jnp.concatenate([_own(part, 1, n) for part in _apart(value, widths[name])], axis=1)
        for name, value in products.items()
    }
    results = call(replace(finish, how=own), flow, _own_leaves(how, whole, n), products)
    cache = results.pop("cache")
    ((name, mixed),) = results.items()
    each = gather(mixed)
    return {name: jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1), "cache": cache}


def _widths_of(how):
    """Product -> the widths of what is joined in it, each the heads of one kind."""
    queries, values = how.n_heads * how.head_dim, how.n_kv_heads * how.head_dim
    queries *= 2 if how.has_gate else 1
    alone = {"q_proj": [queries], "k_proj": [values], "v_proj": [values]}
    return {**alone, "qkv_proj": [queries, values, values]}


def _apart(product, widths):
    return jnp.split(product, list(accumulate(widths))[:-1], axis=-1)


def _own(array, axis, n):
    """Of an array with all heads along an axis, one after another, those of this device."""
    size = array.shape[axis] // n
    first = jax.lax.axis_index(MESH_AXES[HEADS]) * size
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis)


def _own_leaves(how, whole, n):
    """Leaves that have something of each head."""
    counted = {SINKS} if how.has_sinks else set()
    norms = how.head_norms
    if norms and norms.over == "each":
        counted |= {*norms.q, *norms.k}
    return {name: _own(leaf, 0, n) if name in counted else leaf for name, leaf in whole.items()}
