"""Runs that are put down and taken up give the tokens of runs that nobody disturbed."""

import shutil

import numpy as np
import pytest

import jlayer
from jlayer.engine import entries, identity, states
from jlayer.engine.caches import Caches
from jlayer.engine.states import FACTS, StateFolder
from jlayer.errors import CheckpointError, UsageError
from jlayer.plan.tiles import Tier
from tests.adapters import write_adapter
from tests.campaigns import slow_but
from tests.engine.lanes import check_rows, limited
from tests.engine.sessions import (
    DRAWN,
    KINDS,
    PLAIN,
    PROMPT,
    PROMPTS,
    draft_of,
    opened,
    saved_model,
    tokens_of,
    undisturbed,
)
from tests.reference import dense_forms
from tests.tiny import tiny_llama

SEVERAL = {**DRAWN, "num_return_sequences": 2, "repetition_penalty": 1.3}
DRAFTED = {"speculate": "draft", "draft_tokens": 4}


@pytest.fixture(scope="module", params=slow_but(KINDS, ("llama",)))
def folder(request, tmp_path_factory):
    return saved_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder):
    with opened(folder) as found:
        yield found
        assert not found.engine.n_alive


def put_down_everywhere(model, folder, prompt, **options):
    """Saves a run after each of its passes -> the folders."""
    session = model.session(prompt, **options)
    folders = []
    for _ in session:
        folders.append(folder / str(len(folders)))
        model.save_session(folders[-1], session)
    return folders


def check_each(model, folders, expected):
    """Every saved run goes on to the same tokens, without a prompt being computed again."""
    for number, folder in enumerate(folders):
        session = model.load_session(folder)
        n_before = [len(ids) for ids in session.token_ids]
        found = session.result()
        assert tokens_of(found) == expected
        stats = (found if isinstance(found, list) else [found])[0].stats
        if number < len(folders) - 1:
            assert stats["kept_tokens"] > 0
            n_new = sum(map(len, expected)) - sum(n_before)
            # Each text's next token, and guesses that were right once more where a layer has a
            # state: no prompt.
            assert stats["rows"] <= 8 * len(n_before) * n_new
        assert not model.engine.n_alive


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(PROMPT, PLAIN), (PROMPTS, SEVERAL)],
    ids=["greedy alone", "drawn in a batch"],
)
def test_a_run_goes_on_from_every_token_to_the_same_tokens(model, tmp_path, prompt, options):
    expected = undisturbed(model, prompt, **options)
    folders = put_down_everywhere(model, tmp_path, prompt, **options)
    assert len(folders) == options["max_new_tokens"]
    check_each(model, folders, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPTS], ids=["alone", "in a batch"])
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
def test_all_ways_of_a_run(folder, tmp_path, prompt, options, drafts):
    plain = {**options, "max_new_tokens": 16}
    with opened(folder, **({"draft": draft_of(tmp_path)} if drafts else {})) as model:
        expected = undisturbed(model, prompt, **plain)
        own = {**plain, **(DRAFTED if drafts else {})}
        check_each(model, put_down_everywhere(model, tmp_path / "runs", prompt, **own), expected)


def as_told(found):
    """What of a text must not depend on how it came about."""
    names = ("text", "token_ids", "finish_reason", "prompt_tokens", "seed", "logprobs")
    return [getattr(found, name) for name in (*names, "prompt_logprobs")]


def test_text_stops_and_probabilities_are_those_of_one_run(fable, tmp_path):
    options = {**DRAWN, "max_new_tokens": 12, "logprobs": 2, "prompt_logprobs": 1}
    with opened(fable) as model:
        text = jlayer.generate(model, "Once upon a time", **options).text
        options["stop"] = ["zebra", text[-8:-4]]
        expected = jlayer.generate(model, "Once upon a time", **options)
        assert expected.finish_reason == "stop"
        folders = put_down_everywhere(model, tmp_path, "Once upon a time", **options)
        for folder in folders:
            session = model.load_session(folder)
            assert expected.text.startswith(session.texts[0])
            assert as_told(session.result()) == as_told(expected)


def test_a_seed_that_was_drawn_is_kept(tiny, tmp_path):
    with opened(tiny) as model:
        session = model.session([PROMPT, PROMPT], **{**DRAWN, "seed": None})
        next(session)
        session.save(tmp_path / "run")
        one, two = session.result()
        assert one.token_ids != two.token_ids, "each drew its own"
        found = model.load_session(tmp_path / "run").result()
        assert [one.seed for one in found] == [one.seed, two.seed]
        assert tokens_of(found) == [one.token_ids, two.token_ids]


