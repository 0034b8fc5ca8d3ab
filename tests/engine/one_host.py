"""One of several processes, which are the hosts of a model: run by `test_hosts` as
`python -m tests.engine.one_host '{"process_id": 1, "cases": ...}'`. Prints a line of JSON for each
case."""

import json
import sys

import jlayer
from jlayer import AutoModel
from jlayer.plan import making
from tests.engine.test_host_cache import tight

HOW = {"device": "cpu", "dtype": "float32"}


def answer(case, group):
    """What a model gives here: the case names its folder, its tile size, its options and a run."""
    making.TILE_BYTES = (case["tile_bytes"],) if "tile_bytes" in case else making.TILE_BYTES
    options = {**HOW, **group, **case.get("options", {})}
    if case.get("is_tight"):
        tiles = {name: options[name] for name in options.keys() - HOW.keys()}
        options["device_memory"] = tight(case["folder"], **tiles)
    folder = case["folder"].format(**group)
    with AutoModel.from_pretrained(folder, **options) as model:
        found = jlayer.generate(model, case["ids"], **case["run"])
        logits = model.logits([case["ids"]])
        return {
            "name": case["name"],
            "token_ids": found.token_ids,
            "seed": found.seed,
            "logits": logits.ravel().tolist(),
            "read_bytes": found.stats["read_bytes"],
            "sweep_bytes": found.plan["sweep"]["bytes"],
            "cache_bytes": found.plan["host"]["cache_bytes"],
            "device": found.device,
        }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    whole = making.TILE_BYTES
    for case in asked["cases"]:
        making.TILE_BYTES = whole
        print(json.dumps(answer(case, asked["group"])), flush=True)
