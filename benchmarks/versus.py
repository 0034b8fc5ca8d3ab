"""jlayer beside AirLLM, accelerate, transformers and llama.cpp: the same prompt and number of
greedy tokens, each program in a process and an environment of its own.

    python benchmarks/versus.py FOLDER [--new-tokens 8] [--rounds 3] [--out RESULT.json]

FOLDER is a published checkpoint (jlayer's conversion of it is made once, in --work) or a layered
one (the others then read the same files under published names). Where it is one that jlayer
quantized (`make_model.py --quantize`), only llama.cpp runs beside jlayer. It gets a GGUF of the
same shape and of random weights (int4: Q4_0, int8: Q8_0), so tokens are not compared. It runs on
the CPU's cores, with `--device gpu` too.

Programs take turns, round after round; the figure is the median over rounds of the median over
tokens, without the first token of a run. Memory is seen from outside: nvidia-smi's whole device, or
anonymous memory from /proc. Needs the standard library alone; `peer.py` is what runs in the
environments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import common
import gguf_model
from environments import AIRLLM, LLAMA_CPP, TRANSFORMERS, Environments, own_requirements
from published import published, weight_bytes

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("top", "token_ids", "versions")  # of each run; its row has them once
OTHERS = ("transformers", "accelerate-ram", "accelerate-disk", "airllm")
NAMES = ("jlayer", "jlayer-disk", *OTHERS, "llama.cpp")
GGUF_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
NOT_COMPARED = {"same_tokens": None, "why": "its weights are random ones of the same shape"}


class Watch:
    """The memory of another process while it runs: from /proc, and the whole GPU where there is
    one."""

    def __init__(self, *, gpu: bool):
        self.anonymous_bytes = self.resident_bytes = 0
        self.pid: int | None = None  # once it has started
        self._gpu = common.GpuWatch() if gpu else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._stop.wait(0.02):
            try:
                with open(f"/proc/{self.pid}/status") as file:
                    lines = dict(line.split(":", 1) for line in file)
                kib = {name: int(lines[name].split()[0]) for name in ("RssAnon", "VmHWM")}
            except (OSError, KeyError):
                return  # it has ended
            self.anonymous_bytes = max(self.anonymous_bytes, kib["RssAnon"] << 10)
            self.resident_bytes = max(self.resident_bytes, kib["VmHWM"] << 10)

    def __enter__(self):
        if self._gpu:
            self._gpu.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self._gpu:
            self._gpu.__exit__()

    def report(self) -> dict:
        found = {
            "anonymous_bytes": self.anonymous_bytes,
            "resident_bytes": self.resident_bytes,
        }
        if self._gpu:
            found["gpu_bytes"] = (self._gpu.peak - self._gpu.before) << 20
        return found


def contenders(args, environments: Environments, own: Path, public: Path) -> dict[str, list[str]]:
    """Label -> command of a run. jlayer has one for each promise."""
    gpu = args.device == "gpu"
    work = args.work.absolute()
    found = {}
    for name in args.programs:
        if name.startswith("jlayer"):
            python = environments.python("jlayer", own_requirements(cuda=gpu))
            for promise in args.device_memory.split(","):
                label = f"{name} {promise}" if gpu else name
                words = [python, str(HERE / "peer.py"), "jlayer", str(own)]
                words += ["--device-memory", promise, "--work", str(work)]
                if args.host_memory:
                    words += ["--host-memory", args.host_memory]
                found[label] = [*words, *["--keeps-nothing"] * (name == "jlayer-disk")]
        elif name == "llama.cpp":
            python = environments.python("llama.cpp", LLAMA_CPP)
            model = gguf_file(args, python, environments.variables())
            words = [python, str(HERE / "peer.py"), name, str(model), "--work", str(work)]
            found[name] = [*words, "--threads", str(args.threads)]
        else:
            wanted = AIRLLM if name == "airllm" else TRANSFORMERS
            python = environments.python("airllm" if name == "airllm" else "transformers", wanted)
            words = [python, str(HERE / "peer.py"), name, str(public)]
            found[name] = [*words, "--work", str(work)]
    ids = ",".join(map(str, prompt_ids(public, args.prompt_tokens)))
    common_words = ["--prompt-ids", ids, "--new-tokens", str(args.new_tokens)]
    common_words += ["--device", args.device, "--dtype", args.dtype]
    return {label: [*words, *common_words] for label, words in found.items()}


def gguf_file(args, python: str, variables: dict) -> Path:
    """The GGUF of the folder's shape, written once in --work."""
    config = args.folder / "config.json"
    kind = GGUF_TYPES[scheme_of(args.folder)]
    key = hashlib.sha256(config.read_bytes()).hexdigest()[:8]
    path = args.work.absolute() / f"{kind}-{key}.gguf"
    if not path.exists():
        words = [python, str(HERE / "gguf_model.py"), str(config), str(path), "--type", kind]
        subprocess.run(words, env=variables, check=True, stdout=sys.stderr)
    return path


