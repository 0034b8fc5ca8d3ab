"""What is learned of each form of data, held against transformers; and data that means harm."""

import hashlib
import json
import os
import random
import string

import pytest

from jlayer.errors import StorageError, UsageError
from jlayer.text import sandbox
from jlayer.tuning import data
from jlayer.tuning.data import read_data
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.text.conftest import COMPILED, NOW
from tests.tuning import chats
from tests.tuning.chats import AGAIN, ANSWER, CHAT, END, LONG, QUESTION, SYSTEM, TOOLS, Reader


@pytest.fixture
def here(monkeypatch):
    """Templates run in this process: the same code, without the start of another."""

    def render(template, variants, marks):
        payload = {"template": template, "variants": variants, "marks": marks}
        payload["now"] = NOW.isoformat()
        found = sandbox.render_variants(json.loads(json.dumps(payload)), limit=1 << 20)
        return sandbox.read_answer(found)

    monkeypatch.setattr(sandbox, "render", render)
    monkeypatch.setattr("jlayer.text.jinja.compile_template", COMPILED)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return chats.folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def read(here, tokenizers, tmp_path):
    return Reader(tokenizers, tmp_path)


@pytest.fixture
def reads_with(here, tmp_path):
    """(name of a published tokenizer) -> a Reader."""
    return lambda name: Reader(SHARED_DATA / "tokenizers" / name, tmp_path)


def error(read, line, template=None):
    """What is said of a line, behind its place."""
    with pytest.raises(UsageError) as found:
        read(line, template=template)
    place, _, words = str(found.value).partition("data.jsonl: line 1: ")
    assert place
    assert words
    assert "\n" not in str(found.value)
    return words


# Texts, prompts and completions


def test_a_text_is_learned_with_its_end_but_not_its_begin(read):
    ids, weights = read.one({"text": "a king"})
    begin, end = read.tokenizer.bos_token_id, read.tokenizer.eos_token_id
    assert ids == [begin, *read.tokenizer.encode("a king", add_special_tokens=False), end]
    assert weights == [0.0] + [1.0] * (len(ids) - 1)


@pytest.mark.parametrize("before", ["", "<|begin_of_text|>"])
@pytest.mark.parametrize("after", ["", "<|end_of_text|>"])
def test_begin_and_end_stand_once_also_where_the_text_has_them(read, before, after):
    text, prompt = f"{before}a king{after}", f"{before}a "
    plain = read.one({"text": "a king"})
    assert read.one({"text": text}) == plain
    ids, weights = read.one({"prompt": prompt, "completion": f"king{after}"})
    assert ids == plain[0]
    assert weights[-1] == 1.0


def test_the_end_of_a_prompt_that_has_one_is_not_learned(read):
    found = read.learned({"prompt": "a king<|end_of_text|>", "completion": " a queen"})
    assert found == [" a queen<|end_of_text|>"]


@pytest.mark.parametrize("form", ["single", "both ends"])
def test_a_tokenizer_that_adds_the_end_itself(tokenizers, tmp_path, form):
    raw = json.loads((tokenizers / "tokenizer.json").read_text())
    process = raw["post_processor"]
    end = {"id": "<|end_of_text|>", "ids": [1], "tokens": ["<|end_of_text|>"]}
    process["special_tokens"][end["id"]] = end
    process["single"].append({"SpecialToken": {"id": end["id"], "type_id": 0}})
    if form == "single":
        del process["single"][0]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizers / name).read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    read = Reader(folder, tmp_path)
    assert read.tokenizer.encode("a")[-1] == read.tokenizer.eos_token_id
    ids, _ = read.one({"text": "a king"})
    assert ids.count(read.tokenizer.eos_token_id) == 1
    assert read.learned({"prompt": "a king", "completion": " and"}) == [" and<|end_of_text|>"]


def test_a_completion_is_learned_and_its_prompt_is_not(read):
    line = {"prompt": "Who lives there?", "completion": " A cat."}
    ids, _ = read.one(line)
    assert ids == read.one({"text": "Who lives there? A cat."})[0]
    assert read.learned(line) == [" A cat.<|end_of_text|>"]


def test_a_token_that_spans_prompt_and_completion_is_learned(read):
    found = read.learned({"prompt": "once upon a ti", "completion": "me"})
    assert found == [" time<|end_of_text|>"]


