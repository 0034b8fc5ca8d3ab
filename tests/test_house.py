"""The house: which room may import which, what stays light, and what no room reaches into."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import pytest

from tests.conftest import REPOSITORY, long_tests

# In the order in which they may import: each from itself and from those before it.
ROOMS = (
    *(
        "errors",
        "strict",
        "durable",
        "interrupts",
        "leaving",
        "protobuf",
        "tokenizer_files",
        "sizes",
        "additions",
        "parts",
        "spec",
        "pieces",
        "encodings",
        "families",
        "gguf",
        "small_files",
        "config",
        "run_config",
    ),
    *("catalogue", "model", "cores", "checkpoint", "plan", "streaming", "text", "drafting"),
    *("engine", "auto_tokenizer", "api", "torch", "measure", "tuning", "serving", "batch", "app"),
)
GROUND = ROOMS[: ROOMS.index("model")]
# What the converter stands on: it needs no JAX.
UNDER_CONVERT = (*GROUND, "checkpoint")
# Which rows a host reads is one fact, for the converter that keeps them and for the run.
BESIDE_CONVERT = ("jlayer.plan.dealing",)
HEAVY = ("jax", "torch", "transformers", "flax", "orbax", "huggingface_hub")
MOST_LINES = 450
LONGER = {}  # path -> why it is one room all the same


def modules():
    """(dotted name, path) of every module of ours."""
    for folder, package in (("jlayer", "jlayer"), ("convert", "jlayer.convert")):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            inside = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            parts = (package, *(inside[:-1] if inside[-1] == "__init__" else inside))
            yield ".".join(parts), path


MODULES = dict(modules())


def room(module):
    rest = module.partition(".")[2]
    return {"": "app", "__main__": "app"}.get(rest, rest.split(".")[0])


@dataclass(frozen=True)
class Facts:
    """Of one file. `imports`: (module, name or None) of each import, wherever in it.
    `own`: what the file defines or assigns itself: functions, classes, variables, attributes.
    `reached`: (name, expression) of each private name that it takes from elsewhere: as an
    attribute, or to patch it."""

    imports: tuple
    own: frozenset
    reached: tuple


@cache
def facts(path):
    """Each file is parsed once. Its tree is not kept: Python's collector would go through the trees
    of all files again and again."""
    nodes = tuple(ast.walk(ast.parse(path.read_text())))
    own = frozenset(own_names(nodes))
    return Facts(tuple(imports(path, nodes)), own, tuple(private_reaches(nodes, own)))


def imports(path, nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def own_names(nodes):
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_reaches(nodes, own):
    for node in nodes:
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "setattr":
            words = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            name = str(words[0]).rpartition(".")[2] if words else ""
        else:
            continue
        if re.match(r"_[a-z]", name) and name not in own:
            yield name, ast.unparse(node)


def imported(path):
    """(module of ours, name or None) of each import."""
    for module, name in facts(path).imports:
        if f"{module}.{name}" in MODULES:
            module, name = f"{module}.{name}", None
        assert module.split(".")[0] != "convert", f"{path}: a user's convert.py would go before"
        if module.split(".")[0] == "jlayer":
            yield module, name


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_those_before_it(module):
    own = room(module)
    for other, name in imported(MODULES[module]):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        there = room(other)
        if own == there or (other == "jlayer" and name == "__version__"):
            continue
        if own == "convert":
            allowed = there in UNDER_CONVERT or other in BESIDE_CONVERT
            allowed = allowed or module == "jlayer.convert.__main__"
        elif there == "convert":
            allowed = own == "app"
        elif own == "text":
            allowed = there in GROUND
        else:
            allowed = ROOMS.index(there) < ROOMS.index(own)
        assert allowed, f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    """Not even inside a function, or for its types alone: a circle has no reading order."""
    above = {name: {other for other, _ in imported(path)} for name, path in MODULES.items()}
    # A package's own file only names what is inside it, for whoever imports the package.
    for name in list(above):
        above[name] = {other for other in above[name] if not name.startswith(other + ".")}
    finished, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        path.append(name)
        for other in sorted(above.get(name, ())):
            visit(other)
        path.pop()
        finished.add(name)

    for name in MODULES:
        visit(name)


def test_the_ground_floor_needs_the_standard_library_alone():
    for module, path in MODULES.items():
        if room(module) not in GROUND:
            continue
        for name, _ in facts(path).imports:
            top = name.split(".")[0]
            assert top in (*sys.stdlib_module_names, "jlayer"), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_room_reaches_into_the_private_names_of_another_module(module):
    for other, name in imported(MODULES[module]):
        assert not (name or "").startswith("_") or name == "__version__", f"{other}.{name}"
    for _, words in facts(MODULES[module]).reached:
        raise AssertionError(f"{module} reaches for {words}")


TESTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("tests", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.py")
)
# What has no other door; the file says why.
REACHED = {
    "tests/convert/test_orbax.py": {"_put_in_place"},
    "tests/convert/test_pickles.py": {"_metadata"},  # torch's
    "tests/engine/test_device.py": {"_is_started", "_meet"},
}


@pytest.fixture(scope="module")
def private_names():
    """Those that our own code defines; a test may have to use those of other projects."""
    names = {name for path in MODULES.values() for name in facts(path).own}
    return {name for name in names if re.match(r"_[a-z]", name)}


@pytest.mark.parametrize("path", TESTS)
def test_tests_and_benchmarks_use_public_names(private_names, path):
    for other, name in imported(REPOSITORY / path):
        assert not (name or "").startswith("_"), f"{other}.{name}"
    for name, words in facts(REPOSITORY / path).reached:
        allowed = name not in private_names or name in REACHED.get(path, ())
        assert allowed, f"{path} reaches for {words}"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_one_room(module):
    path = MODULES[module]
    n_lines = len(path.read_text().splitlines())
    own = path.relative_to(REPOSITORY).as_posix()
    assert n_lines <= MOST_LINES or own in LONGER, f"{own} has {n_lines} lines"


LIGHT = (
    *("--help", "convert --help", "plan --help", "verify --help", "generate --help"),
    *("chat --help", "chat /does/not/exist", "tune --help"),
    *("export --help", "export /does/not/exist /tmp/x --format orbax"),
    *("demo --help", "bench --help", "generate", "plan", "nonsense"),
    *("list --help", "pull --help", "remove --help", "pull x --offline", "pull a/b/"),
    *("bench --timeline /does/not/exist.png", "plan /does/not/exist"),
    *("verify /does/not/exist", "convert /does/not/exist /tmp/x"),
)


@pytest.fixture(scope="module")
def imported_after():
    """Words of the command line -> what is heavy and imported after them. They are given one after
    another in one fresh process: what one imports is of all that follow."""
    code = f"""
