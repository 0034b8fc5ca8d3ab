"""Write the generated parts of README.md and docs/, each between two marks of its own.

Measured tables come from `results/`, the table of cards from `jlayer plan`, and the rest from the
code itself (see described.py).

    python benchmarks/table.py            rewrites the pages
    python benchmarks/table.py --check    exits 1 where a page is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import described  # noqa: E402  (a script finds its neighbours by the line above)

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)

# (result, model, tokens a sweep) of each row. A result without a raw link takes that of
# LINK_OF_SESSION, which was measured in the same session.
SWEEPS = [
    ("h200-host1536", "70B shape", 1),
    ("h200-host1536", "70B shape", 64),
    ("h200-host4096", "70B shape", 512),
    ("h200-host4096-20-layers", "70B shape", 512),
    ("h200-host4096-20-layers", "70B shape", 64),
    ("h200-host4096-20-layers", "70B shape", 1),
    ("h200-prefill", "70B shape", 4096),
    ("h200-m405", "405B shape", 1),
    ("h200-m405", "405B shape", 64),
]
LINK_OF_SESSION = "h200-host1536"
# Trained checkpoints, the largest first; the name of each format in the table.
CHECKPOINTS = ["fable-14m", "fable-3m", "fable-1m"]
WAYS = {
    "int8": "int8",
    "int4": "**int4**",
    "nf4 b64": "NF4, blocks of 64",
    "rtn g128": "round to nearest, groups of 128",
}
PROGRAMS = {
    "jlayer": "jlayer",
    "jlayer-disk": "jlayer, every layer from disk",
    "transformers": "transformers {transformers}, whole model in memory",
    "accelerate-ram": "accelerate {accelerate}, layers in host memory",
    "accelerate-disk": "accelerate {accelerate}, layers on disk",
    "airllm": "AirLLM {airllm}",
    "llama.cpp": "llama.cpp (xllamacpp {xllamacpp}), {threads} threads of the CPU",
}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def sweeps() -> str:
    """Weights to the GPU against the raw link: a row for each model, budget and token count."""
    session_link = load(LINK_OF_SESSION)["raw_link"]["median"]
    rows = []
    for name, model, tokens in SWEEPS:
        result = load(name)
        sweep = next(one for one in result["sweeps"] if one["tokens"] == tokens)
        speed = sweep["put_bytes_per_s"]
        link = result.get("raw_link", {"median": session_link})["median"]
        rows.append(
            [
                f"{model}, {sum(sweep['tiers'].values())} layers",
                _spaced(result["options"]["device_memory"]),
                f"{tokens:,}",
                f"{sweep['sweep_s']['median']:.3f} s",
                f"{speed / 1e9:.1f} GB/s",
                f"{speed / link:.3f}",
                f"{result['smi_peak_mib']} MiB",
            ]
        )
    head = ["model", "GPU budget", "tokens", "seconds a forward pass", "weights to the GPU"]
    return described.table([*head, "share of the raw link", "GPU memory, whole process"], rows)


def disk() -> str:
    """Bytes read from disk against raw direct reads, on the CPU machine."""
    pairs, promise = load("cpu-8b-disk-pairs"), load("cpu-8b")
    rows = []
    for kind, label in (("disk", "every layer from disk"), ("mixed", None)):
        given = _spaced(pairs["options"]["mixed_host_memory"])
        found = pairs[kind]
        speeds = sorted(one["read_bytes"] / one["sweep_s"] for one in found["pairs"])
        rows.append(
            [
                label or f"{given}, part of the layers kept",
                f"{speeds[len(speeds) // 2] / 1e9:.1f} GB/s",
                f"{found['share']['median']:.2f}",
                "",
            ]
        )
    (sweep,) = promise["sweeps"]
    speed = sweep["read_bytes"] / sweep["sweep_s"]["median"]
    given = _spaced(promise["options"]["host_memory"])
    seen, planned = promise["anonymous_peak_bytes"], sweep["plan_host_peak"]
    rows.append(
        [
            f"{given}, part of the layers kept",
            f"{speed / 1e9:.1f} GB/s",
            f"{speed / promise['raw_disk']:.2f}",
            f"{seen / 2**20:.0f} MiB (planned: {planned / 2**20:.0f})",
        ]
    )
    head = ["host budget", "read from disk", "share of raw O_DIRECT", "process memory (anonymous)"]
    return described.table(head, rows)


def perplexity() -> str:
    """What quantization costs on held-out text: a row for each checkpoint and format."""
    rows = []
    for name in CHECKPOINTS:
        result = load(f"quantization-{name}")
        published = result["windows"]["perplexity"]
        rows.append([name, "published (bfloat16)", "16", f"{published:.3f}", "", "", ""])
        for way, label in WAYS.items():
            row = result["rows"][way]
            rows.append(
                [
                    "",
                    label,
                    f"{row['bits']:.3f}",
                    f"{row['perplexity']:.3f}",
                    f"{row['change']:+.2%}",
                    f"{row['mean_kl']:.4f}",
                    f"{row['same_top_1']:.1%}",
                ]
            )
    head = ["model", "weights", "bits in the layers", "perplexity", "change", "KL divergence"]
    return described.table([*head, "same top-1 token"], rows)


def quantized() -> str:
    """What quantization gains in a sweep: a row for each format and token count."""
    result = load("h200-quantized")
    rows = []
    for index, ratio in enumerate(result["ratios"]):
        for kind in ("bfloat16", "int8", "int4"):
            sweep = result["rounds"][0][kind]["sweeps"][index]
            of_bfloat16 = ["", ""]
            if kind in ratio:
                found = ratio[kind]
                of_bfloat16 = [f"{found[what]['median']:.2f}" for what in ("speedup", "share")]
            rows.append(
                [
                    f"{sweep['tokens']:,}",
                    kind,
                    f"{sweep['moved_bytes'] / 1e9:.2f} GB",
                    f"{sweep['sweep_s']['median']:.3f} s",
                    *of_bfloat16,
                    f"{result['rounds'][0][kind]['smi_peak_mib']} MiB",
                ]
            )
    head = ["tokens", "weights", "bytes a pass", "seconds a pass", "speed-up", "÷ cut in bytes"]
    return described.table([*head, "GPU memory, whole process"], rows)


def versus(result: dict) -> str:
    """The programs compared: what was run, the table, and whether the tokens agree."""
    columns = _versus_columns(result)
    rows = [_versus_row(one, columns) for one in result["rows"]]
    head = ["program", *columns]
    return f"{_setting(result)}\n\n{described.table(head, rows)}\n{_agreement(result['rows'])}\n"


def _versus_columns(result):
    """Heading -> what its cell says of a row. The prompt where every program timed it; memory of
    the process on a GPU too, where a program left the GPU alone."""
    done = [one for one in result["rows"] if "failed" not in one]
    gpu = bool(result["card"]["gpu"])
    on_cpu = not gpu or any(one["name"] == "llama.cpp" for one in done)
    ours = done[0]["s_per_token"]["median"]

    def memory(kind):
        return lambda one: f"{one[kind] / 2**20:.0f} MiB"

    found = {}
    if all("prompt_s" in one for one in done):
        found["seconds for the prompt"] = lambda one: f"{one['prompt_s']:.3f}"
    found["seconds a token"] = lambda one: f"{one['s_per_token']['median']:.3f}"
    found["weights a second"] = lambda one: f"{one['bytes_per_s'] / 1e9:.1f} GB/s"
    if gpu:
        found["GPU memory, whole process"] = memory("gpu_bytes")
    if on_cpu:
        found["process memory (anonymous)"] = memory("anonymous_bytes")
        found["resident, with mapped files"] = memory("resident_bytes")
    found["seconds ÷ jlayer's"] = lambda one: f"{one['s_per_token']['median'] / ours:.2f}"
    return found


def _setting(result):
    card, config, options = result["card"], result["config"], result["options"]
    where = card["gpu"] or f"{card['cores']} cores, no GPU"
    scheme = config.get("quantization_config", {}).get("scheme")
    weights = f"weights in {scheme}, computed in " if scheme else ""
    return (
        f"{where}; {config['num_hidden_layers']} layers, {config['hidden_size']} wide, "
        f"{config['vocab_size']:,} tokens of vocabulary, {weights}{options['dtype']}: "
        f"{result['weight_bytes'] / 1e9:.2f} GB of weights a token. A prompt of "
        f"{options['prompt_tokens']} tokens, then {options['new_tokens']} greedy ones; medians; "
        f"rounds: {options['rounds']}."
    )


def _versus_row(one, columns):
    name, _, promise = one["name"].partition(" ")
    facts = defaultdict(str, {**one, **one.get("versions", {})})  # one that failed has none
    label = PROGRAMS[name].format_map(facts)
    label += f", {_spaced(promise)} GPU budget" if promise else ""
    if "failed" in one:
        return [label, "failed", *[""] * (len(columns) - 1)]
    return [label, *[cell(one) for cell in columns.values()]]


def _spaced(size):
    """`1536MiB` with a space before the unit."""
    return re.sub(r"(\d)([A-Z])", r"\1 \2", size)


def _agreement(rows):
    done = [one for one in rows if "failed" not in one]
    apart = [one for one in done if one["agreement"]["same_tokens"] is None]
    compared = [one for one in done if one not in apart]
    said = [_not_compared(one) for one in apart]
    if len(compared) > 1 or not apart:
        said.insert(0, _compared(compared))
    return " ".join(said)


def _not_compared(one):
    weights = f"{one['format']}, {one['weight_bytes'] / 1e9:.2f} GB a token"
    return f"The tokens of {one['name']} ({weights}) are not compared: {one['agreement']['why']}."


def _compared(rows):
    differences = [one["agreement"]["largest_logprob_difference"] or 0.0 for one in rows]
    text = f"The largest difference in a likely token's log-probability is {max(differences):.3f}."
    others = [one["name"] for one in rows if not one["agreement"]["same_tokens"]]
    if others:
        return f"Other tokens than the rest gave: {', '.join(others)}. {text}"
    return f"All of them gave the same tokens. {text}"


def blocks() -> dict[str, str]:
    """Every generated part by its mark; empty where nothing has been measured yet."""
    found = {
        "sweeps": sweeps(),
        "disk": disk(),
        "perplexity": perplexity(),
        "quantized": quantized(),
        **described.blocks(),
    }
    for machine in ("h200", "cpu"):
        name = f"versus-{machine}"
        there = (RESULTS / f"{name}.json").exists()
        found[name] = versus(load(name)) if there else ""
    return found


def rewritten(pages: dict[Path, str]) -> dict[Path, str]:
    """The pages with every marked part made anew. A further comparison appears where a page has a
    mark with the name of its result, `versus-NAME`."""
    made = blocks()
    marks = [match[2] for text in pages.values() for match in MARKED.finditer(text)]
    further = {mark for mark in marks if mark.startswith("versus-")} - made.keys()
    made |= {mark: versus(load(mark)) for mark in further}
    if sorted(marks) != sorted(made):
        raise SystemExit(f"marked in the pages: {sorted(marks)}; made: {sorted(made)}")

    def filled(match):
        body = made[match[2]]
        return match[1] + (f"\n{body}\n" if body else "") + match[3]

    return {path: MARKED.sub(filled, text) for path, text in pages.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    args = parser.parse_args()
    old = {path: path.read_text() for path in PAGES}
    new = rewritten(old)
    if args.check:
        return int(new != old)
    for path, text in new.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
