"""Show the device memory, host memory and disk that a run needs, and the time of a token.

All of it is computed from the model's config; nothing is allocated.
"""

from __future__ import annotations

import glob
import os
from dataclasses import replace

from jlayer import catalogue
from jlayer.app import options, tuned
from jlayer.app.streams import tell
from jlayer.app.words import time_words
from jlayer.checkpoint.beside import Named, beside
from jlayer.checkpoint.foreign import refuse_adapter, refuse_file
from jlayer.checkpoint.hub import hub_config, is_hub_id
from jlayer.checkpoint.layout import CONFIG, is_layered, read_manifest
from jlayer.checkpoint.links import links_followed
from jlayer.checkpoint.quantization import Quantization, published_quantization, quantization_of
from jlayer.checkpoint.rows import check_host
from jlayer.checkpoint.source import names_in
from jlayer.checkpoint.store import Store
from jlayer.config import model_config, planned_dtype, read_config
from jlayer.cores.native import missing
from jlayer.encodings.registry import SCHEMES
from jlayer.errors import DoesNotFitError, UsageError
from jlayer.families.registry import (
    layer_kinds,
    layer_tensor_name,
    published_tensors,
)
from jlayer.gguf.parts import is_gguf, model_at, parts_of
from jlayer.interrupts import released
from jlayer.plan.lanes import MOST_LANES, most_lanes
from jlayer.plan.low_rank import check_host_share
from jlayer.plan.machine import DEFAULT_DISK, PLATFORMS, Machine, expected_speeds
from jlayer.plan.making import make_plan, matrix_forms, with_host
from jlayer.plan.need import memory_name
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier, Weights, unseen_weights
from jlayer.run_config import RunConfig
from jlayer.sizes import counted, human
from jlayer.spec import ModelConfig
from jlayer.strict import parse_json_object, read_json_object
from jlayer.text.same import check_same_tokens


def add_arguments(parser):
    parser.add_argument(
        "ref",
        metavar="MODEL",
        help="a folder, a config.json, a known model, or a hub id: owner/name[@revision]",
    )
    options.add_run(parser, device_memory="4GiB", host_memory="16GiB", device="gpu")
    options.add_draft(parser)
    options.add_adapters(parser)
    options.add_context(parser, default=512)
    parser.add_argument(
        "--batch", type=int, metavar="N", default=1, help="lanes, texts at a time (default: 1)"
    )
    parser.add_argument(
        "--quantize", choices=tuple(SCHEMES), help="plan for the model converted with --quantize"
    )
    options.add_speeds(parser)
    options.add_offline(parser)
    tuned.add_arguments(parser)


def run(args) -> dict:
    tuned.check(args)
    args.ref = model_at(args.ref)
    if args.batch < 1:
        raise UsageError(f"--batch: found {args.batch}, expected a number of lanes from 1 up")
    cfg = find_config(args.ref, offline=args.offline)
    run = RunConfig.from_options(
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        dtype=args.dtype,
        device=args.device,
        context=args.context,
        devices=1 if args.devices is None else args.devices,
        host_share=args.host_share,
        **options.adapters_of(args),
    )
    if run.devices is None:
        raise UsageError("--devices: all is a number that this plan does not know; say how many")
    if args.context > cfg.max_position_embeddings:
        raise UsageError(
            f"--context: {args.context} tokens, the model's own limit is "
            f"{cfg.max_position_embeddings}; ask for at most that"
        )
    quantization = _quantization(args, cfg)
    draft = _draft(args, cfg, run.dtype or planned_dtype(cfg, None))
    disk_speed = options.speed(args.disk_speed, "--disk-speed")
    link_speed = options.speed(args.link_speed, "--link-speed")
    collectives = run.devices > 1 and missing() is not None  # as a run decides it on one host
    machine = Machine(
        platform=args.device,
        device_budget=run.device_memory,
        host_budget=run.host_memory,
        context_bytes=PLATFORMS[args.device].context_of(collectives=collectives),
        disk_speed=disk_speed or _measured(args.ref) or DEFAULT_DISK,
        link_speed=link_speed and link_speed * run.devices,
        cores=len(os.sched_getaffinity(0)),
        n_devices=run.devices,
        collectives=collectives,
    )
    # A run measures the cores; what this machine has says nothing of the one that is planned for.
    if run.host_share or not (machine.kind.has_link or missing()):
        machine = replace(machine, host=expected_speeds(machine))
    if args.tune:
        return tuned.run(args, _weights(args.ref, cfg, quantization, run.dtype), machine)
    named = Named(run.adapter, run.adapters)
    weights, in_memory = _with_adapters(_weights(args.ref, cfg, quantization, run.dtype), named)
    machine = machine.holding(in_memory)
    check_host_share(weights.cfg, run.host_share)
    shape = RunShape(args.batch, args.context, args.context)
    tilings: dict = {}

    def plan_of(shares):
        return make_plan(weights, machine, shape, tilings=tilings, draft=draft, shares=shares)

    plan = with_host(plan_of, matrix_forms(weights), run.host_share, machine.host)
    lanes = lanes_of(weights, machine, shape, plan, tilings, draft)
    if not args.json:
        kept = quantization and quantization.scheme and described(quantization, cfg)
        print(describe(plan, kept, lanes=lanes, is_converted=is_layered(args.ref)))
        for note in plan.notes:
            tell(note)
    found = {**plan.as_dict(), "lanes": lanes}
    if quantization is not None:
        shapes = published_tensors(cfg)
        bits = quantization.block_bits(shapes) if quantization.scheme else None
        found["quantization"] = {**quantization.as_dict(), "block_bits": bits}
    try:
        plan.check()
    except DoesNotFitError as error:
        fewer = f"; {lanes['most']} lanes would fit" if lanes["most"] else ""
        raise DoesNotFitError(f"{error}{fewer}", report=found) from None
    return found


