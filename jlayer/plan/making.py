"""Makes plans: the fastest forward pass that fits the budgets.

Pure and without JAX, so `jlayer plan` works from a config alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jlayer.families.registry import (
    family_of,
    head_leaf,
    is_matrix,
    is_of_an_expert,
    published_tensors,
    windows_of,
)
from jlayer.plan import hosting, memory
from jlayer.plan.cutting import cut
from jlayer.plan.draft import draft_need
from jlayer.plan.experts import (
    ExpertRooms,
    counts_of,
    guess_rooms,
    no_rooms,
    rooms,
    rooms_need,
    sizes_of,
)
from jlayer.plan.limits import Limits, chunk_limits, row_limits
from jlayer.plan.low_rank import check_host_share
from jlayer.plan.machine import CACHE_PINNED, READING, HostSpeeds, Machine
from jlayer.plan.need import Need, device_memory, host_memory, total
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import PROMPT_ROWS, PoolSizes, RunShape, pool_sizes, together
from jlayer.plan.tiles import Tier, Weights
from jlayer.plan.tiling import Tiling

# None: whole layers. On an H200 tiles of 64 MiB move at the full speed of the link, 32 MiB at 95%.
TILE_BYTES = (None, *(mib << 20 for mib in (256, 128, 64, 48, 32, 16, 8, 4, 2, 1)))
# Device memory left free when tiles that stay fill the rest.
RESERVE_BYTES = 96 << 20
# Seconds that a change to other tiles costs once: new programs are compiled.
OTHER_TILES_S = 5.0


def with_host(
    plan_of: Callable[[hosting.Shares], Plan],
    forms: Sequence[str],
    host_share: float | None,
    speeds: HostSpeeds | None,
) -> Plan:
    """The best of the plans in which the host's cores multiply a share of the rows, or none.

    `plan_of(shares)`: the plan with these shares. `forms`: the encodings of the model's matrices.
    `host_share`: as the user asked for it, for every forward pass; None: as the speeds have it,
    where it pays.
    """
    if host_share is not None:
        shares = tuple((form, host_share) for form in forms) if host_share > 0 else ()
        return replace(plan_of(shares), always_hosted=bool(shares))
    alone = plan_of(())
    if alone.experts.on_device:
        return alone  # the cores multiply no experts, which are most of what passes
    resident = alone.tier_bytes(Tier.DEVICE)
    passing = alone.tiling.n_bytes - resident
    if speeds is None or not alone.fits or not passing:
        return alone
    shares = hosting.auto_shares(
        speeds,
        forms,
        passing=passing,
        resident=resident,
        rows=alone.load.batch,
        n_stages=hosting.all_stages(alone.tiling),
    )
    both = plan_of(shares) if shares else alone
    pays = both.fits and both.decode_seconds < hosting.WORTH * alone.decode_seconds
    return both if pays else alone


def matrix_forms(weights: Weights) -> tuple[str, ...]:
    """The encodings of the streamed matrices that the host's cores could multiply, in order of
    their names: of all but experts, which they do not. None where they may not."""
    if not check_host_share(weights.cfg, None):
        return ()
    table = {family_of(weights.cfg).embedding.published} - {head_leaf(weights.cfg).published}
    shapes = published_tensors(weights.cfg)
    matrices = (name for name in shapes if is_matrix(name, shapes[name]))
    names = [name for name in matrices if name not in table and not is_of_an_expert(name)]
    return tuple(sorted({weights.form_of(name) for name in names}))


def make_plan(
    weights: Weights,
    machine: Machine,
    run: RunShape,
    *,
    held: Sequence[RunShape] = (),
    least_pool: PoolSizes | None = None,
    keeps_layers: bool = True,
    tilings: dict[tuple, Tiling] | None = None,
    draft: Weights | None = None,
    shares: hosting.Shares = (),
) -> Plan:
    """The plan of the fastest forward pass that fits: tiles, chunk of rows, tiers.

    `held`: other live runs. `least_pool`: the rows that the pools have. `tilings`: existing ones of
    this model by how they were cut, to reuse; new ones are added. `draft`: the weights of a draft
    model, which the device holds too. `shares`: of the rows that are set apart for the host's
    cores; see `hosting`. Prompts are split over several forward
    passes, and pools are in host memory, only where nothing fits otherwise: whichever takes less
    time. If nothing fits at all, the plan that needs least memory (`fits` is False; `check`
    refuses).
    """
    tilings = {} if tilings is None else tilings
    # A whole layer is multiplied in one place, and has no experts to choose from.
    is_cut = bool(shares) or weights.cfg.experts is not None or machine.all_devices > 1
    tile_sizes = tuple(size for size in TILE_BYTES if size is not None or not is_cut)

    def bare(tile_bytes, limits):
        tiling = tiling_of(tilings, weights, machine, tile_bytes, shares)
        return bare_plan(weights, machine, tiling, run, held, limits, least_pool, draft)

    def fastest(rows, cache):
        """The plan of the fastest forward pass by these limits; None where none fits."""
        best = None
        for tile_bytes in tile_sizes:
            of_chunks = (bare(tile_bytes, Limits(most, rows, cache)) for most in chunk_rows)
            # Smaller chunks only cost dispatches.
            found = next((plan for plan in of_chunks if plan.fits), None)
            if found is None:
                continue
            plan = _with_tiers(found) if keeps_layers else found
            if best is None or plan.cautious_seconds < best.cautious_seconds:
                best = plan
            elif plan.chunk <= best.chunk:
                break  # smaller tiles leave more memory for kept tiles; that no longer pays here
        return best

    smallest, candidates = None, []
    chunk_rows = chunk_limits(run, *held)
    for rows in row_limits(run, *held):
        for cache in (Tier.DEVICE, Tier.HOST):
            # Whole layers, or the smallest tiles, need least memory.
            limits = Limits(chunk_rows[-1], rows, cache)
            least = [bare(tile_bytes, limits) for tile_bytes in (tile_sizes[0], tile_sizes[-1])]
            smallest = min(filter(None, (smallest, *least)), key=lambda p: p.device_peak_bytes)
            best = fastest(rows, cache) if any(plan.fits for plan in least) else None
            if best is not None and (rows, cache) == (None, Tier.DEVICE):
                return best
            candidates += [] if best is None else [best]
    return min(candidates, key=lambda plan: run_seconds(plan, run), default=smallest)


def tiling_of(
    tilings: dict[tuple, Tiling],
    weights: Weights,
    machine: Machine,
    tile_bytes: int | None,
    shares: hosting.Shares = (),
) -> Tiling:
    """The tiling that is cut like this: of `tilings`, to which it is added if it is not there."""
    if (tile_bytes, shares) not in tilings:
        tiling = cut(
            *(weights, tile_bytes),
            platform=machine.platform,
            n_devices=machine.n_devices,
            host=machine.host_number,
            n_hosts=machine.n_hosts,
            shares=shares,
        )
        tilings[tiling.cut_as] = tiling
    return tilings[tile_bytes, shares]


def run_seconds(plan: Plan, run: RunShape) -> float:
    """About the seconds of all forward passes of a run."""
    return (plan.shapes.prefills - 1 + max(1, run.sweeps)) * plan.cautious_seconds


def refit(
    plan: Plan,
    weights: Weights,
    run: RunShape,
    *,
    held: Sequence[RunShape] = (),
    least_pool: PoolSizes | None = None,
    draft: Weights | None = None,
) -> Plan:
    """The plan of another run with the same tiles and tiers; it may not fit."""
    for rows in row_limits(run, *held):
        for cache in (Tier.DEVICE, Tier.HOST):
            for most in chunk_limits(run, *held):
                limits, on = Limits(most, rows, cache), plan.machine
                bare = bare_plan(weights, on, plan.tiling, run, held, limits, least_pool, draft)
                kept = _with_kept(bare, plan.tiers, plan.experts)
                same = replace(kept, always_hosted=plan.always_hosted)
                if same.fits:
                    return same
    return same


def fitting(plan_of: Callable[[RunShape], Plan], shape: RunShape) -> Plan:
    """The plan of a run with as many guessed tokens as fit: those of `shape`, else half as many,
    and so on; if none fit, the plan without any. How many they are is in `plan.shapes.nodes`."""
    while True:
        plan = plan_of(shape)
        if plan.fits or shape.nodes == 0:
            return plan
        half = shape.nodes // 2
        shape = replace(shape, nodes=half if half >= shape.batch else 0)


def bare_plan(
    weights: Weights,
    machine: Machine,
    tiling: Tiling,
    run: RunShape,
    held: Sequence[RunShape],
    limits: Limits,
    least_pool: PoolSizes | None = None,
    draft: Weights | None = None,
) -> Plan:
    """The plan of a tiling that needs least memory: no tile stays. Prompts of several runs share a
    forward pass where that fits."""
    several = _bare(*(weights, machine, tiling, run, held, limits, least_pool, draft), PROMPT_ROWS)
    if several.fits or not held:
        return several
    return _bare(*(weights, machine, tiling, run, held, limits, least_pool, draft), 0)


def _bare(weights, machine, tiling, run, held, limits, least_pool, draft, prompt_rows):
    ahead = min(machine.kind.ahead, len(tiling.shapes))
    ring = ahead + READING
    shapes = [each.shapes(limits.chunk, limits.rows) for each in (run, *held)]
    load = together(shapes, limits.chunk, prompt_rows)
    needs = [
        *memory.fixed_needs(weights, machine, tiling, ring=ring, ahead=ahead),
        *memory.run_needs(
            weights, machine, tiling, load, cache=limits.cache, least_pool=least_pool
        ),
    ]
    if draft is not None:
        pool = pool_sizes(load, windows_of(weights.cfg), least_pool).n_rows
        needs.append(draft_need(draft, machine, load, pool=pool))
    device = device_memory(machine.device_budget, needs)
    if machine.kind.has_link:
        # Page tables of pools in host memory: see CACHE_PINNED.
        least = sum(need.host for need in needs if need.term == "cache") // CACHE_PINNED
        needs.append(Need("cache", device=max(0, least - total(device))))
        device = device_memory(machine.device_budget, needs)
    else:
        # Device memory is host memory; the slots are counted once.
        needs.append(Need("resident", host=total(device) - device.slots_bytes))
    return Plan(
        machine=machine,
        device=device,
        host=host_memory(machine.host_budget, needs),
        tiling=tiling,
        tiers=tiling.from_disk,
        ring=ring,
        ahead=ahead,
        shapes=shapes[0],
        load=load,
        rows=limits.rows,
        cache=limits.cache,
        model_bytes=weights.stored_bytes,
        published_bytes=weights.published_bytes,
        n_layers=weights.cfg.num_hidden_layers,
        n_held=len(held),
        cfg=weights.cfg,
        experts=no_rooms(weights.cfg),
    )


def _with_tiers(plan: Plan) -> Plan:
    """Keeps tiles in the rest of the budgets: first on a GPU, then in host memory.

    Kept tiles are spread evenly over the forward pass, so that disk and link are busy at the same
    time throughout. What every pass uses comes before experts, which have what room is left. On a
    GPU what is used uncut comes first: the host's cores could not multiply it where it lies. Where
    all that every pass uses stays there, it needs no slots.
    """
    tiling, tiers = plan.tiling, list(plan.tiers)
    on_device = plan.device.budget_bytes - plan.device_peak_bytes - RESERVE_BYTES
    on_device = on_device if plan.machine.kind.has_link else 0
    certain = [n for n in tiling.certain if tiling.sizes[n] and not tiling.shapes[n].for_host]
    chosen = set(certain)
    everything = [Tier.DEVICE if n in chosen else tier for n, tier in enumerate(tiers)]
    slots = _unused_slots(plan, everything)
    if sum(tiling.device_sizes[n] for n in certain) <= on_device + slots:
        on_device += slots
    uncut = [n for n in certain if n in tiling.uncut]
    for some in (uncut, [n for n in certain if n not in tiling.uncut]):
        kept = _spread([tiling.device_sizes[n] for n in some], on_device)
        for index, keep in zip(some, kept, strict=True):
            if keep:
                tiers[index] = Tier.DEVICE
                on_device -= tiling.device_sizes[index]
    rest = [n for n in tiling.certain if tiers[n] is Tier.DISK]
    in_host = plan.host.budget_bytes - plan.host_peak_bytes
    kept = _spread([tiling.sizes[n] + tiling.slack for n in rest], in_host)
    for index, keep in zip(rest, kept, strict=True):
        if keep:
            tiers[index] = Tier.HOST
            in_host -= tiling.sizes[index] + tiling.slack
    return _with_kept(plan, tuple(tiers), _expert_rooms(plan, on_device, in_host))


def _unused_slots(plan, tiers):
    """The bytes of the device's slots for what every pass uses, where all of it stays there."""
    tiling, on = plan.tiling, plan.machine
    moves = any(tiling.sizes[n] and tiers[n] is not Tier.DEVICE for n in tiling.certain)
    if moves or not on.kind.has_link:
        return 0
    certain, *_ = memory.slots_needs(on, tiling, ring=plan.ring, ahead=plan.ahead)
    return certain.device