def test_a_run_in_the_background_is_saved_between_two_passes(tiny, tmp_path):
    options = {**PLAIN, "max_new_tokens": 30}
    with opened(tiny) as model:
        expected = undisturbed(model, PROMPT, **options)
        handle = model.submit(PROMPT, **options)
        next(handle)
        model.save_session(tmp_path / "run", handle)
        assert [handle.result().token_ids] == expected, "it goes on"
        session = model.load_session(tmp_path / "run")
        assert len(session.token_ids[0]) >= 1
        assert tokens_of(session.result()) == expected
        with pytest.raises(UsageError, match="run: found str"):
            model.save_session(tmp_path / "run", "x")


def test_it_may_have_more_tokens_than_it_was_begun_with(tiny, tmp_path):
    with opened(tiny) as model:
        expected = undisturbed(model, PROMPT, **{**DRAWN, "max_new_tokens": 15})
        session = model.session(PROMPT, **DRAWN)
        next(session)
        session.save(tmp_path / "run")
        session.close()
        assert tokens_of(model.load_session(tmp_path / "run", max_new_tokens=15).result()) == (
            expected
        )
        with pytest.raises(UsageError, match=r"found 0, and .*run.* has 1 new tokens already"):
            model.load_session(tmp_path / "run", max_new_tokens=0)
        assert not model.engine.n_alive


@pytest.mark.slow
def test_texts_that_wait_for_room_are_saved_and_taken_up_with_less_room(fable, room_for, tmp_path):
    """Entries are missing of those that wait, and of all where there is room for some alone: they
    are computed anew."""
    prompts = [[9 + n, *range(20, 24)] for n in range(3)]
    options = {**DRAWN, "max_new_tokens": 30}
    with opened(fable) as model:
        expected = undisturbed(model, prompts, **options)
    with opened(fable, **room_for(2, 64)) as model:
        session = model.session(prompts, **options)
        for _ in range(4):
            next(session)
        assert session.decoding.is_waiting
        session.save(tmp_path / "waiting")
        assert tokens_of(session.result()) == expected
    with opened(fable) as model:
        session = model.load_session(tmp_path / "waiting")
        next(session)
        session.save(tmp_path / "whole")
        check_rows(model, session.decoding)
        assert tokens_of(session.result()) == expected
    with opened(fable, **room_for(1, 64)) as model:
        for name in ("whole", "waiting"):
            assert tokens_of(model.load_session(tmp_path / name).result()) == expected
        assert not model.engine.n_alive


def test_entries_move_between_the_device_and_host_memory(fable, room_for, tmp_path):
    """In a budget that is filled pools lie in host memory."""
    prompts, options = [[7, 8, 9, 10, 11], [7, 8, 9, 10, 12]], {**PLAIN, "max_new_tokens": 8}
    small = {"device_memory": room_for(2, 64)["device_memory"]}
    with opened(fable) as model:
        expected = undisturbed(model, prompts, **options)
    for number, (one, other) in enumerate([({}, small), (small, {})]):
        with opened(fable, **one) as model:
            session = model.session(prompts, **options)
            next(session)
            tiers = [model.engine.caches.tier]
            session.save(tmp_path / str(number))
            session.close()
        with opened(fable, **other) as model:
            session = model.load_session(tmp_path / str(number))
            tiers.append(model.engine.caches.tier)
            found = session.result()
            assert tokens_of(found) == expected
            assert found[0].stats["kept_tokens"] == len(prompts[0])
        assert set(tiers) == {Tier.DEVICE, Tier.HOST}