def weights_of(labels: list[str], folder: Path, n_bytes: int) -> dict[str, dict]:
    """Label -> bytes of weights a token; of llama.cpp's, which are a file of its own, the format
    too."""
    found = {label: {"weight_bytes": n_bytes} for label in labels}
    if "llama.cpp" in found:
        config = json.loads((folder / "config.json").read_text())
        kind = GGUF_TYPES[scheme_of(folder)]
        own_bytes = gguf_model.weight_bytes(config, kind)
        found["llama.cpp"] = {"format": kind, "weight_bytes": own_bytes}
    return found


def scheme_of(folder: Path) -> str | None:
    """How jlayer quantized the folder; None where it did not."""
    own = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    return own["scheme"] if own.get("by") == "jlayer" else None


def prompt_ids(folder: Path, n_tokens: int) -> list[int]:
    """The same ids for everybody, none of the first few, which are special."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [10 + (7919 * i) % (vocab - 20) for i in range(1, n_tokens + 1)]


def run(words: list[str], variables: dict, *, gpu: bool, limit_s: float) -> dict:
    """One process from start to end: its report and its memory, or what went wrong."""
    began, neighbours = time.perf_counter(), common.Neighbours()
    watch = Watch(gpu=gpu)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(words, env=variables, text=True, **pipes)
    watch.pid = child.pid
    with watch:
        try:
            out, said = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return {"failed": f"took longer than {limit_s:.0f} s"}
    if child.returncode:
        return {"failed": "\n".join(said.strip().splitlines()[-8:]), "code": child.returncode}
    wall_s = time.perf_counter() - began
    report = {**json.loads(out.splitlines()[-1]), **watch.report()}
    return {**report, "wall_s": wall_s, "other_cores": neighbours.cores()}


def compare(reference: dict, other: dict) -> dict:
    """Whether two runs gave the same tokens; where not, the first place and how close the choice
    was there. The largest difference in log-probability is of tokens that both name among their
    likeliest, up to that place."""
    pairs = list(zip(reference["token_ids"], other["token_ids"], strict=True))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    compared = len(pairs) if first is None else first + 1
    differences = [
        abs(score - dict(map(tuple, theirs))[token])
        for ours, theirs in zip(reference["top"][:compared], other["top"][:compared], strict=True)
        for token, score in ours
        if token in dict(map(tuple, theirs))
    ]
    found = {
        "same_tokens": first is None,
        "largest_logprob_difference": max(differences, default=None),
        "smallest_gap": min(step[0][1] - step[1][1] for step in reference["top"][:compared]),
    }
    if first is not None:
        scores = dict(map(tuple, reference["top"][first]))
        theirs = scores.get(pairs[first][1])
        found["first_difference"] = first
        found["gap_there"] = None if theirs is None else scores[pairs[first][0]] - theirs
    return found


def summarised(runs: dict[str, list[dict]], weights: dict[str, dict]) -> list[dict]:
    """A row for each contender that has run; transformers, where it ran, is what tokens are held
    against. `weights`: see `weights_of`."""
    done = {
        label: [one for one in own if "failed" not in one]
        for label, own in runs.items()
        if label != "llama.cpp"
    }
    reference = next((own[0] for own in (done.get("transformers"), *done.values()) if own), None)
    return [row(label, own, reference, weights[label]) for label, own in runs.items() if own]


def row(label: str, runs: list[dict], reference: dict | None, weights: dict) -> dict:
    """What the table says of one contender."""
    done = [one for one in runs if "failed" not in one]
    if not done:
        return {"name": label, "failed": runs[-1]["failed"]}
    seconds = common.summary([one["s_per_token"] for one in done])
    peaks = ("gpu_bytes", "anonymous_bytes", "resident_bytes")
    times = [name for name in ("first_s", "prompt_s") if name in done[0]]
    facts = [name for name in ("threads", "system") if name in done[0]]
    return {
        "name": label,
        "s_per_token": seconds,
        **{name: statistics.median(one[name] for one in done) for name in times},
        **{name: done[0][name] for name in facts},
        **weights,
        "bytes_per_s": weights["weight_bytes"] / seconds["median"],
        **{peak: max(one[peak] for one in done) for peak in peaks if peak in done[0]},
        "versions": done[0]["versions"],
        "token_ids": done[0]["token_ids"],
        "agreement": NOT_COMPARED if label == "llama.cpp" else compare(reference, done[0]),
        "runs": [{key: value for key, value in one.items() if key not in LEFT_OUT} for one in done],
    }


def said_of(one: dict) -> str:
    if "failed" in one:
        return one["failed"]
    elsewhere = f"{one['other_cores']:.1f} cores were busy elsewhere"
    return f"{one['s_per_token']:.4f} s a token; {elsewhere}"


def say_row(one: dict, ours: float | None):
    if "failed" in one:
        common.say(f"{one['name']:24} failed: {one['failed']}")
        return
    memory = one.get("gpu_bytes", one["anonymous_bytes"])
    prompt = f"  prompt {one['prompt_s']:.3f} s" if "prompt_s" in one else ""
    seconds = one["s_per_token"]
    ratio = f"{seconds['median'] / ours:6.2f} x jlayer" if ours else ""
    common.say(
        f"{one['name']:24} {seconds['median']:8.4f} s a token "
        f"({seconds['min']:.4f}-{seconds['max']:.4f})  {one['bytes_per_s'] / 1e9:6.2f} GB/s  "
        f"{memory / 2**20:8.0f} MiB{prompt}  {ratio}  {same_tokens(one['agreement'])}"
    )


def same_tokens(agreement: dict) -> str:
    if agreement["same_tokens"] is None:
        return f"tokens not compared: {agreement['why']}"
    return "same tokens" if agreement["same_tokens"] else f"tokens differ: {agreement}"


def converted(folder: Path, work: Path, environments: Environments, *, cuda: bool) -> Path:
    """The layered form of `folder`: itself, or a conversion that is made once."""
    if (folder / "manifest.json").exists():
        return folder
    target = work / "jlayer"
    python = environments.python("jlayer", own_requirements(cuda=cuda))
    subprocess.run(
        [python, "-m", "convert", str(folder), str(target)],
        env=environments.variables(),
        check=True,
        stdout=sys.stderr,
    )
    return target


def options():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    default = f"by default {','.join(OTHERS)}; llama.cpp for a folder that jlayer quantized"
    parser.add_argument("--programs", help=f"beside jlayer, with commas; {default}")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--device-memory", default="4GiB", help="promises of jlayer, with commas")
    parser.add_argument("--host-memory", help="promise of jlayer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="llama.cpp's; by default, cores")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a run may take")
    parser.add_argument("--work", type=Path, help="splits and links; by default FOLDER.versus")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/jlayer-versus").expanduser())
    parser.add_argument("--wheels", type=Path, help="install from this folder, not the network")
    parser.add_argument("--here", action="store_true", help="everything in this interpreter")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    parser.add_argument("--commit", help="the code's, where it is no git checkout")
    args = parser.parse_args()
    scheme = scheme_of(args.folder)
    chosen = args.programs or ("llama.cpp" if scheme else ",".join(OTHERS))
    args.programs = [*dict.fromkeys(["jlayer", *chosen.split(",")])]
    for name in args.programs:
        if name not in NAMES:
            parser.error(f"--programs: {name!r} is none of {', '.join(NAMES)}")
        if name in OTHERS and scheme:
            parser.error(f"--programs: {name} cannot read a folder that jlayer quantized")
        if name == "llama.cpp" and scheme is None:
            parser.error(
                "--programs: llama.cpp needs a folder that jlayer quantized, such as one of "
                "make_model.py --quantize int4"
            )
    if args.device == "cpu" and "accelerate-ram" in args.programs:
        args.programs.remove("accelerate-ram")  # there it is transformers itself
    args.work = args.work or args.folder.with_name(args.folder.name + ".versus")
    return args


def main():
    args = options()
    gpu = args.device == "gpu"
    args.work.mkdir(parents=True, exist_ok=True)
    environments = Environments(args.cache, wheels=args.wheels, here=args.here)
    quantized = scheme_of(args.folder) is not None
    public = args.folder if quantized else published(args.folder, args.work / "published")
    own = converted(args.folder, args.work, environments, cuda=gpu)
    n_bytes = weight_bytes(public)
    commands = contenders(args, environments, own, public)
    variables = environments.variables()
    common.say(f"{args.folder}: {n_bytes / 1e9:.2f} GB of weights a token; {common.card()}")

    if "airllm" in commands:  # its own copy of the weights, made once and not timed
        words = [*commands["airllm"], "--new-tokens", "2"]
        run(words, variables, gpu=False, limit_s=args.limit)
    runs: dict[str, list[dict]] = {label: [] for label in commands}
    weights = weights_of([*commands], args.folder, n_bytes)
    card = common.card()
    result = {
        "card": card | {"commit": args.commit or card["commit"]},
        "options": {name: str(value) for name, value in vars(args).items()},
        "config": json.loads((public / "config.json").read_text()),
        "weight_bytes": n_bytes,
    }
    for number in range(args.rounds):
        for label, words in commands.items():
            found = run(words, variables, gpu=gpu, limit_s=args.limit)
            runs[label].append(found)
            common.say(f"round {number + 1}: {label}: {said_of(found)}")
            result["rows"] = summarised(runs, weights)
            if args.out:  # after every run: what was measured stays, whatever comes next
                args.out.write_text(json.dumps(result) + "\n")
    ours = next((one["s_per_token"]["median"] for one in result["rows"] if "runs" in one), None)
    for one in result["rows"]:
        say_row(one, ours)
    common.last_line(result)


if __name__ == "__main__":
    main()
