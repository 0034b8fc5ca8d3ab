"""One of several processes, which are the hosts of a model: run by `test_hosts` as
`python -m tests.engine.one_host '{"process_id": 1, "cases": ...}'`. Prints a line of JSON for each
case. Process 0 gives the tokens and the logits, and the others follow."""

import json
import sys
import time
from contextlib import nullcontext

import jlayer
from jlayer import AutoModel
from jlayer.errors import StorageError, UsageError
from jlayer.measure import bench as bench_module
from jlayer.measure import evaluate
from jlayer.measure.bench import Bench
from jlayer.plan import making
from tests.programs import few_shapes

HOW = {"device": "cpu", "dtype": "float32"}


def answer(case, group):
    """What a model gives here: the case names its folder, its tile size, its options and a run."""
    making.TILE_BYTES = (case["tile_bytes"],) if "tile_bytes" in case else making.TILE_BYTES
    options = {**HOW, **group, **case.get("options", {})}
    folder = case["folder"].format(**group)
    with AutoModel.from_pretrained(folder, **options) as model:
        found = model.follow() if model.follows else GIVEN[case.get("how", "generate")](model, case)
        return {
            "name": case["name"],
            "refused": said_by(jlayer.generate, model, case["ids"]) if model.follows else None,
            "read_bytes": model.engine.totals.read_bytes,
            "sweep_bytes": model.plan.tiling.n_bytes,
            "device": model.engine.device_name,
            **(found or {}),
        }


def generated(model, case):
    decoding, _ = model.decoding(case["ids"], options=case["run"])
    held = max(model.engine.caches.host_bytes for _ in decoding)
    (found,) = decoding.generations()
    return {
        "token_ids": found.token_ids,
        "seed": found.seed,
        "logits": model.logits([case["ids"]]).ravel().tolist(),
        "read_bytes": found.stats["read_bytes"],
        "cache_bytes": found.plan["host"]["cache_bytes"],
        "held_cache_bytes": held,
        "drafted": found.stats["drafted"],
        "sweeps": found.stats["sweeps"],
    }


def submitted(model, case):
    """Texts that are cancelled while they ride alone, some that share forward passes, and one that
    comes when all of them have ended."""
    n_cancelled = [cancelled(model, case) for _ in range(4)]
    runs = [model.submit(prompt, **case["run"]) for prompt in case["prompts"]]
    found = [run.result(timeout=120).token_ids for run in runs]
    found.append(model.submit(case["ids"], **case["run"]).result(timeout=120).token_ids)
    return {"texts": found, "n_cancelled": n_cancelled}


def cancelled(model, case):
    """How many tokens a text got before it was cancelled, in the middle of a pass."""
    run = model.submit(case["ids"], max_new_tokens=200, eos_token_id=None, temperature=0)
    for _ in range(3):
        next(run)
    time.sleep(0.002)
    run.cancel()
    return len(run.result().token_ids)


def encoded(model, case):
    return {"vectors": model.encode(case["prompts"]).tolist()}


def failed(model, case):
    """The reader of process 0 fails in a pass that another thread drives."""

    def begin(written):
        raise StorageError("layer 1: the disk is gone")

    model.engine.caches.begin = begin
    return model.submit(case["ids"], **case["run"]).result(timeout=120)


def evaluated(model, case):
    """The perplexity of some tokens, in windows of which two ride in a pass."""
    evaluate.MOST_WINDOWS = 2
    return vars(evaluate.perplexity(model, case["ids"], length=4, stride=2))


def benchmarked(model, case):
    """Each figure of `bench` once or twice, and the logits after it."""
    bench_module.SIZES = (1, 9)  # so that fewer programs are compiled
    bench_module.LEAST_ROUNDS = bench_module.MOST_ROUNDS = 2
    bench = Bench(model)
    bench.measure_machine()
    blocks = bench.measure_blocks()
    bench.first_sweep()
    sweeps = bench.measure_sweeps()
    return {
        "lanes": bench.lanes,
        "blocks": [row["tokens"] for row in blocks],
        "sweeps": [row["tokens"] for row in sweeps],
        "logits": model.logits([case["ids"]]).ravel().tolist(),
    }


def refused_logits(model, case):
    """A text whose logits process 0 cannot take, beside none, and the same text after it."""
    sweeper = model.engine.sweeper
    run, left = sweeper.run, [StorageError("no room for these logits")]

    def failing(executor, parts, take, **how):
        def once(*given):
            if left:
                raise left.pop()
            take(*given)

        run(executor, parts, once, **how)

    sweeper.run = failing
    failed = model.submit(case["ids"], **case["run"])
    try:
        failed.result(timeout=120)
    except StorageError as error:
        said = str(error)
    again = model.submit(case["ids"], **case["run"]).result(timeout=120)
    return {"said": said, "token_ids": again.token_ids}


def said_by(function, *given):
    try:
        function(*given)
    except UsageError as error:
        return str(error)


GIVEN = {
    "generate": generated,
    "submit": submitted,
    "fail": failed,
    "evaluate": evaluated,
    "bench": benchmarked,
    "encode": encoded,
    "refuse": refused_logits,
}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    whole = making.TILE_BYTES
    with few_shapes() if asked["has_few_shapes"] else nullcontext():
        for case in asked["cases"]:
            making.TILE_BYTES = whole
            print(json.dumps(answer(case, asked["group"])), flush=True)