@pytest.fixture(scope="module")
def put_down(tiny, tmp_path_factory):
    """A saved run of `tiny`."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with opened(tiny) as model:
        session = model.session(PROMPT, **PLAIN)
        next(session)
        session.save(folder)
        session.close()
    return folder


def test_another_model_is_refused_by_name(tiny, put_down, tmp_path, monkeypatch):
    other = tiny_llama(tmp_path / "other", seed=8)
    adapter = write_adapter(tmp_path / "adapter", tiny)
    for folder, options, words in (
        (tiny, {"dtype": "bfloat16"}, "another dtype: expected float32, found bfloat16"),
        (other, {}, "another model .its weights.: expected .*, found .*; open the model"),
        (tiny, {"adapter": adapter}, "another adapter: expected none, found .*; open the model"),
    ):
        with opened(folder, **options) as model:
            with pytest.raises(UsageError, match=f"run: saved with {words}"):
                model.load_session(put_down)
            assert not model.engine.n_alive
    with opened(tiny) as model:
        assert model.load_session(put_down).result().token_ids
        own = identity.FORMAT
        monkeypatch.setattr(identity, "FORMAT", own + 1)
        words = f"another format: expected {own}, found {own + 1}; begin the run"
        with pytest.raises(UsageError, match=words):
            model.load_session(put_down)


def test_damage_is_refused_and_nothing_is_held(tiny, put_down, tmp_path):
    with opened(tiny) as model:
        for what in (FACTS, "part-00001"):
            damaged = tmp_path / what
            shutil.copytree(put_down, damaged)
            (state,) = (path for path in damaged.iterdir() if path.is_dir())
            if what == FACTS:
                (state / what).write_text((state / what).read_text().replace("40", "41", 1))
            else:
                shutil.rmtree(state / what)
            with pytest.raises(CheckpointError, match=r"a damaged state .*; remove it"):
                model.load_session(damaged)
            assert not model.engine.n_alive
        assert model.load_session(put_down).result().token_ids


def forged(saved, folder, change):
    """A copy of a saved run whose facts and parts are changed, written as a run's own are."""
    with StateFolder(saved).reading() as state:
        facts, parts = state.facts, list(state.parts())
    change(facts, parts)
    StateFolder(folder).save(facts, parts, n_bytes=1)
    return folder


def of_lane(name, value):
    return lambda facts, parts: facts["lanes"][0].update({name: value})


def of_row(name, value):
    return lambda facts, parts: facts["rows"][0].update({name: value})


def of_part(number, name, change):
    def made(facts, parts):
        (full,) = (own for own in parts[number] if own.startswith(name))
        parts[number][full] = change(parts[number][full])

    return made


FORGED = {
    "a text more": lambda facts, parts: facts["lanes"].append(facts["lanes"][0]),
    "no prompts": lambda facts, parts: facts.update(rows=[], lanes=[]),
    "no model": lambda facts, parts: facts.update(model=None),
    "a fact less": lambda facts, parts: facts.pop("is_single"),
    "beams": lambda facts, parts: facts["options"].update(num_beams=2),
    "a token of no vocabulary": of_lane("tokens", [133]),
    "a token that is no number": of_lane("tokens", ["5"]),
    "more tokens than may be": of_lane("tokens", [5] * 7),
    "no seed of a draw": of_lane("seed", None),
    "scores that nobody asked for": of_lane("logprobs", [[-1.0, []]]),
    "scores of a prompt": of_lane("prompt_scores", [None] * 40),
    "a prompt of no vocabulary": of_row("ids", [-1] * 40),
    "padding": of_row("padding", [3, 0]),
    "a table of another length": of_part(0, "table", lambda rows: np.arange(99, dtype=np.int32)),
    "a table with holes": of_part(0, "table", lambda rows: rows * 2),
    "a table before the first": of_part(0, "table", lambda rows: rows - 5),
    "a table of fractions": of_part(0, "table", lambda rows: rows.astype(np.float32)),
    "entries of another dtype": of_part(1, "layer-00000.k", lambda own: own.astype(np.float16)),
    "entries of some tokens": of_part(1, "layer-00001.v", lambda own: own[:3]),
    "no entries": lambda facts, parts: parts.clear(),
    "a layer less": lambda facts, parts: [
        part.pop(name) for part in parts for name in list(part) if name.startswith("layer-00002")
    ],
    "a layer more": lambda facts, parts: parts.append({"layer-00099.k": np.zeros(3)}),
    "a layer without a number": lambda facts, parts: parts.append({"layer-x.k": np.zeros(3)}),
}


def test_what_no_run_has_saved_is_refused_whatever_its_digest_says(tiny, tmp_path):
    with opened(tiny) as model:
        session = model.session(PROMPT, **DRAWN)
        next(session)
        session.save(tmp_path / "run")
        expected = session.result().token_ids
        same = forged(tmp_path / "run", tmp_path / "same", lambda facts, parts: None)
        assert model.load_session(same).result().token_ids == expected
        for name, change in FORGED.items():
            folder = forged(tmp_path / "run", tmp_path / name, change)
            with pytest.raises(CheckpointError, match=rf"{name}/1: a damaged state .*; remove it"):
                model.load_session(folder)
            assert not model.engine.n_alive, name


