"""Every command and every Python example of README.md and docs/ is tested, as TESTED says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import pytest

from benchmarks import described, table
from jlayer.app.cli import main
from jlayer.measure import bench as measuring
from tests.adapters import write_adapter
from tests.conftest import BUNDLED, REPOSITORY
from tests.programs import few_shapes

PAGES = {path.name: path.read_text() for path in table.PAGES}
# The reference of the command line is made from the parsers; what it shows are forms, not commands.
COMMAND = re.compile(r"^( {4})?(?:\$ )?((?:jlayer|python|pip) .*)\n", re.MULTILINE)
GENERATED = re.compile(r"<!-- table: .*?<!-- end of table -->", re.DOTALL)


@dataclass(frozen=True)
class Here:
    """Run here, in the order of the pages, with real paths in place of the ones that are shown.
    `shows`: the lines under it are compared with what it prints. `figures`: with the figures, too;
    else up to the first digit of each line that has one, since times and sampled text differ."""

    code: int = 0
    shows: bool = False
    figures: bool = True


@dataclass(frozen=True)
class InCI:
    """A line of .ci/run."""


@dataclass(frozen=True)
class By:
    """Run by another test, whose file says so."""

    test: str


@dataclass(frozen=True)
class Parsed:
    """Its options are checked, no more; `why`."""

    why: str


NETWORK = "needs the network"
COMMANDS_OF_GGUF = "tests/gguf/test_command_line.py"
SERVES = "runs until it is ended; tests/app/test_serve.py starts it"
TESTED = {
    # README.md
    "pip install -e . && jlayer demo": InCI(),
    'pip install -e ".[test]" && pytest': InCI(),
    "jlayer demo": Here(shows=True, figures=False),
    "jlayer plan llama-3.1-70b-instruct --device-memory 4GiB --host-memory 24GiB "
    "--disk-speed 3GB/s": Here(),
    "jlayer convert path/to/Llama-3-8B path/to/Llama-3-8B-int4 --quantize int4": Here(),
    "jlayer plan path/to/Llama-3-8B-int4 --device-memory 4GiB": Here(),
    'jlayer generate path/to/Llama-3-8B-int4 -p "Once upon a time" -n 100': Here(),
    "jlayer chat path/to/Llama-3-8B-int4": Parsed("waits for somebody who types"),
    "jlayer serve path/to/Llama-3-8B-int4": Parsed(SERVES),
    "jlayer plan path/to/Llama-3-8B --device-memory 4GiB --batch 16 --context 512": Here(),
    'jlayer generate path/to/Llama-3-70B --draft path/to/Llama-3-8B -p "Once upon a time" '
    "-n 100": Here(),
    # architecture.md
    "python benchmarks/table.py": By("tests/test_readme.py"),
    "python benchmarks/table.py --check": By("tests/test_readme.py"),
    # chat.md
    'jlayer chat path/to/Llama-3-8B-Instruct --system "Be brief."': By("tests/app/test_chat.py"),
    # batch.md
    "jlayer batch path/to/Llama-3-8B requests.jsonl answers.jsonl": Here(),
    'pip install -e ".[ray]"': Parsed(NETWORK),
    "jlayer batch path/to/Llama-3-8B requests.jsonl answers.jsonl --ray 10.0.0.1:6379 --workers 4 "
    "--host-memory 64GiB": By("tests/app/test_cluster.py"),
    # converting.md
    "jlayer convert path/to/Llama-3-8B path/to/Llama-3-8B-jlayer": Here(),
    "jlayer verify path/to/Llama-3-8B-jlayer": Here(),
    'jlayer generate path/to/Llama-3-8B-jlayer -p "Once upon a time"': Here(),
    "jlayer seal path/to/Llama-3-8B-jlayer": Here(),
    "jlayer convert path/to/Llama-3-8B path/to/Llama-3-8B-jlayer --follow-links": Here(),
    "python -m convert path/to/Llama-3-8B path/to/Llama-3-8B-jlayer": Here(),
    "jlayer plan owner/name": Parsed(NETWORK),
    "jlayer convert owner/name path/to/converted --offline": Parsed(NETWORK),
    "jlayer convert path/to/Llama-3-70B path/to/Llama-3-70B-jlayer --delete-source": Here(),
    "jlayer convert path/to/Llama-3-8B path/to/Llama-3-8B-tuned --merge path/to/adapter": By(
        "tests/convert/test_merge.py"
    ),
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" --adapter path/to/adapter': Here(),
    "jlayer serve path/to/Llama-3-8B --adapter stories=path/to/adapter "
    "--adapter letters=path/to/tuned": Parsed(SERVES),
    "jlayer convert path/to/Llama-3-8B path/to/rows-0-of-2 --rows 0/2": Here(),
    "jlayer convert path/to/Llama-3-8B path/to/rows-1-of-2 --rows 1/2": Here(),
    "jlayer export path/to/Llama-3-8B-jlayer path/to/back --format huggingface": Here(),
    "jlayer export path/to/Llama-3-8B-jlayer path/to/back-orbax --format orbax": Here(),
    "python benchmarks/convert_torture.py --short": By("tests/convert/test_crash.py"),
    "python benchmarks/fuzz_headers.py --count 1000": By("tests/convert/test_fuzz.py"),
    "python benchmarks/fuzz_quantized.py --count 1000": By(
        "tests/convert/test_damaged_quantized.py"
    ),
    # edge.md
    "jlayer plan llama-3.1-8b-instruct --quantize int4 --device cpu --device-memory 900MiB "
    "--host-memory 1500MiB --disk-speed 90MB/s": Here(shows=True),
    'jlayer generate path/to/Llama-3-8B --preset board-2gb -p "Once upon a time"': Here(),
    "python benchmarks/edge.py path/to/Llama-3-8B-int4 --memory 2GiB --cores 2 --disk 90MB/s "
    "--tokens 2": By("tests/measure/test_pruned_benchmarks.py"),
    "python benchmarks/wheels.py": By("tests/measure/test_pruned_benchmarks.py"),
    # pruning.md
    "jlayer prune path/to/Llama-3-8B path/to/pruned --drop-layers 4 --text stories.txt": By(
        "tests/app/test_prune.py"
    ),
    "python benchmarks/pruning.py path/to/fable-3m fairytales.txt.gz --tokens 49152 --seeds 8": By(
        "tests/measure/test_pruned_benchmarks.py"
    ),
    # errors.md
    "jlayer plan llama-3.1-8b-instruct --device-memory 900MiB": Here(code=4, shows=True),
    # evaluating.md
    'pip install -e ".[eval]"': Parsed(NETWORK),
    "jlayer eval harness path/to/Llama-3-8B --tasks arc_easy,hellaswag": Parsed(NETWORK),
    # gguf.md
    'jlayer generate path/to/model.gguf -p "Once upon a time"': By(COMMANDS_OF_GGUF),
    'jlayer generate owner/name:Q4_K_M -p "Once upon a time"': Parsed(NETWORK),
    "jlayer pull owner/name:name-Q4_K_M.gguf@main": Parsed(NETWORK),
    "jlayer plan path/to/model.gguf --device-memory 4GiB": By(COMMANDS_OF_GGUF),
    "jlayer verify path/to/model.gguf": By(COMMANDS_OF_GGUF),
    "jlayer convert path/to/model.gguf path/to/model-jlayer": By(COMMANDS_OF_GGUF),
    "jlayer export path/to/model-jlayer path/to/back.gguf --format gguf": By(COMMANDS_OF_GGUF),
    "jlayer export path/to/Llama-3-8B-jlayer path/to/Llama-3-8B.gguf --format gguf --type q8_0": (
        Here()
    ),
    "python benchmarks/fuzz_gguf.py --count 1000000": By("tests/gguf/test_reader.py"),
    # memory.md
    "jlayer plan llama-3.1-70b-instruct --device-memory 4GiB --devices 2 --host-memory 160GiB "
    "--link-speed 25GB/s": Here(),
    "jlayer plan llama-3.1-70b-instruct --device-memory 1536MiB --host-memory 64GiB "
    "--context 64": Here(shows=True),
    "jlayer plan path/to/Llama-3-8B --device-memory 4GiB": Here(),
    "jlayer plan llama-3.1-405b --device-memory 2GiB --json": Here(),
    "jlayer plan qwen3-30b-a3b-thinking-2507 --quantize int4 --device-memory 4GiB "
    "--host-memory 64GiB": Here(),
    'jlayer generate path/to/Llama-3-8B --preset cpu -p "Once upon a time"': Here(),
    # models.md
    "jlayer pull owner/name": Parsed(NETWORK),
    "jlayer list path/to": Here(),
    "jlayer remove owner/name": Parsed("needs a model in the hub's cache"),
    # performance.md
    "jlayer bench path/to/Llama-3-70B-jlayer --device-memory 1536MiB --timeline sweeps.png": Here(),
    "python benchmarks/lanes.py path/to/Llama-3-70B-jlayer --device-memory 4096MiB "
    "--lanes 1,8,64,256 --context 512 --draw": By("tests/measure/test_lanes.py"),
    "python benchmarks/verifying.py path/to/Llama-3-70B-jlayer path/to/Llama-3-8B-jlayer "
    "--device-memory 4096MiB --rows 1,16,64,128,256,512": By("tests/measure/test_guesses.py"),
    "python benchmarks/speculation.py path/to/Llama-3-70B path/to/Llama-3-8B "
    "--nodes 16,64,256 --temperatures 0,0.7,1": By("tests/measure/test_guesses.py"),
    "python benchmarks/resident.py path/to/Llama-3-8B --tokens 300": By(
        "tests/measure/test_guesses.py"
    ),
    'pip install -e ".[cores]"': Parsed(NETWORK),
    'jlayer generate path/to/Llama-3-8B-int4 -p "Once upon a time" --host-share 0.5': Here(),
    "python benchmarks/cards.py path/to/Llama-3-70B-jlayer --devices 1,2 "
    "--device-memory 1536MiB --tokens 1,64,512": By("tests/measure/test_cards.py"),
    "python benchmarks/shares.py path/to/Llama-3-70B-jlayer --device-memory 1536MiB "
    "--shares 0,auto --tokens 1,2,8": By("tests/measure/test_shares.py"),
    "python benchmarks/opening.py path/to/Llama-3-70B-int4 --device-memory 1536MiB "
    "--rounds 3 --json opening.json": By("tests/measure/test_opening.py"),
    "jlayer bench --from-disk --json": By("tests/app/test_bench.py"),
    'pip install -e ".[timeline]"': Parsed(NETWORK),
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" --timeline generate.png': Here(),
    # hosts.md
    'jlayer generate path/to/Llama-3-70B -p "Once upon a time" --coordinator 10.0.0.1:7070 '
    "--processes 2 --process-id 0": By("tests/engine/test_hosts.py"),
    'jlayer generate path/to/Llama-3-70B -p "Once upon a time" --coordinator 10.0.0.1:7070 '
    "--processes 2 --process-id 1": By("tests/engine/test_hosts.py"),
    "jlayer batch path/to/Llama-3-70B requests.jsonl answers.jsonl --coordinator 10.0.0.1:7070 "
    "--processes 2 --process-id 0": By("tests/app/test_together.py"),
    "jlayer batch path/to/Llama-3-70B requests.jsonl answers.jsonl --coordinator 10.0.0.1:7070 "
    "--processes 2 --process-id 1": By("tests/app/test_together.py"),
    "jlayer eval perplexity path/to/Llama-3-70B --text wikitext.txt --coordinator 10.0.0.1:7070 "
    "--processes 2 --process-id 0": By("tests/app/test_together.py"),
    "jlayer bench path/to/Llama-3-70B --coordinator 10.0.0.1:7070 --processes 2 --process-id 0": By(
        "tests/app/test_together.py"
    ),
    # generating.md
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" --num-beams 4 '
    "--length-penalty 0.8 -n 40": Here(),
    # quantization.md
    "jlayer eval compare path/to/Llama-3-8B-jlayer path/to/Llama-3-8B-int4 "
    "--text stories.txt": Here(),
    "jlayer eval perplexity path/to/Llama-3-8B-jlayer --text stories.txt": Here(),
    "jlayer plan llama-3.1-70b-instruct --quantize int4 --device-memory 1536MiB "
    "--host-memory 64GiB --context 64": Here(shows=True),
    # sessions.md
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" -n 40 --save path/to/run '
    "--save-every 20": Here(),
    "jlayer generate path/to/Llama-3-8B --resume path/to/run --save path/to/run -n 60": Here(),
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" -n 20 '
    "--prompt-cache path/to/prompts": Here(),
    "python benchmarks/prompt_cache.py path/to/Llama-3-70B-jlayer --device-memory 4GiB "
    "--tokens 10000": By("tests/measure/test_prompt_cache.py"),
    # serving.md
    'pip install -e ".[serve]"': Parsed(NETWORK),
    "jlayer serve path/to/Llama-3-8B": Parsed(SERVES),
    "jlayer serve path/to/Llama-3-8B --host 0.0.0.0 --api-key-file path/to/key "
    "--allow-host llm.example.com": Parsed(SERVES),
    "jlayer serve path/to/Llama-3-8B --state path/to/state": Parsed(SERVES),
    "python benchmarks/serving.py --only together,leaving": By("tests/serving/test_soak.py"),
    # tuning.md
    "jlayer tune path/to/Llama-3-8B path/to/data.jsonl path/to/tuned": Here(),
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" --adapter path/to/tuned': Here(),
    "jlayer tune path/to/Llama-3-8B path/to/data.jsonl path/to/author --targets q_proj,v_proj "
    "--rank 8 --held-out path/to/data.jsonl --picture loss.png": Here(),
    "jlayer plan llama-3.1-70b-instruct --tune --host-memory 200GiB": Here(),
    "python benchmarks/tuning.py path/to/Llama-3-70B-jlayer --device-memory 4GiB "
    "--tokens-per-step 4096 --length 512": By("tests/measure/test_tuning.py"),
    # speculation.md
    "jlayer plan llama-3.1-70b-instruct --quantize int4 --draft llama-3.2-1b-instruct "
    "--device-memory 4GiB --host-memory 64GiB": Here(shows=True),
    "jlayer generate path/to/Llama-3-8B --draft path/to/Llama-3-8B-int4 "
    '-p "Once upon a time"': Here(),
    'jlayer generate path/to/Llama-3-8B -p "Once upon a time" --speculate lookup '
    "--draft-tokens 16": Here(),
    'jlayer generate path/to/Llama-3-70B-jlayer --draft path/to/Llama-3-8B -p "Once upon a time" '
    "-n 100": Here(),
    "jlayer bench path/to/Llama-3-70B-jlayer --draft path/to/Llama-3-8B": Here(),
}


def shown():
    """Each command of the pages, indented or in a fence, and the lines under it, where it first
    stands."""
    found = {}
    for text in PAGES.values():
        text = GENERATED.sub("", text)
        for match in re.finditer(
            r"^( {4})?(?:\$ )?((?:jlayer|python|pip) .*)\n", text, re.MULTILINE
        ):
            if match[1] or _is_fenced(text, match.start()):
                under = re.match(r"(?: {4}.*\n)*", text[match.end() :])[0]
                found.setdefault(match[2], [line[4:] for line in under.splitlines()])
    return found


def _is_fenced(text, at):
    return text[:at].count("\n```") % 2 == 1


@pytest.fixture
def mine(tmp_path):
    """Puts what stands for the reader's paths into a line: the bundled model and its copies."""
    (tmp_path / "stories.txt").write_text("Once upon a time there was a little girl.\n" * 3)
    body = {"prompt": "Once upon a time", "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "data.jsonl").write_text('{"text": "Once upon a time there was a girl."}\n' * 3)
    (tmp_path / "requests.jsonl").write_text(json.dumps(line))
    shutil.copytree(BUNDLED, tmp_path / "Llama-3-8B")
    shutil.copytree(BUNDLED, tmp_path / "Llama-3-70B")
    write_adapter(tmp_path / "adapter", BUNDLED)
    return lambda text: text.replace("path/to", str(tmp_path))


def test_every_command_is_tested():
    assert set(shown()) == set(TESTED)


def test_on_a_cpu_the_host_has_the_device_s_sum_in_it_as_the_page_says(capsys):
    words = ["plan", "llama-3.1-70b-instruct", "--device", "cpu", "--host-memory", "1MiB"]
    assert main([*words, "--json"]) == 4  # so that no layer stays, which would count there too
    plan = json.loads(capsys.readouterr().out)
    device, host = plan["device"], plan["host"]
    assert host["resident_bytes"] == device["peak_bytes"] - device["slots_bytes"]
    (row,) = re.findall(r"(?m)^\| `resident_bytes` \|.*", PAGES["memory.md"])
    assert "On a CPU, that of `host` has the sum of `device` in it, without its slots" in row


@pytest.mark.slow
def test_commands_run_one_after_another(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # for what they read and write
    for bound in ("LEAST_ROUNDS", "MOST_ROUNDS"):
        monkeypatch.setattr(measuring, bound, 1)  # `bench` repeats until its figures are steady
    for command, lines in shown().items():
        how = TESTED[command]
        if isinstance(how, Here):
            found = run(shlex.split(mine(command)))
            assert found == how.code, command
            printed = "".join(capsys.readouterr())
            if how.shows:
                compare(lines, printed, figures=how.figures)


def compare(lines, printed, *, figures):
    """What a page shows of an output, `...` standing for anything."""
    assert len(lines) > 2
    for line in lines if figures else filter(re.compile(r"\d").search, lines):
        for piece in line.split("...") if figures else re.split(r"\d", line)[:1]:
            assert piece.strip() in printed, line


def run(words):
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], cwd=REPOSITORY).returncode
    # On a terminal it asks; here there is nobody to ask.
    return main([*words[1:], *(["--yes"] if "--delete-source" in words else [])])


