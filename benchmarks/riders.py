"""Tokens a second of a server's desk: 1 to 256 requests at a time, each with a prompt of its own,
in one process; memory by nvidia-smi.

    python benchmarks/riders.py FOLDER --device-memory 4096MiB --riders 1,8,64,256 --context 512

Each request continues a prompt of random tokens up to `--context`, with `--new` new tokens. Two
figures: over everything, prompts included, and `steady`: of the forward passes in which every
request draws a token. `--steady N` ends a run N such passes after the last request has begun: what
counts over everything is then left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from statistics import median

import common


def measured(model, *, riders: int, context: int, new: int, steady: int | None = None) -> dict:
    """Serves so many requests at once. `steady`: forward passes after the last of them has begun;
    None: until all are answered."""
    import numpy as np

    from jlayer.serving.desk import Desk
    from jlayer.serving.job import Order
    from jlayer.serving.queue import Limits

    rng = np.random.default_rng(riders)
    asked = {"temperature": 0, "max_new_tokens": new, "eos_token_id": None, "speculate": "off"}
    options = model.sampling_options(asked)
    desk, passes = Desk(model, limits=Limits(people=riders), keeps=0), []
    run = model.engine.sweeper.run

    def timed(executor, parts, *args, **options):
        n_compiled, at = sum(model.engine.compiles.values()), time.perf_counter()
        run(executor, parts, *args, **options)
        n_rows = sum(len(part.real) for part in parts)
        is_new = sum(model.engine.compiles.values()) > n_compiled
        passes.append((n_rows, round(time.perf_counter() - at, 3), is_new))
        if len(passes) % 20 == 0:  # a run that is cut short has said how far it came
            last = passes[-20:]
            common.say(
                f"  pass {len(passes)}: {time.perf_counter() - began:.0f} s, "
                f"{sum(map(bool, times))} of {riders} have begun; medians of the last 20: "
                f"{median(rows for rows, _, _ in last):.0f} rows, "
                f"{median(s for _, s, _ in last):.2f} s"
            )

    times: list[list[float]] = [[] for _ in range(riders)]
    model.engine.sweeper.run = timed
    desk.start()
    try:

        def heard(number):
            return lambda job: times[number].extend(
                [time.perf_counter()] * (job.n_tokens - len(times[number]))
            )

        began = time.perf_counter()
        jobs = [
            desk.submit(
                Order(
                    tuple(rng.integers(0, model.config.vocab_size, context - new).tolist()),
                    options,
                    client=str(number),
                ),
                heard(number),
            )
            for number in range(riders)
        ]
        while not all(job.is_over for job in jobs):
            time.sleep(0.02)
            if steady is not None and min(map(len, times)) > steady:
                for job in jobs:
                    job.cancel()
        took = time.perf_counter() - began
        status = desk.status()
    finally:
        desk.stop()
        model.engine.sweeper.run = run
    errors = [str(job.error) for job in jobs if job.error]
    if errors:
        return {"riders": riders, "error": errors[0]}
    all_in, one_out = max(each[0] for each in times), min(each[-1] for each in times)
    # One token a pass: so the times of a request's tokens are those of the passes.
    ticks = [at for at in times[0] if all_in <= at <= one_out][: steady and steady + 1]
    gaps = [later - sooner for sooner, later in pairwise(ticks)]
    plan = model.plan
    return {
        "riders": riders,
        "seconds": took if steady is None else None,
        "first_token_s": min(each[0] for each in times) - began,
        "all_in_s": all_in - began,
        "tokens_per_s": riders * new / took if steady is None else None,
        "prompt_tokens_per_s": riders * (context - new) / (all_in - began),
        "steady_pass_s": median(gaps) if gaps else None,
        "steady_passes": len(gaps),
        "steady_tokens_per_s": riders / median(gaps) if gaps else None,
        "passes": status.passes_total,
        "each_pass": passes,  # rows, seconds, whether programs were compiled for it
        "predicted_pass_s": plan.sweep_seconds,
        "cache_bytes": plan.device.cache_bytes + getattr(plan.host, "cache_bytes", 0),
        "cache_on_host": getattr(plan.host, "cache_bytes", 0) > 0,
        "tiers": plan.as_dict()["tiers"],
        "host_share": plan.host_share,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share")
    parser.add_argument("--device")
    parser.add_argument("--riders", default="1,8,64,256")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--steady", type=int)
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args), "runs": []}
    with common.GpuWatch() as watch:
        share = {} if args.host_share is None else {"host_share": args.host_share}
        with common.opened(args, **share) as model:
            for riders in map(int, args.riders.split(",")):
                found = measured(
                    model, riders=riders, context=args.context, new=args.new, steady=args.steady
                )
                result["runs"].append(found)
                common.say(" ".join(f"{name} {value}" for name, value in found.items()))
            result["memory"] = model.engine.memory()
    common.end(result, watch)


if __name__ == "__main__":
    main()