@needs_shared_data
@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral-v1"])
def test_every_boundary_between_prompt_and_completion(name, reads_with):
    read, text = reads_with(name), "Héllo  wörld, 日本 😀\n\nthe end"
    encode = read.tokenizer.encode
    lines = [{"prompt": text[:n], "completion": text[n:]} for n in range(1, len(text))]
    for line, example in zip(lines, read(*lines), strict=True):
        ids = list(example.ids)
        assert ids == [*encode(text), read.tokenizer.eos_token_id]
        n = len(ids) - sum(weight == 1.0 for weight in example.weights)
        assert list(example.weights) == [0.0] * n + [1.0] * (len(ids) - n)
        # What is not learned is of the prompt alone, and the next token is not.
        assert encode(line["prompt"])[:n] == ids[:n]
        assert encode(line["prompt"])[: n + 1] != ids[: n + 1]


def test_the_words_of_alpacas_prompts(read):
    with_input = {"instruction": "Name it.", "input": "a cat", "output": "Tom"}
    assert read.learned(with_input) == ["Tom<|end_of_text|>"]
    assert read.tokenizer.decode(read.one(with_input)[0]) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Input:\na cat\n\n### Response:\nTom"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName {it}.\n\n### Response:\nTom"
    )
    for more in ({}, {"input": ""}, {"input": None}):
        ids, _ = read.one({"instruction": "Name {it}.", "output": "Tom", **more})
        assert read.tokenizer.decode(ids) == without


# Conversations


def theirs(read, template, messages, **options):
    """(ids, whether each is learned) by transformers; without marks in the template, the ids."""
    marks = "{% generation %}" in template
    found = read.theirs.apply_chat_template(
        messages,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=marks,
        **options,
    )
    return (found["input_ids"], found["assistant_masks"]) if marks else found["input_ids"]


@pytest.mark.reference
@pytest.mark.parametrize("messages", [CHAT, LONG, [SYSTEM, *LONG], [*CHAT, AGAIN]])
@pytest.mark.parametrize("name", chats.MARKED)
def test_the_same_is_learned_as_transformers_marks(read, name, messages):
    if name == "llama 2":
        messages = [each for each in messages if each is not SYSTEM]
    template = chats.MARKED[name]
    ids, mask = theirs(read, template, messages)
    assert sum(mask) > 5
    assert read.one({"messages": messages}, template) == (ids, [float(each) for each in mask])


@pytest.mark.reference
@pytest.mark.parametrize("name", chats.MARKED)
def test_an_answer_that_says_what_was_asked(read, name):
    echo = [QUESTION, {"role": "assistant", "content": QUESTION["content"]}, AGAIN, END]
    ids, mask = theirs(read, chats.MARKED[name], echo)
    assert read.one({"messages": echo}, chats.MARKED[name]) == (ids, [float(each) for each in mask])


@pytest.mark.reference
@needs_shared_data
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_published_tokenizers_with_their_own_templates(reads_with, name):
    read = reads_with(name)
    ids, _ = read.one({"messages": LONG})
    assert ids == read.theirs.apply_chat_template(LONG, return_dict=False)
    first, end = {"llama2": (" ", " </s>"), "llama3": ("", "<|eot_id|>")}[name]
    found = [text.removeprefix("▁") for text in read.learned({"messages": LONG})]
    assert [text.strip() for text in found] == [
        (first + each["content"] + end).strip() for each in (ANSWER, END)
    ]
    marked = {"llama2": chats.LLAMA2, "llama3": chats.LLAMA3_FIRST}[name]
    ids, mask = theirs(read, marked, LONG)
    assert read.one({"messages": LONG}, marked) == (ids, [float(each) for each in mask])


@pytest.mark.reference
@needs_shared_data
def test_qwens_template_with_tools(read):
    folder = SHARED_DATA / "tokenizers" / "qwen2.5-chat-template"
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
        ANSWER,
    ]
    line = {"messages": messages, "tools": TOOLS}
    assert read.one(line, template)[0] == theirs(read, template, messages, tools=TOOLS)
    assert read.learned(line, template) == [
        '<tool_call>\n{"name": "look", "arguments": {"at": "cat"}}\n</tool_call><|im_end|>',
        "An old woman, and a cat.<|im_end|>",
    ]


