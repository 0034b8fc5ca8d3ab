"""Experts that are streamed as they are chosen: bytes and seconds of prompts and of single tokens,
beside what a simulated cache would move.

    python benchmarks/make_model.py FOLDER --shape qwen3-30b-a3b-thinking-2507 --layers 8
    python benchmarks/experts.py FOLDER --device-memory 4096MiB --prompt 512 --tokens 32
    python benchmarks/experts.py FOLDER --device-memory 4096MiB --guess on,off --turns 3

A token's bytes are compared with those of the experts that it chose and that were not on the
device, of those that were guessed in vain, and of what every pass moves. Hits are compared with a
cache that drops what was not used for the longest time, which sees the same choices. `--guess`:
whether experts are put before their layer has decided; with both, one after the other in each of
the turns, over the same tokens and with empty caches. `--right 0.85`: so many guesses stay as they
are, the others are spoilt. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise

import common

GUESS = ("on", "off")
N_MOVING = 8  # single tokens of which the moving alone is timed


class Choices:
    """The experts that each layer chose in each pass, in order; and the seconds that it waited for
    decisions, and the bytes that were put by guess in vain."""

    def __init__(self):
        self.passes: list[list[tuple[int, tuple[int, ...]]]] = []
        self.waited_s: list[float] = []
        self._guessed: list[dict[int, int]] = []  # of each pass, tile -> bytes, until it runs
        self._expected: tuple[int, ...] = ()  # what the next layer may choose
        self.n_foreseen = self.n_chosen = 0  # of the layers that were guessed

    def begin(self):
        self.passes.append([])
        self.waited_s.append(0.0)
        self._guessed.append({})

    @property
    def wasted(self) -> list[int]:
        return [sum(left.values()) for left in self._guessed]

    def on_step(self, step, tile):
        from jlayer.streaming.steps import Put, Run

        self._asked = time.perf_counter()
        if isinstance(step, Put) and step.guessed:
            self._guessed[-1][step.tile] = tile.n_bytes
        if isinstance(step, Run):
            for used in (step.tile, *step.also):
                self._guessed[-1].pop(used, None)

    def on_taken(self, step, result):
        from jlayer.streaming.steps import Fetch

        if isinstance(step, Fetch):
            self.waited_s[-1] += time.perf_counter() - self._asked
            self.passes[-1].append((step.tile, tuple(result.chosen)))
            if self._expected:
                self.n_foreseen += len(set(self._expected) & set(result.chosen))
                self.n_chosen += len(result.chosen)
            self._expected = tuple(result.guessed)


class OnTheLink:
    """How fast experts cross the link while they do, (bytes, seconds) of each layer: from when the
    first is put to when the last is there. It is waited for before they run, so a pass takes longer
    than usual. Without guesses: these are put while a decision is waited for."""

    def __init__(self):
        self.found: list[tuple[int, float]] = []
        self._arrays, self._n_bytes = [], 0
        self._is_expert = False

    def on_step(self, step, tile):
        import jax

        from jlayer.streaming.steps import Put, Run

        self._is_expert = tile.expert is not None
        if not self._is_expert:
            return
        if isinstance(step, Put) and not self._arrays:
            self._began = time.perf_counter()
        if isinstance(step, Put):
            self._n_bytes += tile.n_bytes
        if isinstance(step, Run) and self._arrays:
            jax.block_until_ready(self._arrays)
            self.found.append((self._n_bytes, time.perf_counter() - self._began))
            self._arrays, self._n_bytes = [], 0

    def on_taken(self, step, result):
        from jlayer.streaming.steps import Put

        if isinstance(step, Put) and self._is_expert:
            self._arrays.append(result)

    def speed(self) -> float | None:
        """Bytes/s; None where nothing moved."""
        seconds = sum(each for _, each in self.found)
        return sum(n_bytes for n_bytes, _ in self.found) / seconds if seconds else None


def simulated(choices: Choices, sizes: dict[int, int]) -> tuple[int, list[list[int]]]:
    """(hits, of each pass for each layer the number of experts that were not there) of caches of
    `sizes` experts, by the first tile of a layer's experts."""
    caches, hits, missed = {first: OrderedDict() for first in sizes}, 0, []
    for one in choices.passes:
        missed.append([])
        for first, chosen in one:
            cache, size = caches[first], sizes[first]
            there = [expert for expert in chosen if expert in cache]
            hits += len(there)
            missed[-1].append(len(chosen) - len(there))
            for expert in there:
                cache.move_to_end(expert)
            for expert in (number for number in chosen if number not in there):
                if len(cache) == size and size and next(iter(cache)) not in chosen:
                    cache.popitem(last=False)
                if len(cache) < size:
                    cache[expert] = None
    return hits, missed


