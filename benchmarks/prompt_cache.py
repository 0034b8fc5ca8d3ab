"""Seconds to the first token of a long prompt: computed, and taken from the prompt cache.

    python benchmarks/prompt_cache.py MODEL --device-memory 4GiB --tokens 10000 --rounds 3

In turn: without a prompt cache; with an empty one, which it fills; and with that one again, after
its files were dropped from the page cache (`--warm`: left in it). A first round, which compiles, is
not counted. `first_token_s`: from the prompt to its first token, with what is read from the prompt
cache, or written to it, in it, and without opening the model. `tokens_are_equal`: of all runs. The
prompt is random ids of the vocabulary, the same in every round. `--cache FOLDER`: keep prompts in a
new folder in this one (default: beside MODEL). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from contextlib import closing

import common
import numpy as np

from jlayer import AutoModel
from jlayer.engine.prompt_cache import PromptCache
from jlayer.sizes import human, parse_bytes


def main():
    args = arguments()
    home = tempfile.mkdtemp(prefix=".prompts-", dir=args.cache or folder_beside(args.model))
    try:
        result = measured(args, os.path.join(home, "prompts"))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    result = {**common.card(), "model": os.path.basename(os.path.normpath(args.model)), **result}
    common.last_line(result)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=10_000, help="of the prompt")
    parser.add_argument("--new", type=int, default=4, help="new tokens, which must be equal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share")
    parser.add_argument("--dtype")
    parser.add_argument("--cache", metavar="FOLDER", help="keep prompts in a new folder in it")
    parser.add_argument("--cache-size", default="1TiB", help="the most of it")
    parser.add_argument("--warm", action="store_true", help="read prompts from the page cache")
    return parser.parse_args()


def folder_beside(model: str) -> str:
    return os.path.dirname(os.path.abspath(model))


def measured(args, prompts: str) -> dict:
    options = {
        name: getattr(args, name)
        for name in ("device", "device_memory", "host_memory", "host_share", "dtype")
        if getattr(args, name) is not None
    }
    with AutoModel.from_pretrained(args.model, context=args.tokens + args.new, **options) as model:
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, args.tokens).tolist()
        runs = [one_round(args, model, ids, prompts, number) for number in range(args.rounds + 1)]
    ways = {way: [run[way] for run in runs[1:]] for way in runs[0]}  # the first one compiles
    summed = {way: common.summary([one["first_token_s"] for one in ways[way]]) for way in ways}
    ratio = summed["read"]["median"] / summed["computed"]["median"]
    last = runs[-1]["read"]
    common.say(
        f"{args.tokens} tokens, {human(last['kept_bytes'])} kept: "
        f"{summed['computed']['median']:.2f} s computed, {summed['read']['median']:.2f} s read, "
        f"{ratio:.3f} of it; {summed['filling']['median']:.2f} s the first time"
    )
    return {
        "prompt_tokens": args.tokens,
        "first_token_s": summed,
        "read_over_computed": ratio,
        "kept_tokens": last["kept_tokens"],
        "kept_bytes": last["kept_bytes"],
        "tokens_are_equal": len({tuple(one["token_ids"]) for run in ways.values() for one in run})
        == 1,
    }


def one_round(args, model, ids, prompts: str, number: int) -> dict:
    """Figures of each way, one after another."""
    engine, found = model.engine, {}
    shutil.rmtree(prompts, ignore_errors=True)
    for way in ("computed", "filling", "read"):
        size = parse_bytes(args.cache_size, option="--cache-size")
        engine.prompt_cache = None if way == "computed" else PromptCache(prompts, size, engine)
        if way == "read" and not args.warm:
            drop(prompts)
        one = found[way] = first_token(model, ids, args.new)
        one["kept_bytes"] = bytes_of(prompts)
        common.say(
            f"{way} {number or '(compiles)'}: first token after {one['first_token_s']:.2f} s, "
            f"{one['sweeps']} forward passes for {args.new} tokens, {one['kept_tokens']} kept"
        )
    return found


def first_token(model, ids, n_new: int) -> dict:
    drawn = {"temperature": 0, "speculate": "off", "eos_token_id": None}
    began, spent = time.perf_counter(), None
    with closing(model.session(ids, max_new_tokens=n_new, **drawn)) as session:
        for _ in session:
            spent = spent or time.perf_counter() - began
        found = session.result()
    return {
        "first_token_s": spent,
        "token_ids": found.token_ids,
        "kept_tokens": found.stats["kept_tokens"],
        "sweeps": found.stats["sweeps"],
    }


def drop(folder: str) -> None:
    """Drops the files in a folder from the page cache."""
    for where, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(where, name), os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def bytes_of(folder: str) -> int:
    return sum(
        os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
    )


if __name__ == "__main__":
    main()
