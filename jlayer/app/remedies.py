"""What limits a forward pass of one token, what would help most, and the sentence that says so.

Pure: figures of `bench` go in. The seconds after a remedy are computed from the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jlayer.app.words import time_words
from jlayer.encodings.int4 import INT4
from jlayer.measure.together import Together, together
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.plan import Plan
from jlayer.plan.tiles import Tier
from jlayer.sizes import human

QUANTIZED_BITS = 4.5  # a weight in the smallest format, with its scales
# Where the longest part is below this share of a sweep, the overhead of the steps is the limit.
EXPLAINS = 0.6
# Another share is advised where a sweep takes at most so much of the time.
CLEARLY = 0.9
MOVING = ("disk", "link", "cores")  # what takes as long as there are bytes


@dataclass(frozen=True)
class Helpers:
    """What is known of the host's cores.

    `speeds`: of their products, and of the link meanwhile. `asked`: the share that the user asked
    for; None: auto. `fits`: whether the budgets hold a share. `install`: what to do where kernels
    cannot be compiled for them.
    """

    speeds: HostSpeeds | None = None
    asked: float | None = None
    fits: Callable[[float], bool] = lambda share: True
    install: str | None = None


NO_HELPERS = Helpers()


def conclude(found: dict, plan: Plan, helpers: Helpers = NO_HELPERS) -> dict:
    """What limits a sweep of one token, and what would help most, in one sentence."""
    rows = {row["tokens"]: row for row in found["sweeps"]}
    row, alone = rows[1], found["blocks"][0]
    took = row["seconds"]["median"]
    parts = {name: row["limits_s"][name] for name in MOVING if name in row["limits_s"]}
    # The shortest of several: other work on the machine only makes it longer.
    n_bytes = row["bytes"] - plan.host_product_bytes  # what the host multiplies is not the device's
    parts["programs"] = alone["seconds"]["min"] * n_bytes / alone["bytes"]
    parts = {name: min(part, took) for name, part in parts.items()}
    limit = max(parts, key=parts.get)
    if parts[limit] < EXPLAINS * took:
        limit = "steps"
    remedies, share = {}, None
    if limit != "steps":
        remedies = remedies_for(parts, row, plan, helpers)
        share = share_for(parts, plan, helpers)
        if share is not None:
            remedies[share["words"]] = share["seconds"]
    remedies = dict(sorted(remedies.items(), key=lambda item: item[1]))
    many = rows[64]["seconds"]["median"] / took if 64 in rows else None
    install = helpers.install if limit == "link" else None
    return {
        "limit": limit,
        "parts_s": parts,
        "remedies_s": remedies,
        "advised_host_share": share and share["host_share"],
        "conclusion": sentence(
            limit,
            parts,
            took,
            remedies,
            n_tiles=plan.n_tiles,
            many=many,
            share=share,
            install=install,
        ),
    }


def remedies_for(parts: dict, row: dict, plan: Plan, helpers: Helpers = NO_HELPERS) -> dict:
    """Remedy -> the least seconds of a sweep after it, by what is bought or quantized."""

    def after(**changed):
        return max((parts | changed).values())

    faster = {name: parts[name] / 2 for name in ("programs", "cores") if name in parts}
    found = {"faster memory and more cores": after(**faster)}
    weight_bits = 8 * row["bytes"] / row["weights"]
    if "disk" in parts:
        more = human(plan.tier_bytes(Tier.DISK))
        found[f"{more} more host memory"] = after(disk=0)
        found["a disk twice as fast"] = after(disk=parts["disk"] / 2)
    if "link" in parts:
        # The cores keep a share of all rows if the user asked for one, else of those that pass.
        of_host = plan.host_product_bytes if helpers.asked else 0
        halved = ("link",) if helpers.asked else ("link", "cores")
        fewer = {name: parts[name] / 2 for name in halved if name in parts}
        more = human((plan.put_bytes - of_host) // 2)
        found[f"{more} more device memory"] = after(**fewer)
    if weight_bits > 2 * QUANTIZED_BITS:
        smaller = QUANTIZED_BITS / weight_bits
        fewer = {name: parts[name] * smaller for name in MOVING if name in parts}
        fewer |= _quantized(parts, row, plan, helpers, smaller)
        found["quantizing the weights to 4 bits"] = after(**fewer)
    return found


def _quantized(parts, row, plan, helpers, smaller):
    """Link and cores after quantizing, where the cores' speed with 4 bits is known."""
    speeds, tokens = helpers.speeds, row["tokens"]
    if speeds is None or helpers.asked == 0 or INT4.name not in dict(speeds.forms):
        return {}
    a_byte = smaller * speeds.seconds_a_byte(INT4.name, tokens)  # of what is a byte now
    both = together(plan, speeds, tokens)
    if both is None or helpers.asked:  # the cores keep their rows
        return {"cores": plan.host_product_bytes * a_byte} if "cores" in parts else {}
    link_s, cores_s = both.link_s * smaller, both.passing_bytes * a_byte
    then = replace(both, link_s=link_s, cores_s=cores_s)  # it is divided anew
    seconds = then.seconds(then.share)
    return {name: seconds for name in ("link", "cores") if name in parts}


