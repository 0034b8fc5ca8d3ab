"""Experts are streamed as they are chosen: what is kept of them, and where, changes no number; what
moves is what was chosen and not there; and what fails leaves nothing behind."""

import json
import threading

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.engine import compiles, picking, programs
from jlayer.engine.choosing import Chooser
from jlayer.errors import CheckpointError, StorageError, UnsupportedModelError
from jlayer.families.registry import layer_kinds
from jlayer.model import together
from jlayer.parts import Router
from jlayer.plan import making
from jlayer.plan.experts import ExpertRooms, is_stacked
from jlayer.streaming.incoming import Incoming
from jlayer.streaming.steps import Fetch
from tests.campaigns import slow_but
from tests.engine.mixture import CONFIG, N_SPARSE, save
from tests.streaming.conftest import set_tile_bytes

N_EXPERTS = CONFIG["num_experts"]
PROMPTS = [[5, 17, 90, 33, 2, 61], [77, 3, 40]]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": None, "speculate": "off"}
IDS = np.random.default_rng(3).integers(3, 133, (2, 20))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save(tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture
def keep(monkeypatch):
    """Has every layer keep so many experts on the device and in host memory."""

    def kept(on_device, in_host):
        found = iter([on_device, in_host] * 100)
        monkeypatch.setattr(making, "rooms", lambda counts, *_: (next(found),) * len(counts))

    return kept


def opened(folder, **options):
    return AutoModel.from_pretrained(folder, device="cpu", dtype="float32", **options)


def told(model):
    """What a model says to some prompts, and of a text."""
    return (
        [jlayer.generate(model, prompt, **GREEDY).token_ids for prompt in PROMPTS],
        model.logits(IDS),
    )


@pytest.fixture(scope="module")
def expected(published):
    with opened(published) as model:
        return told(model)


KEPT = [(0, 0), (2, 5), (N_EXPERTS, N_EXPERTS), (1, 0), (0, 1), (3, 5)]


@pytest.mark.parametrize("kept", slow_but(KEPT, KEPT[1:2]))
def test_what_is_kept_changes_no_number(published, expected, keep, kept):
    keep(*kept)
    with opened(published) as model:
        tokens, logits = told(model)
        found = model.engine.totals
    assert tokens == expected[0]
    np.testing.assert_array_equal(logits, expected[1])
    assert (found.experts_on_device > 0) == (kept[0] > 0)
    assert (found.experts_in_host > 0) == (kept[1] > 0 and kept[0] < N_EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", [700, 2_700])  # an expert of 4032 bytes
def test_an_expert_may_be_cut_into_any_tiles(published, expected, keep, monkeypatch, tile_bytes):
    set_tile_bytes(monkeypatch, tile_bytes)
    keep(2, 4)
    with opened(published) as model:
        n_tiles = {len(tiles) for tiles in model.plan.tiling.experts}
        tokens, logits = told(model)
    assert n_tiles == ({7} if tile_bytes == 700 else {2})
    assert tokens == expected[0]
    np.testing.assert_allclose(logits, expected[1], rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.slow
def test_the_hosts_cores_multiply_what_all_tokens_use(published, expected):
    """Some rows of each matrix but those of experts."""
    with opened(published, host_share=0.5) as model:
        assert model.plan.host_product_bytes > 0
        assert not any(tile.for_host for tiles in model.plan.tiling.experts for tile in tiles)
        tokens, logits = told(model)
    assert tokens == expected[0]
    np.testing.assert_allclose(logits, expected[1], rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("kept", slow_but([(0, 0), (2, 5)], [(2, 5)]))
def test_experts_that_are_stacked_give_the_same(published, expected, keep, monkeypatch, kept):
    """As on a GPU: one product of all experts of a call, of a few rows and of picked ones."""
    keep(*kept)
    long = np.random.default_rng(4).integers(3, 133, (1, 70))
    with opened(published) as model:
        of_many = model.logits(long)
    stacked = []

    def seen(*arguments):
        stacked.append(arguments[4])
        return real(*arguments)

    real = together.mix_stacked
    monkeypatch.setattr(together, "mix_stacked", seen)
    monkeypatch.setattr(compiles, "all_programs", {})  # made of the others
    monkeypatch.setattr(programs, "is_stacked", lambda tile, _: is_stacked(tile, "gpu"))
    with opened(published) as model:
        tokens, logits = told(model)
        found = model.logits(long)
    assert set(stacked) == {0, 16, 32}  # all rows, and lengths of picked ones
    assert tokens == expected[0]
    for some, right in ((logits, expected[1]), (found, of_many)):
        np.testing.assert_allclose(some, right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_lanes_together_are_what_each_is_alone(published, expected, keep):
    """Lanes share the experts that any of them has chosen."""
    keep(2, 4)
    with opened(published) as model:
        runs = [model.submit(prompt, **GREEDY) for prompt in PROMPTS]
        assert [run.result().token_ids for run in runs] == expected[0]
        guessed = jlayer.generate(model, PROMPTS[0], **GREEDY | {"speculate": "lookup"})
        assert guessed.token_ids == expected[0][0]


def test_a_draft_with_experts_is_refused(published):
    with pytest.raises(UnsupportedModelError, match=r"has experts.*take a dense one"):
        opened(published, draft=published)


def test_only_what_is_chosen_is_used_and_moves(published, keep):
    """A token moves its own experts and what all tokens need; nothing that is kept moves twice."""
    keep(0, 0)
    with opened(published) as model:
        jlayer.generate(model, PROMPTS[0], **GREEDY | {"max_new_tokens": 1})
        before, n_before = model.engine.totals.put_bytes, model.engine.totals.experts_used
        jlayer.generate(model, PROMPTS[0][:1], **GREEDY | {"max_new_tokens": 4})
        n_used = model.engine.totals.experts_used - n_before
        moved = model.engine.totals.put_bytes - before
        tiling = model.plan.tiling
        certain = sum(tiling.sizes[n] for n in tiling.certain)
        one = sum(tile.n_bytes for tile in tiling.experts[0])
    assert n_used == 4 * N_SPARSE * CONFIG["num_experts_per_tok"]
    ahead = moved - 4 * certain - n_used * one  # what of the next sweep is on its way
    assert abs(ahead) < certain


def test_a_prompt_moves_each_expert_once(published, keep):
    keep(0, 0)
    with opened(published) as model:
        model.logits(np.arange(3, 103)[None])
        assert model.engine.totals.experts_used == N_SPARSE * N_EXPERTS


def test_padding_chooses_no_expert(published, keep):
    """A chunk is longer than the text; its other rows hold anything."""
    keep(0, 0)
    with opened(published) as model:
        model.logits(np.array([[7]]))
        assert model.engine.totals.experts_used == N_SPARSE * CONFIG["num_experts_per_tok"]


def test_an_expert_that_is_damaged_is_found_before_a_token_has_used_it(published, tmp_path):
    """Also: the others may be used as long as nobody asks for it."""
    folder = convert_checkpoint(published, tmp_path / "layered")
    with opened(tmp_path / "layered") as model:
        decisions = []

        def on_taken(step, result):
            decisions.extend([result.chosen] if isinstance(step, Fetch) else [])

        with model.engine.watch.also(lambda *_: None, on_taken):
            model.logits(np.array([[7]]))
    del folder
    used, unused = decisions[0][0], next(n for n in range(N_EXPERTS) if n not in decisions[0])
    file = next((tmp_path / "layered").glob("*layer*0.safetensors"))
    flip(file, f"experts.{unused}.down_proj")
    with opened(tmp_path / "layered") as model:
        model.logits(np.array([[7]]))
    flip(file, f"experts.{used}.down_proj")
    with (
        opened(tmp_path / "layered") as model,
        pytest.raises(CheckpointError, match=rf"experts\.{used}\.down_proj.*damaged"),
    ):
        model.logits(np.array([[7]]))


def flip(file, name):
    """Changes a bit of a tensor whose name has `name` in it."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (entry,) = (value for key, value in header.items() if name in key)
    data[8 + length + entry["data_offsets"][0] + 1] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [(0, 0), (2, 4)])
@pytest.mark.parametrize("fault", ["reader", "decision", "interrupt"])
def test_what_fails_leaves_nothing_behind(published, expected, keep, monkeypatch, kept, fault):
    keep(*kept)
    threads = set(threading.enumerate())
    with opened(published) as model:
        for n_before in (0, 1, 11) if fault == "reader" else (0, 1, 2):
            with monkeypatch.context() as patched:
                error = break_after(patched, fault, n_before)
                with pytest.raises(type(error), match="on purpose"):
                    model.logits(IDS)
            np.testing.assert_array_equal(model.logits(IDS), expected[1])
        assert told(model)[0] == expected[0]
    assert set(threading.enumerate()) <= threads


def break_after(patched, fault, n_before):
    """Has a read of an expert, or a decision, fail after some that do not."""
    error = KeyboardInterrupt if fault == "interrupt" else StorageError
    error, left = error("on purpose"), iter(range(n_before))

    def fails():
        if next(left, None) is None:
            raise error

    if fault == "reader":
        real = Incoming.read_tile

        def read(self, tile, slot):
            if self.tiles[tile].expert is not None:
                fails()
            return real(self, tile, slot)

        patched.setattr(Incoming, "read_tile", read)
    else:
        decide = Chooser.decide
        patched.setattr(Chooser, "decide", lambda *given: (fails(), decide(*given))[1])
    return error


@pytest.mark.slow
def test_of_many_rows_those_are_picked_that_chose_an_expert(published, monkeypatch):
    """In one chunk and in several, whole experts and cut ones; an expert that too many rows chose
    is multiplied by all."""
    ids = np.random.default_rng(5).integers(3, 133, (3, 300))
    with monkeypatch.context() as patched:
        patched.setattr(picking, "MANY_ROWS", 1 << 30)
        with opened(published) as model:
            expected = model.logits(ids)
            assert not any("picked" in label for label in model.engine.compiles)
    for tile_bytes in (5_000, 700):
        set_tile_bytes(monkeypatch, tile_bytes)
        with opened(published) as model:
            found = model.logits(ids)
            assert any("picked" in label for label in model.engine.compiles)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_lengths_of_picked_rows():
    router = Router(128, 8)
    assert picking.picked_lengths(router, 63) == ()
    assert picking.picked_lengths(router, 64) == (16, 32)
    assert picking.picked_lengths(router, 512) == (32, 64, 128, 256)
    assert picking.picked_lengths(Router(8, 2), 512) == (128, 256)
    lengths = picking.picked_lengths(router, 512)
    assert [picking.picked_length(lengths, n) for n in (1, 32, 33, 256, 257)] == [
        *(32, 32, 64, 256),
        0,
    ]


def test_experts_of_as_many_rows_run_together():
    assert picking.in_order(np.array([3, 0, 7, 3, 1])) == [2, 0, 3, 4]
    assert picking.in_order(np.array([1, 0, 1])) == [0, 2]


def test_padding_counts_where_rows_are_picked_but_chooses_nothing():
    routing = np.array([[0.5, 0, 0], [0, 0.2, 0], [0.1, 0, 0.3]], np.float32)
    n_routed = picking.routed(routing, np.array([0, 1]))
    assert n_routed.tolist() == [2, 1, 0]
    assert picking.in_order(n_routed) == [0, 1]


def test_another_plan_reads_no_expert_again_that_it_still_keeps(published, expected, keep):
    """A run that leaves less room beside it, and one after it that has all again."""
    keep(0, 6)
    with opened(published) as model:
        assert told(model)[0] == expected[0]
        before = model.engine.totals.experts_used, model.engine.totals.experts_in_host
        with model.engine.turn() as executor:
            kept = executor.experts.kept_in_host()
            for in_host in (4, 6):
                executor.retier(
                    model.plan.tiers, experts=ExpertRooms((0,) * N_SPARSE, (in_host,) * N_SPARSE)
                )
            left = executor.experts.kept_in_host()
        assert {first: numbers[-4:] for first, numbers in kept.items()} == left
        assert told(model)[0] == expected[0]
        assert model.engine.totals.experts_in_host > 2 * before[1] - N_SPARSE * 2


def test_programs_are_compiled_for_kinds_and_not_for_experts(published, tmp_path):
    found = []
    more = save(tmp_path / "more", num_experts=13, num_hidden_layers=7)
    for folder in (published, more):
        with opened(folder) as model:
            model.logits(IDS)
            found.append(sum(model.engine.compiles.values()))
            assert len(set(layer_kinds(model.engine.cfg))) == 2
    assert found[0] == found[1]
