"""What things need of memory, as closed formulas: held against compiled programs."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jlayer.additions import Addition, Additions, Columns
from jlayer.checkpoint.quantization import published_quantization
from jlayer.encodings.grouped import BLOCK_BYTES
from jlayer.encodings.plain import FOR_ALL_ROWS
from jlayer.encodings.registry import SCHEMES
from jlayer.engine.division import divided
from jlayer.engine.outgoing import Outgoing
from jlayer.engine.programs import Programs
from jlayer.engine.size import Size
from jlayer.families.adapted import A_END, B_END, LENGTHS_END
from jlayer.families.registry import published_tensors
from jlayer.plan.cutting import cut
from jlayer.plan.hosting import seconds_on_host
from jlayer.plan.machine import (
    CORE_LOW_RANK_NUMBERS,
    CORE_LOW_RANK_OPERATIONS,
    HostSpeeds,
)
from jlayer.plan.memory import OUTGOING, landing_bytes, logits_bytes, temporary_bytes
from jlayer.plan.shapes import CHUNK_ROWS, RunShape, Shapes
from jlayer.plan.tiles import Weights, unseen_weights
from jlayer.streaming.devices import Devices
from tests.plan.models import (
    LLAMA_70B,
    SMALL,
    SMALL_GPT_OSS,
    machine,
    plan_of,
    weights_of,
)


class Copied:
    """An output of the head whose copy on the host begins when it is asked for, as on a GPU."""

    def __init__(self, logits, counts):
        self.nbytes, self._logits, self._counts = logits.nbytes, logits, counts

    def copy_to_host_async(self):
        self._counts["alive"] += 1
        self._counts["most"] = max(self._counts.values())

    def __array__(self, dtype=None, copy=None):
        return self._logits

    def __del__(self):
        self._counts["alive"] -= 1


def test_the_host_has_room_for_every_copy_of_logits_on_its_way():
    counts = {"alive": 0, "most": 0}
    outgoing = Outgoing(lambda output, places, row: None)
    for place in range(8):
        outgoing.add(
            Copied(np.zeros((2, 3), np.float32), counts), np.array([place]), [(slice(None), 0)]
        )
    outgoing.finish()
    assert counts == {"alive": 0, "most": OUTGOING}
    shape = {"batch": 4, "longest": 512, "context": 512}
    spacious = machine(device_budget=24 << 30)
    plan = plan_of(LLAMA_70B, on=spacious, all_logits=True, **shape)
    shapes = RunShape(all_logits=True, **shape).shapes(plan.chunk)
    without = plan_of(LLAMA_70B, on=spacious, **shape).host.embedding_bytes
    logits = logits_bytes(LLAMA_70B, shapes, plan.tiling)
    assert logits > 0
    assert plan.host.embedding_bytes >= without + counts["most"] * logits


@pytest.fixture
def without_machine_code_optimised():
    """Buffers are assigned before machine code is made: its optimisation takes half of the time of
    a compilation and moves no byte of the temporaries. Such programs are not run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PLAIN = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
QUANTISED = [("int8", "bfloat16"), ("int4", "bfloat16"), ("int4", "float32")]

