"""What leaving out layers costs: perplexity of held-out text by the number of layers that are left
out, chosen by influence, as the last ones, and at random.

    python benchmarks/pruning.py MODEL TEXT[.gz] [--most 3] [--seeds 8] [--tokens 16384]

Takes the last tokens of the text. Influence is measured on the first three quarters of
the tokens, perplexity on the last quarter, in float32. Each set of layers is a model of its own,
opened without them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
from pathlib import Path

import common

from jlayer import AutoModel
from jlayer.measure.evaluate import perplexity
from jlayer.measure.influence import influences


def read(path: str) -> str:
    raw = Path(path).read_bytes()
    return (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()


def choices(n_layers: int, n: int, order, seeds: int) -> dict[str, list[tuple[int, ...]]]:
    """way of choosing -> the sets of `n` layers that it gives."""
    drawn = [random.Random(seed).sample(range(n_layers), n) for seed in range(seeds)]
    return {
        "influence": [tuple(sorted(order[:n]))],
        "last": [tuple(range(n_layers - n, n_layers))],
        "random": [tuple(sorted(one)) for one in drawn],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--most", type=int, default=3, help="layers that are left out")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    options = {"device": args.device, "dtype": "float32"}
    with AutoModel.from_pretrained(args.model, **options) as model:
        text = read(args.text)
        ids = model.text.encode(text[-12 * args.tokens :])[-args.tokens :]
        cut = len(ids) - len(ids) // 4
        found = influences(model, ids[:cut], length=args.window)
    n_layers, known = len(found.of_layers), {}

    def loss(dropped):
        if dropped not in known:
            with AutoModel.from_pretrained(args.model, without_layers=dropped, **options) as model:
                known[dropped] = perplexity(model, ids[cut:], length=args.window).perplexity
        return known[dropped]

    print("influence:", ", ".join(f"{value:.4f}" for value in found.of_layers))
    curve = [{"n": 0, "perplexity": loss(())}]
    for n in range(1, args.most + 1):
        sets = choices(n_layers, n, found.least(args.most), args.seeds)
        losses = {way: [loss(one) for one in own] for way, own in sets.items()}
        row = {"n": n, "dropped": sets["influence"][0]}
        row |= {way: statistics.median(own) for way, own in losses.items()}
        row |= {"random_best": min(losses["random"]), "random_worst": max(losses["random"])}
        curve.append(row)
        print(row, flush=True)
    print(json.dumps({"influence": found.of_layers, "curve": curve, "card": common.card()}))


if __name__ == "__main__":
    main()
