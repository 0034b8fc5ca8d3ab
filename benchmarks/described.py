"""The generated parts of README.md and docs/ that come from the code itself.

The command line comes from the argument parsers, the table of cards from `jlayer plan`, the table
of models from their registry, the map of files from each module's docstring, and the table of
packages from pyproject.toml and the imports. table.py writes them into the pages.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from jlayer import catalogue
from jlayer.app.cli import main
from jlayer.families.holders import HOLDERS
from jlayer.families.registry import FAMILIES

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = ("jlayer", "convert")

# The machines of "Will it run on my card?": (name, device budget, host budget, link). A card
# leaves a little of its memory to the driver and the desktop; the host budget is 3/4 of its memory.
CARDS = {
    "4": ("4 GB card, 16 GB memory", "3800MiB", "12GiB", "12GB/s"),
    "8": ("8 GB card, 32 GB memory", "7600MiB", "24GiB", "25GB/s"),
    "24": ("24 GB card, 64 GB memory", "23GiB", "48GiB", "25GB/s"),
}
DISKS = ("3GB/s", "7GB/s")
# (card, name in configs/models, its name in the table, encoding). Combinations that hold the whole
# model on the card are left out: streaming has no use there.
RUNS = [
    ("4", "llama-3.1-8b-instruct", "8B", "bfloat16"),
    ("4", "llama-3.1-8b-instruct", "8B", "int4"),
    ("4", "llama-3.1-70b-instruct", "70B", "bfloat16"),
    ("4", "llama-3.1-70b-instruct", "70B", "int4"),
    ("4", "llama-3.1-405b", "405B", "int4"),
    ("8", "llama-3.1-70b-instruct", "70B", "bfloat16"),
    ("8", "llama-3.1-70b-instruct", "70B", "int4"),
    ("8", "llama-3.1-405b", "405B", "int4"),
    ("24", "llama-3.1-70b-instruct", "70B", "bfloat16"),
    ("24", "llama-3.1-70b-instruct", "70B", "int4"),
    ("24", "llama-3.1-405b", "405B", "int4"),
]

# What each package of pyproject.toml is for. A package without a line here is an error.
PURPOSES = {
    "jax": "compiles and runs the arithmetic; device memory and transfers",
    "jaxlib": "the compiled half of jax",
    "flax": "`flax.struct`: frozen dataclasses that jax takes as trees of arrays",
    "numpy": "arrays on the host: reading, conversion, quantization, sampling",
    "ml_dtypes": "the dtype bfloat16 for numpy",
    "safetensors": "the file format. Headers are read by our own strict reader; the library writes "
    "and reads the files of the tests, and Transformers needs it",
    "orbax-checkpoint": "the Orbax format, and checkpoints of `jlayer tune`. Its own saves are the "
    "reference in the tests",
    "optax": "AdamW, and the schedules of its learning rate, in `jlayer tune`",
    "tensorstore": "reads and writes Orbax arrays, one at a time",
    "backports.zstd": "unpacks Orbax chunks as streams (Python 3.14 has it built in)",
    "transformers": "`model.tokenizer` in Python; the reference that the tests compare with",
    "tokenizers": "text to ids and back",
    "huggingface_hub": "downloads of hub ids, and their cache",
    "xxhash": "checks rows as they are read; about ten times as fast as SHA-256",
    "rich": "progress bars, and the width of characters on a terminal",
    "jinja2": "chat templates",
    "regex": "patterns in an adapter's config: those of `re`, but what matches has an end",
    "torch": "reads `pytorch_model.bin` and Meta's `.pth` files; reference in the tests",
    "matplotlib": "draws the pictures of `--timeline` and `--picture`",
    "llvmlite": "compiles the kernels with which the host's cores multiply weights in host memory",
    "starlette": "the server's table of paths, and requests as Python reads them",
    "uvicorn": "the server's HTTP",
    "msgspec": "bodies of requests, read by their types",
    "llguidance": "which tokens a schema, an expression or a grammar allows next",
    "python-multipart": "files that are sent to the server as forms",
    "ray": "batches on a cluster: places workers, replaces those that die, asks again",
    "lm_eval": "the tasks of `jlayer eval harness`",
    "pytest": "runs the tests",
    "pytest-xdist": "runs the tests in two processes",
    "hypothesis": "makes inputs for property tests",
    "ruff": "lint and format",
    "sentencepiece": "reference for our reading of `tokenizer.model`",
    "tiktoken": "reference for our reading of `tokenizer.model`",
    "gguf": "writes GGUF files and decodes their blocks; reference for ours, in the tests",
    "xllamacpp": "llama.cpp, whose tokens GGUF files are to give, in the tests",
    "bitsandbytes": "quantizes models and decodes their weights; reference for ours, in the tests",
    "peft": "saves adapters and merges them; reference for ours, in the tests",
    "accelerate": "Transformers needs it to load what bitsandbytes has quantized, in the tests",
    "openai": "a client of the server, in the tests",
    "httpx": "a client of the server, in the tests",
    "selenium": "drives the page in a browser, in the tests",
}
# Which models have a type. A type without a line here is an error.
MODELS = {
    "arcee": "AFM 4.5B",
    "cohere": "Command R and R+, Aya",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek V2 and V2.5, V2 Lite",
    "deepseek_v3": "DeepSeek V3, V3.1 and R1",
    "deepseek_v32": "DeepSeek V3.2, texts of up to 2048 tokens",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B and 300B-A47B",
    "exaone4": "EXAONE 4.0",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B and 27B",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma4": "Gemma 4 31B and 26B-A4B",
    "gemma4_text": "the text of a Gemma 4",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414 9B and 32B",
    "glm4_moe": "GLM-4.5 to 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5, texts of up to 2048 tokens",
    "gpt_oss": "gpt-oss 20B and 120B: experts in MXFP4, as published, or as plain numbers",
    "granite": "Granite 3, dense",
    "granitemoe": "Granite 3 1B-A400M and 3B-A800M",
    "helium": "Helium 1 2B",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "kimi_k2": "Kimi K2",
    "llama": "Llama 1 to 3.3, and many in its form: Yi, SmolLM 2, Falcon 3",
    "llama4": "Llama 4 Scout and Maverick",
    "llama4_text": "the text of a Llama 4",
    "minimax_m2": "MiniMax M2, as published: in FP8",
    "ministral": "a Mistral whose layers differ in their window",
    "ministral3": "the text of Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mistral4": "the text of Mistral 4",
    "mistral3": "Mistral Small 3.1 and 3.2, Ministral 3",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "nemotron": "Nemotron 3 8B, Minitron",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE 1B-7B",
    "phi3": "Phi 3 and 3.5 mini, Phi 4",
    "phimoe": "Phi 3.5 MoE, texts of up to 4096 tokens",
    "qwen2": "Qwen 2 and 2.5, QwQ",
    "qwen2_moe": "Qwen 1.5 MoE, Qwen 2 57B-A14B",
    "qwen3": "Qwen 3, dense",
    "qwen3_5": "Qwen 3.5, 3.6 and 3.8, dense",
    "qwen3_5_moe": "Qwen 3.5 and 3.6 with experts",
    "qwen3_5_moe_text": "the text of a Qwen 3.5 with experts",
    "qwen3_5_text": "the text of a dense Qwen 3.5",
    "qwen3_moe": "Qwen 3 30B-A3B and 235B-A22B, Qwen 3 Coder",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM 3B and 2",
    "starcoder2": "StarCoder 2",
}
MODULE_OF = {"orbax-checkpoint": "orbax"}  # where a package is imported under another name


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def blocks() -> dict[str, str]:
    """Every part that this module makes, by its mark."""
    return {
        "cards": cards(),
        "command-line": command_line(),
        "files": files(),
        "models": models(),
        "packages": packages(),
    }


def cards() -> str:
    """Memory and seconds a token of known models on common machines, as `jlayer plan` says."""
    rows = []
    for card, model, name, encoding in RUNS:
        machine, device_memory, host_memory, link = CARDS[card]
        words = ["plan", model, "--device-memory", device_memory, "--host-memory", host_memory]
        words += ["--link-speed", link, "--json"]
        words += [] if encoding == "bfloat16" else ["--quantize", encoding]
        # The table does not tell how many lanes would fit, and finding that takes longest.
        with mock.patch("jlayer.app.verbs.plan.lanes_of", return_value={}):
            plans = [json.loads(printed([*words, "--disk-speed", speed])) for speed in DISKS]
        assert all(plan["fits"] for plan in plans), words
        memory = [max(plan[at]["peak_bytes"] for plan in plans) for at in ("device", "host")]
        rows.append(
            [
                machine,
                f"{name} {encoding}",
                *[f"{n_bytes / 2**30:.1f} GiB" for n_bytes in memory],
                *[_figures(plan["sweep"]["seconds"]) for plan in plans],
            ]
        )
    speeds = [f"s/token, disk {speed.replace('GB', ' GB')}" for speed in DISKS]
    return table(["machine", "model", "GPU memory", "host memory", *speeds], rows)


def models() -> str:
    """The model types that run, with their architectures, and names that `jlayer plan` knows."""
    known = defaultdict(list)
    for name in catalogue.names("models"):
        known[json.loads(catalogue.model_json(name))["model_type"]].append(f"`{name}`")
    held = {name: holder.architecture for name, holder in HOLDERS.items()}
    rows = {name: family.architecture for name, family in FAMILIES.items()} | held
    return table(
        ["`model_type`", "architecture", "models", "known to `jlayer plan`"],
        [
            [f"`{name}`", f"`{rows[name]}`", MODELS[name], ", ".join(known[name])]
            for name in sorted(rows)
        ],
    )


def _figures(seconds):
    """Two significant figures: predictions are not better than that."""
    return f"{seconds:.2g}" if seconds < 100 else f"{round(seconds, -1):.0f}"


def printed(words: list[str]) -> str:
    """What `jlayer WORDS` prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, words
    return out.getvalue()