def repeats(choices: Choices) -> float:
    """Of what single tokens chose, the share that the token before had chosen too."""
    singles = [dict(one) for one in choices.passes[2:]]
    pairs = [
        (set(before[first]), set(after[first]))
        for before, after in pairwise(singles)
        for first in after
    ]
    return sum(len(one & other) for one, other in pairs) / sum(len(other) for _, other in pairs)


@contextmanager
def spoilt(model, right: float):
    """Inside the `with` only this share of the guesses stays as it is; others are any experts. The
    routers of a model of random weights foresee each other better than those of a trained one."""
    import numpy as np

    chooser, n_experts = model.engine.sweeper.chooser, model.engine.cfg.experts.router.n_experts
    rng, real = np.random.default_rng(0), chooser.decide

    def decide(passing, following):
        found = real(passing, following)
        if following is None:
            return found
        others = iter(rng.permutation([n for n in range(n_experts) if n not in found.guessed]))
        guessed = [n if rng.random() < right else int(next(others, n)) for n in found.guessed]
        return replace(found, guessed=guessed)

    if right < 1:  # drawing takes time
        chooser.decide = decide
    try:
        yield
    finally:
        chooser.decide = real


def measure(model, *, n_prompt: int, n_tokens: int, guess: str) -> dict:
    """A prompt, then single tokens, of random ids. Before them one more token, from empty caches:
    all that stays on the device is put there, which is not measured."""
    import numpy as np

    from jlayer.plan.shapes import RunShape
    from jlayer.streaming.experts import choices as choices_of

    rng, engine = np.random.default_rng(0), model.engine
    counts = [1, n_prompt, *(1 for _ in range(n_tokens))]
    n_ids = sum(counts) + N_MOVING
    ids = rng.integers(0, model.config.vocab_size, n_ids).tolist()
    shape = RunShape(1, n_prompt, n_ids, sweeps=len(counts) + N_MOVING)
    seen, seconds, moved = Choices(), [], []
    with closing(engine.start(shape)) as forward:
        plan, totals = model.plan, engine.totals
        rooms = replace(plan.experts, guessed=plan.experts.guessed if guess == "on" else 0)
        with engine.turn() as executor:
            executor.retier(plan.tiers, plan.attending, rooms)
        for n in (n_prompt, 1):
            forward.compile(n)
        before_all, at = replace(totals), 0
        with engine.watch.also(seen.on_step, seen.on_taken):
            for n in counts:
                seen.begin()
                before, began = replace(totals), time.perf_counter()
                forward.sweep([ids[at : at + n]], [at])
                seconds.append(time.perf_counter() - began)
                moved.append(totals.since(before))
                at += n
        found = totals.since(before_all)
        moving = OnTheLink()
        with engine.watch.also(moving.on_step, moving.on_taken):
            for place in range(at, at + N_MOVING * (guess == "off")):
                forward.sweep([ids[place : place + 1]], [place])
        with engine.turn() as executor:  # what the engine takes it to be
            executor.retier(plan.tiers, plan.attending, plan.experts)
    kinds = choices_of(plan.tiles)
    expert_bytes = [sum(tile.n_bytes for tile in tiles) for tiles in plan.tiling.experts]
    sizes = {kind.first: n for kind, n in zip(kinds, plan.experts.on_device, strict=True)}
    hits, missed = simulated(seen, sizes)
    certain = plan.put_bytes - round(plan.moved(plan.load.batch).put_bytes)
    expected = [
        certain + wasted + sum(n * size for n, size in zip(counts, expert_bytes, strict=True))
        for counts, wasted in zip(missed, seen.wasted, strict=True)
    ]
    put = [each["put_bytes"] for each in moved]
    return {
        "guess": guess,
        "prompt": {"tokens": n_prompt, "seconds": seconds[1], "moved": put[1]},
        "prompt_experts": [len(chosen) for _, chosen in seen.passes[1]],
        "token_s": common.summary(seconds[2:]),
        "moved_per_token": sum(put[2:]) / n_tokens,
        "expected_per_token": sum(expected[2:]) / n_tokens,
        "moved_by_expected": sum(put[1:]) / sum(expected[1:]),
        "while_moving_bytes_per_s": moving.speed(),
        "waited_for_decisions_s": common.summary(seen.waited_s[2:]),
        "repeats": repeats(seen),
        "uses": found["experts_used"],
        "hits": found["experts_on_device"],
        "simulated_hits": hits,
        "in_host": found["experts_in_host"],
        "guessed": sum(each["experts_guessed"] for each in moved[2:]),
        "wasted": sum(each["experts_wasted"] for each in moved[2:]),
        "guessed_by_token": [each["experts_guessed"] for each in moved[2:]],
        "foreseen_share": seen.n_foreseen / seen.n_chosen if seen.n_chosen else None,
        "wasted_per_token": sum(seen.wasted[2:]) / n_tokens,
        "guessed_at_a_time": rooms.guessed,
        "on_device_a_layer": plan.experts.on_device,
        "in_host_a_layer": plan.experts.in_host,
        "expert_bytes": expert_bytes,
        "certain_bytes": certain,
        "predicted_token_s": plan.decode_seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--guess", default="on", help="on, off or on,off")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument(
        "--right", type=float, default=1.0, help="share of guesses left as they are"
    )
    args = parser.parse_args()
    guesses = args.guess.split(",")
    if not set(guesses) <= set(GUESS):
        parser.error(f"--guess: found {args.guess!r}, expected on, off or on,off")
    result = {"card": common.card(), "options": vars(args), "experts": []}
    link = None
    if args.device != "cpu":
        result["raw_link"] = common.summary(common.raw_link_speed())
        link = result["raw_link"]["median"]
        common.say(f"raw link  {link / 1e9:6.2f} GB/s")
    with common.GpuWatch() as watch, common.opened(args) as model, spoilt(model, args.right):
        # The first run reads what stays in host memory, and compiles.
        for guess in guesses:
            measure(model, n_prompt=args.prompt, n_tokens=2, guess=guess)
        for _ in range(args.turns):
            for guess in guesses:
                found = measure(model, n_prompt=args.prompt, n_tokens=args.tokens, guess=guess)
                result["experts"].append(found)
                say(found, link)
        result["memory"] = model.engine.memory()
    common.end(result, watch)