def lanes_of(
    weights: Weights,
    machine: Machine,
    shape: RunShape,
    plan: Plan,
    tilings: dict,
    draft: Weights | None = None,
) -> dict:
    """How many lanes of this context fit, and what a forward pass with a token of each then takes.

    `asked`: the lanes of `plan`, with its `seconds` and the `tokens_per_s` of all its lanes
    together; `most`: as many as fit, with theirs. None for lanes that do not fit. `tilings`: as for
    `make_plan`.
    """
    most = most_lanes(weights, machine, shape, tilings, draft=draft)
    if plan.fits:
        most = max(most, shape.batch)
    best = plan if most == shape.batch else None
    if most and best is None:
        many = replace(shape, batch=most)
        best = make_plan(weights, machine, many, tilings=tilings, draft=draft)
    seconds = plan.decode_seconds if plan.fits else None
    at_most = best.decode_seconds if most else None
    return {
        "asked": shape.batch,
        "seconds": seconds,
        "tokens_per_s": seconds and shape.batch / seconds,
        "most": most,
        "most_seconds": at_most,
        "most_tokens_per_s": at_most and most / at_most,
    }


def find_config(ref: str, *, offline: bool = False) -> ModelConfig:
    """The config behind REF: a folder, a file, a hub id, or a known name. Raises what reading it
    does."""
    if is_gguf(ref):
        return read_config(ref)
    if os.path.isdir(ref):
        names = names_in(ref)
        if CONFIG not in names:
            refuse_adapter(ref, names)
        if is_layered(ref):
            check_host(ref, read_manifest(ref).host)
        return read_config(ref)
    if is_hub_id(ref) and not ref.endswith(".json"):
        with released():
            ref = hub_config(ref, offline=offline)
    if os.path.exists(ref) or os.sep in ref or ref.endswith(".json"):
        refuse_file(ref, but_json=True)
        raw = read_json_object(ref)
        if raw.get("model_type") is None and not raw.get("architectures"):
            tell(f"{ref}: model_type is missing; assumed to be llama")
            raw["model_type"] = "llama"
        return model_config(raw, where=ref)
    return model_config(parse_json_object(catalogue.model_json(ref), what=ref), where=ref)


def _weights(
    ref: str, cfg: ModelConfig, quantization: Quantization | None, dtype: str | None
) -> Weights:
    """Weights as they lie on disk, computed in `dtype`, or else in the dtype that they have."""
    if is_gguf(ref) and not (quantization and quantization.scheme):
        store = Store(ref)
        return Weights(cfg, store.form_of, dtype or store.float_dtype)
    stored = planned_dtype(cfg, dtype)
    as_published = not is_layered(ref) and not (quantization and quantization.scheme)
    return unseen_weights(
        *(cfg, quantization), stored=stored, dtype=dtype or stored, as_published=as_published
    )


