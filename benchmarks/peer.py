"""One program on one checkpoint: greedy tokens after a prompt, timed one by one. `versus.py` starts
it in the environment that the program needs and watches its memory from outside.

    python benchmarks/peer.py NAME FOLDER --prompt-ids 5,6,7 --new-tokens 8 --device cpu --work DIR

Only the named program is imported. The last line of stdout is one JSON object; whatever the
program itself prints goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib import metadata

TOP = 20  # likeliest tokens of each step that are reported with their log-probabilities
PACKAGES = (
    *("jax", "jaxlib", "torch", "transformers", "accelerate", "airllm", "safetensors"),
    *("xllamacpp", "gguf"),
)


class Clock:
    """A streamer in the sense of transformers: `put` gets the prompt, then each token as it is
    there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def first_s(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    def report(self) -> dict:
        """Seconds to the first token from the prompt on, and of each token after it."""
        first, *rest = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return {
            "first_s": first,
            "token_s": rest,
            "s_per_token": statistics.median(rest),
        }


def run_jlayer(args, ids, clock):
    import jlayer

    options = {"device": args.device, "dtype": args.dtype}
    options |= {"device_memory": args.device_memory, "host_memory": args.host_memory}
    if args.keeps_nothing:
        options["keeps_layers"] = False
    began = time.perf_counter()
    with jlayer.AutoModel.from_pretrained(args.folder, **options) as model:
        load_s = time.perf_counter() - began
        greedy = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": []}
        found = model.generate([ids], streamer=clock, **greedy)
        warm = Clock()  # the prompt again, now that all is compiled
        model.generate([ids], streamer=warm, **greedy | {"max_new_tokens": 1})
        # Once more for the log-probabilities, which the timed run does not compute.
        again = jlayer.generate(model, ids, logprobs=TOP, **greedy)
        plan = model.plan.as_dict()
        return {
            "load_s": load_s,
            "prompt_s": warm.first_s(),
            "token_ids": found[0][len(ids) :],
            "top": [step["top"] for step in again.logprobs],
            "tiers": plan["tiers"],
            "tile_bytes": plan["tile_bytes"],
            "memory": model.engine.memory(),
        }


def run_transformers(args, ids, clock):
    model, load_s = _loaded(args, {})
    return {"load_s": load_s, **_generate(model.to(_device(args)), args, ids, clock)}


def run_accelerate(args, ids, clock, *, layers_on):
    """Decoder layers in host memory or on disk, the rest on the device: how accelerate is told to
    run what does not fit."""
    from transformers import AutoConfig

    device = _device(args)
    edge = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(edge, device)
    n_layers = AutoConfig.from_pretrained(args.folder).num_hidden_layers
    where |= {f"model.layers.{layer}": layers_on for layer in range(n_layers)}
    offload = os.path.join(args.work, "accelerate")
    model, load_s = _loaded(args, {"device_map": where, "offload_folder": offload})
    return {"load_s": load_s, **_generate(model, args, ids, clock)}


def run_airllm(args, ids, clock):
    """AirLLM as its README has it; the first opening splits the checkpoint into its own files."""
    import torch
    from airllm import AutoModel

    split = os.path.join(args.work, "airllm")
    os.makedirs(split, exist_ok=True)
    began = time.perf_counter()
    model = AutoModel.from_pretrained(
        args.folder,
        device=_device(args),
        dtype=getattr(torch, args.dtype),
        layer_shards_saving_path=split,
    )
    load_s = time.perf_counter() - began
    return {"load_s": load_s, **_generate(model, args, ids, clock)}


def run_llamacpp(args, ids, clock):
    """llama.cpp's own server in this process, on the CPU's cores alone; `folder` is a GGUF."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = args.folder
    params.n_ctx = len(ids) + args.new_tokens + 64
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.port = 0  # any that is free; nothing is sent to it
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    began = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - began
    token_ids, warm = _completed(server, ids, args.new_tokens, clock), Clock()
    _completed(server, ids, 1, warm)
    return {
        "load_s": load_s,
        "prompt_s": warm.first_s(),
        "token_ids": token_ids,
        "threads": args.threads,
        "system": xllamacpp.get_system_info(),
    }


def _completed(server, ids, n_tokens, clock):
    """Greedy tokens after a prompt that llama.cpp computes anew. Each comes as a chunk of its own,
    with a text such as `t17`: see gguf_model.py."""
    found = []

    def take(chunk):
        text = chunk["choices"][0]["text"]
        if text:  # the last chunk has none
            clock.put(text)
            found.append(int(text.removeprefix("t")))

    request = {"prompt": ids, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    clock.put(ids)
    server.handle_completions(request | {"stream": True, "cache_prompt": False}, take)
    if len(found) != n_tokens:
        raise RuntimeError(f"llama.cpp gave {len(found)} chunks for {n_tokens} tokens")
    return found


RUNNERS = {
    "jlayer": run_jlayer,
    "transformers": run_transformers,
    "accelerate-ram": lambda *all_of: run_accelerate(*all_of, layers_on="cpu"),
    "accelerate-disk": lambda *all_of: run_accelerate(*all_of, layers_on="disk"),
    "airllm": run_airllm,
    "llama.cpp": run_llamacpp,
}


def _device(args):
    return "cuda:0" if args.device == "gpu" else "cpu"


def _loaded(args, how):
    import torch
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype, **how).eval()
    return model, time.perf_counter() - began


def _generate(model, args, ids, clock):
    """Through transformers' own `generate`, which all of them bring."""
    import torch

    prompt = torch.tensor([ids], device=_device(args))
    for each in (model, model.model):  # AirLLM's model holds transformers' own
        if getattr(each, "generation_config", None):
            each.generation_config.eos_token_id = None
    with torch.no_grad():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=args.new_tokens,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
        )
    top = [torch.log_softmax(step[0].float(), -1).topk(TOP) for step in found.logits]
    return {
        "token_ids": found.sequences[0, len(ids) :].tolist(),
        "top": [
            [list(pair) for pair in zip(step.indices.tolist(), step.values.tolist(), strict=True)]
            for step in top
        ],
    }


def versions() -> dict:
    """The versions of what is installed of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNNERS)
    parser.add_argument("folder")
    parser.add_argument("--prompt-ids", required=True)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", required=True, help="where a program may keep files of its own")
    parser.add_argument("--device-memory", help="jlayer's promise")
    parser.add_argument("--host-memory", help="jlayer's promise")
    parser.add_argument("--keeps-nothing", action="store_true", help="jlayer: all from disk")
    parser.add_argument("--threads", type=int, help="llama.cpp's")
    args = parser.parse_args()
    ids = [int(word) for word in args.prompt_ids.split(",")]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    clock = Clock()
    report = RUNNERS[args.name](args, ids, clock)
    print(json.dumps({**report, **clock.report(), "versions": versions()}), file=answer, flush=True)


if __name__ == "__main__":
    main()