def _expert_rooms(plan, on_device, in_host):
    """The rooms for experts in so many bytes. Those for guesses come first, as they are few; there
    are none where all experts are on the device, or none is in host memory."""
    counts, sizes = counts_of(plan.cfg), sizes_of(plan.tiling)
    device_sizes = [size.device for size in sizes]
    kept = rooms(counts, device_sizes, on_device)
    there = rooms(counts, [size.host for size in sizes], in_host)
    guessed = 0
    # A router that is streamed is not there for the layer before it.
    if any(there) and kept != counts and not plan.cfg.experts.router_moves:
        largest = max(device_sizes)
        guessed = guess_rooms(plan.cfg.experts.router, largest, max(0, on_device))
        kept = rooms(counts, device_sizes, on_device - 2 * guessed * largest)
    return ExpertRooms(kept, there, guessed)


def _with_kept(plan, tiers, experts):
    """A bare plan with these tiers and rooms, and what they keep added to its sums."""
    (tiles,), some = memory.kept_needs(plan.tiling, tiers), rooms_need(plan.tiling, experts)
    kept = Need("resident", device=tiles.device + some.device, host=tiles.host + some.host)
    device, host = plan.device, plan.host
    device = replace(device, slots_bytes=device.slots_bytes - _unused_slots(plan, tiers))
    return replace(
        plan,
        tiers=tiers,
        experts=experts,
        device=replace(device, resident_bytes=device.resident_bytes + kept.device),
        host=replace(host, resident_bytes=host.resident_bytes + kept.host),
    )


def pays(same: Plan, best: Plan, n_sweeps: int) -> bool:
    """Whether changing to plan `best` saves time over `n_sweeps` forward passes.

    Other tiles need new programs, and the host tier is read again. The same tiles in other tiers
    cost nothing: the next pass reads what is missing, as it would have anyway.
    """
    gain = (same.cautious_seconds - best.cautious_seconds) * n_sweeps
    if best.tiling is same.tiling:
        return gain > 0
    refill_s = best.tier_bytes(Tier.HOST) / best.machine.disk_speed
    return gain > OTHER_TILES_S + refill_s


def _spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of `sizes` to keep within `room` bytes, spread evenly over the list."""
    whole = sum(sizes)
    if room >= whole:
        return [True] * len(sizes)
    if room < min(sizes, default=0):
        return [False] * len(sizes)
    kept, used, passed = [], 0, 0
    for size in sizes:
        passed += size
        # Keep this tile if the kept bytes are behind the proportional share by half of it or more.
        with_it = used + size
        keep = with_it <= room and with_it <= room * passed / whole + size / 2
        kept.append(keep)
        if keep:
            used = with_it
    return kept