def say(found, link):
    """A run in words. `link`: its speed in bytes/s; None where there is none."""
    token, prompt = found["token_s"]["median"], found["prompt"]
    of_link = f"; {found['moved_per_token'] / token / link:.3f} of the link" if link else ""
    common.say(
        f"guesses {found['guess']}: a token: {token:.4f} s "
        f"(predicted {found['predicted_token_s']:.4f}), {found['moved_per_token'] / 1e9:.3f} GB, "
        f"{found['moved_by_expected']:.3f} x what was chosen and not there{of_link}"
    )
    if link and found["while_moving_bytes_per_s"]:
        speed = found["while_moving_bytes_per_s"]
        common.say(f"while experts of a token move: {speed / link:.3f} of the link")
    of_link = f"; {prompt['moved'] / prompt['seconds'] / link:.3f} of the link" if link else ""
    common.say(
        f"a prompt of {prompt['tokens']}: {prompt['seconds']:.3f} s, "
        f"{prompt['moved'] / 1e9:.3f} GB{of_link}"
    )
    waited = found["waited_for_decisions_s"]["median"]
    common.say(
        f"{found['uses']} uses, {found['hits']} on the device (simulated "
        f"{found['simulated_hits']}), {found['in_host']} in host memory; {found['guessed']} "
        f"put by guess, {found['wasted']} of them in vain, {found['wasted_per_token'] / 1e9:.3f} "
        f"GB a token; {found['repeats']:.3f} of what a token chose was chosen by the one before; "
        f"waited {waited:.4f} s a token for decisions"
    )
    if found["foreseen_share"] is not None:
        common.say(f"of what was chosen {found['foreseen_share']:.1%} was among the likeliest")


if __name__ == "__main__":
    main()
