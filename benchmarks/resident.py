"""A model that lies on the device whole: seconds a token with `--speculate auto` beside `off`, in
turns.

    python benchmarks/resident.py MODEL --tokens 300 --runs 5

`--always` guesses even where a run is too short to make up for compiling more programs, which
`auto` leaves alone by itself. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from statistics import median

import common


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--always", action="store_true")
    args = parser.parse_args()

    import jlayer
    from jlayer.engine import speculation

    if args.always:
        speculation.WORTH_S = 0.0
    with jlayer.AutoModel.from_pretrained(
        args.model, draft=args.draft, device=args.device, device_memory=args.device_memory
    ) as model:
        prompt = [(7 * i + 3) % model.config.vocab_size for i in range(args.prompt_tokens)]
        rows: dict = {"off": [], "auto": []}
        for _ in range(args.runs + 1):
            for speculate, found in rows.items():
                one = jlayer.generate(
                    model,
                    prompt,
                    max_new_tokens=args.tokens,
                    temperature=args.temperature,
                    seed=7,
                    speculate=speculate,
                    min_new_tokens=args.tokens,
                )
                found.append(one.stats["decode_s"] / len(one.token_ids))
                sweeps = one.stats["sweeps"]
                common.say(f"{speculate}: {found[-1]:.5f} s a token, {sweeps} passes")
        seconds = {name: common.summary(found[1:]) for name, found in rows.items()}
        pairs = [a / b for a, b in zip(rows["auto"][1:], rows["off"][1:], strict=True)]
        common.say(f"auto / off: median {median(pairs):.3f} of {len(pairs)} pairs")
        common.last_line(
            {**common.card(), "seconds_a_token": seconds, "auto_by_off": common.summary(pairs)}
        )


if __name__ == "__main__":
    main()
