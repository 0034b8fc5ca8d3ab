"""Requests for different adapters in the same forward passes: each gets what it gets alone, in the
same compiled programs, and none gets the cache entries of another's prompt."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlayer
from jlayer import AutoModel, UsageError
from jlayer.checkpoint.adapter import CONFIG, WEIGHTS
from jlayer.checkpoint.store import Store
from tests.adapters import write_adapter
from tests.engine.lanes import GREEDY, Run

PROMPT = [7 + n for n in range(40)]
PLAIN = {**GREEDY, "max_new_tokens": 8, "speculate": "off", "eos_token_id": None}
# Of different ranks, dtypes and matrices.
FORMS = {
    "first": {"rank": 2, "seed": 1},
    "second": {"rank": 5, "targets": ("q_proj", "gate_proj", "up_proj"), "seed": 2},
    "third": {"rank": 1, "targets": ("v_proj", "o_proj", "lm_head"), "dtype": "bfloat16"},
}
NAMES = (*FORMS, None)


def opened(folder, **options):
    return AutoModel.from_pretrained(folder, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / name, tiny, size=0.3, **form) for name, form in FORMS.items()
    }


@pytest.fixture(scope="module")
def alone(tiny, folders):
    """By name, the logits and tokens of a model with that adapter for its only one."""
    found = {}
    for name in NAMES:
        with opened(tiny, adapter=folders.get(name), host_share=0) as model:
            found[name] = model.logits(PROMPT), jlayer.generate(model, PROMPT, **PLAIN).token_ids
    assert len({str(tokens) for _, tokens in found.values()}) == len(NAMES)
    return found


@pytest.fixture(scope="module")
def model(tiny, folders):
    with opened(tiny, adapters=folders, host_share=0) as found:
        yield found
        found.engine.kept.clear()
        assert not found.engine.n_alive


def together(model, names=NAMES, **options):
    """(the tokens of a request for each, one after another; the rows of all their passes, which
    they share)."""
    runs = [Run(model, PROMPT, **{**PLAIN, "adapter": name, **options}) for name in names]
    lanes = [lane for run in runs for lane in run.lanes]
    n_before = model.engine.scheduler.n_passes
    while any(lane.is_alive for lane in lanes):
        model.engine.scheduler.advance(lanes, once=True)
        for run in runs:
            run.take()
    for run in runs:
        run.close()
    # Where guesses are taken some end before others: the last one has seen all passes.
    last = max((run.decoding.stats for run in runs), key=lambda stats: stats.sweeps)
    n_passes = model.engine.scheduler.n_passes - n_before
    assert last.sweeps == n_passes, "all rode together"
    return [run.lanes[0].token_ids for run in runs], last.rows


def tokens_of(alone, names=NAMES):
    return [alone[name][1] for name in names]


def test_each_gets_what_it_gets_alone(model, alone):
    found, _ = together(model)
    assert found == tokens_of(alone)
    for name, (logits, _) in alone.items():
        found = model.logits(PROMPT, adapter=name)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("host_share", [0.5, 1])
def test_with_cores_of_the_host(tiny, folders, alone, host_share):
    with opened(tiny, adapters=folders, host_share=host_share) as model:
        assert together(model)[0] == tokens_of(alone)


def test_the_same_programs_serve_all(model):
    together(model, ("first", "second"))
    before = dict(model.engine.compiles)
    together(model, ("third", None))
    together(model, ("second", "third"))
    assert model.engine.compiles == before


def test_one_of_its_own_beside_those_with_names(tiny, folders, alone):
    own, others = folders["first"], {name: folders[name] for name in ("second", "third")}
    with opened(tiny, adapter=own, adapters=others) as model:
        found, _ = together(model, (None, *others))
    assert found == tokens_of(alone, FORMS)


def test_guesses_are_verified_under_their_own_adapter(model, alone):
    assert together(model, speculate="lookup", draft_tokens=7)[0] == tokens_of(alone)


def test_prompts_of_one_adapter_alone_share_entries(model, alone):
    n_later = 2 * (PLAIN["max_new_tokens"] - 1)
    found, n_rows = together(model, ("first", "first"))
    assert (found, n_rows) == (tokens_of(alone, ("first", "first")), len(PROMPT) + 1 + n_later)
    found, n_rows = together(model, ("first", "second"))
    assert (found, n_rows) == (tokens_of(alone, ("first", "second")), 2 * len(PROMPT) + n_later)


def test_what_is_kept_is_for_the_same_adapter(model, alone):
    model.engine.kept.most = 2
    for name, n_kept in (("first", 0), ("second", 0), ("first", len(PROMPT) - 1)):
        run = Run(model, PROMPT, **PLAIN, adapter=name)
        (tokens,) = run.tokens()
        run.decoding.keep()
        assert (tokens, run.decoding.stats.kept_tokens) == (alone[name][1], n_kept)
    model.engine.kept.most = 0
    model.engine.kept.clear()


def test_what_overflows_under_one_reaches_no_other(tiny, folders, alone, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    tensors = {
        name: 0 * each + 3e38 for name, each in load_file(folders["first"] / WEIGHTS).items()
    }
    save_file(tensors, big / WEIGHTS)
    (big / CONFIG).write_bytes((folders["first"] / CONFIG).read_bytes())
    with opened(tiny, adapters={"big": big, "second": folders["second"]}) as model:
        assert together(model, ("second", None))[0] == tokens_of(alone, ("second", None))
        with pytest.raises(jlayer.CheckpointError, match="not finite"):
            model.logits(PROMPT, adapter="big")


def test_an_unknown_one_is_refused_by_name(model, tiny):
    with pytest.raises(UsageError, match=r"'fourth'.* has first, second, third"):
        jlayer.generate(model, PROMPT, **PLAIN, adapter="fourth")
    with opened(tiny) as plain, pytest.raises(UsageError, match="has none"):
        plain.logits(PROMPT, adapter="first")


@pytest.mark.parametrize(
    "given", [{"": "x"}, {" ": "x"}, {"a": ""}, [("a", "x"), ("a", "y")], "ab"]
)
def test_names_that_are_none(tiny, given):
    with pytest.raises(UsageError, match="adapters: "):
        opened(tiny, adapters=given)


def test_they_are_counted(tiny, folders):
    """Layers are whole: each array is in one tile. Beside each other they are in host memory."""
    found = []
    for given in ({}, {name: folders[name] for name in ("first", "second")}):
        with opened(tiny, adapters=given, host_share=0) as model:
            store = model.engine.store
            found.append((sum(tile.n_bytes for tile in model.plan.tiles), store.memory_bytes))
    tensors = [load_file(folders[name] / WEIGHTS) for name in ("first", "second")]
    assert found[1][0] - found[0][0] == sum(a.nbytes for each in tensors for a in each.values())
    both = [{name: a.nbytes for name, a in each.items() if "q_proj" in name} for each in tensors]
    assert found[1][1] == sum(n for each in both for n in each.values())


def test_another_one_is_another_model(tiny, folders):
    pairs = list(folders.items())
    given = [pairs, pairs[:2], pairs[::-1], [(f"{name}-2", folder) for name, folder in pairs]]
    assert len({Store(tiny, adapters=each).fingerprint for each in given}) == len(given)


def test_what_differs_in_dtype_is_float32(tiny, folders):
    """What is of one dtype stays in it."""
    short = {"first": folders["first"], "third": folders["third"]}
    write_adapter(short["first"].parent / "fourth", tiny, targets=("q_proj", "v_proj"))
    short["fourth"] = short["first"].parent / "fourth"
    store, stem = Store(tiny, adapters=list(short.items())), "model.layers.0.self_attn."
    forms = {name: store.form_of(f"{stem}{name}.lora_B.weight") for name in ("v_proj", "o_proj")}
    assert forms == {"v_proj": "float32", "o_proj": "bfloat16"}
