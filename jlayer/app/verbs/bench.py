"""Measure a model on this machine: each stage alone against its limit, then whole forward passes.

The predicted limit of a forward pass is printed before anything is measured. Then: the disk and the
link alone, the host's cores alone and beside the link where they multiply, one layer alone at 1, 64
and 512 tokens, and whole forward passes. The disk is measured again between the passes, so that a
disk whose speed drifts does not falsify the shares. Without MODEL the bundled model is streamed
from disk.
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
from jlayer.app.remedies import Helpers, conclude
from jlayer.app.running import write_text
from jlayer.app.streams import is_terminal, takes_utf8, tell
from jlayer.app.together import followed, opened_for
from jlayer.app.words import time_words
from jlayer.interrupts import check
from jlayer.plan.hosting import seconds_on_host
from jlayer.plan.machine import DEFAULT_DISK
from jlayer.plan.tiles import Tier
from jlayer.sizes import human, parse_bytes

OF = {
    "disk": "of the raw disk",
    "link": "of the raw link",
    "memory": "of raw memory",
    "arithmetic": "of raw arithmetic",
    "cores": "of the cores' speed",
}


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
    options.add_processes(parser)
    options.add_draft(parser)
    options.add_adapter(parser)
    options.add_context(parser)
    options.add_offline(parser)
    options.add_follow_links(parser)
    timeline.add_option(parser)


def run(args: argparse.Namespace) -> dict | None:
    timeline.check_file(args.timeline)
    name, run_options = name_of(args.ref or BUNDLED), _options(args)
    with nullcontext(args.ref) if args.ref else converted_bundled() as ref:
        if followed(args, run_options, refs=(ref,)):
            return None
        return _benchmark(args, ref, name, run_options)


def _benchmark(args, ref, name, run_options):
    with (
        opened_for(args, run_options, ref=ref) as model,
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
    own = ("context", "draft", "adapter", "follow_links")
    found = options.given(args, *options.RUN, *options.PROCESSES, *own)
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
    if bench.lanes:
        hosts = model.engine.hosts
        names = [""] if hosts is None else [hosts.names[number] for number in range(hosts.n)]
        found["lanes"] = [
            {"host": name, **of_host} for name, of_host in zip(names, bench.lanes, strict=True)
        ]
        say(lanes_lines(found["lanes"]))
    if bench.cores is not None:
        found["cores"] = bench.cores.as_dict()
        say(cores_lines(found["cores"]))
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
    found |= conclude(found, model.plan, _helpers(bench))
    with timeline.recorded(model, picture, name):
        for _ in range(3 if picture else 0):  # the first has tiles that were read ahead
            bench.sweep(1)
    if model.engine.draft is not None:
        bench.forward.close()  # the draft's trees need its memory
        found["draft"] = measure_draft(model)
        say(draft_lines(found["draft"]))
    say(f"\n{found['conclusion']}")
    return found


def _helpers(bench):
    """What the closing sentence may say of the host's cores."""
    from jlayer.cores.native import INSTALL, missing

    why = missing() if bench.has_link else None
    return Helpers(
        speeds=bench.host_speeds,
        asked=bench.engine.run.host_share,
        fits=bench.fits_with,
        install=why if why and INSTALL in why else None,
    )


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
        f"ceiling   a forward pass uses {human(plan.tiling.n_bytes)} of weights{_on_each(model)}; "
        "its least time, by the plan's figures, is the longest of:",
    ]
    for name, n_bytes, speed, how in _expected(plan):
        lines.append(
            f"          {name:<6}{human(n_bytes):>12} at {rate(speed):<11} {how:<22}"
            f"{time_words(n_bytes / speed):>10}"
        )
    return "\n".join(lines) + "\n"


def _on_each(model):
    hosts = model.engine.hosts
    return "" if hosts is None else f" on each of {hosts.n} hosts (all bytes below are of one)"