def _with_adapters(weights: Weights, named: Named) -> tuple[Weights, int]:
    """The weights with adapters beside them, and the bytes of what is in memory for these."""
    if not named.folders:
        return weights, 0
    with links_followed():  # it runs nothing
        found = beside(named, weights.cfg)
    cfg = replace(weights.cfg, additions=found.additions)
    with_them = Weights(
        cfg, lambda name: found.forms.get(name) or weights.form_of(name), weights.dtype
    )
    return with_them, found.memory_bytes


def _draft(args, cfg, dtype) -> Weights | None:
    """The weights of --draft. Where both are folders, what a run would refuse is refused here."""
    if args.draft is None:
        return None
    args.draft = model_at(args.draft)
    draft = find_config(args.draft, offline=args.offline)
    if all(os.path.isdir(ref) or is_gguf(ref) for ref in (args.ref, args.draft)):
        sizes = {"vocab_size": cfg.vocab_size, "draft_vocab_size": draft.vocab_size}
        check_same_tokens(args.ref, args.draft, **sizes)
    elif draft.vocab_size != cfg.vocab_size:  # it may be padded, which a config does not tell
        tell(
            f"draft: {args.draft} has a vocabulary of {draft.vocab_size}, and {args.ref} one of "
            f"{cfg.vocab_size}; a run refuses a draft with other tokens"
        )
    return _weights(args.draft, draft, _quantization_of(args.draft, draft), dtype)


def _quantization_of(ref, cfg) -> Quantization | None:
    if is_gguf(ref):
        return Store(ref).quantization
    return read_manifest(ref).quantization if is_layered(ref) else published_quantization(cfg)


def _quantization(args, cfg) -> Quantization | None:
    """How REF is quantized, or would be by --quantize; a plan needs the sizes alone."""
    there = _quantization_of(args.ref, cfg)
    if args.quantize is None:
        return there
    if there and there.scheme not in (None, args.quantize):
        raise UsageError(
            f"--quantize: found {args.quantize}, but {args.ref} is quantized to {there.scheme}; "
            "name the model that it was converted from"
        )
    if there and there.scheme:
        return there
    if there and not there.may_be_quantized:
        raise UsageError(
            f"--quantize: found {args.quantize}, but {args.ref} is published quantized "
            f"({', '.join(there.table.encodings)}), and stays so; plan without --quantize"
        )
    return quantization_of(args.quantize, published_tensors(cfg), published=there)


def _measured(ref):
    """The measured speed of the disk where REF is a folder or file with weights, else None."""
    from jlayer.streaming.direct import disk_speed

    if is_gguf(ref):
        return disk_speed(parts_of(ref))
    shards = sorted(glob.glob(os.path.join(glob.escape(ref), "*.safetensors")))
    return disk_speed([path for path in shards if os.path.isfile(path)])


def described(quantization: Quantization, cfg: ModelConfig) -> str:
    """The bits of each kind of matrix, in one line."""
    counts = {}
    for layer, kind in enumerate(layer_kinds(cfg)):
        for leaf in kind.leaves:
            at_int8 = layer_tensor_name(cfg, leaf, layer) in quantization.at_int8
            counts[leaf.name] = counts.get(leaf.name, 0) + at_int8
    kept = ", ".join(f"{name} of {counted(n, 'layer')}" for name, n in counts.items() if n)
    bits, kept_as = quantization.block_bits(published_tensors(cfg)), quantization.table.encodings
    return (
        f"{quantization.scheme}, {bits:.2f} bits a weight in the layers; embedding and head int8"
        + (f"; {', '.join(kept_as)} as published" if kept_as else "")
        + (f"; at int8 as well {kept}" if kept else "")
    )


