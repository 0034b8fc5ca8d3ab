"""Measure a model on this machine: each stage alone against its limit, then whole forward passes.

The predicted limit of a forward pass is printed before anything is measured. Then: the disk and the
link alone, one layer alone at 1, 64 and 512 tokens, and whole forward passes. The disk is measured
again between the passes, so that a disk whose speed drifts does not falsify the shares. Without
MODEL the bundled model is streamed from disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing, nullcontext

from jlayer.app import options, progress
from jlayer.app import picture as timeline
from jlayer.app.bundled import BUNDLED, converted_bundled
from jlayer.app.inputs import name_of
from jlayer.app.running import opened, write_text
from jlayer.app.streams import is_terminal, takes_utf8, tell
from jlayer.app.words import time_words
from jlayer.interrupts import check
from jlayer.plan.machine import DEFAULT_DISK
from jlayer.sizes import human, parse_bytes
from jlayer.streaming.schedule import Tier

QUANTIZED_BITS = 4.5  # a weight in the smallest format, with its scales
# Where the longest part is below this share of a sweep, the overhead of the steps is the limit.
EXPLAINS = 0.6
OF = {
    "disk": "of the raw disk",
    "link": "of the raw link",
    "memory": "of raw memory",
    "arithmetic": "of raw arithmetic",
    "cores": "of the cores' speed",
}
MOVING = ("disk", "link", "cores")  # what takes as long as there are bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ref", metavar="MODEL", nargs="?", help=f"{options.REF} (default: the bundled model)"
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="keep no layer in memory: read all in every forward pass",
    )
    options.add_run(parser)
    options.add_draft(parser)
    options.add_context(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)
    timeline.add_option(parser)


def run(args: argparse.Namespace) -> dict:
    timeline.check_file(args.timeline)
    name = name_of(args.ref or BUNDLED)
    with (
        nullcontext(args.ref) if args.ref else converted_bundled() as ref,
        opened(ref, offline=args.offline, **_options(args)) as model,
        progress.shown(model, _shower(args), words=_pass_words) as show,
    ):
        for note in model.notes:
            tell(note)
        say = _silent if show is None else lambda line: _say(show, line)
        found = {"model": name, **measure(model, say, name=name, picture=args.timeline)}
    if not args.json and not is_terminal(sys.stdout):
        print(json.dumps(found, ensure_ascii=not takes_utf8(sys.stdout)))
    return found


def _pass_words(number):
    return f"forward pass {number + 1}"


def _options(args):
    """The run options. The buffers of the disk's measurement are part of the host's budget."""
    found = options.given(args, *options.RUN, "context", "draft", "follow_links")
    if args.host_memory is not None:
        from jlayer.measure.machine import HOST_BYTES

        found["host_memory"] = parse_bytes(args.host_memory, option="host_memory") - HOST_BYTES
    if args.from_disk or not args.ref:
        found["keeps_layers"] = False
    return found


def measure(model, say, *, name: str, picture: str | None = None) -> dict:
    """Measures and says each figure when it is there; returns all of them.

    `picture`: the file of a picture of two sweeps of one token, of the model `name`. They run last,
    since recording them takes time.
    """
    from jlayer.measure.bench import Bench
    from jlayer.measure.machine import card, summary

    bench = Bench(model)
    found = {"card": card(model.folder), "device": model.engine.device_name, "dtype": model.dtype}
    found |= {"reads": "direct" if bench.engine.reads_directly else "buffered"}
    found["plan"] = model.plan.as_dict()
    say(card_lines(found["card"]))
    say(ceiling_lines(model))
    bench.measure_machine()
    found["blocks"] = bench.measure_blocks()
    found["raw"] = {name: summary(speeds) for name, speeds in bench.speeds.items()}
    for name, speeds in found["raw"].items():
        say(raw_line(name, speeds))
    for row in found["blocks"]:
        say(row_line("one layer alone", row))
    found["first_sweep_s"] = bench.first_sweep()
    took = time_words(found["first_sweep_s"])
    say(f"{'first forward pass':<28}{took:>10}{'':14}fills the kept layers")
    found["load_s"] = model.engine.load_s
    found["first_token_s"] = found["load_s"] + found["first_sweep_s"]  # without compiling
    found["cached_bytes"] = model.engine.totals.cached_bytes
    say(opening_line(found, read_bytes=model.engine.totals.read_bytes))
    found["sweeps"] = bench.measure_sweeps()
    found["raw"] = {name: summary(speeds) for name, speeds in bench.speeds.items()}
    if "disk" in found["raw"]:
        say(raw_line("disk", found["raw"]["disk"]))
    for row in found["sweeps"]:
        say(row_line("forward pass" if row["tokens"] else "weights alone", row))
    found["memory"] = model.engine.memory()
    found |= conclude(found, model.plan)
    with timeline.recorded(model, picture, name):
        for _ in range(3 if picture else 0):  # the first has tiles that were read ahead
            bench.sweep(1)
    if model.engine.draft is not None:
        bench.forward.close()  # the draft's trees need its memory
        found["draft"] = measure_draft(model)
        say(draft_lines(found["draft"]))
    say(f"\n{found['conclusion']}")
    return found


def opening_line(found: dict, *, read_bytes: int) -> str:
    """The seconds to open and to the first token, and how much came from the page cache."""
    share = found["cached_bytes"] / max(1, read_bytes)
    return (
        f"{'first token':<28}{time_words(found['first_token_s']):>10}{'':14}"
        f"opened in {time_words(found['load_s'])}; {share:.0%} of the reads from the page cache"
    )


def measure_draft(model) -> dict:
    """The figures of the draft model, and of forward passes that verify its guesses."""
    from jlayer.measure.drafts import DraftBench

    with closing(DraftBench(model)) as bench:
        return bench.measure()


def draft_lines(found: dict) -> str:
    """What guessing takes, and the width that `auto` would choose if guesses were as good as
    assumed."""
    lines = [
        f"\ndraft model       {name_of(found['folder'])}, {found['dtype']}, "
        f"{human(found['bytes'])} on the device over {found['context']} tokens "
        f"(planned with its temporaries: {human(found['planned_bytes'])})"
    ]
    for row in found["steps"]:
        took = time_words(row["seconds"]["median"])
        lines.append(f"{'a step of it':<18}{_rows(row['rows']):<10}{took:>10}")
    for row in found["passes"]:
        took, drafting = time_words(row["seconds"]["median"]), time_words(row["drafting_s"])
        line = f"{'pass with a tree':<18}{_rows(row['rows']):<10}{took:>10}"
        line += f"{row['to_one_row']:>9.2f} of one row"
        if row["rows"] > 1:
            line += f", drafting about {drafting}"
        lines.append(
            f"{line}; {row['assumed_tokens_per_s']:.3g} tokens a second "
            f"if it gives {row['assumed_tokens']:g} (assumed)"
        )
    best = found["assumed_best_rows"]
    width = f"about {best - 1} guesses a forward pass" if best > 1 else "no guesses"
    lines.append(
        f"at these assumed figures --speculate auto would take {width}; its own are learnt"
    )
    return "\n".join(lines)


def _rows(count):
    return f"{count} row{'s' * (count != 1)}"


def card_lines(card: dict) -> str:
    """The machine, for a person."""
    gpu = card["gpu"] or "no GPU"
    return (
        f"machine   {card['cpu']}, {card['cores']} cores, {human(card['memory_bytes'])}; {gpu}\n"
        f"          {card['file_system']}; {card['system']}, Python {card['python']}, "
        f"jax {card['jax']}"
    )


def ceiling_lines(model) -> str:
    """What a sweep moves, and its least time by the plan's figures."""
    plan = model.plan
    kept = [f"{plan.layers(tier)} {tier.value}" for tier in Tier if plan.layers(tier)]
    lines = [
        f"model     {model.engine.device_name}, {model.dtype}, layers: {', '.join(kept)}; "
        f"{plan.n_tiles} tiles of up to {human(plan.tile_bytes)}",
        f"ceiling   a forward pass uses {human(plan.tiling.n_bytes)} of weights; its least time, "
        "by the plan's figures, is the longest of:",
    ]
    for name, n_bytes, speed, how in _expected(plan):
        lines.append(
            f"          {name:<6}{human(n_bytes):>12} at {rate(speed):<11} {how:<22}"
            f"{time_words(n_bytes / speed):>10}"
        )
    return "\n".join(lines) + "\n"