def share_for(parts: dict, plan: Plan, helpers: Helpers) -> dict | None:
    """Another share for the host's cores, where a sweep is clearly shorter with it: "host_share" as
    the user types it, "words", and "seconds" of a sweep; None where none is."""
    both = together(plan, helpers.speeds, plan.load.batch)
    if both is None or "link" not in parts or not (option := both.option):
        return None
    now = dict(parts)
    if "cores" in parts:
        now["cores"] += both.exchange_s
    then = now | {"link": both.seconds_with(option)} | _programs(parts, both, option, plan)
    then.pop("cores", None)
    if max(then.values()) > CLEARLY * max(now.values()) or not helpers.fits(option):
        return None
    more = "more" if option > plan.host_product_bytes / both.all_bytes else "fewer"
    words = f"{more} of the rows for the host's cores, --host-share {option:g}"
    return {"host_share": option, "words": words, "seconds": max(then.values())}


def _programs(parts, both: Together, option, plan):
    """The device's arithmetic over the rows that it has then; as long as now where it has none."""
    n_bytes = both.all_bytes - plan.host_product_bytes
    ratio = (1 - option) * both.all_bytes / n_bytes if n_bytes else 1.0
    return {"programs": parts["programs"] * ratio}


def sentence(limit, parts, took, remedies, *, n_tiles, many, share=None, install=None) -> str:
    """`many`: the time of a sweep of 64 tokens over that of one token; None where not measured.
    `share`: as from `share_for`. `install`: what to do for kernels for the host's cores."""
    if limit == "steps":
        resources = "disk, link, cores" if "cores" in parts else "disk, link"
        return (
            f"Neither {resources} nor arithmetic limits this machine with so small a model, but "
            f"its {n_tiles} steps a forward pass, {time_words(took / n_tiles)} each; what would "
            "help most is a larger model, or more tokens a forward pass."
        )
    names = {
        "disk": "The disk limits",
        "link": "The link to the device limits",
        "cores": "The host's cores, which multiply where the weights lie, limit",
        "programs": "The arithmetic limits",
    }
    best, then = next(iter(remedies.items()))
    more = ""
    if share is not None and best != share["words"]:
        more = (
            f"; on this machine as it is, {share['words']} would do "
            f"(about {time_words(share['seconds'])})"
        )
    if install is not None:
        more += f"; the host's cores could multiply a part of the rows, but {install}"
    if many is not None and many < 1.2:
        more += (
            f"; and 64 tokens take only {many:.2f} times as long as one, so that several prompts "
            "at a time are nearly free"
        )
    return (
        f"{names[limit]} this machine, {time_words(parts[limit])} of the "
        f"{time_words(took)} of a forward pass; what would help most is {best} (about "
        f"{time_words(then)} a forward pass){more}."
    )
