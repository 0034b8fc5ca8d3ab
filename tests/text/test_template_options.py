"""Tools, documents and variables on their way from a user to the chat template: from Python and
from the command line."""

import json

import pytest

from jlayer.app.cli import main
from jlayer.engine.prompts import encode_prompts
from jlayer.errors import UsageError
from tests.conftest import BUNDLED
from tests.text.built import files_of
from tests.text.chats import QWEN3
from tests.text.families import FAMILIES
from tests.text.reference import ours, theirs, write
from tests.text.samples import user

pytestmark = pytest.mark.reference
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
MESSAGES = user("hi")
SHOWN = (
    "{{ messages[-1].content }}|{{ effort }}|{{ tools | length if tools else 0 }}"
    "|{{ documents | map(attribute='text') | join if documents else '' }}|{{ off is defined }}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a tokenizer and a template, and nothing else."""
    files = files_of(FAMILIES["qwen 3"]) | {"chat_template.jinja": QWEN3.encode()}
    return write(tmp_path_factory.mktemp("qwen"), files)


def ids(tokenizer, prompt=None, **form):
    (row,), _ = encode_prompts(tokenizer, prompt, folder="f", **form)
    return row.ids


def test_what_python_gives_reaches_the_template(here, qwen):
    one, other = ours(qwen), theirs(qwen)
    said = [*MESSAGES, {"role": "assistant", "content": "Hello, I"}]
    for messages, form, asked in (
        (MESSAGES, {}, {}),
        (MESSAGES, {"tools": [TOOL]}, {"tools": [TOOL]}),
        (MESSAGES, {"chat_template_kwargs": {"tools": [TOOL]}}, {"tools": [TOOL]}),
        (
            MESSAGES,
            {"chat_template_kwargs": {"enable_thinking": False, "unknown": [1]}},
            {"enable_thinking": False, "unknown": [1]},
        ),
        (said, {"continue_final_message": True}, {"continue_final_message": True}),
    ):
        begins = "continue_final_message" not in asked
        expected = other.apply_chat_template(
            messages, add_generation_prompt=begins, return_dict=False, **asked
        )
        assert ids(one, messages, **form) == expected
        assert ids(one, messages=messages, **form) == expected
    expected = other.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert ids(one, "hi", chat=True, chat_template_kwargs={"enable_thinking": False}) == expected
    template = "{% for d in documents %}{{ d.text }}{% endfor %}"
    asked = {"documents": [{"text": "seen"}], "chat_template": template}
    assert ids(one, MESSAGES, **asked) == other.encode("seen")


@pytest.mark.parametrize(
    ("prompt", "form", "words"),
    [
        ("hi", {"tools": [TOOL]}, "tools: is for chats"),
        ("hi", {"chat_template_kwargs": {"x": 1}}, "x: is for chats"),
        ([1, 2], {"documents": [{"text": "x"}]}, "documents: is for chats"),
        ([[1], [2]], {"continue_final_message": True}, "continue_final_message: is for chats"),
        ({"input_ids": [1]}, {"chat_template": "{{ x }}"}, "chat_template: is for chats"),
        (MESSAGES, {"tool": [TOOL]}, "option.*tool.*did you mean 'tools'"),
        (MESSAGES, {"chat_template_kwargs": [1]}, "found a list, expected a mapping"),
        (MESSAGES, {"chat_template_kwargs": {"self": 1}}, "self is none of them"),
        (MESSAGES, {"tools": [TOOL], "chat_template_kwargs": {"tools": []}}, "tools: given twice"),
        (MESSAGES, {"tools": [1]}, r"tools\[0\]: found a int"),
    ],
)
def test_what_nothing_would_read_is_refused(here, qwen, prompt, form, words):
    with pytest.raises(UsageError, match=words):
        ids(ours(qwen), prompt, **form)


# The command line


def generate(capsys, folder, *words):
    status = main(["generate", str(folder), "hi", "--show-prompt", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_variables_on_the_command_line(here, capsys, qwen, tmp_path):
    other = theirs(qwen)
    for words, asked in (
        (["enable_thinking=false"], {"enable_thinking": False}),
        ([f"tools={json.dumps([TOOL])}", "enable_thinking=true"], {"tools": [TOOL]}),
    ):
        options = [part for word in words for part in ("--template-var", word)]
        expected = other.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True, **asked
        )
        status, out, _ = generate(capsys, qwen, *options)
        assert (status, out) == (0, expected + "\n")
        status, out, _ = generate(capsys, qwen, *options, "--json")
        assert json.loads(out)["prompt_ids"] == other.encode(expected, add_special_tokens=False)
    template = tmp_path / "template.jinja"
    template.write_text(SHOWN)
    options = ["--chat-template", str(template), "--template-var", 'effort="high = é"']
    options += ["--template-var", 'documents=[{"text": "d"}]', "--template-var", "off=null"]
    status, out, _ = generate(capsys, BUNDLED, *options)
    assert (status, out) == (0, "hi|high = é|0|d|True\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x"], "--template-var: found 'x': expected NAME=JSON, such as enable_thinking=false"),
        (["enable-thinking=false"], "--template-var enable-thinking: expected NAME=JSON"),
        (["x=high"], "--template-var x: 'high' is not JSON"),
        (["x="], "--template-var x: '' is not JSON"),
        (['x={"a": 1, "a": 2}'], "a key occurs twice"),
        (["x=NaN"], "template variables: Out of range float"),
        (["x=1", "x=2"], "--template-var x: given twice"),
        (["messages=[]"], "messages is none of them"),
        (['tools={"name": "f"}'], "tools: found a dict, expected a list"),
        (['tools=[{"description": "f"}]'], "tools[0]: its name is None"),
    ],
)
def test_variables_that_are_none(here, capsys, qwen, words, line):
    status, out, err = generate(
        capsys, qwen, *(part for word in words for part in ("--template-var", word))
    )
    assert (status, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


def test_messages_that_the_template_raises_on_are_one_line(here, capsys, tmp_path):
    template = tmp_path / "template.jinja"
    for source, line in (
        ("{{ raise_exception('users go\nfirst') }}", "chat template: users go first"),
        ("{% if x %}{{ x.y.z }}{% endif %}", "have not the form that it reads"),
    ):
        template.write_text(source)
        options = ["--chat-template", str(template), "--template-var", "x=1"]
        status, out, err = generate(capsys, BUNDLED, *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert line in err


def test_ids_go_through_no_template(capsys):
    words = ["generate", str(BUNDLED), "--prompt-ids", "1,2", "--template-var", "x=1"]
    assert main(words) == 2
    assert "--template-var: is for chats" in capsys.readouterr().err
