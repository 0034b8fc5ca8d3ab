"""Experts that take turns in memory of the device, which the driver fills: no copy that comes as
late as it may changes a number."""

import time

import jax
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.errors import StorageError
from jlayer.streaming import turns
from jlayer.streaming.steps import Free, Run
from tests.campaigns import slow_but
from tests.engine.mixture import CONFIG, save
from tests.programs import all_shapes
from tests.streaming.conftest import set_expert_rooms
from tests.streaming.late import LateCopies, with_late_copies

ALL = CONFIG["num_experts"]
PROMPTS = [[5, 17, 90, 33, 2, 61], [77, 3, 40]]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "eos_token_id": None, "speculate": "off"}
IDS = np.random.default_rng(3).integers(3, 133, (2, 20))
pytestmark = pytest.mark.usefixtures("all_shapes")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save(tmp_path_factory.mktemp("turns") / "model")


def told(folder):
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        tokens = [found.token_ids for found in jlayer.generate(model, PROMPTS, **GREEDY)]
        return tokens, model.logits(IDS), model.logits(IDS[:, :7]), model.engine.totals


@pytest.fixture(scope="module")
def expected(published):
    with all_shapes():  # the numbers hang on them
        return told(published)


KEPT = [(0, ALL, 0), (3, 5, 2), (0, 0, 0), (2, ALL, 2), (ALL, ALL, 0)]


@pytest.mark.parametrize("kept", slow_but(KEPT, KEPT[1:2]))
def test_the_numbers_are_the_same(published, expected, monkeypatch, kept):
    on_device, in_host, guessed = kept
    set_expert_rooms(monkeypatch, on_device=on_device, in_host=in_host, guessed=guessed)
    with_late_copies(monkeypatch)
    tokens, *logits, totals = told(published)
    assert tokens == expected[0]
    for found, right in zip(logits, expected[1:3], strict=True):
        np.testing.assert_array_equal(found, right)
    copies = max(LateCopies.made, key=lambda each: each.n_begun)
    # What is not put by the driver is what came to a new room.
    n_put = totals.experts_used - totals.experts_on_device + totals.experts_wasted
    assert copies.n_begun == n_put - copies.n_events
    assert copies.is_closed
    assert (copies.n_after > 0) == (on_device < ALL)


def test_what_fails_leaves_nothing_and_the_next_text_is_right(published, expected, monkeypatch):
    set_expert_rooms(monkeypatch, on_device=2, in_host=ALL, guessed=2)
    with_late_copies(monkeypatch)
    with AutoModel.from_pretrained(published, device="cpu", dtype="float32") as model:
        model.logits(IDS)
        runs = iter(range(100))

        def fail(step, tile):
            if isinstance(step, Run) and tile.expert is not None and next(runs) == 4:
                raise StorageError("the disk is gone")

        with model.engine.watch.also(fail), pytest.raises(StorageError, match="is gone"):
            model.logits(IDS)
        copies = max(LateCopies.made, key=lambda each: each.n_begun)
        assert copies.n_come == copies.n_begun  # nothing writes to memory that was given back
        np.testing.assert_array_equal(model.logits(IDS), expected[1])


def test_a_slot_of_the_host_is_free_when_its_copy_has_come(published, monkeypatch):
    """A program may be waiting for the copy on the device; the host has to wait for it too."""
    set_expert_rooms(monkeypatch, on_device=0, in_host=0, guessed=0)
    with_late_copies(monkeypatch)
    waited, freed, real = [], [], turns.Room.block_until_ready
    monkeypatch.setattr(
        turns.Room, "block_until_ready", lambda room: (waited.append(room), real(room))
    )

    def note(step, tile):
        if isinstance(step, Free) and tile.expert is not None and step.slot is not None:
            freed.append(len(waited))

    with AutoModel.from_pretrained(published, device="cpu", dtype="float32") as model:
        with model.engine.watch.also(note):
            model.logits(IDS)
        assert freed == list(range(len(freed)))  # one was waited for at each
        assert len(freed) > ALL


def test_a_timeline_shows_when_a_copy_has_come(published, monkeypatch):
    from jlayer.streaming.record import Recorder

    set_expert_rooms(monkeypatch, on_device=2, in_host=ALL, guessed=0)
    with_late_copies(monkeypatch)
    late, wait = 0.05, LateCopies.wait

    def slowly(self, event):
        if not self.has_come(event):
            time.sleep(late)
        wait(self, event)

    with AutoModel.from_pretrained(published, device="cpu", dtype="float32") as model:
        model.logits(IDS)
        monkeypatch.setattr(LateCopies, "wait", slowly)
        with Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers) as recorder:
            model.logits(IDS[:1, :1])
        timeline = recorder.timeline()
    puts = [span for span in timeline.lane("put") if timeline.tiles[span.tile].expert is not None]
    assert puts
    assert max(span.end - span.begin for span in puts) >= late


def test_jax_arrays_stay_where_they_are_and_are_ready_as_jax_says():
    """What rooms build on: an array's address does not change, and one that is taken by DLPack is
    the same memory."""
    array = jax.device_put(np.arange(1024, dtype=np.float32) + 0)
    same = jax.dlpack.from_dlpack(array)
    assert same.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
