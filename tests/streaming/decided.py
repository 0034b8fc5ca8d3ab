"""Layers with experts that are made up, what is chosen of them, and the steps that follow."""

from collections import OrderedDict
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

from hypothesis import strategies as st

from jlayer.plan.experts import ExpertRooms
from jlayer.plan.tiles import Tier
from jlayer.streaming.experts import ExpertStream, choices
from jlayer.streaming.schedule import sweeps
from jlayer.streaming.steps import Decision, Fetch, Run
from jlayer.streaming.watch import Totals

N_LAYERS, N_EXPERTS, N_PLACES, N_SWEEPS = 3, 5, 2, 6
BEFORE, AFTER = 2, 1  # certain tiles of a layer

sizes = st.lists(st.integers(0, N_EXPERTS), min_size=N_LAYERS, max_size=N_LAYERS)
chosen = st.sets(st.integers(0, N_EXPERTS - 1)).map(sorted)
runs = st.fixed_dictionaries(
    {
        "on_device": sizes,
        "in_host": sizes,
        "ring": st.integers(1, 4),
        "ahead": st.integers(1, 3),
        "at_once": st.integers(1, 3),
        "chosen": st.lists(chosen, min_size=N_LAYERS * N_SWEEPS, max_size=N_LAYERS * N_SWEEPS),
        "tiers": st.lists(st.sampled_from(Tier), min_size=BEFORE + AFTER, max_size=BEFORE + AFTER),
    }
)


def made_up():
    """Tiles of layers with experts, each of which is cut in two."""
    tiles = []
    for layer in range(N_LAYERS):
        tiles += [SimpleNamespace(layer=layer, expert=None)] * BEFORE
        for expert in range(N_EXPERTS):
            tiles += [SimpleNamespace(layer=layer, expert=expert, is_whole_expert=False)] * N_PLACES
        tiles += [SimpleNamespace(layer=layer, expert=None)] * AFTER
    return tiles


TILES = made_up()
CHOICES = choices(TILES)
FIRST = {choice.first: number for number, choice in enumerate(CHOICES)}
EXPERT_OF = {
    tile: (layer, expert)
    for layer, choice in enumerate(CHOICES)
    for expert, tiles in enumerate(choice.tiles)
    for tile in tiles
}


def stream_of(run):
    first = run["ring"]  # those of other tiles come before
    at_once = min(run.get("at_once", 1), run["ahead"], run["ring"])
    experts = ExpertStream(
        [replace(choice, at_once=at_once) for choice in CHOICES],
        rooms=ExpertRooms(run["on_device"], run["in_host"], run.get("rooms", 0)),
        ring=range(first, first + run["ring"]),
        ahead=run["ahead"],
        totals=Totals(),
    )
    experts.guesses = "guessed" in run
    return experts


def steps_of(run, experts):
    """(the steps before the first sweep, those of each sweep), as they are asked for; what is
    chosen is an iterator over all layers of all sweeps, and what is guessed over those that are."""
    tiers = [
        Tier.DISK if tile.expert is not None else tier
        for tile, tier in zip(TILES, of_layers(run["tiers"]), strict=True)
    ]
    lists = sweeps(tiers, ring=run["ring"], ahead=run["ahead"], experts=experts)
    decisions, guesses, found = iter(run["chosen"]), iter(run.get("guessed", ())), []
    for steps in islice(lists, N_SWEEPS + 1):
        found.append([])
        decision = None
        while True:
            try:
                step = steps.send(decision)
            except StopIteration:
                break
            found[-1].append(step)
            if isinstance(step, Fetch):
                guess = () if step.guess is None else next(guesses)
                decision = Decision(next(decisions), guess)
            else:
                decision = None
    return found[0], found[1:]


def of_layers(tiers):
    one = [*tiers[:BEFORE], *[Tier.DISK] * (N_EXPERTS * N_PLACES), *tiers[BEFORE:]]
    return one * N_LAYERS


def run_in_order(steps):
    """The tiles that run, in order."""
    return [tile for step in steps if isinstance(step, Run) for tile in (step.tile, *step.also)]


def place_of(step):
    """Where a tile lies in host memory: its own room has no name."""
    return ("of", step.tile) if step.slot is None else step.slot


def simulated(sizes, decisions):
    """How often what is chosen is there, of caches that drop what was not used for the longest
    time; what is there of a choice counts as used first."""
    caches, hits, missed = [OrderedDict() for _ in sizes], 0, []
    for number, decision in enumerate(decisions):
        layer = number % N_LAYERS
        cache, size = caches[layer], sizes[layer]
        there = [expert for expert in decision if expert in cache]
        for expert in there:
            cache.move_to_end(expert)
        for expert in decision:
            if expert in there:
                continue
            missed.append((layer, expert))
            if len(cache) == size and size and next(iter(cache)) not in decision:
                cache.popitem(last=False)
            if len(cache) < size:
                cache[expert] = None
        hits += len(there)
    return hits, missed
