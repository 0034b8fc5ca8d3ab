"""A context or memory that is full: what can be dropped is offered, and nothing goes by itself."""

import re

import pytest

from jlayer import AutoModel
from tests.app.chat.talk import TEMPLATE, chat

WORDS = "The king and the queen of the land went to see the sea. "
CONTEXT = 96


@pytest.fixture(scope="module")
def model(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32", context=CONTEXT) as found:
        yield found


def n_tokens(model, messages):
    return len(model.text.encode_chat(messages, chat_template=TEMPLATE))


def users(found):
    return [one.user for one in found.session.conversation.exchanges]


def test_what_can_be_dropped_is_offered_with_what_it_gives(model, capsys):
    lines = [WORDS + "One?", WORDS + "Two?", "Three?", 3 * WORDS]
    found = chat(model, *lines, system="Be brief.")
    found.run()
    assert users(found) == lines[:3], "nothing was dropped"
    messages = found.session.conversation.as_dicts()
    for one in messages:
        one.pop("finish_reason", None)
    system, last = messages[:1], [{"role": "user", "content": 3 * WORDS}]
    counts = [n_tokens(model, [*system, *messages[1 + 2 * n :], *last]) for n in range(4)]
    said = capsys.readouterr().err
    assert (
        f"jlayer: context: {counts[0]} tokens with this message, and an answer needs room for 8; "
        f"the context is 96, so {counts[0] + 8 - CONTEXT} have to go\n"
    ) in said
    needed = next(n for n in range(4) if counts[n] + 8 <= CONTEXT)
    assert needed == 2
    assert re.findall(r"/drop (\d).*?: (\d+) tokens(.*)", said) == [
        ("1", str(counts[0] - counts[1]), ""),
        ("2", str(counts[1] - counts[2]), "; then it fits"),
    ]
    n_system = n_tokens(model, [*system, *last]) - n_tokens(model, last)
    assert f"/system   the system message, {n_system} tokens" in said
    assert "/clear    all of them" in said


def test_the_message_comes_back_once_something_was_dropped(model, capsys):
    lines = [WORDS + "One?", WORDS + "Two?", 3 * WORDS, "/stats", "/drop 1", "/drop 1", 3 * WORDS]
    found = chat(model, *lines)
    found.run()
    assert found.typist.before == ["", "", "", "", "", 3 * WORDS, 3 * WORDS, ""]
    assert users(found) == [3 * WORDS]
    assert "1 message and its answer dropped, 1 left" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["/clear", '/system ""'])
def test_other_ways_to_make_room(model, command):
    lines = [WORDS + "One?", 4 * WORDS, command, 4 * WORDS]
    found = chat(model, *lines, system=2 * WORDS)
    found.run()
    assert found.typist.before[3] == 4 * WORDS


@pytest.mark.slow
def test_another_message_may_be_sent_instead(model):
    found = chat(model, WORDS + "One?", 6 * WORDS + WORDS, "Two?")
    found.run()
    assert users(found) == [WORDS + "One?", "Two?"]
    assert found.typist.before[-1] == ""


def test_a_message_that_is_too_long_by_itself_says_so(model, capsys):
    found = chat(model, "One?", 12 * WORDS, 12 * WORDS)
    found.run()
    said = capsys.readouterr().err
    alone = n_tokens(model, [{"role": "user", "content": 12 * WORDS}])
    assert f"the message itself has {alone} tokens: make it shorter" in said
    assert "then it fits" not in said
    assert users(found) == ["One?"]


def test_a_changed_message_that_does_not_fit_changes_nothing_until_there_is_room(model):
    long = 5 * WORDS
    lines = [WORDS + "One?", WORDS + "Two?", "/edit 2", long, "/drop 1", long]
    found = chat(model, *lines)
    before = []
    found.typist.remember = lambda entry: before.append(users(found))
    found.run()
    assert before[-2:] == [[WORDS + "One?", WORDS + "Two?"], [WORDS + "Two?"]]
    assert found.typist.prompts[-2:] == ["edit 1 > ", "> "]
    assert users(found) == [long]


def test_a_template_that_fails_while_offers_are_made_ends_no_chat(model, capsys):
    """One that wants a system message fails on the chat without, which tells what that takes."""
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    found = chat(model, 8 * WORDS, system="Be brief.", template=template + TEMPLATE)
    found.run()
    said = capsys.readouterr().err
    assert said.count("have to go\n") == 1
    assert "no system" in said


@pytest.mark.slow
def test_an_answer_is_cut_to_the_room_that_is_left(model):
    found = chat(model, 4 * WORDS, options={"max_new_tokens": 1000})
    result = found.run()
    n_prompt = n_tokens(model, [{"role": "user", "content": 4 * WORDS}])
    assert n_prompt + result["stats"]["new_tokens"] <= CONTEXT
    assert result["messages"][1]["finish_reason"] in ("stop", "length")


def test_what_is_kept_of_the_turn_before_takes_no_room_from_the_next_answer(fable, room_for):
    options = {"device": "cpu", "dtype": "float32", **room_for(2, 64)}
    with AutoModel.from_pretrained(fable, **options) as model:
        found = chat(model, WORDS + "One?", options={"max_new_tokens": 1000})
        ids = found.speaker.ids([{"role": "user", "content": WORDS}])

        def limit():
            decoding = found.speaker.begin(ids)
            decoding.close()
            return decoding.lanes[0].limit

        alone = limit()
        assert 20 < alone < 900
        found.run()
        assert len(model.engine.kept) == 1
        assert limit() == alone


def test_memory_that_is_full_is_said_with_its_sum_and_the_same_offers(fable, room_for, capsys):
    options = {"device": "cpu", "dtype": "float32", **room_for(2, 64)}
    with AutoModel.from_pretrained(fable, **options) as model:
        two = WORDS + "Two?"
        found = chat(model, WORDS + "One?", two, "/drop 1", two)
        found.run()
        said = capsys.readouterr().err
        assert users(found) == [two]
        assert found.typist.before == ["", "", "", two, ""]
        (line,) = [line for line in said.splitlines() if line.startswith("jlayer: device_memory: ")]
        assert " given, needed are " in line
        assert re.search(r"/drop 1 .*: \d+ tokens; then it fits\n  /clear", said)
