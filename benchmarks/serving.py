"""What a real `jlayer serve` bears, on the bundled model: many clients at once, slow ones, absent
ones, 10,000 requests, a model that is slow, and being killed.

    python benchmarks/serving.py --json benchmarks/results/serving-cpu.json
    python benchmarks/serving.py --only together,leaving

The campaigns are functions of their size in crowds.py and trials.py, which
tests/serving/test_soak.py calls with smaller ones. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.crowds import half_open, leaving, many, slow_reader, together
from benchmarks.served import Server
from benchmarks.trials import killed, slow_model

CROWDED = ("--host-memory", "250MiB")  # room for a few dozen texts
CAMPAIGNS = {
    "together": lambda: on_a_server(together),
    "slow_reader": lambda: on_a_server(slow_reader),
    "half_open": lambda: on_a_server(half_open),
    "leaving": lambda: on_a_server(leaving, *CROWDED),
    "many": lambda: on_a_server(many),
    "slow_model": lambda: on_a_server(slow_model, slowed=1.2),
    "killed": killed,
}


def on_a_server(campaign, *words, **options) -> dict:
    with Server(*words, **options) as server:
        return campaign(server)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(CAMPAIGNS)}")
    parser.add_argument("--json", type=Path, help="also keep it here, beside other campaigns'")
    args = parser.parse_args()
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    result["card"] = card = common.card()
    common.say(str(card))
    for name in args.only.split(",") if args.only else CAMPAIGNS:
        others, began = common.Neighbours(), time.perf_counter()
        found = CAMPAIGNS[name]()
        found |= {"took_s": time.perf_counter() - began, "neighbours_cores": others.cores()}
        result[name] = {**found, "commit": card["commit"]}
        common.say(f"{name}: {json.dumps(found)}")
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    common.last_line(result)


if __name__ == "__main__":
    main()