class _Found(BaseException):
    """Carries a parser out of the program."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that answers `jlayer COMMAND --help`."""

    def take(parser, file=None):
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "print_help", take):
        try:
            main([*command.split(), "--help"])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"jlayer {command} --help printed no help")


def commands() -> dict[str, str]:
    """Every command of jlayer, and what `jlayer --help` says of it."""
    lines = re.split(r"\n(?:verbs|commands):\n", printed_help(""))[1].splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))


def printed_help(command: str) -> str:
    """What `jlayer COMMAND --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return out.getvalue()


def command_line() -> str:
    """Every command with its arguments and options."""
    summaries = commands()
    parts = [
        table(
            ["command", "what it does"],
            [[f"[`{name}`](#jlayer-{name})", line] for name, line in summaries.items()],
        )
    ]
    for name in summaries:
        parts += _described(f"jlayer {name}", parser_of(name))
    return "\n".join(parts)


def _described(title, parser) -> Iterator[str]:
    """A parser as Markdown: its name, its description, a table of its arguments; then the same for
    each command under it."""
    yield f"## {title}\n"
    yield f"{parser.description.strip()}\n"
    rows, below = [], []
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):
            below = action.choices.items()
        elif "--help" not in action.option_strings:
            rows.append([_spelled(action), _meaning(action)])
    if rows:
        yield table(["argument", "meaning"], rows)
    for name, own in below:
        yield from _described(f"{title} {name}", own)


def _spelled(action):
    value = action.metavar or (
        "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
    )
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if not names:
        return f"`{value}`" + (" (may be left out)" if action.nargs == "?" else "")
    if action.nargs == 0:
        return names
    return f"{names} `{value}`".replace("|", "\\|")


def _meaning(action):
    text = " ".join((action.help or "").split()) % {"default": action.default}
    return (text + (" (required)" if action.required and action.option_strings else "")).replace(
        "|", "\\|"
    )


def modules(top: str) -> Iterator[Path]:
    """Every Python file under a folder of the repository, a folder's own file first."""
    root = REPOSITORY / top
    inside = (path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    for folder in [root, *sorted(inside)]:
        own = sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name))
        yield from own


