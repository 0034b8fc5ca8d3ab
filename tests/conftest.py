"""Strict by default: three CPU devices, strict dtype promotion, rank promotion an error. Shared
checkpoints."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs run for a millisecond and are compiled for a hundred: LLVM need not do its best (at
# its level 0 Qwen 3.5 rounds more than the tolerance). CI's long campaigns have what users have.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=3 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers of pytest share the cores; OpenMP's threads would wait for each other in a loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA writes a line for each program that it finds compiled; a failing test would show hundreds.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Workers, and a hundred processes that tests start, would each compile our sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No test is a race: how long an example takes depends on what else the machine does.
hypothesis.settings.register_profile(
    "no deadline", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no deadline")

COMPILED = "JLAYER_TESTS_COMPILED"  # names the folder that all workers of a session share
REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
BUNDLED = REPOSITORY / "jlayer" / "data" / "fable-3m"

NO_SHARED_DATA = "the shared test data is not beside this checkout"

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=NO_SHARED_DATA)


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        metavar="K/N",
        help="only the tests of part K (from 0) of N: the long campaigns take hours",
    )


def long_tests() -> frozenset[str]:
    """The names in tests/long.txt."""
    lines = (REPOSITORY / "tests" / "long.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


LONG = long_tests()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks long tests, and drops the tests of other parts. Which part a test is in hangs on its
    name alone, so all workers agree, and a new test moves no other."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)
    if part := config.getoption("--part"):
        number, n_parts = map(int, part.split("/"))
        own = [item for item in items if crc32(item.nodeid.encode()) % n_parts == number]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(own)])
        items[:] = own


def pytest_collection_finish():
    """All of the tests and what they import stays until the end: Python's collector need not go
    through millions of objects each time."""
    gc.collect()
    gc.freeze()


def pytest_configure():
    """Many tests build the same programs: XLA compiles each once a session, for the workers and the
    processes that tests start alike."""
    import jax

    if COMPILED not in os.environ:  # else this is a worker, which has it from the first process
        folder = tempfile.mkdtemp(prefix="jlayer-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[COMPILED] = folder
    settings = {
        "jax_compilation_cache_dir": os.environ[COMPILED],
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


class LastPrograms(OrderedDict):
    """The programs of models that were closed, too: many tests open models that are alike."""

    def __setitem__(self, name, program):
        super().__setitem__(name, program)
        self.move_to_end(name)
        if len(self) > 500:  # each takes some twenty of the 65,530 mappings of a process
            self.popitem(last=False)


@pytest.fixture(scope="session", autouse=True)
def less_to_begin_with():
    """What each model that is opened would do again: compile, and see how fast the cores are with
    as many bytes as large models have."""
    from jlayer.engine import compiles, speeds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiles, "all_programs", LastPrograms())
        patch.setattr(speeds, "MATRIX_BYTES", 1 << 20)
        yield


@pytest.fixture
def all_shapes():
    """Where runs have few shapes, for tests of the shapes themselves: how pools grow, what a chunk
    holds, what is promised."""
    from tests import programs

    with programs.all_shapes():
        yield


@pytest.fixture(autouse=True)
def campaigns_have_all_shapes(request):
    """Not those of the table: what they compare with is made by fixtures of their module."""
    if request.node.get_closest_marker("slow") and request.node.nodeid not in LONG:
        request.getfixturevalue("all_shapes")


@pytest.fixture
def compiled_anew(monkeypatch):
    """For a test that looks at what is compiled, or at what programs are made of."""
    from jlayer.engine import compiles

    monkeypatch.setattr(compiles, "all_programs", {})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A converted random model of three layers; read only."""
    from jlayer.convert import convert_checkpoint
    from tests.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("tiny")
    convert_checkpoint(tiny_llama(folder / "source"), folder / "layered")
    return folder / "layered"


@pytest.fixture(scope="session")
def fable(tmp_path_factory):
    """The bundled trained model, converted; read only."""
    from jlayer.convert import convert_checkpoint

    target = tmp_path_factory.mktemp("fable") / "layered"
    convert_checkpoint(BUNDLED, target)
    return target


@pytest.fixture
def room_for(fable, monkeypatch):
    """Call it with a number of lanes and their context: budgets that hold so many and no more."""
    from jlayer import AutoModel
    from jlayer.plan.making import make_plan
    from jlayer.plan.shapes import RunShape
    from jlayer.plan.tiles import Tier
    from tests.programs import all_shapes

    monkeypatch.setattr("jlayer.engine.alike.anonymous_bytes", lambda: 100 << 20)

    def budgets(lanes, context):
        with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
            engine = model.engine
            shape = RunShape(lanes, 5, context)
            machine = replace(engine.plan.machine, device_budget=1, host_budget=1)
            needed = make_plan(engine.weights, machine, shape)
            assert needed.cache is Tier.HOST
            return {
                "device_memory": needed.device_peak_bytes,
                "host_memory": needed.host_peak_bytes,
            }

    with all_shapes():
        yield budgets
