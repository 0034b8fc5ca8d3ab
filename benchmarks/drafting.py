"""Seconds of a draft model's steps, alone on its device: rows of trees of one lane over a context,
and of prompts.

    python benchmarks/drafting.py FOLDER --rows 2,8,16,32,64 --context 2048

The entries before hold zeros. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import common
import numpy as np


def seconds_of(draft, part, count=20):
    draft.guess([part])
    found = []
    for _ in range(count):
        began = time.perf_counter()
        draft.guess([part])
        found.append(time.perf_counter() - began)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", default="2,8,16,32,64")
    parser.add_argument("--prompts", default="64,512")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--fresh", type=int, default=128)
    parser.add_argument("--device")
    parser.add_argument("--device-memory", default="4096MiB")
    options = parser.parse_args()

    from jlayer.engine.batch import Entry, Growth, arrange, arrange_growth
    from jlayer.engine.device import choose
    from jlayer.engine.draft import DraftModel
    from jlayer.plan.shapes import capacity_for, pool_rows
    from jlayer.sizes import parse_bytes
    from jlayer.streaming.watch import Watch

    devices, *_ = choose(options.device, parse_bytes(options.device_memory, option=""))
    draft = DraftModel(options.folder)
    began = time.perf_counter()
    draft.load(devices.first, most_ids=draft.cfg.vocab_size, watch=Watch())
    common.say(f"loaded in {time.perf_counter() - began:.1f} s: {draft.n_bytes >> 20} MiB")
    context, pool = options.context, pool_rows(options.context + 1024)
    committed, result = np.arange(context, dtype=np.int32), {**common.card(), "rows": []}
    capacity = capacity_for(context + 64)
    for rows in map(int, options.rows.split(",")):
        new = np.arange(context, context + rows, dtype=np.int32)
        growth = Growth(
            *([1] * rows, [context] * rows, new, committed, new, [context] * rows),
            np.eye(rows, dtype=bool),
        )
        part = arrange_growth(
            [growth], tokens=rows, fresh=options.fresh, capacity=capacity, pool=pool
        )
        found = seconds_of(draft, part)
        result["rows"].append({"rows": rows, "seconds": common.summary(found)})
        common.say(f"{rows:4} rows of a tree: {1e3 * median(found):.2f} ms")
    for rows in map(int, options.prompts.split(",")):
        new = np.arange(context, context + rows, dtype=np.int32)
        (part,) = arrange([Entry([1] * rows, committed, new, capacity)], pool=pool)
        found = seconds_of(draft, part)
        result["rows"].append({"prompt": rows, "seconds": common.summary(found)})
        common.say(f"{rows:4} rows of a prompt: {1e3 * median(found):.2f} ms")
    stats = devices.first.memory_stats()
    if stats:
        result["peak_bytes"] = stats["peak_bytes_in_use"]
        common.say(f"peak {stats['peak_bytes_in_use'] >> 20} MiB")
    result["temporary_bytes"] = draft.temporary_bytes
    common.say(f"temporaries {draft.temporary_bytes >> 20} MiB")
    common.last_line(result)


if __name__ == "__main__":
    main()
