"""Turns of a chat: each costs its new tokens, and gives the text of a run by itself."""

import pytest

import jlayer
from jlayer import AutoModel
from jlayer.app.chat.conversation import Exchange
from jlayer.app.chat.reading import Cleared
from jlayer.app.chat.session import TurnsFailed
from jlayer.app.ending import Interrupted
from jlayer.errors import StorageError
from tests.app.chat.talk import CLEARED, CTRL_C, PLAIN, TEMPLATE, chat, failing, n_alike

FIRST = "Once upon a time there was a little girl who had a cat. Who was she?"
SECOND = "And what did she see?"


@pytest.fixture(scope="module")
def model(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as found:
        yield found
        found.engine.kept.clear()
        assert not found.engine.n_alive


def afresh(model, messages, **options):
    """(ids of the messages, the tokens and the text of the answer) where nothing is kept."""
    model.engine.kept.clear()
    form = {"chat_template": TEMPLATE}
    found = jlayer.generate(model, messages, **{**PLAIN, **form, **options})
    return model.text.encode_chat(messages, **form), found.token_ids, found.text


class Turns(list):
    """What each turn of a chat has computed, noted when it is over."""

    def note(self, found):
        def take():
            session = found.session
            self.append((session.last, session.conversation.as_dicts()))

        return take


def test_a_turn_computes_its_new_tokens_and_gives_the_text_of_a_fresh_run(model):
    turns = Turns()
    found = chat(model, FIRST, lambda: note(), SECOND, lambda: note())
    note = turns.note(found)
    found.run()
    history = []
    for number, (last, messages) in enumerate(turns):
        ids, tokens, text = afresh(model, messages[:-1])
        assert messages[-1]["content"] == text
        n_kept = n_alike(history, ids)
        assert (n_kept > 20) == (number > 0)
        assert last.kept_tokens == n_kept
        assert last.rows == len(ids) - n_kept + len(tokens) - 1, "the last one needs no pass"
        history = [*ids, *tokens][:-1]
    assert len(turns) == 2


def test_another_answer_is_cut_back_to_the_message(model):
    """Seeds go up by one, so it is another; sampled, so that it may be."""
    options = {"temperature": 1.0, "seed": 5}
    found = chat(model, FIRST, SECOND, "/retry", options=options)
    found.run()
    *messages, last = found.session.conversation.as_dicts()
    ids, tokens, text = afresh(model, messages, **options | {"seed": 6})
    assert last["content"] == text
    assert found.session.last.kept_tokens == len(ids) - 1, "its logits are needed again"
    assert found.session.last.rows == 1 + len(tokens) - 1
    assert text != afresh(model, messages, **options)[2]
    assert len(messages) == 3


def test_a_changed_message_takes_the_place_of_it_and_of_all_that_follow(model, capsys):
    found = chat(model, FIRST, SECOND, "/edit 1", "", "/edit 1", f"{FIRST} And where?")
    found.run()
    user, answer = found.session.conversation.as_dicts()
    assert user["content"] == f"{FIRST} And where?"
    assert answer["content"] == afresh(model, [user])[2]
    assert found.typist.before == ["", "", "", FIRST, "", FIRST, ""]
    assert found.typist.prompts[-2] == "edit 1 > "
    assert found.session.last.kept_tokens > 16
    said = capsys.readouterr().err
    assert "its answer goes, and 1 message and its answer after it" in said
    assert "nothing was changed" in said


@pytest.mark.parametrize("word", ["", CLEARED, CTRL_C], ids=["empty", "cleared", "ctrl-c"])
def test_an_edit_that_is_taken_back_changes_nothing(model, word):
    found = chat(model, FIRST, SECOND, "/edit 1", word, "/stats", "/edit")
    found.run()
    said = [m["content"] for m in found.session.conversation.as_dicts() if m["role"] == "user"]
    assert said == [FIRST, SECOND]
    assert found.typist.before[-1] == SECOND, "the last one, where no number is given"


def test_ctrl_c_stops_the_answer_which_stays_and_the_second_one_leaves(model):
    found = chat(model, FIRST, CTRL_C)
    with failing(model, 6, KeyboardInterrupt()), pytest.raises(Interrupted) as stop:
        found.run()
    assert stop.value.code == 130
    (user, answer) = stop.value.result["messages"]
    assert user == {"role": "user", "content": FIRST}
    assert answer["finish_reason"] == "interrupted"
    _, tokens, text = afresh(model, [user])
    assert answer["content"]
    assert text.startswith(answer["content"])
    assert answer["content"] != text
    assert stop.value.result["stats"]["new_tokens"] == 6 < len(tokens)
    assert "(stopped; what there is of the answer stays)" in found.shown()


def test_what_a_stopped_answer_has_computed_is_not_computed_again(model):
    found = chat(model, FIRST, SECOND)
    with failing(model, 6, KeyboardInterrupt()):
        result = found.run()
    assert result["messages"][1]["finish_reason"] == "interrupted"
    ids, tokens, text = afresh(model, without_reasons(result["messages"][:-1]))
    assert result["messages"][-1]["content"] == text
    assert found.session.last.kept_tokens > len(ids) // 2
    assert found.session.last.rows == len(ids) - found.session.last.kept_tokens + len(tokens) - 1


def without_reasons(messages):
    return [
        {key: value for key, value in one.items() if key != "finish_reason"} for one in messages
    ]


def test_a_stop_before_the_first_token_gives_the_message_back(model):
    found = chat(model, FIRST, CLEARED, SECOND)
    with failing(model, 0, KeyboardInterrupt()):
        found.run()
    assert found.typist.before == ["", FIRST, "", ""]
    (exchange,) = found.session.conversation.exchanges
    assert exchange.user == SECOND


def test_a_message_that_was_given_back_leaves_at_the_next_ctrl_c(model):
    found = chat(model, FIRST, Cleared(was_typed=False), SECOND)
    with failing(model, 0, KeyboardInterrupt()), pytest.raises(Interrupted) as stop:
        found.run()
    assert stop.value.result["messages"] == []


def test_one_ctrl_c_at_the_prompt_leaves_nothing_and_two_in_a_row_leave(model):
    found = chat(model, CTRL_C, "/help", CTRL_C, CLEARED, CTRL_C, "/help")
    with pytest.raises(Interrupted):
        found.run()
    assert found.typist.history == ["/help"]
    found = chat(model, CTRL_C, is_terminal=False)
    with pytest.raises(Interrupted):
        found.run()


@pytest.mark.parametrize("number", [0, 5], ids=["prompt", "answer"])
def test_a_disk_that_fails_is_one_line_and_the_message_comes_back(model, capsys, number):
    found = chat(model, FIRST, FIRST, SECOND)
    with failing(model, number, StorageError("disk: gone")) as raised:
        found.run()
    assert raised
    assert capsys.readouterr().err.count("jlayer: disk: gone\n") == 1
    assert found.typist.before == ["", FIRST, "", ""]
    messages = found.session.conversation.as_dicts()
    assert [m["content"] for m in messages if m["role"] == "user"] == [FIRST, SECOND]
    assert messages[-1]["content"] == afresh(model, messages[:-1])[2]


def test_what_the_template_refuses_is_one_line_and_comes_back(model, capsys):
    found = chat(model, FIRST, "refuse", SECOND)
    found.run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no such word" in line]
    assert line.startswith("jlayer: ")
    assert found.typist.before == ["", "", "refuse", ""]
    assert [one.user for one in found.session.conversation.exchanges] == [FIRST, SECOND]


def test_a_failed_second_try_leaves_the_first_answer(model):
    found = chat(model, FIRST, "/retry", options={"temperature": 1.0, "seed": 1})
    answers = []

    def on_step(step, tile):
        if found.session.totals.turns == 1:
            answers.append(found.session.conversation.exchanges[0])
            raise StorageError("disk: gone")

    with model.engine.watch.also(on_step):
        found.run()
    assert [answers[0]] == found.session.conversation.exchanges
    assert found.typist.before == ["", "", ""]


def test_the_system_message_goes_first_and_may_be_changed_and_taken_away(model, capsys):
    lines = ["/system", "/system Be brief.", FIRST, '/system ""', SECOND]
    found = chat(model, *lines, system="You are a king.")
    found.run()
    messages = found.session.conversation.as_dicts()
    assert [message["role"] for message in messages] == 2 * ["user", "assistant"]
    assert messages[3]["content"] == afresh(model, messages[:3])[2]
    system = {"role": "system", "content": "Be brief."}
    assert messages[1]["content"] == afresh(model, [system, messages[0]])[2]
    assert "You are a king.\n" in capsys.readouterr().err


def test_an_answer_that_meets_the_limit_says_so_and_stats_count_it(model, capsys):
    found = chat(model, FIRST, "/stats", options={"max_new_tokens": 3})
    result = found.run()
    assert "(cut at 3 tokens" in found.shown()
    assert result["messages"][-1]["finish_reason"] == "length"
    stats, said = result["stats"], capsys.readouterr().err
    ids = model.text.encode_chat([{"role": "user", "content": FIRST}], chat_template=TEMPLATE)
    assert stats["new_tokens"] == 3
    assert stats["prompt_tokens"] == len(ids)
    assert stats["context_tokens"] == len(ids) + 3
    assert f"context    {len(ids) + 3} of 1,024 tokens" in said
    assert f"{len(ids)} tokens of prompts, 0 of them kept" in said


def test_clearing_drops_all_messages_and_their_cache_and_not_the_system_message(model):
    kept = []
    look = lambda: kept.append(len(model.engine.kept))  # noqa: E731
    found = chat(model, FIRST, look, "/clear", look, system="Be brief.")
    result = found.run()
    assert kept == [1, 0]
    assert result["messages"] == [{"role": "system", "content": "Be brief."}]
    assert result["stats"]["context_tokens"] == 0


def test_a_conversation_is_saved_and_goes_on_in_another_chat(model, tmp_path, capsys):
    path = tmp_path / "talk.json"
    first = chat(model, FIRST, f"/save {path}", system="Be brief.")
    first.run()
    second = chat(model, f"/load {path}", SECOND, f"/save {path}", "n", f"/save {path}", "y")
    result = second.run()
    assert result["messages"][:-2] == first.session.conversation.as_dicts()
    assert (
        result["messages"][-1]["content"]
        == afresh(model, without_reasons(result["messages"][:-1]))[2]
    )
    assert second.typist.prompts[-4].endswith("replace it? [y/N] ")
    assert capsys.readouterr().err.count("nothing was saved") == 1
    third = chat(model, f"/load {path}", is_terminal=False)
    assert third.run()["messages"] == result["messages"]


def test_a_conversation_that_is_saved_to_a_folder_costs_its_new_tokens_alone(
    model, fable, tmp_path, capsys
):
    path = tmp_path / "talk"
    turns = Turns()
    first = chat(model, FIRST, f"/save {path}/", f"/save {path}", "n", lambda: note())
    note = turns.note(first)
    first.run()
    ((last, messages),) = turns
    n_cached = last.prompt_tokens + last.new_tokens - 1
    said = capsys.readouterr().err
    assert f"saved to {path}/, with the cache of {n_cached} tokens" in said
    assert "nothing was saved" in said
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as other:
        second = chat(other, f"/load {path}", SECOND, lambda: note())
        note = turns.note(second)
        result = second.run()
        other.engine.kept.clear()
        assert not other.engine.n_alive
    assert result["messages"][:-2] == messages
    before, tokens, _ = afresh(model, messages[:-1])
    ids, _, text = afresh(model, result["messages"][:-1])
    assert result["messages"][-1]["content"] == text
    assert turns[-1][0].kept_tokens == n_alike([*before, *tokens][:-1], ids) > last.prompt_tokens
    with AutoModel.from_pretrained(fable, device="cpu") as other:
        refused = chat(other, f"/load {path}", is_terminal=False)
        with pytest.raises(TurnsFailed, match="saved with another dtype"):
            refused.run()


def test_a_message_without_an_answer_is_answered_by_retry(model, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text('{"messages": [{"role": "user", "content": "Who is there?"}]}')
    found = chat(model, f"/load {path}", "/retry")
    (exchange,) = chat_of(found)
    _, _, text = afresh(model, [{"role": "user", "content": "Who is there?"}])
    assert exchange == Exchange("Who is there?", text, "", "length")


def chat_of(found):
    found.run()
    return found.session.conversation.exchanges


def test_the_conversation_is_on_disk_after_every_turn(model, tmp_path):
    path = tmp_path / "last.json"
    found = chat(model, FIRST, SECOND, CTRL_C, CTRL_C, last_path=str(path))
    with pytest.raises(Interrupted):
        found.run()
    again = chat(model, "/load", last_path=str(path))
    assert chat_of(again) == found.session.conversation.exchanges
    assert path.stat().st_mode & 0o777 == 0o600