# How many times XLA's own figure the formula may be, for a bound that is far off refuses what would
# fit: the most that was found, and a little for another processor's programs.
# Long caches: attention is most of it; bfloat16 at 2 tokens, where keys are gone before values
# come. Tiles: float32 at 64 and 512 tokens, where the product of rows and all that the MLP might
# hold are both counted. Whole plain layers: bfloat16 at 8 tokens, where XLA:CPU keeps no float32
# copy of what is gathered. Whole quantized layers: a decoded block is counted for each matrix, of
# which XLA keeps one or two at a time (3.0 times for int8 and 5.6 for int4, at 2 tokens, where
# little else is there).
MOST_ABOVE = {"long cache": 2.3, "tiles": 2.8, "whole": 2.8, "whole and quantized": 5.6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "capacity", "stored", "dtype"),
    [
        *((tokens, capacity, *kind) for tokens in CHUNK_ROWS for capacity in (64, 1024)
          for kind in PLAIN),
        *((tokens, 64, *kind) for tokens in (2, 512) for kind in QUANTISED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tile_bytes", [None, 100_000])
def test_temporaries_of_compiled_programs_stay_within_the_formula_and_near_it(
    tokens, capacity, stored, dtype, tile_bytes, monkeypatch, without_machine_code_optimised
):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 60_000)  # so that matrices go in several blocks
    weights = weights_of(SMALL, stored=stored, dtype=dtype)
    tiling = cut(weights, tile_bytes, platform="cpu")
    programs = Programs(SMALL, dtype=dtype, devices=Devices(jax.devices("cpu")[:1]))
    compile_all(
        programs, tiling, Size(tokens, 1, tokens, capacity, capacity), with_head=stored in SCHEMES
    )
    found = programs.temporary_bytes
    bound = temporary_bytes(
        weights, Shapes(1, (capacity,), capacity, tokens, tokens), tiling, platform="cpu"
    )
    case = (
        "long cache" if capacity > 64
        else "tiles" if tile_bytes
        else "whole and quantized" if stored in SCHEMES
        else "whole"
    )  # fmt: skip
    assert found <= bound <= MOST_ABOVE[case] * found


@pytest.mark.parametrize("tokens", [2, 512])
@pytest.mark.parametrize("stored", ["int4", "bfloat16"])
def test_programs_that_read_the_hosts_products_stay_within_the_formula(
    tokens, stored, monkeypatch, without_machine_code_optimised
):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 60_000)
    weights = weights_of(SMALL, stored=stored, dtype="bfloat16")
    tiling = cut(weights, 100_000, platform="cpu", shares=((stored, 0.5),))
    programs = Programs(SMALL, dtype="bfloat16", devices=Devices(jax.devices("cpu")[:1]))
    hosted = frozenset(n for n, tile in enumerate(tiling.tiles) if tile.for_host)
    compile_all(programs, tiling, Size(tokens, 1, tokens, 64, 64), with_head=False, hosted=hosted)
    assert any("hosted" in label for label in programs.compiles)
    shapes = Shapes(1, (64,), 64, tokens, tokens)
    found, bound = (
        programs.temporary_bytes,
        temporary_bytes(weights, shapes, tiling, platform="cpu"),
    )
    assert found <= bound <= MOST_ABOVE["tiles"] * found


@pytest.mark.parametrize(
    ("tokens", "tile_bytes", "dtype"),
    [
        (2, 10_000_000, "bfloat16"),
        pytest.param(2, 100_000, "bfloat16", marks=pytest.mark.slow),
        pytest.param(512, 100_000, "bfloat16", marks=pytest.mark.slow),
        pytest.param(512, 10_000_000, "float32", marks=pytest.mark.slow),
    ],
)
def test_experts_in_mxfp4_are_decoded_within_the_formula(
    tokens, tile_bytes, dtype, monkeypatch, without_machine_code_optimised
):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 60_000)
    cfg = SMALL_GPT_OSS
    weights = unseen_weights(cfg, published_quantization(cfg), stored="bfloat16", dtype=dtype)
    tiling = cut(weights, tile_bytes, platform="cpu")
    assert {part.form for tile in tiling.tiles for part in tile.parts} == {"bfloat16", "mxfp4"}
    programs = Programs(cfg, dtype=dtype, devices=Devices(jax.devices("cpu")[:1]))
    compile_all(
        programs, tiling, Size(tokens, 1, tokens, 64, 64, windows=((128, 64, 64),)), with_head=False
    )
    shapes = Shapes(1, (64,), 64, tokens, tokens)
    bound = temporary_bytes(weights, shapes, tiling, platform="cpu")
    found = programs.temporary_bytes
    assert found <= bound <= MOST_ABOVE["tiles"] * found