def _expected(plan):
    """(what, bytes of a sweep, bytes a second, source of that speed) of disk, link or CPU, and
    cores."""
    machine, disk_bytes = plan.machine, plan.tier_bytes(Tier.DISK)
    if disk_bytes:
        how = "(typical)" if machine.disk_speed == DEFAULT_DISK else "(measured at opening)"
        yield "disk", disk_bytes, machine.disk_speed, how
    of_host = plan.host_product_bytes
    if not machine.kind.has_link:
        n_bytes = plan.tiling.n_bytes - of_host
        yield "CPU", n_bytes, machine.bytes_per_s, "(typical of one token)"
    else:
        how = "(measured at opening)" if machine.link_speed else "(typical)"
        yield "link", plan.put_bytes - of_host, machine.bytes_per_s, how
    if of_host and machine.host is not None:
        tiles = sorted(plan.hosted(plan.load.batch))
        speed = of_host / seconds_on_host(machine.host, plan.tiling, tiles, plan.load.batch)
        yield "cores", of_host, speed, "(measured at opening)"


def raw_line(name: str, speeds: dict) -> str:
    """A speed of the machine, measured without the model."""
    names = {"disk": "raw disk", "link": "raw link", "memory": "raw memory"}
    form = operations if name == "arithmetic" else rate
    spread = f"{form(speeds['min'])} to {form(speeds['max'])}, {speeds['n']} times"
    return f"{names.get(name, 'raw arithmetic'):<18}{'':20}{form(speeds['median']):>12}  {spread}"


def lanes_lines(lanes: list[dict]) -> str:
    """How links add up, and disks: those of each host, and of all hosts."""
    if len(lanes) == 1:
        return f"{'links':<18}{_links_words(lanes[0])}"
    lines = []
    for number, own in enumerate(lanes):
        words = [] if own["disk"] is None else [f"disk {rate(own['disk'])}"]
        words += [_links_words(own)] if own["links"] else []
        lines.append(f"{f'host {number}':<18}{'; '.join(words) or '-'}")
    each = {"disks": [own["disk"] for own in lanes], "links": [own["together"] for own in lanes]}
    words = [f"{name} {rate(sum(all_))}" for name, all_ in each.items() if None not in all_]
    lines.append(f"{'all hosts':<18}{'; '.join(words) or '-'}")
    return "\n".join(lines)


def _links_words(own):
    alone, together = own["links"], own["together"]
    if len(alone) == 1:
        return f"link {rate(together)}"
    each = ", ".join(map(rate, alone))
    times = together * len(alone) / sum(alone)
    return f"links alone {each}; together {rate(together)}, {times:.2f} times one"


def cores_lines(cores: dict) -> str:
    """The cores' speed by tokens: alone, and with the link's where there is one."""
    lines = []
    for row in cores["speeds"]:
        tokens, alone = _tokens(row["tokens"]), rate(row["alone_bytes_per_s"])
        line = f"{'cores':<18}{tokens:<20}{alone:>12}  {cores['encoding']}"
        if "link_bytes_per_s" in row:
            beside, link = rate(row["beside_bytes_per_s"]), rate(row["link_bytes_per_s"])
            line += f"; {beside} beside the link, which moves {link}: "
            line += f"together {rate(row['together_bytes_per_s'])}"
        lines.append(line)
    return "\n".join(lines)


def _tokens(count):
    return f"{count} token{'s' * (count != 1)}"


def row_line(title: str, row: dict) -> str:
    """A measured time and its share of the limit."""
    tokens = _tokens(row["tokens"]) if row["tokens"] else ""
    share, limit = row["share"], OF[row["limit"]]
    line = (
        f"{title:<18}{tokens:<10}{time_words(row['seconds']['median']):>10}"
        f"{rate(row['bytes_per_s']):>12}  {share['median']:.2f} {limit} "
        f"({share['min']:.2f} to {share['max']:.2f}, {share['n']} times)"
    )
    if "together_share" in row:
        line += f", {row['together_share']['median']:.2f} of cores and link together"
    return line


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