def describe(plan, quantized: str | None = None, *, lanes: dict, is_converted: bool = False) -> str:
    """The plan as text: a line for each use of memory, then the layers, the time of a token, and
    `lanes`: see `lanes_of`."""
    found = plan.as_dict()
    if quantized:
        lines = [
            f"model {human(plan.model_bytes)} in {plan.n_layers} layers, of "
            f"{human(plan.published_bytes)} as published",
            f"quantized       {quantized}",
            "",
        ]
    else:
        lines = [
            f"model {human(plan.model_bytes)} in {plan.n_layers} layers; "
            + (
                "converted"
                if is_converted
                else "it runs as it is published, and converting it takes as much disk again"
            ),
            "",
        ]
    n = plan.machine.n_devices
    for title in ("device", "host"):
        lines.append(f"each of {n} devices" if title == "device" and n > 1 else title)
        for name, n_bytes in found[title].items():
            if n_bytes:
                lines.append(f"  {memory_name(name):<14}{human(n_bytes):>12}")
    kept = ", ".join(f"{name.removesuffix('_layers')} {n}" for name, n in found["tiers"].items())
    lines += [
        *_experts_lines(plan),
        *_uncut_lines(plan),
        f"layers          {kept}",
        f"tiles           {plan.n_tiles} a pass, of up to {human(plan.tile_bytes)}",
        f"forward pass    {human(found['sweep']['bytes'])}, {human(found['sweep']['disk_bytes'])} "
        f"of it from disk; about {_times(plan)}",
        *_cores_lines(plan),
        *_lanes_lines(lanes),
    ]
    if plan.put_bytes == 0:
        lines.append("the whole model fits on the device: a program that keeps it there is faster")
    lines.append("fits" if plan.fits else "does not fit")
    return "\n".join(lines)


def _experts_lines(plan):
    """Lines on the experts of a layer, and how many of them are kept where."""
    if not plan.experts.on_device:
        return []
    router = plan.cfg.experts.router
    on_device, in_host = (
        sum(kept) / len(kept) for kept in (plan.experts.on_device, plan.experts.in_host)
    )
    return [
        f"experts         {router.n_chosen} of {router.n_experts} for a token; a layer keeps "
        f"{on_device:.3g} on the device and {in_host:.3g} in host memory"
        + (f", and {plan.experts.guessed} may be put by guess" if plan.experts.guessed else "")
    ]


def _uncut_lines(plan):
    """A line on the leaves that are used uncut and streamed, if there are some."""
    sizes, uncut = plan.tiling.sizes, plan.tiling.uncut
    if not uncut:
        return []
    names = dict.fromkeys(name for n in uncut for name in plan.tiling.shapes[n].uncut)
    kept = sum(sizes[n] for n in uncut if plan.tiers[n] is Tier.DEVICE)
    return [
        f"used uncut      {human(sum(sizes[n] for n in uncut))} of {' and '.join(sorted(names))}: "
        f"{human(kept)} of it stays on the device, the rest is streamed"
    ]


def _times(plan):
    """The time of a forward pass, and for how many tokens. More tokens use more experts."""
    if not plan.experts.on_device:
        return time_words(plan.sweep_seconds) + _tokens(plan)
    prompts = f"{time_words(plan.sweep_seconds)} for {plan.load.n_rows} of prompts"
    return f"{time_words(plan.decode_seconds)} for one token, {prompts}"


def _tokens(plan):
    """How many tokens the time of a forward pass is for."""
    if plan.n_chunks > 1 or plan.host_product_bytes:
        return f" with {counted(plan.shapes.n_rows, 'token')} of prompts"
    return ", one token or 64" if plan.machine.kind.has_link else " for one token"


def _cores_lines(plan):
    """A line on what the host's cores multiply, if they do."""
    if not plan.host_product_bytes:
        return []
    each = f"multiply {human(plan.host_product_bytes)} of it where they lie, at a token for each"
    return [f"host's cores    {each} lane ({plan.host_share:.0%})"]


def _lanes_lines(lanes):
    """Lines on the lanes that were asked for, and on as many as fit."""
    asked, most = lanes["asked"], lanes["most"]
    lines = []
    if lanes["seconds"]:
        lines.append(f"{asked}: {_rate(lanes['seconds'], lanes['tokens_per_s'])}")
    if most > asked or (most and not lines):
        bound = " or more" if most == MOST_LANES else ""
        rate = _rate(lanes["most_seconds"], lanes["most_tokens_per_s"])
        lines.append(f"{most}{bound} would fit: {rate}")
    return [f"{head:<16}{line}" for head, line in zip(["lanes", ""], lines, strict=False)]


def _rate(seconds, tokens_per_s):
    return f"about {time_words(seconds)} a forward pass, {tokens_per_s:.2g} tokens a second"
