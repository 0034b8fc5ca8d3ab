"""What several devices have of an array -> all of it, on each of them. All of this is inside
programs that every device runs (`Devices.on_each`)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jlayer.families.base import Stage
from jlayer.plan.dealing import Deal
from jlayer.plan.tiles import Tile
from jlayer.streaming.devices import MESH_AXES, ROWS


def gathered(products: Mapping[str, jax.Array], stage: Stage, tile: Tile) -> dict:
    """Products [R, rows] by name, of the rows of a tile that each device has -> of all rows of the
    tile. They cross together: a collective costs time."""
    deals = {
        group.product: deal
        for group in stage.groups
        if group.product in products and (deal := tile.deal_of(tile.heights[group.leaves[0]]))
    }
    if not deals:
        return dict(products)
    joined = jnp.concatenate([products[name] for name in deals], axis=-1)
    each, found, at = jax.lax.all_gather(joined, MESH_AXES[ROWS]), dict(products), 0
    for name, deal in deals.items():
        found[name] = _in_order(each[:, :, at : at + deal.height], deal)
        at += deal.height
    return found


def gathered_rows(leaf: jax.Array, deal: Deal | None) -> jax.Array:
    """The rows [height, ...] of a leaf that each device has -> all of its rows [rows, ...]."""
    if deal is None:
        return leaf
    each = jax.lax.all_gather(leaf.reshape(leaf.shape[0], -1).T, MESH_AXES[ROWS])
    return _in_order(each, deal).T.reshape(deal.n_rows, *leaf.shape[1:])


def _in_order(each, deal):
    """[n, R, height] of each device -> [R, rows]."""
    if deal.is_even:
        return jnp.moveaxis(each, 0, 1).reshape(each.shape[1], deal.n_rows)
    own = [each[number, :, deal.repeated(number) :] for number in range(deal.n)]
    return jnp.concatenate(own, axis=-1)
