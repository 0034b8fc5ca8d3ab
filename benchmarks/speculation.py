"""Tokens a forward pass by speculation: trees of several widths, temperatures and sources of
guesses, on real models.

    python benchmarks/speculation.py TARGET DRAFT --nodes 16,64,256 --temperatures 0,0.7,1

Ten openings of stories, 160 tokens each. A figure is all new tokens divided by all forward passes,
those over the prompts included, which carry a tree as well. Other answers are forgotten before each
prompt, unless --others. `--blind` repeats the draft's rows with trees that do not know the noise;
`--check` decodes every prompt plainly too, and compares token for token. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse

import common
import numpy as np

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The king said to the fisherman,",
    '"Who are you?" asked Dorothy.',
    "The old woman took the wolf by the",
    "In a far away land there lived a poor",
    "It was a cold winter evening, and Mr.",
    "The princess looked into the well and",
    '"I should like to go home," said the',
    "There was once a tailor who had three sons, and",
    "When the sun rose over the forest, the",
)


class Runs:
    """A target and its draft, opened once, and what plain decoding gives."""

    def __init__(self, options):
        import jlayer

        self._n, self._keeps_others = options.tokens, options.others
        self._seeds = [int(seed) for seed in options.seeds.split(",")]
        self._model = jlayer.AutoModel.from_pretrained(
            options.target,
            draft=options.draft,
            dtype=options.dtype,
            device=options.device,
            device_memory=options.device_memory,
        )
        self._plain: dict = {}

    def row(self, speculate, temperature, nodes, *, blind=False, check=False) -> dict:
        """The figures of all prompts."""
        from jlayer import generate

        speculation = self._model.engine.speculation
        speculation.grower.knows_noise = not blind
        found, plain = [], []
        for seed in self._seeds if temperature else self._seeds[:1]:
            for prompt in PROMPTS:
                if not self._keeps_others:
                    speculation.forget_answers()
                options = {"max_new_tokens": self._n, "temperature": temperature, "seed": seed}
                guesses = {"speculate": speculate, "draft_tokens": nodes}
                found.append(generate(self._model, prompt, **guesses, **options))
                if check:
                    key = (prompt, temperature, seed)
                    if key not in self._plain:
                        off = generate(self._model, prompt, speculate="off", **options)
                        self._plain[key] = off.token_ids
                    plain.append(self._plain[key])
        stats = [one.stats for one in found]
        n_tokens = sum(len(one.token_ids) for one in found)
        sweeps = sum(one["sweeps"] for one in stats)
        row = {
            "speculate": speculate,
            "temperature": temperature,
            "nodes": nodes,
            "blind": blind,
            "texts": len(found),
            "tokens_per_pass": n_tokens / sweeps,
            "mean_over_prompts": sum(len(one.token_ids) / one.stats["sweeps"] for one in found)
            / len(found),
            "accepted_by_depth": _sum_lists(one["accepted_by_depth"] for one in stats),
            "draft_s": sum(one["draft_s"] for one in stats),
            "sweep_s": sum(one["sweep_s"] for one in stats),
            "sharpness": stats[-1]["sharpness"],
        }
        if check:
            row |= self._compared(found, plain, temperature)
        return row

    def _compared(self, found, plain, temperature):
        """How many texts and tokens are those of plain decoding, up to the first that is not; and
        how far apart there, in logits, what was drawn and what plain decoding drew were."""
        equal, gaps, n_equal = 0, [], 0
        seeds = self._seeds if temperature else self._seeds[:1]
        keys = [(seed, prompt) for seed in seeds for prompt in PROMPTS]
        for (seed, prompt), one, tokens in zip(keys, found, plain, strict=True):
            if one.token_ids == tokens:
                equal, n_equal = equal + 1, n_equal + len(tokens)
                continue
            pairs = list(zip(one.token_ids, tokens, strict=False))
            first = next(i for i, (a, b) in enumerate(pairs) if a != b)
            n_equal += first
            gaps.append(self._gap(prompt, tokens[:first], pairs[first], temperature, seed))
        n_tokens = sum(map(len, plain))
        return {
            "equal_to_plain": equal,
            "tokens_before_a_difference": n_equal / n_tokens,
            "largest_gap": max(gaps, default=0.0),
        }

    def _gap(self, prompt, tokens, pair, temperature, seed):
        from jlayer.engine.sample import NoiseKey, noise

        ids = [*self._model.text.encode(prompt), *tokens]
        logits = self._model.logits(ids)[0, -1]
        low, high = sorted(pair)
        scores = logits[[low, high]].astype(float)
        if temperature:
            scores += temperature * noise(np.array([low, high]), NoiseKey(seed, 0, len(ids)))
        return float(abs(scores[0] - scores[1]))


def _sum_lists(lists):
    total = []
    for one in lists:
        total += [0] * (len(one) - len(total))
        total = [a + b for a, b in zip(total, [*one, *[0] * (len(total) - len(one))], strict=True)]
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--nodes", default="16,64,256")
    parser.add_argument("--temperatures", default="0,0.7,1")
    parser.add_argument("--modes", default="draft,auto,lookup")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--seeds", default="1", help="of the rows that draw")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    runs, rows = Runs(options), []
    for mode in options.modes.split(","):
        for temperature in map(float, options.temperatures.split(",")):
            for nodes in map(int, options.nodes.split(",")):
                for blind in (False, True) if options.blind and mode == "draft" else (False,):
                    row = runs.row(mode, temperature, nodes, blind=blind, check=options.check)
                    common.say(_line(row))
                    rows.append(row)
    common.last_line({**common.card(), "rows": rows})


def _line(row):
    checked = ""
    if "equal_to_plain" in row:
        share = 100 * row["tokens_before_a_difference"]
        checked = (
            f", {row['equal_to_plain']} of {row['texts']} equal, {share:.1f}% of tokens before a "
            f"difference, the largest of {row['largest_gap']:.3f} logits"
        )
    return (
        f"{row['speculate']}{' blind' if row['blind'] else ''}, temperature {row['temperature']}, "
        f"{row['nodes']} nodes: {row['tokens_per_pass']:.2f} tokens a forward pass "
        f"(mean {row['mean_over_prompts']:.2f}){checked}"
    )


if __name__ == "__main__":
    main()
