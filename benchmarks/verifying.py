"""Forward passes that verify trees of guesses, and what drafting them takes: of one text, by the
rows of a pass, with a draft model that is resident; memory by nvidia-smi.

    python benchmarks/verifying.py TARGET DRAFT --device-memory 4096MiB --rows 1,16,64,128,256,512

Made-up weights (make_model.py) do for it: time is measured, and acceptance is assumed, in the last
column, as SpecExec published it for a 1B draft. `--rows 1` decodes plainly. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from statistics import median

import common

# Rows of a pass -> tokens that one gives: assumed, not measured.
ASSUMED = {1: 1.0, 16: 4.3, 64: 6.0, 128: 6.7, 256: 7.7, 512: 8.0}


def passes(model, rows: int, *, count: int, prompt: list[int], temperature: float) -> dict:
    """Figures of `count` forward passes that carry the last token and `rows` - 1 guesses."""
    draft, steps = model.engine.draft, []
    guess = draft.guess

    def counted(parts):
        steps.append(len(parts))
        return guess(parts)

    speculation = (
        {"speculate": "draft", "draft_tokens": rows - 1} if rows > 1 else {"speculate": "off"}
    )
    options = {"max_new_tokens": 600, "temperature": temperature, "seed": 7}
    begin, _ = model.prepared([prompt], options=options | speculation)
    draft.guess, found = counted, []
    try:
        with closing(begin()) as run:
            before = None
            began = time.perf_counter()
            for _ in run:
                now = (run.stats.draft_s, run.stats.sweep_s, time.perf_counter(), len(steps))
                if before is not None:
                    found.append([b - a for a, b in zip(before, now, strict=True)])
                else:
                    first_s = now[2] - began
                before = now
                if len(found) >= count + 2:
                    break
            n_new = len(run.lanes[0].token_ids)
    finally:
        draft.guess = guess
    drafting, sweep, whole, n_steps = zip(*found[2:], strict=True)
    return {
        "rows": rows,
        "draft_s": common.summary(list(drafting)),
        "sweep_s": common.summary(list(sweep)),
        "pass_s": common.summary(list(whole)),
        "steps": median(n_steps),
        "first_s": first_s,
        "tokens_per_pass_here": n_new / (len(found) + 1),
        "assumed_tokens": ASSUMED[rows],
        "assumed_s_per_token": median(whole) / ASSUMED[rows],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--device-memory", default="4096MiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--rows", default="1,16,64,128,256,512")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--context", type=int)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()

    import jlayer

    result = {**common.card(), "rows": []}
    with common.GpuWatch() as watch:
        measure(jlayer, args, result)
    result["smi_peak_mib"], result["smi_before_mib"] = watch.peak, watch.before
    common.say(f"nvidia-smi peak {watch.peak} MiB, before {watch.before}")
    common.last_line(result)


def measure(jlayer, args, result):
    """Opens the model, and adds all figures to the result."""
    began = time.perf_counter()
    model = jlayer.AutoModel.from_pretrained(
        args.target,
        draft=args.draft,
        device=args.device,
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        context=args.context,
    )
    with model:
        result["open_s"] = time.perf_counter() - began
        common.say(f"opened in {result['open_s']:.1f} s")
        prompt = [(7 * i + 3) % model.config.vocab_size for i in range(args.prompt_tokens)]
        for rows in map(int, args.rows.split(",")):
            found = passes(
                model, rows, count=args.count, prompt=prompt, temperature=args.temperature
            )
            result["rows"].append(found)
            draft_s, sweep_s = found["draft_s"]["median"], found["sweep_s"]["median"]
            first = result["rows"][0]["sweep_s"]["median"]
            common.say(
                f"{rows:4} rows: sweep {sweep_s:.4f} s = {sweep_s / first:.3f} x the first, "
                f"drafting {draft_s:.4f} s in {found['steps']:.0f} steps = {draft_s / first:.3f} "
                f"of it; whole pass {found['pass_s']['median']:.4f} s; at an assumed "
                f"{found['assumed_tokens']} tokens {found['assumed_s_per_token']:.4f} s a token; "
                f"the first pass took {found['first_s']:.1f} s"
            )
        plan = model.plan
        result["plan"] = plan.as_dict()
        result["memory"] = model.engine.memory()
        result["compiles"] = len(model.engine.compiles)


if __name__ == "__main__":
    main()
