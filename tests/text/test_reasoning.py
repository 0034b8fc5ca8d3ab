"""Reasoning apart from content: through templates and back, in pieces of any kind, and before a
text that is held to a form."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlayer.errors import UsageError
from jlayer.text.calls import ToolParser
from jlayer.text.constraint import Constraint
from jlayer.text.conventions import convention_of
from jlayer.text.reasoning import (
    CONTENT,
    MARKS,
    REASONING,
    ReasoningSplitter,
    reasoning_marks_of,
)
from jlayer.text.tools import calls_only, messages_for_template, read_tools
from tests.text import chats, templates, tool_templates
from tests.text.marked import answer_of, divided, marked_tokenizer, streamed
from tests.text.samples import user

THINK, MISTRAL = MARKS[:2]


def split(marks, pieces, **options):
    """(reasoning, content)"""
    splitter = ReasoningSplitter(marks, **options)
    found = [each for piece in pieces for each in splitter.feed(piece)] + splitter.finish()
    assert all(text for _, text in found)
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds, key=[REASONING, CONTENT].index)
    return tuple("".join(text for k, text in found if k == kind) for kind in (REASONING, CONTENT))


THOUGHTS = ["", "hm", "one\n\ntwo </thin <think> \n three", "日本語 😀"]
ANSWERS = ["", "Hi", "a\n\nb </think> [/THI c\n", "<think>no</think>"]
OF_TEMPLATES = {
    "qwen 3": (chats.QWEN3, THINK),
    "glm 4": (chats.GLM4, THINK),
    "qwen 3 thinking": (tool_templates.QWEN3_THINKING, THINK),
    "mistral, by name": (tool_templates.MISTRAL_NAMED, MISTRAL),
}


@pytest.mark.parametrize("name", OF_TEMPLATES)
@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("said", ANSWERS)
def test_reasoning_is_read_as_its_template_wrote_it(here, name, thought, said):
    template, marks = OF_TEMPLATES[name]
    tokenizer, rng = marked_tokenizer(), random.Random(name)
    assert reasoning_marks_of(template) == marks
    if name in ("qwen 3", "glm 4"):  # they strip what they are given
        said = said.strip()
    messages = [*user("?"), {"role": "assistant", "content": said, "reasoning_content": thought}]
    prompt, answer = answer_of(tokenizer, template, messages)
    options = {"is_open": marks.are_left_open(prompt)}
    assert options["is_open"] == (name == "qwen 3 thinking")
    if name == "mistral, by name" and not thought and said.startswith("<think>"):
        return  # this template leaves out reasoning that is empty
    thought = thought.strip("\n")
    for pieces in divided(answer, rng):
        found = split(marks, pieces, **options)
        assert found == (thought, said.lstrip("\n"))
    ids = tokenizer.encode(answer, add_special_tokens=False)
    shown = marks.shown_tokens(tokenizer)
    assert split(marks, streamed(tokenizer, ids, shown), **options) == found


CASES = [  # text, whether the prompt is open, reasoning, content
    ("Hi", False, "", "Hi"),
    (" \n Hi", False, "", " \n Hi"),
    (" \n", False, "", " \n"),
    ("<thi", False, "", "<thi"),
    ("x<think>y</think>z", False, "", "x<think>y</think>z"),
    ("\n<think>\n\n</think>\n\nz", False, "", "z"),
    ("<think>a", False, "a", ""),
    ("<think>a\n</thin", False, "a\n</thin", ""),
    ("<think>a\n", False, "a\n", ""),
    ("<think>", False, "", ""),
    ("a</think>b", False, "", "a</think>b"),
    ("a</think>b", True, "a", "b"),
    ("\n\na\n</think>\n\nb\n", True, "a", "b\n"),
    ("</think>b", True, "", "b"),
    ("a", True, "a", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), CASES)
def test_texts(text, is_open, reasoning, content):
    for pieces in divided(text, random.Random(0)):
        assert split(THINK, pieces, is_open=is_open) == (reasoning, content)


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "\n", "a", " ", "<", "</", "think>"]), max_size=9
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_pieces_do_not_matter_and_nothing_but_marks_is_lost(words, is_open, rng):
    text = "".join(words)
    whole = split(THINK, [text], is_open=is_open)
    for pieces in divided(text, rng, n=2):
        assert split(THINK, pieces, is_open=is_open) == whole
    assert "".join(map(without_marks, whole)) == without_marks(text)


def without_marks(text):
    return re.sub("</?think>", "", "".join(text.split()))


def test_text_is_not_held_back_for_long():
    splitter = ReasoningSplitter(THINK)
    assert splitter.feed("<think>") == []
    assert splitter.feed("\nLet") == [(REASONING, "Let")]
    assert splitter.feed(" me\n") == [(REASONING, " me")]
    assert splitter.feed("see</thi") == [(REASONING, "\nsee")]
    assert splitter.feed("nk>\n\nYes") == [(CONTENT, "Yes")]
    assert splitter.feed("\n") == [(CONTENT, "\n")]
    assert ReasoningSplitter(None).feed("<think>") == [(CONTENT, "<think>")]


def test_marks_are_known_by_the_template_or_else_by_the_tokenizer():
    assert reasoning_marks_of(chats.GEMMA3) is None
    assert reasoning_marks_of(templates.CHATML, ["<think>"]) is None
    assert reasoning_marks_of(templates.CHATML, ["<think>", "</think>"]) == THINK
    assert reasoning_marks_of(tool_templates.MISTRAL_NAMED, ["<think>", "</think>"]) == MISTRAL
    assert MISTRAL.token_ids(marked_tokenizer()) is not None
    assert MARKS[2].token_ids(marked_tokenizer()) is None


def test_reasoning_first_then_calls(here):
    template = tool_templates.MISTRAL_NAMED
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    message = {"role": "assistant", "reasoning_content": "hm [TOOL_CALLS]f[ARGS]{}"}
    messages = messages_for_template(
        [*user("?"), {**message, "content": "So", "tool_calls": calls}]
    )
    answer = answer_of(marked_tokenizer(), template, messages)[1]
    splitter = ReasoningSplitter(reasoning_marks_of(template))
    parser = ToolParser(convention_of(template), {"f": {}})
    found = []
    for kind, text in [*splitter.feed(answer), *splitter.finish()]:
        if kind == CONTENT:
            parser.feed(text)
        else:
            found.append(text)
    parser.finish()
    assert "".join(found) == "hm [TOOL_CALLS]f[ARGS]{}"
    assert (parser.content, [(c.name, c.arguments) for c in parser.calls]) == (
        "So",
        [("f", '{"x": 1}')],
    )


# Before a text that is held to a form


@pytest.fixture
def yes():
    """(a tokenizer, a constraint to "yes", the marks' tokens)"""
    pytest.importorskip("llguidance")
    tokenizer = marked_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size + 3, "eos_ids": [tokenizer.eos_token_id]}
    return tokenizer, Constraint.choice(tokenizer, ["yes"], **sizes), THINK.token_ids(tokenizer)


