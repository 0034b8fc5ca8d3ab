"""Process 0 of several decides who rides, what is guessed and what is drawn; the others follow."""

import json
import re

import jax
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine.batch import Entry, arrange
from jlayer.engine.messages import packed_parts, unpacked_parts
from jlayer.engine.pool import Pool
from jlayer.measure import evaluate
from jlayer.plan.shapes import PoolSizes
from tests.conftest import BUNDLED, REPOSITORY
from tests.engine.hosts import answers, ended, groups, started, started_for

IDS = [1, 5, 9, 33, 7, 12, 1, 5, 9]
GREEDY = {"max_new_tokens": 24, "temperature": 0, "eos_token_id": None}
PROMPTS = [[4, 4, 8], [*IDS, 40, 41, 42]]
DRAWN = {**GREEDY, "temperature": 0.9, "seed": 7}


def alone(*prompts, **run):
    """What one process gives for each prompt, one after another."""
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        return [jlayer.generate(model, prompt, **run).token_ids for prompt in prompts]


def case(name, run, **more):
    return {"name": name, "folder": str(BUNDLED), "ids": IDS, "run": run, **more}


def leaves(parts):
    return jax.tree.leaves(
        [
            (part.tokens, part.wanted, part.places, part.hidden, part.hidden_places, part.rows)
            for part in parts
        ]
    )


@pytest.fixture(scope="module")
def hosts():
    """What two hosts give for some cases, by their names."""
    drafted = {"options": {"draft": str(BUNDLED)}}
    lookup = {"speculate": "lookup", "draft_tokens": 7}
    cases = [
        case("draft", {**GREEDY, "draft_tokens": 7}, **drafted),
        case("drawn", {**DRAWN, "draft_tokens": 7}, **drafted),
        case("lookup", {**GREEDY, **lookup}),
        case("submit", {**DRAWN, "max_new_tokens": 8}, how="submit", prompts=PROMPTS),
        case("refuse", GREEDY, how="refuse"),
        case("evaluate", {}, how="evaluate"),
        case("encode", {}, how="encode", prompts=PROMPTS),
    ]
    return answers(cases, 2, 1)


@pytest.mark.parametrize("name", ["draft", "drawn", "lookup"])
def test_guesses_are_those_of_process_0_and_change_no_token(hosts, name):
    found = hosts[0][name]
    assert [found["token_ids"]] == alone(IDS, **(DRAWN if name == "drawn" else GREEDY))
    assert found["drafted"] > 0
    if name == "draft":  # it is the model itself
        assert found["sweeps"] < len(found["token_ids"]) / 3


def test_texts_that_are_submitted_and_cancelled_in_process_0_ride_on_all(hosts):
    found = hosts[0]["submit"]
    assert found["texts"] == alone(*PROMPTS, IDS, **{**DRAWN, "max_new_tokens": 8})
    assert all(0 < count < 200 for count in found["n_cancelled"])


def test_a_pass_whose_logits_process_0_cannot_take_ends_its_texts_alone(hosts):
    found = hosts[0]["refuse"]
    assert found["said"] == "no room for these logits"
    assert [found["token_ids"]] == alone(IDS, **GREEDY)


def test_a_text_is_as_likely_on_two_hosts_as_on_one(hosts, monkeypatch):
    found = hosts[0]["evaluate"]
    monkeypatch.setattr(evaluate, "MOST_WINDOWS", 2)
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        expected = evaluate.perplexity(model, IDS, length=4, stride=2)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert found["sweeps"] == expected.sweeps == 2
    assert found["n_predicted"] == expected.n_predicted == len(IDS) - 1


def test_a_text_has_the_same_vector_on_two_hosts_as_on_one(hosts):
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        expected = model.encode(PROMPTS)
    found = hosts[0]["encode"]["vectors"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_benchmark_is_of_all_hosts_and_changes_no_answer():
    cases = [case("bench", {}, how="bench", options={"keeps_layers": False})]
    found, other = (of_host["bench"] for of_host in answers(cases, 2, 2))
    assert [set(lane) for lane in found["lanes"]] == [{"disk", "links", "together"}] * 2
    assert found["blocks"] == [1, 9]
    assert found["sweeps"] == [0, 1, 9]  # all weights moving, and passes
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as model:
        logits = model.logits([IDS]).ravel()
    np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    # Each pass of process 0 was one of the other's, the one without arithmetic too.
    assert other["read_bytes"] >= 8 * other["sweep_bytes"]


def test_another_process_takes_no_prompt(hosts):
    refused = hosts[1]["submit"]["refused"]
    assert refused.startswith("hosts: process 0 alone takes prompts; call follow()")


@pytest.mark.slow
def test_the_page_s_example_runs():
    text = (REPOSITORY / "docs" / "hosts.md").read_text()
    (block,) = re.findall(r"(?m)^    from jlayer import .*\n(?:    .*\n|\n)*", text)
    code = "\n".join(line[4:] for line in block.splitlines())
    code = code.replace("path/to/Llama-3-70B", str(BUNDLED))
    code = code.replace("10.0.0.1:7070", groups(1)[0]["coordinator"])
    own = [code.replace("=2)", f"=2, process_id={number}, device='cpu')") for number in range(2)]
    with started(*(["-c", one] for one in own)) as processes:
        (first, text, _), (second, other, _) = ended(processes)
    with AutoModel.from_pretrained(BUNDLED, device="cpu") as model:
        assert text == jlayer.generate(model, "Once upon a time").text + "\n"
    assert (first, second, other) == (0, 0, "")


@pytest.mark.slow
def test_a_pass_that_fails_in_another_thread_of_process_0_ends_all():
    """It has no way to go on: the others are in the middle of the pass."""
    asked = started_for([case("fail", GREEDY, how="fail")], 2)
    with asked as processes:
        (code, _, errors), (other, _, lines) = ended(processes)
    assert (code, other) == (6, 6)
    assert errors.splitlines()[-1] == "jlayer: layer 1: the disk is gone"
    assert "ended early: layer 1: the disk is gone" in lines.splitlines()[-1]


def test_a_process_by_itself_follows_nobody():
    with AutoModel.from_pretrained(BUNDLED, device="cpu") as model:
        assert not model.follows
        with pytest.raises(jlayer.UsageError, match="follow: this is process 0, or the only one"):
            model.follow()


@pytest.mark.parametrize(
    "more", [{}, {"windows": (8,)}, {"has_state": True}], ids=["plain", "windows", "states"]
)
def test_chunks_are_told_as_they_are(more):
    pool = Pool(**more)
    slots = 6 if more.get("has_state") else 0
    pool.grow(PoolSizes(64, tuple(32 for _ in pool.windows), slots))
    tree, text = pool.take(5), pool.take(7)
    none = np.zeros(0, np.int32)
    entries = [
        Entry([5, 6, 7, 8, 9], none, tree, 64, wanted=3, parents=(-1, 0, 0, 1, 1), n_kept=1),
        Entry([1, 2, 3, 4], text[:3], text[3:], 64, is_long=True, n_kept=4, adapter=2),
    ]
    parts = arrange(entries, pool=64, windows=pool.windows, switches=True, slots=slots)
    told = unpacked_parts(json.loads(json.dumps(packed_parts(parts))))
    assert [part.size for part in told] == [part.size for part in parts]
    for own, other in zip(leaves(parts), leaves(told), strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_array_equal(own, other)