def _expected(plan):
    """(what, bytes of a sweep, bytes a second, source of that speed) of disk, CPU and link."""
    machine, disk_bytes = plan.machine, plan.tier_bytes(Tier.DISK)
    if disk_bytes:
        how = "(typical)" if machine.disk_speed == DEFAULT_DISK else "(measured at opening)"
        yield "disk", disk_bytes, machine.disk_speed, how
    if not machine.kind.has_link:
        n_bytes = sum(tile.n_bytes for tile in plan.tiles)
        yield "CPU", n_bytes, machine.bytes_per_s, "(typical of one token)"
    else:
        how = "(measured at opening)" if machine.link_speed else "(typical)"
        yield "link", plan.put_bytes, machine.bytes_per_s, how


def raw_line(name: str, speeds: dict) -> str:
    """A speed of the machine, measured without the model."""
    names = {"disk": "raw disk", "link": "raw link", "memory": "raw memory"}
    form = operations if name == "arithmetic" else rate
    spread = f"{form(speeds['min'])} to {form(speeds['max'])}, {speeds['n']} times"
    return f"{names.get(name, 'raw arithmetic'):<18}{'':20}{form(speeds['median']):>12}  {spread}"


def row_line(title: str, row: dict) -> str:
    """A measured time and its share of the limit."""
    tokens = f"{row['tokens']} token{'s' * (row['tokens'] != 1)}" if row["tokens"] else ""
    share, limit = row["share"], OF[row["limit"]]
    return (
        f"{title:<18}{tokens:<10}{time_words(row['seconds']['median']):>10}"
        f"{rate(row['bytes_per_s']):>12}  {share['median']:.2f} {limit} "
        f"({share['min']:.2f} to {share['max']:.2f}, {share['n']} times)"
    )