def test_reasoning_is_free_and_what_follows_is_held(yes):
    tokenizer, constraint, marks = yes
    first = constraint.allowed()
    free = constraint.after_reasoning(marks, is_open=True)
    assert free.allowed().sum() == tokenizer.vocab_size - 1
    assert not free.allowed()[tokenizer.eos_token_id]
    free.accept(tokenizer.encode("no, or? <think>", add_special_tokens=False))
    assert not free.is_over
    assert (free.allowed([marks[1]]) == first).all()
    assert free.allowed().sum() == tokenizer.vocab_size - 1
    free.accept([marks[1]])
    assert (free.allowed() == first).all()
    free.accept(tokenizer.encode("yes", add_special_tokens=False))
    assert free.is_over


def test_a_text_may_begin_with_reasoning_or_not(yes):
    tokenizer, constraint, marks = yes
    first = constraint.allowed()
    either = constraint.after_reasoning(marks, is_open=False)
    assert set(np.flatnonzero(either.allowed() != first)) == {marks[0]}
    thinks, says = either.copy(), either.copy()
    thinks.accept([marks[0], *tokenizer.encode("no", add_special_tokens=False), marks[1]])
    assert (thinks.allowed() == first).all()
    says.accept(tokenizer.encode("yes", add_special_tokens=False))
    assert says.is_over
    with pytest.raises(UsageError, match="not allowed here"):
        says.accept([marks[0]])
    assert set(np.flatnonzero(either.allowed() != first)) == {marks[0]}


def test_forced_calls_after_reasoning(yes):
    tokenizer, _, marks = yes
    tools = read_tools([{"type": "function", "function": {"name": "f"}}])
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_ids": [tokenizer.eos_token_id]}
    held = calls_only(tokenizer, convention_of(chats.QWEN3), tools, is_parallel=False, **sizes)
    held = held.after_reasoning(marks, is_open=False)
    text = '<think>\nhm\n</think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    held.accept(tokenizer.encode(text, add_special_tokens=False))
    assert held.is_over