def test_a_template_in_its_own_process(tokenizers, tmp_path):
    found = Reader(tokenizers, tmp_path).learned({"messages": CHAT}, chats.CHATML)
    assert found == ["An old woman, and a cat.<|im_end|>"]


def test_lists_of_messages_as_prompt_and_completion(read):
    line = {"prompt": LONG[:2], "completion": LONG[2:]}
    assert read.learned(line, chats.CHATML) == ["They went home.<|im_end|>"]
    whole = read.one({"messages": LONG}, chats.CHATML)[0]
    assert read.one(line, chats.CHATML)[0] == whole


def test_a_template_that_rewrites_earlier_answers_is_refused_unless_they_count_nothing(read):
    words = error(read, {"messages": LONG}, chats.QWEN3)
    assert words.startswith("messages[1]: this chat template writes this answer in another way")
    earlier = {"messages": [QUESTION, ANSWER | {"weight": 0}, AGAIN, END]}
    assert read.learned(earlier, chats.QWEN3) == [
        "<think>\n\n</think>\n\nThey went home.<|im_end|>"
    ]
    parts = {"prompt": LONG[:3], "completion": LONG[3:]}
    assert read.one(parts, chats.QWEN3) == read.one(earlier, chats.QWEN3)


def test_gpt_oss_ends_its_last_answer_in_another_way_than_earlier_ones(read):
    found = read.learned({"messages": CHAT}, chats.HARMONY)
    assert found == ["<|channel|>final<|message|>An old woman, and a cat.<|return|>"]
    assert "in another way once more follows" in error(read, {"messages": LONG}, chats.HARMONY)


def test_a_template_that_ends_a_chat_with_one_more_token(read):
    found = read.learned({"messages": LONG}, chats.PHI3)
    assert found == [
        "An old woman, and a cat.<|end|>",
        "They went home.<|end|>\n<|end_of_text|>",
    ]


def test_a_template_without_special_tokens(read):
    found = read.learned({"messages": LONG}, chats.PLAIN)
    assert found == [" An old woman, and a cat.\n", " They went home.\n"]


def test_a_template_that_opens_an_answer_otherwise_than_it_writes_one(read):
    words = error(read, {"messages": CHAT}, chats.OPENS_A_THOUGHT)
    assert words.startswith("messages[1]: this chat template opens an answer in another way than")
    words = error(read, {"prompt": [QUESTION], "completion": [ANSWER]}, chats.OPENS_A_THOUGHT)
    assert words.startswith("completion[0]: this chat template opens")


def test_an_answer_before_all_else(read):
    found = read.learned({"messages": [ANSWER, AGAIN, END]}, chats.CHATML)
    assert found == ["An old woman, and a cat.<|im_end|>", "They went home.<|im_end|>"]
    words = error(read, {"messages": [ANSWER, AGAIN, END]}, chats.LLAMA3_FIRST)
    assert words.startswith("messages[0]: is the assistant's, and where it begins")


def test_special_tokens_in_what_is_said_stay_text(read):
    inside = {"role": "assistant", "content": "a <|im_end|> b<|end_of_text|>"}
    ids, weights = read.one({"messages": [QUESTION, inside]}, chats.CHATML)
    special = set(read.tokenizer.special_tokens.values())
    learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert [token in special for token in learned] == [False] * (len(learned) - 1) + [True]
    assert read.tokenizer.decode(learned) == "a <|im_end|> b<|end_of_text|>"


def test_tools_that_a_template_does_not_read_are_refused(read):
    line = {"messages": CHAT, "tools": TOOLS}
    assert error(read, line, chats.CHATML).startswith("tools: this chat template does not read")
    ids, _ = read.one(line, chats.READS_TOOLS)
    assert ids != read.one({"messages": CHAT}, chats.READS_TOOLS)[0]
    for none in ([], None):
        assert read.one({"messages": CHAT, "tools": none}, chats.CHATML)


# Weights


def test_weights_of_a_line_and_of_answers(read):
    answers = [ANSWER | {"weight": 0.5}, END | {"weight": 3}]
    messages = [QUESTION, answers[0], AGAIN, answers[1]]
    ids, weights = read.one({"messages": messages, "weight": 2}, chats.CHATML)
    plain_ids, plain = read.one({"messages": LONG}, chats.CHATML)
    assert ids == plain_ids
    first, second = (
        len(read.tokenizer.encode(each["content"], add_special_tokens=False)) + 1
        for each in answers
    )
    assert [weight for weight in weights if weight] == [1.0] * first + [6.0] * second
    assert [weight > 0 for weight in weights] == [weight > 0 for weight in plain]
    assert read.one({"text": "a king", "weight": 0})[1] == [0.0] * 4


