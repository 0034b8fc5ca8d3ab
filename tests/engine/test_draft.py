"""A draft model alone: its likeliest tokens are those of the same model streamed, after texts and
after nodes of trees, whatever was accepted before; and it takes no more memory than is planned."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers
from safetensors.numpy import load_file, save_file

from jlayer import StorageError, UnsupportedModelError
from jlayer.convert import convert_checkpoint
from jlayer.engine import draft_weights
from jlayer.engine.batch import Entry, Growth, arrange, arrange_growth
from jlayer.engine.draft import CANDIDATES, DraftModel
from jlayer.engine.draft_weights import scaled_rows
from jlayer.engine.growing import room_for_tree, step_nodes
from jlayer.engine.packing import pack, packed_bytes, unpack
from jlayer.engine.pool import Pool
from jlayer.engine.sample import NoiseKey, gumbel, noise, noise_words
from jlayer.engine.size import Size
from jlayer.model.cache import Rows
from jlayer.plan.draft import draft_bytes, draft_need
from jlayer.plan.memory import cache_bytes
from jlayer.plan.shapes import PoolSizes, RunShape, pool_rows
from jlayer.streaming.watch import Watch
from tests import made_up
from tests.engine.test_engine import opened
from tests.plan.models import machine
from tests.tiny import tiny_llama

CPU = jax.devices("cpu")[0]
VOCAB, CAPACITY, POOL = 133, 64, 256
NODES = 4  # of a lane in a step


def loaded(folder, *, dtype="float32", most_ids=VOCAB):
    draft = DraftModel(folder, dtype=dtype)
    draft.load(CPU, most_ids=most_ids, watch=Watch())
    return draft


class Text:
    """A text that a draft model reads: its tokens, and the pool rows of the first of them."""

    def __init__(self, tokens):
        self.tokens, self.rows = list(tokens), np.zeros(0, np.int32)
        self.nodes, self.fresh = [], np.zeros(0, np.int32)  # of its tree: (parent, token)

    def path(self, node):
        parent, token = self.nodes[node]
        return [token] if parent < 0 else [*self.path(parent), token]

    def ancestors(self, node):
        parent, _ = self.nodes[node]
        return [node] if parent < 0 else [*self.ancestors(parent), node]


class Rounds:
    """Texts that grow by rounds of reading, guessing in two steps, and accepting a part."""

    def __init__(self, draft, seed=0, n_texts=2):
        self.draft, self._pool = draft, Pool()
        self._pool.grow(PoolSizes(POOL))
        self.rng = np.random.default_rng(seed)
        self.texts = [Text(self.rng.integers(3, VOCAB, 11 + n)) for n in range(n_texts)]
        self.n_read = []
        self.found = []  # (the tokens, the likeliest after them, their logits)

    def check(self, model, *, exact=2e-5):
        """Holds all that it found against the model, which reads it whole."""
        most = max(len(tokens) for tokens, *_ in self.found)
        padded = [[*map(int, tokens), *[0] * (most - len(tokens))] for tokens, *_ in self.found]
        whole = model.logits(padded)
        for (tokens, ids, logits), each in zip(self.found, whole, strict=True):
            want = each[len(tokens) - 1]
            atol = exact * np.abs(want).max()
            np.testing.assert_allclose(logits, want[ids], rtol=0, atol=atol)
            np.testing.assert_allclose(logits, np.sort(want)[::-1][: len(ids)], rtol=0, atol=atol)
            assert len(np.unique(ids)) == len(ids) == min(CANDIDATES, VOCAB)

    def take(self, count):
        rows = self._pool.take(count)
        self.draft.forget(rows)
        return rows

    def round(self):
        entries = []
        for text in self.texts:
            more = self.take(len(text.tokens) - len(text.rows))
            text.rows = np.concatenate([text.rows, more])
            known = min(self.draft.n_known(text.rows), len(text.tokens) - 1)
            self.n_read.append(len(text.tokens) - known)
            entries.append(
                Entry(text.tokens[known:], text.rows[:known], text.rows[known:], CAPACITY)
            )
        found = self.draft.guess(arrange(entries, pool=self._pool.n_rows, most=32))
        for text, ids, logits in zip(self.texts, found.ids, found.logits, strict=True):
            self.found.append((text.tokens.copy(), ids, logits))
            text.nodes, text.fresh = [], np.zeros(0, np.int32)
        for count in (NODES, NODES - 1):
            self.step(count)
        for text in self.texts:
            self.accept(text)

    def step(self, count):
        growths = []
        for text in self.texts:
            new = self.take(count)
            text.fresh, first = np.concatenate([text.fresh, new]), len(text.nodes)
            parents = self.rng.integers(-1, max(first, 1) if first else 0, count)
            text.nodes += [(int(p), int(self.rng.integers(3, VOCAB))) for p in parents]
            seen = np.zeros((count, len(text.nodes)), bool)
            depths = []
            for place in range(count):
                ancestors = text.ancestors(first + place)
                seen[place, ancestors] = True
                depths.append(len(ancestors))
            tokens = [token for _, token in text.nodes[first:]]
            positions = [len(text.tokens) - 1 + depth for depth in depths]
            places = [
                len(text.tokens) - 1 + len(text.ancestors(node)) for node in range(len(text.nodes))
            ]
            growths.append(
                Growth(tokens, positions, new, text.rows, text.fresh.copy(), places, seen)
            )
        part = arrange_growth(
            growths, tokens=NODES, fresh=16, capacity=CAPACITY, pool=self._pool.n_rows
        )
        found = self.draft.guess([part])
        pairs = [(t, n) for t in self.texts for n in range(len(t.nodes) - count, len(t.nodes))]
        for (text, node), ids, logits in zip(pairs, found.ids, found.logits, strict=True):
            self.found.append(([*text.tokens, *text.path(node)], ids, logits))

    def accept(self, text):
        """A path of the tree, a token that the draft model has not seen, and the next one."""
        path = text.ancestors(int(self.rng.integers(len(text.nodes))))
        kept = text.fresh[path]
        self._pool.release(np.delete(text.fresh, path))
        more = self.rng.integers(3, VOCAB, 2).tolist()
        text.tokens += [*(text.nodes[node][1] for node in path), *more]
        text.rows = np.concatenate([text.rows, kept])


FORMS = {
    "float32": {},
    "bfloat16 tied": {"dtype": "bfloat16", "tied": True},
    "int8": {"quantize": "int8"},
    "int4 tied": {"quantize": "int4", "tied": True},
}


def saved(folder, *, quantize=None, **options):
    source = tiny_llama(folder / "source", **{"num_hidden_layers": 2, **options})
    if quantize is None:
        return source
    convert_checkpoint(source, folder / "layered", quantize=quantize)
    return folder / "layered"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_it_finds_likeliest_is_so_in_the_same_model_streamed(tmp_path, form):
    folder = saved(tmp_path, **FORMS[form])
    with opened(folder) as model:
        rounds = Rounds(loaded(folder))
        for _ in range(3):
            rounds.round()
        rounds.check(model)
    # In later rounds it reads what it has not seen: nothing that was accepted from its own nodes.
    assert rounds.n_read == [11, 12] + [2] * 4


@pytest.mark.slow
def test_rows_of_int8_are_the_model_with_the_rounded_weights(tmp_path, monkeypatch):
    """As a plain model is kept on a GPU."""
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    rounded = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            scaled = scaled_rows(tensor)
            tensor = np.asarray(scaled.q, np.float32) * np.asarray(scaled.scale)[:, None]
        rounded[name] = np.ascontiguousarray(tensor)
    other = tmp_path / "rounded"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(rounded, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(draft_weights, "platform_of", lambda _: "gpu")
    monkeypatch.setattr(draft_weights, "BLOCK_NUMBERS", 200)
    draft = loaded(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(draft.model.layers)} == {"int8", "float32"}
    with opened(other) as model:
        rounds = Rounds(draft)
        for _ in range(2):
            rounds.round()
        rounds.check(model)


@pytest.mark.slow
def test_in_bfloat16_it_computes_as_the_streamed_model_does(tmp_path):
    folder = saved(tmp_path, dtype="bfloat16")
    with opened(folder, dtype="bfloat16") as model:
        rounds = Rounds(loaded(folder, dtype="bfloat16"))
        for _ in range(2):
            rounds.round()
        rounds.check(model, exact=0.05)


def test_a_pool_that_grows_keeps_its_entries_and_one_that_is_dropped_is_read_anew(tmp_path):
    folder = saved(tmp_path)
    with opened(folder) as model:
        rounds = Rounds(loaded(folder))
        rounds.round()
        rounds._pool.grow(PoolSizes(2 * POOL))
        rounds.round()
        assert rounds.n_read == [11, 12, 2, 2]
        assert rounds.draft.n_rows == 2 * POOL
        rounds.draft.drop()
        rounds.round()
        assert min(rounds.n_read[-2:]) > 11
        rounds.check(model)


def test_a_failure_of_the_device_drops_its_pools_and_says_so(tmp_path):
    folder = saved(tmp_path)
    with opened(folder) as model:
        rounds = Rounds(loaded(folder))
        rounds.round()
        draft, run = rounds.draft, rounds.draft._run

        def fails(part):
            jax.tree.map(lambda leaf: leaf.delete(), draft.pools)
            raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

        draft._run = fails
        with pytest.raises(StorageError, match="the draft model: the device failed"):
            rounds.round()
        draft._run = run
        assert draft.n_known(rounds.texts[0].rows) == 0
        rounds.round()
        rounds.check(model)


def test_ids_beyond_the_vocabulary_of_the_model_are_never_guessed(tmp_path):
    draft = loaded(saved(tmp_path), most_ids=50)
    rounds = Rounds(draft)
    rounds.round()
    for _, ids, _ in rounds.found:
        np.testing.assert_array_equal(np.sort(ids), np.arange(50))


def test_layers_of_several_kinds_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(made_up.FAMILIES, made_up.NAME, made_up.FAMILY)
    from jlayer.families.registry import FAMILIES

    monkeypatch.setitem(FAMILIES, made_up.NAME, made_up.FAMILY)
    folder = made_up.save(tmp_path / "kinds")
    with pytest.raises(UnsupportedModelError, match="layers of several kinds"):
        DraftModel(str(folder))


# Its memory


@pytest.fixture(scope="module")
def some_draft(tmp_path_factory):
    """Of which most are layers, as real ones are."""
    folder = tmp_path_factory.mktemp("wide")
    wide = {"num_hidden_layers": 24, "hidden_size": 96, "intermediate_size": 200}
    return saved(folder, dtype="bfloat16", vocab_size=1000, tied=True, **wide)


RUNS = [
    RunShape(1, 40, 60, nodes=63),
    RunShape(1, 200, 1000, nodes=255),
    RunShape(4, 20, 60, nodes=4 * 63),
    RunShape(8, 1, 60, nodes=8 * 15),
    RunShape(70, 1, 60, nodes=70 * 3),
]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.batch} of {run.nodes}")
def test_its_temporaries_are_within_what_is_planned(some_draft, run):
    dtype = "float32" if run.batch == 1 else "bfloat16"
    load = run.shapes()
    pool = pool_rows(load.entries)
    draft = loaded(some_draft, dtype=dtype, most_ids=1000)
    none, capacity = np.zeros(0, np.int32), load.capacity
    rows = np.arange(run.longest, dtype=np.int32)
    prompts = [Entry([0] * run.longest, none, rows, capacity)] * run.batch
    parts = arrange(prompts, pool=pool, most=load.chunk)
    share = run.nodes // run.batch
    count, room = step_nodes(share, run.batch), room_for_tree(share)
    one = np.zeros(1, np.int32)
    growth = Growth([0], [0], one, none, one, one, np.eye(1) > 0)
    parts.append(
        arrange_growth([growth] * run.batch, tokens=count, fresh=room, capacity=capacity, pool=pool)
    )
    for part in parts:
        draft.compile(part)
    on = machine(platform="cpu")
    need = draft_need(draft.weights, on, load, pool=pool).device
    held = cache_bytes(draft.cfg, pool, item_bytes=2 if dtype == "bfloat16" else 4)
    planned = need - draft_bytes(draft.weights, "cpu") - held
    assert draft.temporary_bytes <= planned
    assert draft.n_bytes == draft_bytes(draft.weights, "cpu")


# Small things of it

finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@given(numbers.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=finite))
@example(np.zeros((2, 3), np.float32))
@example(np.array([[1e-40, 0], [3e38, -3e38]], np.float32))
def test_a_row_is_rounded_by_less_than_a_step(matrix):
    found = scaled_rows(matrix)
    q, scale = np.asarray(found.q), np.asarray(found.scale).astype(np.float64)
    assert (np.abs(q.astype(int)) <= 127).all()
    error = np.abs(q * scale[:, None] - matrix.astype(np.float64))
    largest = np.abs(matrix).max(axis=1).astype(np.float64)
    tiny = 127 * np.finfo(np.float32).tiny
    assert (error.max(axis=1) <= largest / 254 * (1 + 1e-5) + tiny).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_makes_its_row_zeros(bad):
    matrix = np.ones((3, 4), np.float32)
    matrix[1, 2] = bad
    found = scaled_rows(matrix)
    product = np.asarray(found.q) * np.asarray(found.scale)[:, None]
    assert np.isfinite(product).all()
    assert (product[1] == 0).all()
    np.testing.assert_allclose(product[[0, 2]], 1)


@pytest.mark.parametrize(("rows", "lanes", "fresh"), [(5, 3, None), (2, 1, 5)])
def test_small_arrays_come_out_as_they_went_in(rows, lanes, fresh):
    rng = np.random.default_rng(rows)
    size = Size(lanes * rows, lanes, rows, 7, 50, fresh)
    struct = {"ids": jax.ShapeDtypeStruct((3, 2), "int32"), "rows": size.rows_struct}
    made = jax.tree.map(
        lambda one: (
            (rng.integers(-(1 << 31), 1 << 31, one.shape) % (2 if one.dtype == bool else 1 << 32))
            .astype(np.int64)
            .astype(one.dtype)
        ),
        struct,
    )
    raw = pack(made)
    assert raw.nbytes == packed_bytes(struct)
    found = jax.jit(lambda raw: unpack(raw, struct))(raw)
    assert isinstance(found["rows"], Rows)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(made), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@given(
    st.sets(st.integers(0, 130_000), min_size=1, max_size=120),
    st.tuples(*[st.integers(0, 1 << 32)] * 3),
)
@settings(max_examples=40)
def test_the_noise_of_some_ids_is_that_of_all(ids, key):
    ids, key = np.array(sorted(ids)), NoiseKey(*key)
    np.testing.assert_array_equal(noise(ids, key), gumbel(noise_words(130_001, key))[ids])


def test_a_need_is_of_its_own_pool(some_draft):
    """More rows, more bytes, by what they take in all layers and once more in the scan."""
    draft, load = DraftModel(some_draft, dtype="float32"), RunShape(1, 1, 60, nodes=15).shapes()
    on = machine(platform="cpu")
    few, many = (draft_need(draft.weights, on, load, pool=pool).device for pool in (100, 300))
    layers = replace(draft.cfg, num_hidden_layers=draft.cfg.num_hidden_layers + 1)
    assert many - few == cache_bytes(layers, 200, item_bytes=4)
