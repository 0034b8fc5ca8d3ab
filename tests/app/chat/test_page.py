"""How an answer is shown: its reasoning dim, on terminals alone; and nothing moves the cursor."""

import io
from types import SimpleNamespace

import pytest

from jlayer import AutoModel
from jlayer.app.chat.conversation import Conversation, Exchange
from jlayer.app.chat.page import Page, has_colour, visible
from jlayer.app.chat.turns import Speaker, follow
from jlayer.engine.lane import Step
from jlayer.errors import StorageError
from jlayer.text.reasoning import ReasoningSplitter, reasoning_marks_of
from tests.app.chat.talk import Terminal
from tests.conftest import BUNDLED

MARKS = reasoning_marks_of("<think></think>")
PIECES = ("<thi", "nk>\nhm, ", "why\n</th", "ink>\n\nBecause.", " Yes")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Answering:
    """A run that gives these pieces; `ends` with an exception, or by itself."""

    def __init__(self, pieces, ends=None):
        lane = SimpleNamespace(token_ids=[], n_prompt=4, table=None, limit=9, n_left=9)
        self.lanes, self._pieces, self._ends = [lane], pieces, ends
        self.stats = SimpleNamespace(drafted=0, tokens_per_sweep=1.0)

    def __iter__(self):
        for number, piece in enumerate(self._pieces):
            self.lanes[0].token_ids.append(number)
            yield [Step(piece, (number,))]
        if self._ends is not None:
            raise self._ends

    def generations(self):
        reason = "stop" if self._ends is None else "interrupted"
        return [SimpleNamespace(text="".join(self._pieces), finish_reason=reason)]


@pytest.fixture(scope="module")
def model():
    with AutoModel.from_pretrained(BUNDLED, device="cpu") as found:
        yield found


def shown(model, monkeypatch, *, stream, pieces=PIECES, ends=None, **env):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", stream)
    answer = follow(model, Answering(pieces, ends), ReasoningSplitter(MARKS), Page(stream))
    return answer, stream.getvalue()


def test_reasoning_is_dim_on_a_terminal_and_apart_from_the_answer(model, monkeypatch):
    answer, text = shown(model, monkeypatch, stream=Terminal())
    assert (answer.reasoning, answer.text) == ("hm, why", "Because. Yes")
    plain = text.replace(PLAIN + DIM, "")
    assert plain == f"{DIM}hm, why{PLAIN}\n\nBecause. Yes\n"


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_where_no_colour_is_wanted_there_is_none(model, monkeypatch, env):
    _, text = shown(model, monkeypatch, stream=Terminal(), **env)
    assert text == "hm, why\n\nBecause. Yes\n"
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour(Terminal()), "an empty one says nothing"


def test_in_a_pipe_there_is_the_answer_alone_as_it_is(model, monkeypatch):
    pieces = (*PIECES, " \x1b[31m\r")
    answer, text = shown(model, monkeypatch, stream=io.StringIO(), pieces=pieces)
    assert text == "Because. Yes \x1b[31m\r\n"
    assert answer.reasoning == "hm, why"


@pytest.mark.parametrize(
    ("pieces", "text"), [((), "\n"), (("a",), "a\n"), (("a\n",), "a\n"), (("<think>hm",), "\n")]
)
def test_in_a_pipe_every_answer_ends_a_line(model, monkeypatch, pieces, text):
    assert shown(model, monkeypatch, stream=io.StringIO(), pieces=pieces)[1] == text


def test_an_error_in_the_middle_of_an_answer_does_not_stand_in_its_line(model, monkeypatch):
    stream = Terminal()
    with pytest.raises(StorageError):
        shown(model, monkeypatch, stream=stream, pieces=("a",), ends=StorageError("disk: gone"))
    assert stream.getvalue() == "a\n"


def test_on_a_terminal_no_text_moves_the_cursor(model, monkeypatch):
    everything = "".join(map(chr, range(0x110))) + "ü犬"
    _, text = shown(model, monkeypatch, stream=Terminal(), pieces=(everything,))
    assert all(each.isprintable() or each in "\t\n\xa0\xad" for each in text)
    assert "\x1b" not in text
    assert len(visible(everything)) == len(everything)
    assert visible("\x1b[2J\x9b") == "␛[2J\ufffd"


SO_FAR = ("", "<thi", "hm, ", "hm, why\n</th", "hm, why\n\nBecause.", "hm, why\n\nBecause. Yes")


@pytest.mark.parametrize("n_pieces", range(len(PIECES) + 1))
def test_an_answer_that_is_stopped_is_what_came_so_far(model, monkeypatch, n_pieces):
    stop = KeyboardInterrupt()
    answer, text = shown(
        model, monkeypatch, stream=Terminal(), pieces=PIECES[:n_pieces], ends=stop, NO_COLOR="1"
    )
    assert answer.stop is stop
    assert text.rstrip("\n") == SO_FAR[n_pieces]
    assert text.endswith("\n") == bool(n_pieces)
    before, _, after = SO_FAR[n_pieces].partition("\n\n")
    expected = ("", before) if n_pieces == 1 else (before, after)
    assert (answer.reasoning, answer.text) == expected


# A template that shows reasoning of the answer to the last message alone, as Qwen 3's does.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ opening }}{% endif %}"
)


def test_reasoning_is_given_to_the_template_which_leaves_it_out_of_later_turns(model):
    speaker = Speaker(model, options={}, template={"chat_template": THINKING})
    conversation = Conversation(None, [Exchange("one", "two", "a thought")])
    assert conversation.messages()[1]["reasoning_content"] == "a thought"
    text = model.text.decode(speaker.ids(conversation.prompt("three")))
    assert text == "<|user|>one<|assistant|>two<|user|>three<|assistant|>"
    last = model.text.decode(speaker.ids(conversation.messages(), add_generation_prompt=False))
    assert "<think>a thought</think>two" in last


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_template_that_begins_the_reasoning_is_seen(model, opening):
    speaker = Speaker(model, options={}, template={"chat_template": THINKING, "opening": opening})
    splitter = speaker.splitter(speaker.ids([{"role": "user", "content": "one"}]))
    pieces = [*splitter.feed("hm</think>so"), *splitter.finish()]
    kinds = {kind for kind, _ in pieces}
    assert kinds == ({"reasoning", "content"} if opening else {"content"})