def test_commands_of_ci_stand_there():
    lines = (REPOSITORY / ".ci" / "run").read_text()
    for command, how in TESTED.items():
        if isinstance(how, InCI):
            assert re.search(rf"(^| ){re.escape(command)}($| )", lines, re.MULTILINE), command


def test_commands_of_other_tests_stand_there():
    for command, how in TESTED.items():
        if isinstance(how, By):
            text = (REPOSITORY / how.test).read_text()
            _, what, *options = shlex.split(command)
            assert re.search(rf"\b{re.escape(what.split('/')[-1].removesuffix('.py'))}\b", text)
            if what.endswith(".py"):
                done = subprocess.run(
                    [sys.executable, what, "--help"],
                    cwd=REPOSITORY,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                for option in options:
                    assert not option.startswith("-") or option in done.stdout, command


def test_other_commands_have_options_that_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for command, how in TESTED.items():
        if isinstance(how, Parsed):
            first, *words = shlex.split(command)
            if first == "pip":
                (extra,) = re.findall(r"\.\[(\w+)\]", command)
                assert extra in extras["optional-dependencies"], command
            else:
                described.parser_of(words[0]).parse_args(words[1:])


def test_extras_in_the_text_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for page, text in PAGES.items():
        for extra in re.findall(r'"\.\[(\w+)\]"', text):
            assert extra in extras["optional-dependencies"], page


EXAMPLES = {
    page: blocks
    for page, text in PAGES.items()
    if (blocks := re.findall(r"^    import jlayer\n(?:    .*\n|\n)*", text, re.MULTILINE))
}


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[] if p == "README.md" else pytest.mark.slow) for p in EXAMPLES]
)
def test_the_python_examples_run(page, mine, capsys):
    for block in EXAMPLES[page]:
        code = "\n".join(line[4:] for line in block.splitlines())
        with few_shapes():
            exec(compile(mine(code), "example", "exec"), {})
    assert page != "README.md" or "(1, " in capsys.readouterr().out