def files() -> str:
    """The map: a list for each folder with a line for each file, its docstring's first sentence."""
    lines = []
    for top in CODE:
        for path in modules(top):
            folder, name = path.parent.relative_to(REPOSITORY).as_posix(), path.name
            if name == "__init__.py":
                lines.append(f"\n`{folder}/`: {first_sentence(path)}\n")
            else:
                lines.append(f"- `{folder}/{name}`: {first_sentence(path)}")
    return "\n".join(lines).strip() + "\n"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path} has no docstring"
    words = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", words)[0]


def packages() -> str:
    """Every package that pyproject.toml asks for: what for, and which of our files import it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    importers = _importers()
    wanted = dict.fromkeys(map(_package, project["dependencies"]), "always")
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            wanted.setdefault(_package(requirement), f'`".[{extra}]"`')
    if wanted.keys() != PURPOSES.keys():
        found = sorted(wanted.keys() ^ PURPOSES.keys())
        raise SystemExit(f"in one of pyproject.toml and PURPOSES alone: {', '.join(found)}")
    rows = []
    for package, when in wanted.items():
        module = MODULE_OF.get(package, package)
        found = sorted(importers.get(module.replace("-", "_"), ()))
        users = ", ".join(f"`{name}`" for name in found)
        users = f"{len(found)} files" if len(found) > 6 else users or "no file"
        rows.append([f"`{package}`", when, PURPOSES[package], users])
    return table(["package", "installed", "used for", "imported by"], rows)


def _package(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


def _importers():
    """Module of a package -> our files that import it, as paths without the repository's."""
    found = defaultdict(set)
    for top in CODE:
        for path in modules(top):
            name = path.relative_to(REPOSITORY).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [f"{node.module}.{alias.name}" for alias in node.names]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for one in names:
                    found[one.split(".")[0]].add(name)
                    found[".".join(one.split(".")[:2])].add(name)
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(blocks().values()))