def conclude(found: dict, plan) -> dict:
    """What limits a sweep of one token, and what would help most, in one sentence.

    The time of a sweep after each remedy is computed from the same parts.
    """
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
    remedies = {} if limit == "steps" else remedies_for(parts, row, plan)
    many = rows[64]["seconds"]["median"] / took if 64 in rows else None
    return {
        "limit": limit,
        "parts_s": parts,
        "remedies_s": remedies,
        "conclusion": sentence(limit, parts, took, remedies, n_tiles=plan.n_tiles, many=many),
    }


def remedies_for(parts: dict, row: dict, plan) -> dict:
    """Remedy -> the least seconds of a sweep after it; the best first."""

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
        more = human(plan.put_bytes // 2)
        found[f"{more} more device memory"] = after(link=parts["link"] / 2)
    if weight_bits > 2 * QUANTIZED_BITS:
        smaller = QUANTIZED_BITS / weight_bits
        fewer = {name: parts[name] * smaller for name in MOVING if name in parts}
        found["quantizing the weights to 4 bits"] = after(**fewer)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def sentence(limit, parts, took, remedies, *, n_tiles, many) -> str:
    """`many`: the time of a sweep of 64 tokens over that of one token; None where not measured."""
    if limit == "steps":
        return (
            "Neither disk, link nor arithmetic limits this machine with so small a model, but its "
            f"{n_tiles} steps a forward pass, {time_words(took / n_tiles)} each; what would "
            "help most is a larger model, or more tokens a forward pass."
        )
    names = {
        "disk": "The disk",
        "link": "The link to the device",
        "cores": "The host's cores, which multiply where the weights lie,",
        "programs": "The arithmetic",
    }
    best, then = next(iter(remedies.items()))
    more = (
        f"; and 64 tokens take only {many:.2f} times as long as one, so that several prompts at a "
        "time are nearly free"
        if many is not None and many < 1.2
        else ""
    )
    return (
        f"{names[limit]} limits this machine, {time_words(parts[limit])} of the "
        f"{time_words(took)} of a forward pass; what would help most is {best} (about "
        f"{time_words(then)} a forward pass){more}."
    )


def rate(value: float) -> str:
    """Bytes a second, in decimal units as disks and links are sold."""
    return _scaled(value, "B/s")


def operations(value: float) -> str:
    return _scaled(value, "flop/s")


def _scaled(value, unit):
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _shower(args):
    return None if args.json else write_text


def _say(show, line):
    show(f"{line}\n")
    check()


def _silent(line):
    check()