import json, sys
from jlayer.app.cli import main
found = {{}}
for words in {LIGHT!r}:
    try:
        main(words.split())
    except SystemExit:
        pass
    found[words] = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(found), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("words", LIGHT)
def test_help_and_usage_errors_import_nothing_heavy(imported_after, words):
    assert imported_after[words] == []


def test_importing_jlayer_is_cheap():
    heavy = (*HEAVY, "numpy")
    code = f"import sys, jlayer; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A package that no extra of the tests brings, since it is large -> who imports it.
NOT_INSTALLED = {"lm_eval": "jlayer.measure.harness"}


def test_every_public_name_survives_the_import_of_every_module():
    """Importing a module binds it in its package: one named as a public function replaces it."""
    missing = {user for name, user in NOT_INSTALLED.items() if find_spec(name) is None}
    modules = [
        name
        for name in MODULES
        if name.startswith("jlayer.") and not name.endswith("__main__") and name not in missing
    ]
    code = f"""
import importlib
for name in {modules!r}:
    importlib.import_module(name)
import jlayer
for name in jlayer.__all__:
    found = getattr(jlayer, name)
    if not callable(found) or found.__name__ != name:
        print(name, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 50
    assert done.stdout == ""


def test_long_tests_are_there():
    """Each line of tests/long.txt names a test, and none twice."""
    lines = (REPOSITORY / "tests" / "long.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert len(names) == len(long_tests())
    for name in names:
        path, *_, function = name.partition("[")[0].split("::")
        text = (REPOSITORY / path).read_text()
        assert re.search(rf"^def {function}\(|^{function} = ", text, re.M), name