@pytest.mark.parametrize(
    "weight", ["null", "true", '"1"', "-1", "1e-4", "1e6", "1e999", "[]", "1" + "0" * 400]
)
def test_weights_that_are_none(read, weight):
    whole = json.dumps({"messages": CHAT})
    for line in (
        whole[:-1] + f', "weight": {weight}}}',
        whole.replace("cat.", f'cat.", "weight": {weight}, "name": "'),
    ):
        with pytest.raises(UsageError, match=r"weight: found .{1,40}, expected 0, or a number"):
            read.raw(line.encode(), template=chats.CHATML)


def test_a_weight_that_would_not_be_used_is_refused(read):
    line = {"messages": [QUESTION | {"weight": 1}, ANSWER]}
    assert error(read, line, chats.CHATML).startswith("messages[0]: weight: found in a message")
    line = {"prompt": [QUESTION, ANSWER | {"weight": 1}, AGAIN], "completion": [END]}
    assert error(read, line, chats.CHATML).startswith("prompt[1]: weight: found in a message")


# Files


def lines_of(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_marks_of_byte_order_line_ends_and_empty_lines(read):
    plain = read.raw(lines_of("a", "b"))
    assert len(plain.examples) == 2
    for raw in (
        b"\xef\xbb\xbf" + lines_of("a", "b"),
        lines_of("a", "b").replace(b"\n", b"\r\n"),
        b"\n \t\r\n" + lines_of("a") + b"\n\n" + lines_of("b"),
        lines_of("a", "b").rstrip(),
    ):
        found = read.raw(raw, "other.JSON")
        assert found.examples == plain.examples
        assert found.sha256 != plain.sha256
    with pytest.raises(UsageError, match=r"line 4: not JSON \(.* at column 1\)"):
        read.raw(b"\n\n" + lines_of("a") + b"nonsense\n")


def test_a_line_may_hold_other_characters_that_end_lines(read):
    text = "a\u2028b\u0085c\x0b\x00\r\n"
    raw = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    assert read.tokenizer.decode(read.raw(raw).examples[0].ids) == text


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_is_one_example(read, name):
    raw = "\ufeffOnce upon a time\r\nthere was é".encode()
    found = read.raw(raw, name)
    (example,) = found.examples
    assert read.tokenizer.decode(example.ids) == raw.decode("utf-8-sig")
    assert list(example.weights) == [0.0] + [1.0] * (len(example.ids) - 1)
    assert found.n_tokens == len(example.ids) - 1
    assert found.sha256 == hashlib.sha256(raw).hexdigest()


def test_many_lines_keep_their_order(read):
    texts = [f"king number {n}" for n in range(300)]
    found = read.raw(lines_of(*texts)).examples
    assert [read.tokenizer.decode(each.ids) for each in found] == texts
    broken = lines_of(*texts[:200]) + b"{}\n" + lines_of(*texts) + b"nonsense\n"
    with pytest.raises(UsageError, match="line 201: found nothing, expected one of: text; prompt"):
        read.raw(broken)


def test_of_two_lines_that_are_wrong_the_first_is_told(read, monkeypatch):
    monkeypatch.setattr(data, "MOST_TEXT_BYTES", 100)
    with pytest.raises(UsageError, match="line 1: found nothing"):
        read.raw(b"{}\n" + lines_of("a" * 100))
    with pytest.raises(UsageError, match="line 2: longer than 0 MiB; give it in parts, as lines"):
        read.raw(lines_of("a", "a" * 100))
    with pytest.raises(UsageError, match=r'a.txt: longer than 0 MiB.*lines of {"text": ...}'):
        read.raw(b"a" * 101, "a.txt")
    assert read.raw(b"a" * 100, "a.txt").n_tokens


WRONG_FILES = {
    "a.csv": (b"a", "its name ends in .csv, expected .jsonl or .json"),
    "a": (b"a", "its name has no ending, expected"),
    "a.jsonl": (b"", "has no example, expected one a line"),
    "b.jsonl": (b"\n\n", "has no example, expected one a line"),
    "c.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "run: git lfs pull"),
    "d.json": (b'[\n{"text": "a"}\n]', r"line 1: found a list, expected an object a line; jq"),
    "e.json": (b'[{"text": "a"}]', r"line 1: found a list, expected an object a line; jq"),
    "f.json": (b'{\n"text": "a"\n}', r"line 1: found an object that goes on, expected one a line"),
    "g.jsonl": (b'{"text": "\xff"}', r"line 1: not UTF-8 \(byte 10\)"),
    "h.jsonl": ('{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    "a.txt": (b"", "is empty, expected a text"),
    "b.txt": (b"\xef\xbb\xbf", "is empty, expected a text"),
    "c.txt": (b"a\xff", "not UTF-8 at byte 1; convert"),
    "d.txt": (b"version https://git-lfs.github.com/spec/v1\n", "run: git lfs pull"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_are_none(read, name):
    raw, words = WRONG_FILES[name]
    with pytest.raises(UsageError, match=words):
        read.raw(raw, name)


def test_what_is_no_file(read, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name, words in (("folder", "not a regular file"), ("fifo", "not a regular"), ("x", "miss")):
        with pytest.raises(UsageError, match=words):
            read_data(tmp_path / f"{name}.jsonl", read.tokenizer)
        (tmp_path / f"{name}.txt").symlink_to(tmp_path / f"{name}.jsonl")
        with pytest.raises(UsageError, match=words):
            read_data(tmp_path / f"{name}.txt", read.tokenizer)


def test_a_file_that_cannot_be_read(read, tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of("a"))
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        read_data(path, read.tokenizer)


# Lines that are none

WRONG_LINES = {
    "{}": "found nothing, expected one of: text; prompt and completion; instruction and output",
    "[]": "found a list, expected an object a line",
    "1": "found a JSON int, expected an object",
    '{"text": "a", "text": "b"}': "key 'text' stands twice",
    '{"text": NaN}': "NaN is not JSON",
    '{"text": 1' + "0" * 5000 + "}": r"not JSON \(a number of thousands of digits\); mend it",
    '{"text": ' + "[" * 200 + "]" * 200 + "}": "nested deeper than 64 levels",
    '{"text": ""}': "text: found an empty text, expected some text; mend the line",
    '{"text": null}': "text: found null, expected some text",
    '{"text": 1e5}': "text: found a number",
    '{"text": "\\ud800"}': r"text: not valid Unicode \(a lone surrogate at character 0\)",
    '{"prompt": "\\ud83d", "completion": "\\ude00"}': "text: not valid Unicode",
    '{"text": "a", "id": 1, "b": 2}': "found b, id beside text; leave out what is not of one form",
    '{"conversations": []}': "found conversations, expected one of: text; prompt and completion",
    '{"a\\nb\\ud800": 1}': r"found a\\nb\\ud800, expected one of",
    '{"prompt": "a"}': "found prompt, expected one of",
    '{"prompt": "", "completion": "a"}': "prompt: found an empty text",
    '{"prompt": "a", "completion": []}': "prompt is a text, completion a list; expected two texts",
    '{"prompt": "a", "completion": "b", "tools": []}': "tools: found beside texts",
    '{"prompt": [], "completion": []}': 'found no answer, expected a message of "role"',
    '{"prompt": [1], "completion": []}': r"prompt\[0\]: found a number, expected {\"role\": ...,",
    '{"instruction": "a", "output": "b", "input": 0}': "input: found a number, expected some text",
    '{"instruction": "a", "output": ""}': "output: found an empty text",
    '{"messages": {}}': "messages: found an object, expected a list of messages",
    '{"messages": []}': 'found no answer, expected a message of "role": "assistant"',
    '{"messages": [{"role": "user", "content": "a"}]}': "found no answer, expected a message",
    '{"messages": [{"role": ["assistant"]}]}': "found no answer, expected a message",
    '{"messages": [{"role": "user"}, {"role": "assistant"}]}': "chat template: .*; it works with",
    '{"messages": [{"role": "a\\nb"}, {"role": "assistant"}]}': r"messages\[0\]: role is",
}


@pytest.mark.parametrize("line", WRONG_LINES, ids=range(len(WRONG_LINES)))
def test_lines_that_are_none(read, line):
    with pytest.raises(UsageError, match=f"data.jsonl: line 1: {WRONG_LINES[line]}") as found:
        read.raw(line.encode(), template=chats.CHATML)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 800


def test_messages_that_a_template_refuses(read):
    line = {"messages": [QUESTION, QUESTION, ANSWER]}
    assert error(read, line, chats.LLAMA2) == "chat template: roles must alternate"


def test_a_model_without_a_template(read):
    with pytest.raises(UsageError, match="no chat template") as found:
        read({"messages": CHAT})
    assert "data.jsonl: line 1: " in str(found.value)
    assert found.value.command_line.endswith("in a file (--chat-template F)")


def test_a_text_of_no_tokens(read, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(type(read.tokenizer), "encode", lambda *args, **options: [])
    monkeypatch.setattr(read.tokenizer, "eos_token_id", None)
    assert error(read, {"text": "a"}).startswith("makes 0 tokens, expected 2 or more")
    assert error(read, {"prompt": "a", "completion": "b"}).startswith("makes 0 tokens")


def test_long_names_and_texts_are_cut_in_what_is_said(read):
    for line in (
        {"x" * 100_000: 1},
        {"messages": [{"role": "x" * 100_000}, ANSWER]},
        {f"{n}": 1 for n in range(10_000)},
    ):
        assert len(error(read, line, chats.CHATML)) < 700


# Chance

SEEDS = [
    {"text": "Once upon a time"},
    {"prompt": "Who?", "completion": " A cat.", "weight": 0.5},
    {"instruction": "Name it.", "input": "a", "output": "b"},
    {"messages": LONG},
    {"messages": [SYSTEM, QUESTION, ANSWER | {"weight": 0}, AGAIN, END], "tools": TOOLS},
    {"prompt": [QUESTION], "completion": [ANSWER, AGAIN, END], "tools": None},
]
ODD = [None, True, 0, -1, 1e-300, 1e308, 10**400, "", "\ud800", "\x00", "<|im_end|>", [], {}, "é"]
BYTES = [b"\xff", b"\x00", b'"', b"{", b"[", b"1e999", b"NaN", b"\\ud800", b"\\", b"9" * 5000]


def mutated(value, rng):
    """A value of JSON, with something in it replaced, doubled or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {rng.choice(["weight", "role", "text", "x\n", "\udcff"]): value[key]}
        return value | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        new = rng.choice([[], [value[at]] * 2, [mutated(value[at], rng)]])
        return value[:at] + new + value[at + 1 :]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice([*string.printable, "\ud83d", "\u2028"]) + value[at + 1 :]
    return rng.choice(ODD)


def lines_by_chance(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        value = rng.choice(SEEDS)
        for _ in range(rng.randrange(1, 4)):
            value = mutated(value, rng)
        raw = json.dumps(value).encode()
        if rng.random() < 0.3:
            at = rng.randrange(len(raw) + 1)
            raw = raw[:at] + rng.choice(BYTES) + raw[at + rng.randrange(3) :]
        yield raw


@pytest.mark.parametrize("name", ["chatml", "llama 3, first", "llama 2", "qwen 3", "gpt-oss"])
def test_a_line_is_an_example_or_one_line_of_words(read, name):
    template = (chats.MARKED | chats.PUBLISHED)[name]
    template = template if "tools" in template else "{# tools #}" + template
    outcomes = {"read": 0, "refused": 0}
    for raw in lines_by_chance(700, seed=name):
        try:
            found = read.raw(raw, template=template)
        except UsageError as problem:
            outcomes["refused"] += 1
            words = str(problem)
            assert "data.jsonl: " in words, raw
            assert len(words.splitlines()) == 1, raw
            assert words.isprintable(), raw
            assert len(words) < 900, raw
            assert "object at 0x" not in words
            continue
        outcomes["read"] += 1
        (example,) = found.examples
        assert len(example.ids) == len(example.weights) >= 2, raw
        assert min(example.ids) >= 0
        assert max(example.ids) < read.tokenizer.vocab_size
        assert example.weights[0] == 0.0
        assert all(weight == 0.0 or 1e-6 <= weight <= 1e6 for weight in example.weights), raw
    assert min(outcomes.values()) > 30, outcomes
