"""Texts whose entries stay for the next turn, and runs that give theirs back and go on."""

import pytest

import jlayer
from jlayer import AutoModel
from jlayer.errors import DoesNotFitError
from tests.campaigns import slow_but
from tests.engine.lanes import GREEDY, Run
from tests.reference.dense_forms import save

PROMPT = [7 + n for n in range(40)]
PLAIN = {**GREEDY, "max_new_tokens": 12, "speculate": "off", "eos_token_id": None}
# What a layer keeps of a text: all of it, what its window sees, a state that cannot be cut back.
KINDS = ("llama", "gemma3", "qwen3_5")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param) / "source", request.param)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as found:
        found.engine.kept.most = 2
        yield found
        found.engine.kept.clear()
        assert not found.engine.n_alive


def turn(model, prompt, **options):
    """(new tokens, of so many tokens of the prompt the entries were there, rows of all passes)."""
    run = Run(model, prompt, **{**PLAIN, **options})
    (tokens,), stats = run.tokens(), run.decoding.stats
    run.decoding.keep()
    return tokens, stats.kept_tokens, stats.rows


def afresh(model, prompt, **options):
    """The tokens of a text when nothing is kept."""
    model.engine.kept.clear()
    return jlayer.generate(model, prompt, **{**PLAIN, **options}).token_ids


@pytest.mark.slow
def test_the_next_turn_costs_its_new_tokens(model):
    model.engine.kept.clear()
    first, n_kept, _ = turn(model, PROMPT)
    assert n_kept == 0
    longer = [*PROMPT, *first, 50, 51, 52]
    second, n_kept, n_rows = turn(model, longer)
    assert n_kept == len(PROMPT) + len(first) - 1, "all but the last token had ridden"
    assert n_rows == len(longer) - n_kept + len(second) - 1
    assert model.engine.n_alive == len(model.engine.kept) == 1
    assert second == afresh(model, longer)


def keeping(model, prompt):
    decoding, _ = model.decoding(prompt, options=PLAIN)
    decoding.keeps = True
    return decoding, decoding.lanes[0]


@pytest.mark.parametrize("model", slow_but(KINDS, ("llama",)), indirect=True)
def test_a_run_that_is_iterated_keeps_its_entries_however_it_ends(model):
    model.engine.kept.clear()
    first, lane = keeping(model, PROMPT)
    assert len(list(first)) == PLAIN["max_new_tokens"]
    longer = [*PROMPT, *lane.token_ids, 50, 51]
    stopped, lane = keeping(model, longer)
    assert stopped.stats.kept_tokens == len(longer) - 3
    steps = iter(stopped)
    for _ in range(3):
        next(steps)
    steps.close()
    assert stopped.is_closed
    assert model.engine.n_alive == len(model.engine.kept) == 1
    longest = [*longer, *lane.token_ids, 52]
    found, n_kept, _ = turn(model, longest)
    assert n_kept == len(longest) - 2
    assert found == afresh(model, longest)


@pytest.mark.parametrize("model", slow_but(KINDS, ("llama",)), indirect=True)
def test_a_turn_that_is_said_anew_begins_where_the_texts_part(model):
    model.engine.kept.clear()
    turn(model, PROMPT)
    other = [*PROMPT[:30], 90, 91, 92]
    found, n_kept, _ = turn(model, other)
    cuts = {"llama": 30}  # a window has moved on, and a state cannot be cut
    assert n_kept == cuts.get(model.config.model_type, 0)
    assert found == afresh(model, other)


@pytest.mark.slow
def test_the_text_that_most_can_be_taken_from_is_taken(model):
    model.engine.kept.clear()
    one, _, _ = turn(model, PROMPT)
    two, _, _ = turn(model, [*PROMPT[:20], *range(80, 100)])
    assert len(model.engine.kept) == 2
    _, n_kept, _ = turn(model, [*PROMPT, *one, 50])
    assert n_kept == len(PROMPT) + len(one) - 1
    _, n_kept, _ = turn(model, [*PROMPT[:20], *range(80, 100), *two, 50])
    assert n_kept == 40 + len(two) - 1
    assert len(model.engine.kept) == 2
    turn(model, [*range(60, 90)])
    assert len(model.engine.kept) == 2, "the one that was used longest ago has gone"


@pytest.mark.slow
def test_several_texts_of_a_prompt_go_on_from_one(model):
    model.engine.kept.clear()
    first, _, _ = turn(model, PROMPT)
    longer = [*PROMPT, *first, 50, 51, 52]
    drawn = {"do_sample": True, "temperature": 1.0, "seed": 5, "num_return_sequences": 3}
    run = Run(model, longer, **{**PLAIN, **drawn})
    found = run.tokens()
    assert run.decoding.stats.kept_tokens == len(PROMPT) + len(first) - 1
    run.decoding.keep()
    alone = jlayer.generate(model, longer, **{**PLAIN, **drawn})
    model.engine.kept.clear()
    assert found == [one.token_ids for one in jlayer.generate(model, longer, **{**PLAIN, **drawn})]
    assert found == [one.token_ids for one in alone]


@pytest.mark.parametrize("model", slow_but(KINDS, ("llama",)), indirect=True)
def test_a_run_that_gives_its_entries_back_goes_on_as_if_nothing_had_been(model):
    expected, beside = afresh(model, PROMPT), afresh(model, PROMPT[::-1])
    run, other = Run(model, PROMPT, **PLAIN), Run(model, PROMPT[::-1], **PLAIN)
    for _ in range(5):
        run.advance()
    run.decoding.suspend()
    assert model.engine.n_alive == 1
    assert run.decoding.is_waiting
    assert not run.lanes[0].is_hungry
    assert other.tokens() == [beside]
    assert run.decoding.admit_waiting()
    assert run.tokens() == [expected]
    run.close()
    other.close()


def test_a_run_whose_texts_have_ended_has_nothing_to_give_back_for_later(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        run = Run(model, PROMPT, **{**PLAIN, "max_new_tokens": 1})
        run.tokens()
        run.decoding.suspend()
        assert not run.decoding.is_waiting
        assert not run.decoding.admit_waiting()
        run.close()
        assert not model.engine.n_alive


@pytest.mark.slow
def test_texts_of_one_prompt_give_their_entries_back_and_go_on(model):
    drawn = {**PLAIN, "do_sample": True, "temperature": 1.0, "seed": 5, "num_return_sequences": 3}
    expected = [one.token_ids for one in jlayer.generate(model, PROMPT, **drawn)]
    run = Run(model, PROMPT, **drawn)
    for _ in range(4):
        run.advance()
    run.decoding.suspend()
    assert not model.engine.n_alive or len(model.engine.kept) == model.engine.n_alive
    run.decoding.admit_waiting()
    assert run.tokens() == expected
    run.close()


def test_what_is_kept_goes_as_soon_as_a_run_needs_its_room(fable, room_for):
    with AutoModel.from_pretrained(
        fable, device="cpu", dtype="float32", **room_for(2, 64)
    ) as model:
        model.engine.kept.most = 8
        texts = [[9 + n, *range(20, 40)] for n in range(4)]
        for text in texts:
            turn(model, text, max_new_tokens=64 - len(text))
        assert 1 <= len(model.engine.kept) < 4
        with pytest.raises(DoesNotFitError):
            Run(model, texts[0], max_new_tokens=400, eos_token_id=None)
        assert not len(model.engine.kept), "all of them were given up for it"
        assert not model.engine.n_alive
