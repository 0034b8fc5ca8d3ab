"""Many lanes in a forward pass: seconds of passes with 1 to 256 lanes of one context, and of 512
rows of one lane over a long one, all in one process; memory by nvidia-smi.

    python benchmarks/lanes.py FOLDER --device-memory 4096MiB --lanes 1,8,64,256 --context 512

The entries before are there and hold zeros: what a pass does with them takes as long. `--draw`
times drawing a token for each lane (top-k 50 at temperature 0.7), which follows a pass. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from statistics import median

import common


def passes(model, *, lanes: int, rows: int, context: int, count: int) -> dict:
    """Seconds of forward passes of `rows` tokens for each lane that ends at position `context`."""
    from jlayer.plan.shapes import RunShape

    shape = RunShape(lanes, rows, context, sweeps=count, entries=lanes * context)
    with closing(model.engine.start(shape)) as forward:
        start = context - rows
        forward.compile(rows)
        forward.pretend(start)
        ids = [
            [(7 * i + lane) % model.config.vocab_size for i in range(rows)] for lane in range(lanes)
        ]
        forward.sweep(ids, [start] * lanes)
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            forward.sweep(ids, [start] * lanes)
            seconds.append(time.perf_counter() - began)
        plan = model.plan
        cache = plan.device.cache_bytes + getattr(plan.host, "cache_bytes", 0)
        return {
            "lanes": lanes,
            "rows": rows,
            "context": context,
            "sweep_s": common.summary(seconds),
            "predicted_s": plan.sweep_seconds,
            "put_bytes": plan.put_bytes,
            "cache_bytes": cache,
            "cache_on_host": getattr(plan.host, "cache_bytes", 0) > 0,
            "tile_bytes": plan.tile_bytes,
            "tiers": plan.as_dict()["tiers"],
            "device_peak_bytes": plan.device_peak_bytes,
        }


def drawing(model, lanes: int) -> float:
    """Seconds to draw a token for so many lanes, from logits like a model's."""
    import numpy as np

    from jlayer.engine.drawing import draw_all
    from jlayer.engine.riders import Rider

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (lanes, model.config.vocab_size)).astype(np.float32)
    begin, _ = model.prepared([[5]] * lanes, options={"temperature": 0.7, "top_k": 50, "seed": 1})
    with closing(begin()) as run:
        riders = [Rider(lane, len(lane.history) - 1, len(lane.history)) for lane in run.lanes]
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            draw_all(list(zip(riders, logits[:, None], strict=True)))
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--lanes", default="1,8,64,256")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--long", default="1x8192,512x8192", help="rows x context of one lane")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args), "passes": []}
    if args.device != "cpu":
        result["raw_link"] = common.summary(common.raw_link_speed())
        common.say(f"raw link  {result['raw_link']['median'] / 1e9:6.2f} GB/s")
    wanted = [(int(n), 1, args.context) for n in filter(None, args.lanes.split(","))]
    for each in filter(None, args.long.split(",")):
        rows, context = map(int, each.split("x"))
        wanted.append((1, rows, context))
    with common.GpuWatch() as watch:
        from jlayer import DoesNotFitError

        with common.opened(args) as model:
            for lanes, rows, context in wanted:
                try:
                    found = passes(
                        model, lanes=lanes, rows=rows, context=context, count=args.sweeps
                    )
                except DoesNotFitError as error:
                    common.say(f"{lanes:4} lanes x {rows} rows over {context}: {error}")
                    continue
                result["passes"].append(found)
                first = result["passes"][0]["sweep_s"]["median"]
                seconds = found["sweep_s"]["median"]
                link = result.get("raw_link", {"median": 1e99})["median"]
                moved = found["put_bytes"] + found["cache_on_host"] * found["cache_bytes"]
                whole = (model.plan.tiling.n_bytes + found["cache_bytes"]) / link
                common.say(
                    f"{lanes:4} lanes x {rows:3} rows over {context:6}: {seconds:7.4f} s "
                    f"({found['sweep_s']['min']:.4f}-{found['sweep_s']['max']:.4f}), predicted "
                    f"{found['predicted_s']:.4f}; {seconds / first:.3f} x the first; "
                    f"{moved / seconds / link:.3f} of the link; {seconds / whole:.3f} x bytes of "
                    f"weights and cache; cache {found['cache_bytes'] >> 20} MiB"
                    f"{' on the host' if found['cache_on_host'] else ''}; "
                    f"tiles {found['tile_bytes'] >> 20} MiB; {found['tiers']}"
                )
            if args.draw:
                for lanes in (1, 8, 64):
                    result[f"draw_{lanes}_s"] = drawing(model, lanes)
                    common.say(f"drawing {lanes:3} tokens: {result[f'draw_{lanes}_s']:.4f} s")
            result["memory"] = model.engine.memory()
    common.end(result, watch)


if __name__ == "__main__":
    main()
