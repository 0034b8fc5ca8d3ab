"""Experts that are streamed as they are chosen: bytes and seconds of prompts and of single tokens,
beside what a simulated cache would move.

    python benchmarks/make_model.py FOLDER --shape qwen3-30b-a3b-thinking-2507 --layers 8
    python benchmarks/experts.py FOLDER --device-memory 4096MiB --prompt 512 --tokens 32

A token's bytes are compared with those of the experts that it chose and that were not on the
device, and of what every pass moves. Hits are compared with a cache that drops what was not used
for the longest time, which sees the same choices. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from contextlib import closing
from itertools import pairwise

import common


class Choices:
    """The experts that each layer chose in each pass, in order."""

    def __init__(self):
        self.passes: list[list[tuple[int, tuple[int, ...]]]] = []

    def on_step(self, step, tile):
        pass

    def on_taken(self, step, result):
        from jlayer.streaming.steps import Fetch

        if isinstance(step, Fetch):
            self.passes[-1].append((step.tile, tuple(result)))


def simulated(choices: Choices, sizes: dict[int, int]) -> tuple[int, list[list[int]]]:
    """(hits, of each pass for each layer the number of experts that were not there) of caches of
    `sizes` experts, by the first tile of a layer's experts."""
    caches, hits, missed = {first: OrderedDict() for first in sizes}, 0, []
    for one in choices.passes:
        missed.append([])
        for first, chosen in one:
            cache, size = caches[first], sizes[first]
            there = {expert for expert in chosen if expert in cache}
            hits += len(there)
            missed[-1].append(len(chosen) - len(there))
            for expert in there:
                cache.move_to_end(expert)
            for expert in set(chosen) - there:
                if len(cache) == size and size and next(iter(cache)) not in chosen:
                    cache.popitem(last=False)
                if len(cache) < size:
                    cache[expert] = None
    return hits, missed


def repeats(choices: Choices) -> tuple[int, int]:
    """(uses by single tokens of experts that the token before used too, all uses), of the passes
    after the second."""
    singles = [dict(one) for one in choices.passes[1:]]
    pairs = [
        (set(before[first]), set(after[first]))
        for before, after in pairwise(singles)
        for first in after
    ]
    return sum(len(one & other) for one, other in pairs), sum(len(other) for _, other in pairs)


def measure(model, *, n_prompt: int, n_tokens: int) -> dict:
    """A prompt, then single tokens, of random ids."""
    import numpy as np

    from jlayer.plan.shapes import RunShape
    from jlayer.streaming.experts import choices as choices_of

    rng, engine = np.random.default_rng(0), model.engine
    ids = rng.integers(0, model.config.vocab_size, n_prompt + n_tokens).tolist()
    shape = RunShape(1, n_prompt, n_prompt + n_tokens, sweeps=1 + n_tokens)
    seen, seconds, moved = Choices(), [], []
    with closing(engine.start(shape)) as forward:
        for n in (n_prompt, 1):
            forward.compile(n)
        with engine.watch.also(seen.on_step, seen.on_taken):
            for start in (0, *range(n_prompt, n_prompt + n_tokens)):
                n = n_prompt if start == 0 else 1
                seen.passes.append([])
                before, began = engine.totals.put_bytes, time.perf_counter()
                forward.sweep([ids[start : start + n]], [start])
                seconds.append(time.perf_counter() - began)
                moved.append(engine.totals.put_bytes - before)
    plan, totals = model.plan, engine.totals
    kinds = choices_of(plan.tiles)
    expert_bytes = [sum(tile.n_bytes for tile in tiles) for tiles in plan.tiling.experts]
    sizes = {kind.first: n for kind, n in zip(kinds, plan.experts.on_device, strict=True)}
    hits, missed = simulated(seen, sizes)
    repeated, n_uses = repeats(seen)
    certain = plan.put_bytes - round(plan.moved(plan.load.batch).put_bytes)
    expected = [
        certain + sum(n * size for n, size in zip(counts, expert_bytes, strict=True))
        for counts in missed
    ]
    return {
        "prompt": {"tokens": n_prompt, "seconds": seconds[0], "moved": moved[0]},
        "prompt_experts": [len(chosen) for _, chosen in seen.passes[0]],
        "token_s": common.summary(seconds[1:]),
        "moved_per_token": sum(moved[1:]) / n_tokens,
        "expected_per_token": sum(expected[1:]) / n_tokens,
        "moved_by_expected": sum(moved) / sum(expected),
        "repeats": repeated / n_uses,
        "uses": totals.experts_used,
        "hits": totals.experts_on_device,
        "simulated_hits": hits,
        "in_host": totals.experts_in_host,
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
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args)}
    link = None
    if args.device != "cpu":
        result["raw_link"] = common.summary(common.raw_link_speed())
        link = result["raw_link"]["median"]
        common.say(f"raw link  {link / 1e9:6.2f} GB/s")
    with common.GpuWatch() as watch, common.opened(args) as model:
        # The first run reads what stays in host memory.
        measure(model, n_prompt=args.prompt, n_tokens=2)
        found = result["experts"] = measure(model, n_prompt=args.prompt, n_tokens=args.tokens)
        result["memory"] = model.engine.memory()
    token, prompt = found["token_s"]["median"], found["prompt"]
    of_link = f"; {found['moved_per_token'] / token / link:.3f} of the link" if link else ""
    common.say(
        f"a token: {token:.4f} s (predicted {found['predicted_token_s']:.4f}), "
        f"{found['moved_per_token'] / 1e9:.3f} GB, {found['moved_by_expected']:.3f} x what was "
        f"chosen and not there{of_link}"
    )
    of_link = f"; {prompt['moved'] / prompt['seconds'] / link:.3f} of the link" if link else ""
    common.say(
        f"a prompt of {prompt['tokens']}: {prompt['seconds']:.3f} s, "
        f"{prompt['moved'] / 1e9:.3f} GB{of_link}"
    )
    common.say(
        f"{found['uses']} uses, {found['hits']} on the device (simulated {found['simulated_hits']} "
        f"in the last run), {found['in_host']} in host memory; {found['repeats']:.3f} of what a "
        "token chose was chosen by the one before"
    )
    common.end(result, watch)


if __name__ == "__main__":
    main()
