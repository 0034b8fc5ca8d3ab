"""The figures of guessing: trees as passes verify them, at the rows that there is room
for; what is assumed is told from what is measured."""

from contextlib import closing

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.measure import bench
from jlayer.measure.drafts import ASSUMED_TOKENS, STEP_ROWS, DraftBench, drafting_seconds
from jlayer.plan.shapes import RunShape

IDS = [5, 17, 99, 3, 64]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench, "MOST_ROUNDS", 1)


def test_a_tree_is_verified_as_its_paths_are_computed_and_leaves_the_lane_as_it_was(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        with closing(model.engine.start(RunShape(context=40, nodes=4))) as forward:
            forward.sweep([IDS], [0])
            before, n_free = forward.rows.tolist(), model.engine.caches.pool.n_free
            logits = forward.verify([7, 8, 9, 10], [-1, 0, 0, -1])
            assert forward.rows.tolist() == before
            assert model.engine.caches.pool.n_free == n_free
        for row, path in enumerate(([7], [7, 8], [7, 9], [10])):
            alone = model.logits(np.array([[*IDS, *path]]))[0, -1]
            np.testing.assert_allclose(logits[row], alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.slow
def test_every_size_that_there_is_room_for_is_measured(fable, quick):
    with AutoModel.from_pretrained(fable, device="cpu", draft=fable) as model:
        with closing(DraftBench(model)) as measuring:
            found = measuring.measure()
            assert model.engine.n_alive == 1
        assert model.engine.n_alive == 0
    assert [row["rows"] for row in found["steps"]] == list(STEP_ROWS)
    assert [row["rows"] for row in found["passes"]] == list(ASSUMED_TOKENS)
    assert found["passes"][0]["to_one_row"] == 1
    assert 6e6 < found["bytes"] < found["planned_bytes"]
    for row in found["passes"]:
        seconds = row["seconds"]["median"] + row["drafting_s"]
        assert row["assumed_tokens_per_s"] == pytest.approx(row["assumed_tokens"] / seconds)
    best = max(found["passes"], key=lambda row: row["assumed_tokens_per_s"])
    assert found["assumed_best_rows"] == best["rows"]


@pytest.mark.slow
def test_memory_that_holds_few_guesses_is_measured_with_those(fable, quick):
    with AutoModel.from_pretrained(fable, device="cpu", draft=fable) as model:
        engine, context = model.engine, 512
        few = engine.plan_for(RunShape(context=context, nodes=20)).device_peak_bytes
    with (
        AutoModel.from_pretrained(fable, device="cpu", draft=fable, device_memory=few) as model,
        closing(DraftBench(model)) as measuring,
    ):
        found = measuring.measure()
    rows = [row["rows"] for row in found["passes"]]
    assert rows[0] == 1
    assert rows[-1] < 512
    assert rows == [rows for rows in ASSUMED_TOKENS if rows <= rows_that_fit(measuring)]


def rows_that_fit(measuring):
    return 1 + measuring.plan.shapes.nodes


def test_drafting_is_a_step_for_the_last_token_and_one_for_every_few_guesses():
    steps = {2: [1.0], 8: [10.0], 16: [100.0], 32: [1000.0]}
    assert drafting_seconds(1, steps) == 0
    assert drafting_seconds(8, steps) == 11
    assert drafting_seconds(64, steps) == 81
    assert drafting_seconds(128, steps) == 801
    assert drafting_seconds(512, steps) == 16_001
    assert drafting_seconds(64, {2: [1.0]}) == 9  # nothing larger had room
