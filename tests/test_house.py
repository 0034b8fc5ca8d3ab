"""The house: which wing may import which, what stays light, and that the README tells the truth
about the files."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

WINGS = ["ground", "jlayer.model", "jlayer.weights", "jlayer.run", "jlayer.app"]
HEAVY = ("jax", "torch", "transformers", "flax", "orbax", "huggingface_hub")


def modules():
    """(name, path) of every module of ours."""
    for folder in ("jlayer", "convert"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield ".".join(path.relative_to(REPOSITORY).with_suffix("").parts), path


def wing(module):
    if module.split(".")[0] == "convert":
        return "convert"
    if module == "jlayer.__main__":
        return "jlayer.app"
    return next(
        (name for name in WINGS[1:] if module == name or module.startswith(name + ".")), "ground"
    )


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wing_imports_only_from_those_before_it(module, path):
    own = wing(module)
    for name in imports(path):
        if name.split(".")[0] not in ("jlayer", "convert") or name == "jlayer":
            continue
        other = wing(name)
        if own == "convert":
            allowed = {"ground", "convert", "jlayer.weights", "jlayer.app"}
            assert other in allowed, name
            assert other != "jlayer.app" or module == "convert.__main__", name
            assert other != "jlayer.weights" or name in (
                "jlayer.weights.digest",
                "jlayer.weights.layout",
                "jlayer.weights.header",
                "jlayer.weights.packed",
                "jlayer.weights.published",
            ), name
        elif other == "convert":
            assert own == "jlayer.app", f"{module} imports {name}"
        else:
            assert WINGS.index(other) <= WINGS.index(own), f"{module} imports {name}"


def test_the_ground_floor_needs_the_standard_library_alone():
    for module, path in modules():
        if wing(module) == "ground" and module != "jlayer.data.__init__":
            for name in imports(path):
                top = name.split(".")[0]
                assert top in (*sys.stdlib_module_names, "jlayer"), f"{module} imports {name}"


@pytest.mark.parametrize(
    "words",
    [
        *("--help", "convert --help", "plan --help", "verify --help", "generate --help"),
        *("export --help", "export /does/not/exist /tmp/x --format orbax"),
        *("demo --help", "bench --help", "generate", "plan", "nonsense"),
        *("bench --timeline /does/not/exist.png", "plan /does/not/exist"),
        *("verify /does/not/exist", "convert /does/not/exist /tmp/x"),
    ],
)
def test_help_and_usage_errors_import_nothing_heavy(words):
    code = (
        "import sys; from jlayer.app.cli import main\n"
        f"try: main({words.split()!r})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_importing_jlayer_is_cheap():
    heavy = (*HEAVY, "numpy")
    code = f"import sys, jlayer; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["model/block", "weights/schedule", "run/executor"])
def test_a_newcomers_first_hour_stays_short(name):
    assert len((REPOSITORY / "jlayer" / f"{name}.py").read_text().splitlines()) < 400


def test_the_readme_names_every_file_of_the_code():
    readme = (REPOSITORY / "README.md").read_text()
    missing = [
        path.relative_to(REPOSITORY).as_posix()
        for _, path in modules()
        if path.name not in ("__init__.py",) and f"`{path.name}`" not in readme
    ]
    assert missing == []


def test_the_readme_shows_the_real_help():
    readme = (REPOSITORY / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "jlayer", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in readme


def test_ci_runs_the_two_commands_that_stand_at_the_top_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^    (pip install .*)$", readme, re.MULTILINE)[:2]
    assert len(commands) == 2
    script = (REPOSITORY / ".ci" / "run").read_text()
    for command in commands:
        assert command in script
