"""A published folder run in place against its conversion: sweeps of both in turn, all from disk.

    python benchmarks/make_model.py /tmp/p8 --shape 8b --layers 6 --published
    python benchmarks/make_model.py /tmp/l8 --shape 8b --layers 6
    python benchmarks/in_place.py /tmp/p8 /tmp/l8 [--device cpu] [--pairs 5] [--host-memory 9GiB]

Each pair sweeps both, in an order that changes from pair to pair; the figure is the median of the
ratios. With --host-memory the layers that fit are kept there, so that a GPU's link is measured too.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

import common


def timed_sweep(model, forward) -> dict:
    """One sweep in a steady state: what other sweeps have left to be read ahead is over."""
    time.sleep(1)
    forward.sweep([[5]], [0])  # finds its first tiles read already: only the next one is steady
    totals = model.engine.totals
    before = totals.read_bytes, totals.put_bytes, totals.bounced_bytes
    began = time.perf_counter()
    forward.sweep([[5]], [0])
    seconds = time.perf_counter() - began
    after = totals.read_bytes, totals.put_bytes, totals.bounced_bytes
    read, put, bounced = (now - then for now, then in zip(after, before, strict=True))
    return {"sweep_s": seconds, "read_bytes": read, "put_bytes": put, "bounced_bytes": bounced}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("published")
    parser.add_argument("layered")
    parser.add_argument("--device")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args)}

    from jlayer import AutoModel
    from jlayer.plan.shapes import RunShape

    options = {"device": args.device, "device_memory": args.device_memory}
    kept = {"host_memory": args.host_memory} if args.host_memory else {"keeps_layers": False}
    with ExitStack() as stack:
        kinds = {}
        for kind, folder in (("in place", args.published), ("converted", args.layered)):
            model = stack.enter_context(AutoModel.from_pretrained(folder, **options, **kept))
            forward = model.engine.start(RunShape(1, 1, 64))
            logits = forward.sweep([[5]], [0])
            kinds[kind] = (model, forward, logits)
        assert (kinds["in place"][2] == kinds["converted"][2]).all(), "not the same weights"
        pairs = []
        for n in range(args.pairs):
            pair = {}
            for kind in list(kinds) if n % 2 else reversed(list(kinds)):
                pair[kind] = timed_sweep(*kinds[kind][:2])
            pair["ratio"] = pair["in place"]["sweep_s"] / pair["converted"]["sweep_s"]
            pairs.append(pair)
            for kind in kinds:
                found = pair[kind]
                common.say(
                    f"{kind:10} {found['sweep_s']:.3f} s a sweep, "
                    f"{found['put_bytes'] / found['sweep_s'] / 1e9:.2f} GB/s of weights, "
                    f"{found['read_bytes'] / 1e9:.2f} GB read, "
                    f"{found['bounced_bytes'] / 1e9:.2f} GB moved"
                )
            common.say(f"ratio      {pair['ratio']:.3f}")
    result["pairs"] = pairs
    result["ratio"] = common.summary([pair["ratio"] for pair in pairs])
    common.say(f"in place takes {result['ratio']['median']:.3f} of the converted folder's time")
    common.last_line(result)


if __name__ == "__main__":
    main()
