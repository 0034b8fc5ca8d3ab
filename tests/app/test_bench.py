"""The verb `bench`: what it prints in which order, and the sentence at its end."""

import json
import re

import pytest

from jlayer.app.cli import main
from jlayer.app.verbs.bench import conclude
from jlayer.config import model_config
from jlayer.measure import bench as measuring
from jlayer.plan.machine import Machine
from jlayer.plan.making import make_plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Weights
from tests.tiny import TINY


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measuring, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(measuring, "MOST_ROUNDS", 1)


def test_the_ceiling_comes_first_and_one_object_last(fable, tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "arithmetic_speeds", lambda *_: [1e12])  # it takes a while
    opened = []
    measure = measuring.Bench.measure_machine

    def first(self):
        opened.append(capsys.readouterr().out)
        measure(self)

    monkeypatch.setattr(measuring.Bench, "measure_machine", first)
    words = [str(fable), "--device", "cpu", "--host-memory", "1GiB", "--from-disk"]
    assert main(["bench", *words, "--timeline", str(tmp_path / "x.png")]) == 0
    (before,) = opened
    assert "ceiling   a forward pass uses 6.00 MiB of weights" in before
    assert "raw" not in before
    *lines, last = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for row in ("raw memory", "raw disk", "one layer alone   1 token", "forward pass      512 tok"):
        assert f"\n{row}" in f"\n{text}", row
    found = json.loads(last)
    assert lines[-1] == found["conclusion"]
    assert found["model"] == fable.name
    assert [row["tokens"] for row in found["sweeps"]] == [0, 1, 64, 512]
    assert found["sweeps"][1]["bytes"] == found["plan"]["sweep"]["bytes"]
    # The buffers of the raw reads are part of the promise.
    assert found["memory"]["host_budget_bytes"] == (1 << 30) - (32 << 20)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_without_ref_the_bundled_model_streams_from_disk(quick, capsys):
    assert main(["bench", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "fable-3m"
    assert found["plan"]["tiers"] == {"device_layers": 0, "host_layers": 0, "disk_layers": 6}
    assert set(found["raw"]) == {"disk", "memory", "arithmetic"}


@pytest.mark.slow
def test_a_draft_model_is_measured_too_and_what_is_assumed_says_so(
    fable, quick, capsys, monkeypatch
):
    for speeds in ("memory_speeds", "arithmetic_speeds"):
        monkeypatch.setattr(measuring, speeds, lambda *_: [1e12])
    assert main(["bench", str(fable), "--device", "cpu", "--draft", str(fable)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["draft"]
    (draft,) = [line for line in lines if line.startswith("draft model ")]
    assert f"{fable.name}, bfloat16, " in draft
    assert sum(line.startswith("a step of it") for line in lines) == len(found["steps"])
    passes = [line for line in lines if line.startswith("pass with a tree")]
    assert len(passes) == len(found["passes"])
    assert all(line.endswith("(assumed)") for line in passes)
    (said,) = [line for line in lines if line.startswith("at these assumed figures")]
    guesses = found["assumed_best_rows"] - 1
    assert (f"about {guesses} guesses" if guesses else "no guesses") in said
    assert lines[-1] == json.loads(last)["conclusion"]


def found(took, *, block=0.001, bits=16, took_64=None, **limits):
    """Figures of a model of ten layers."""

    def row(tokens, seconds):
        return {
            "tokens": tokens,
            "bytes": 1000,
            "weights": 1000 * 8 / bits,
            "seconds": {"median": seconds, "min": seconds},
            "limits_s": limits,
        }

    alone = {"tokens": 1, "bytes": 100, "seconds": {"min": block}}
    return {"blocks": [alone], "sweeps": [row(1, took), row(64, took_64 or 9 * took)]}


@pytest.mark.parametrize(
    ("figures", "limit", "said"),
    [
        (found(2.0, disk=1.9, link=0.5), "disk", r"The disk limits.* 1.9 s of the 2 s of a for"),
        (found(2.0, disk=1.9, link=0.5), "disk", r"B more host memory \(about 500 ms a for"),
        (found(2.0, disk=1.9, link=1.8), "disk", r"quantizing the weights to 4 bits \(about 534"),
        (found(2.0, disk=1.9, link=1.8, bits=4.5), "disk", "more host memory"),
        (found(2.0, link=1.9), "link", r"The link to the device.*quantizing .*\(about 534 ms"),
        (found(2.0, link=1.9, bits=4.5), "link", r"more device memory \(about 950 ms"),
        (found(2.0, took_64=2.02, link=1.9), "link", "64 tokens take only 1.01 times as long"),
        (found(2.0, block=0.19, disk=1.0), "programs", "faster memory and more cores"),
        (found(2.0, block=0.19, disk=9.0), "disk", "2 s of the 2 s of a forward"),
        (found(2.0, disk=1.0, link=0.5), "steps", "so small a model, but its 4 steps a forward"),
    ],
)
def test_the_sentence_names_the_limit_and_the_best_remedy(figures, limit, said):
    cfg = model_config({"model_type": "llama", "torch_dtype": "bfloat16", **TINY}, where="test")
    machine = Machine("gpu", 4 << 30, 4 << 30, 0)
    weights = Weights(cfg, lambda _: "bfloat16", "bfloat16")
    plan = make_plan(weights, machine, RunShape(), keeps_layers=False)
    drawn = conclude(figures, plan)
    assert drawn["limit"] == limit
    assert re.search(said, drawn["conclusion"]), drawn["conclusion"]