def test_host_memory_holds_a_part_of_a_state_at_a_time(tiny, tmp_path, monkeypatch):
    """No layer's entries are fetched, or read, before those of the part before are done with."""
    monkeypatch.setattr(entries, "PART_BYTES", 1)
    log = []

    def logged(owner, name, what):
        real = getattr(owner, name)

        def call(*given, **more):
            log.append(what)
            return real(*given, **more)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (states, "write_part"),
        (states, "read_part"),
        (Caches, "entries"),
        (Caches, "place"),
    ):
        logged(owner, name, name)
    with opened(tiny) as model:
        session = model.session(PROMPT, **PLAIN)
        next(session)
        session.save(tmp_path / "run")
        session.close()
        n_layers = model.config.num_hidden_layers
        assert log == ["write_part", *["entries", "write_part"] * n_layers], "the table comes first"
        log.clear()
        model.load_session(tmp_path / "run").close()
        assert log == ["read_part", *["read_part", "place"] * n_layers]


@pytest.mark.slow
def test_a_prompt_that_is_half_computed_goes_on_from_there(model, tmp_path):
    expected = undisturbed(model, PROMPT, **PLAIN)
    with limited(model, rows=16):
        session = model.session(PROMPT, **PLAIN)
        scheduler = model.engine.scheduler
        scheduler.join(session.decoding.lanes)
        scheduler.drive_until(lambda: len(session.decoding.lanes[0].table) > 0)
        session.save(tmp_path / "run")
        session.close()
        again = model.load_session(tmp_path / "run")
        found = again.result()
    assert 0 < found.stats["kept_tokens"] < len(PROMPT)
    assert tokens_of(found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (3, 2)])
def test_on_another_number_of_devices(tiny, tmp_path, numbers):
    found = []
    for n_devices in numbers:
        with opened(tiny, devices=n_devices) as model:
            if not found:
                found.append(undisturbed(model, PROMPTS, **DRAWN))
                session = model.session(PROMPTS, **DRAWN)
                next(session)
                next(session)
                session.save(tmp_path / "run")
                session.close()
            else:
                session = model.load_session(tmp_path / "run")
                assert tokens_of(session.result()) == found[0]


@pytest.mark.slow
def test_bfloat16_goes_on_with_the_same_bits(folder, tmp_path):
    options = {**DRAWN, "max_new_tokens": 24}
    with opened(folder, dtype="bfloat16") as model:
        expected = undisturbed(model, PROMPT, **options)
        folders = put_down_everywhere(model, tmp_path, PROMPT, **options)
        check_each(model, folders, expected)


@pytest.mark.slow
def test_across_the_length_at_which_the_rotary_embedding_switches(tmp_path):
    folder = dense_forms.save(tmp_path / "model", "phi3-longrope")
    with opened(folder) as model:
        n_before = model.config.switches_at - 5
        prompt, options = [7 + n % 90 for n in range(n_before)], {**PLAIN, "max_new_tokens": 12}
        expected = undisturbed(model, prompt, **options)
        for saved in put_down_everywhere(model, tmp_path / "runs", prompt, **options):
            assert tokens_of(model.load_session(saved).result()) == expected


def test_what_cannot_be_saved_is_refused_by_name(tiny, tmp_path):
    with opened(tiny) as model:
        for options, words in (
            ({"num_beams": 2}, "num_beams: found 2; a beam search"),
            ({"output_scores": True, "return_dict_in_generate": True}, "keeps all scores"),
        ):
            session = model.session(PROMPT, **{**PLAIN, **options})
            with pytest.raises(UsageError, match=f"{words} cannot be saved"):
                session.save(tmp_path / "run")
            session.close()
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_adapters_by_name_have_runs_and_prompts_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("jlayer.engine.prompt_cache.BLOCK", 8)
    adapters = {
        name: write_adapter(tmp_path / name, tiny, size=size)
        for name, size in (("a", 0.3), ("b", 0.6))
    }
    with opened(tiny, adapters=adapters, prompt_cache=tmp_path / "prompts") as model:
        expected = {}
        for name in (None, "a", "b"):
            options = {**PLAIN, **({"adapter": name} if name else {})}
            session = model.session(PROMPT, **options)
            next(session)
            session.save(tmp_path / f"run-{name}")
            found = session.result()
            assert found.stats["kept_tokens"] == 0, "each computes its own prompt"
            expected[name] = found.token_ids
        assert len(set(map(tuple, expected.values()))) == 3
        for name, tokens in expected.items():
            assert model.load_session(tmp_path / f"run-{name}").result().token_ids == tokens
            again = jlayer.generate(model, PROMPT, **PLAIN, **({"adapter": name} if name else {}))
            assert again.token_ids == tokens
            assert again.stats["kept_tokens"] > 0