ADAPTED = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(stored, of, *, dtype="bfloat16", rank=48, n_adapters=1, has_lengths=False):
    """Weights with adapters whose A and B are of the dtype `of`."""
    plain = weights_of(SMALL, stored=stored, dtype=dtype)
    names = [name for name in published_tensors(SMALL) if name.split(".")[-2] in ADAPTED]
    numbers = range(n_adapters) if n_adapters > 1 else [None]
    columns = tuple(Columns(rank // n_adapters, 2.0, number) for number in numbers)
    added = Addition(columns, has_lengths)
    cfg = replace(SMALL, additions=Additions(tuple((name, added) for name in sorted(names))))
    forms = {A_END: FOR_ALL_ROWS[of].name, B_END: of, LENGTHS_END: of}

    def form_of(name):
        end = next((end for end in forms if name.endswith(f".{end}")), None)
        return plain.form_of(name) if end is None else forms[end]

    return Weights(cfg, form_of, dtype)


def temporaries_without_head(weights, tile_bytes, tokens):
    """(XLA's bytes of temporaries, what the formula says)."""
    tiling = cut(weights, tile_bytes, platform="cpu")
    programs = Programs(weights.cfg, dtype="bfloat16", devices=Devices(jax.devices("cpu")[:1]))
    compile_all(programs, tiling, Size(tokens, 1, tokens, 64, 64), with_head=False)
    shapes = Shapes(1, (64,), 64, tokens, tokens)
    bound = temporary_bytes(weights, shapes, tiling, platform="cpu")
    return programs.temporary_bytes, bound


@pytest.mark.parametrize("of", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [2, 512])
@pytest.mark.parametrize(("tile_bytes", "n_adapters"), [(None, 1), (100_000, 1), (100_000, 3)])
def test_what_adapters_add_stays_within_the_formula(
    of, tokens, tile_bytes, n_adapters, without_machine_code_optimised
):
    weights = adapted("bfloat16", of, n_adapters=n_adapters)
    found, bound = temporaries_without_head(weights, tile_bytes, tokens)
    assert found <= bound <= 3 * found


@pytest.mark.parametrize("of", ["bfloat16", "float32"])
def test_what_an_adapter_adds_on_the_host_takes_one_core_s_time(of):
    """Whatever A and B are stored as: no speed of the cores together is theirs."""
    speeds, rows = HostSpeeds(forms=(("int8", ((1, 1e9),)), (of, ((1, 1e12),)))), (1, 5)
    found = []
    for weights in (weights_of(SMALL, stored="int8", dtype="bfloat16"), adapted("int8", of)):
        tiling = cut(weights, 100_000, platform="gpu", shares=(("int8", 1.0),))
        apart = [number for number, tile in enumerate(tiling.shapes) if tile.for_host]
        found.append(np.array([seconds_on_host(speeds, tiling, apart, n) for n in rows]))
    added = (part for number in apart for part in tiling.shapes[number].parts if part.is_low_rank)
    n_numbers = sum(math.prod(part.shape) for part in added)
    each = 1 / CORE_LOW_RANK_NUMBERS + 2 * np.array(rows) / CORE_LOW_RANK_OPERATIONS
    alone, both = found
    np.testing.assert_allclose(both - alone, n_numbers * each)
    assert n_numbers > 0


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("tile_bytes", "block_bytes"), [(None, 1 << 20), (None, 64_000), (200_000, 64_000)]
)
def test_lengths_of_rows_stay_within_the_formula(
    stored, tile_bytes, block_bytes, without_machine_code_optimised, compiled_anew, monkeypatch
):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block_bytes)
    weights, tokens = adapted(stored, "float32", rank=2, has_lengths=True), 2
    found, bound = temporaries_without_head(weights, tile_bytes, tokens)
    assert found <= bound <= 9 * found


def test_an_adapter_is_neither_published_nor_landed_in():
    weights, plain = adapted("int8", "float32"), weights_of(SMALL, stored="int8", dtype="bfloat16")
    assert weights.published_bytes == plain.published_bytes
    shapes = Shapes(1, (64,), 64, 64, 64)
    found = [
        landing_bytes(cut(each, 100_000, platform="gpu", shares=(("int8", 0.5),)), shapes)
        for each in (weights, plain)
    ]
    assert found[0] == found[1] > 0


def compile_all(programs, tiling, size, *, with_head, hosted=frozenset()):
    """Compiles what a chunk goes through. A plain head has no temporaries of its own: it is left
    out, to save its time."""
    division = divided(tiling.tiles, hosted)
    for tile in tiling.tiles:
        if tile.kind is not None or with_head:
            programs.calls_at(
                tile,
                size,
                shape=division.shape(tile),
                wanted=size.rows,
                on_host=id(tile) in division.tiles,
                landing=size.rows,
            )
