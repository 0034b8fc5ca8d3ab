"""Texts for tuning: which tokens a line has, which of them count, and what is refused."""

import json
import tracemalloc

import pytest

from jlayer.errors import CheckpointError, UsageError
from jlayer.text.renderer import MOST_BYTES, Renderer
from jlayer.text.sandbox import render
from jlayer.tuning import data
from jlayer.tuning.data import read_data, read_examples
from jlayer.tuning.examples import Example
from jlayer.tuning.lanes import cut
from tests.text.built import files_of
from tests.text.chats import TEMPLATES
from tests.text.families import FAMILIES
from tests.text.reference import ours, theirs, write
from tests.text.samples import LARGE, bundled, folder_of, load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


TURNS = [user("a king"), said("the cat"), user("the queen"), said("went home", weight=0.5)]


@pytest.fixture
def read(tmp_path):
    """Reads lines (objects, or bytes as they stand) as a file."""

    def read(tokenizer, *lines, name="data.jsonl", **options):
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw))
        return read_examples(path, tokenizer, **options)

    return read


def test_bad_lines_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    tokenizer = bundled()
    good, bad = '{"text": "a cat"}\n', ('{"txt": 1}\n', "[]\n", '{"text": "a", "weight": -1}\n')
    file, clean = tmp_path / "some.jsonl", tmp_path / "clean.jsonl"
    file.write_text(bad[0] + good + "".join(bad[1:]) + good)
    clean.write_text(2 * good)
    found = read_data(file, tokenizer, skips_bad=True)
    assert found.examples == read_data(clean, tokenizer).examples
    places = [told.split(": ")[0] for told in found.skipped]
    assert places == [f"{file} line {number}" for number in (1, 3, 4)]
    file.write_text("".join(bad))
    with pytest.raises(UsageError, match=r"no text is left; 3 bad lines: .* line 1: "):
        read_data(file, tokenizer, skips_bad=True)
    file.write_text("version https://git-lfs.github.com/spec/v1\n" + good)
    with pytest.raises(UsageError, match="Git LFS pointer"):
        read_data(file, tokenizer, skips_bad=True)


def runs(tokenizer, example):
    """(text, weight) of the stretches of one weight."""
    found = []
    for token, weight in zip(example.ids.tolist(), example.all_weights.tolist(), strict=True):
        if not found or found[-1][1] != weight:
            found.append(([], weight))
        found[-1][0].append(token)
    return [
        (tokenizer.decode(ids, skip_special_tokens=False, continues=True), w) for ids, w in found
    ]


def learnt(tokenizer, example):
    """The stretches that count."""
    return [text for text, weight in runs(tokenizer, example) if weight]


@pytest.fixture
def llama2():
    return load("llama2")


@pytest.fixture
def llama3():
    return load("llama3")


@pytest.fixture(params=LARGE)
def large(request):
    return load(request.param)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """family -> (our tokenizer, that of transformers), each with its default template."""
    found = {}
    for family, templates in TEMPLATES.items():
        files = files_of(FAMILIES[family])
        files["chat_template.jinja"] = templates["default"].encode()
        folder = write(tmp_path_factory.mktemp("family"), files)
        found[family] = ours(folder), theirs(folder)
    return found


# Texts, prompts and completions


@pytest.mark.parametrize("text", ["Hello,  world", " é日本 x", "a", "two\n\nlines\n", "a <b> c"])
def test_a_text_counts_whole_between_bos_and_the_end_of_text(read, large, text):
    (one,) = read(large, {"text": text})
    assert list(one.ids) == [*large.encode(text), large.eos_token_id]
    assert one.ids[0] == large.bos_token_id
    assert one.weights is None
    assert one.all_weights.tolist() == [0.0, *[1.0] * (len(one) - 1)]


def test_a_plain_file_is_one_text(read):
    whole = "One day.\r\nThe end 日.\n" * 500
    for raw in (whole.encode(), b"\xef\xbb\xbf" + whole.encode()):
        (one,) = read(bundled(), raw, name="data.TXT")
        assert list(one.ids) == [*bundled().encode(whole), bundled().eos_token_id]
        assert one.n_learned == len(one) - 1


def test_a_text_takes_four_bytes_a_token(read):
    """And four more where its tokens count by other weights than 1; cut into pieces, as many."""
    words = "Once upon a time there was a king. " * 200
    lines = [{"text": words}] * 20, [{"prompt": words, "completion": words}] * 20
    for some, least in zip(lines, (4, 8), strict=True):
        read(bundled(), some[0])  # what is there once
        tracemalloc.start()
        try:
            found = read(bundled(), *some)
            n_bytes, n_tokens = tracemalloc.get_traced_memory()[0], sum(map(len, found))
            assert n_tokens > 20_000
            assert least * n_tokens < n_bytes < 1.5 * least * n_tokens
            pieces = cut(found, 512)
            n_more = tracemalloc.get_traced_memory()[0] - n_bytes
            assert sum(map(len, pieces)) > n_tokens / 2
            assert n_more < (least - 4 + 2) * n_tokens
        finally:
            tracemalloc.stop()


def test_a_text_of_nothing_has_nothing_to_learn():
    assert [Example.of(range(n)).n_learned for n in (0, 1, 2, 5)] == [0, 0, 1, 4]
    assert Example.of([5, 6, 7], [0, 2, 0]).n_learned == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "counts"),
    [
        ("The sky is", " blue", [" blue"]),
        ("", "The sky", ["The sky"]),
        ("日", "本 é", [None]),  # and of both characters
        ("a", " é", [" é"]),
        ("x = ", "1", [None]),  # some have a token of the space and the digit
    ],
)
def test_a_completion_counts_alone_with_the_end_of_text(read, large, prompt, completion, counts):
    (one,) = read(large, {"prompt": prompt, "completion": completion, "weight": 2})
    assert list(one.ids) == [*large.encode(prompt + completion), large.eos_token_id]
    (before, none), (after, weight) = runs(large, one)
    assert (none, weight) == (0, 2)
    end = large.decode([large.eos_token_id], skip_special_tokens=False)
    assert after.endswith(completion + end)
    if counts != [None]:
        assert after.lstrip() == completion.lstrip() + end
    begin = large.decode([large.bos_token_id], skip_special_tokens=False)
    assert (before + after).replace(" ", "") == (begin + prompt + completion + end).replace(" ", "")


def test_a_token_of_the_prompt_and_the_completion_counts(read, llama3):
    (one,) = read(llama3, {"prompt": "They f", "completion": "inished"})
    assert learnt(llama3, one) == [" finished<|end_of_text|>"]


def test_neither_bos_nor_the_end_of_text_stands_twice(read, llama3):
    (one,) = read(llama3, {"text": "<|begin_of_text|>a king<|end_of_text|>"})
    assert [one] == read(llama3, {"text": "a king"})
    assert learnt(llama3, one) == ["a king<|end_of_text|>"]
    (one,) = read(llama3, {"prompt": "a", "completion": " king<|end_of_text|>"})
    assert learnt(llama3, one) == [" king<|end_of_text|>"]


def test_alpacas_lines_have_the_words_of_stanford(read, llama3):
    row = {"instruction": "Add {x}.", "input": "1 2", "output": "3"}
    one, other, third = read(llama3, row, row | {"input": ""}, {**row, "weight": 0})
    assert runs(llama3, one) == [
        (
            "<|begin_of_text|>Below is an instruction that describes a task, paired with an input "
            "that provides further context. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n",
            0,
        ),
        ("3<|end_of_text|>", 1),
    ]
    assert runs(llama3, other)[0][0] == (
        "<|begin_of_text|>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Response:\n"
    )
    assert third == Example.of(one.ids, [0.0] * len(one))
    del row["input"]
    assert read(llama3, row) == [other]


# Chats

# family -> what counts of TURNS
LEARNT = {
    "gemma 3": ["the cat<end_of_turn>", "went home<end_of_turn>"],
    "command r": ["the cat<|END_OF_TURN_TOKEN|>", "went home<|END_OF_TURN_TOKEN|>"],
    "glm 4": ["\n\n<think></think>\nthe cat", "\n\n<think></think>\nwent home"],
    "mistral, converted from tekken": ["the cat</s>", "went home</s>"],
    "phi 4": ["the cat<|im_end|>", "went home<|im_end|>"],
    "phi 3 mini": [" the cat<|end|>", " went home<|end|>"],
    "smollm 3": [
        "<|im_start|>assistant\nthe cat<|im_end|>\n",
        "<|im_start|>assistant\nwent home<|im_end|>\n",
    ],
    "granite 3": ["the cat<|end_of_text|>", "went home<|end_of_text|>"],
}
# And of the two texts of those that write turns in another way once others follow.
APART = {
    "qwen 3": [
        "<think>\n\n</think>\n\nthe cat<|im_end|>",
        "<think>\n\n</think>\n\nwent home<|im_end|>",
    ],
    "gpt-oss": [
        "<|channel|>final<|message|>the cat<|return|>",
        "<|channel|>final<|message|>went home<|return|>",
    ],
}


def without_weights(messages):
    return [{key: message[key] for key in message if key != "weight"} for message in messages]


def test_every_family_is_one_of_them():
    assert {*LEARNT, *APART} == set(TEMPLATES)


@pytest.mark.reference
@pytest.mark.parametrize("family", LEARNT)
def test_of_a_chat_counts_what_the_assistant_says_and_the_end_of_its_turn(read, families, family):
    one, other = families[family]
    (example,) = read(one, {"messages": TURNS, "weight": 3})
    asked = {"add_generation_prompt": False, "return_dict": False}
    assert list(example.ids) == other.apply_chat_template(without_weights(TURNS), **asked)
    found = [(text, weight) for text, weight in runs(one, example) if weight]
    assert found == list(zip(LEARNT[family], (3, 1.5), strict=True))


@pytest.mark.reference
@pytest.mark.parametrize("family", APART)
def test_turns_that_the_template_writes_anew_are_refused_or_taken_apart(read, families, family):
    one, other = families[family]
    words = r"data.jsonl line 1: messages\[1\]: the chat template writes this turn in another way"
    with pytest.raises(UsageError, match=words) as caught:
        read(one, {"messages": TURNS})
    assert "turns_apart" in str(caught.value)
    assert "turns_apart" not in caught.value.command_line
    examples = read(one, {"messages": TURNS}, turns_apart=True)
    asked = {"add_generation_prompt": False, "return_dict": False}
    for n, example in zip((2, 4), examples, strict=True):
        expected = other.apply_chat_template(without_weights(TURNS[:n]), **asked)
        assert list(example.ids) == expected
    assert [learnt(one, example) for example in examples] == [[text] for text in APART[family]]
    # What the message tells to do gives the same.
    silent = [message | {"weight": 0} if "weight" in message else message for message in TURNS]
    silent = [TURNS[0], said("the cat", weight=0), *TURNS[2:]]
    assert read(one, {"messages": TURNS[:2]}, {"messages": silent}) == examples


MARKED = [family for family in TEMPLATES if "{% generation %}" in TEMPLATES[family]["default"]]


@pytest.mark.reference
@pytest.mark.parametrize("family", [*MARKED, "llama3", "llama2"])
def test_generation_marks_count_as_in_transformers(read, families, family):
    if family in LARGE:
        one, other = load(family), theirs(folder_of(family))
        template = CHATML.replace("m.content +", "'' }}{% generation %}{{ m.content +")
        template = template.replace(
            "'<|im_end|>\n' }}", "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        )
        template = template.replace("{% for m", "{{ bos_token }}{% for m")
    else:
        (one, other), template = families[family], None
    for messages in (TURNS[:2], without_weights(TURNS), [user("é😀"), said(" 日本\n x </s> ")]):
        found = other.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if "</s>" in str(messages) and "</s>" in other.get_added_vocab():
            continue  # there it is the token
        (example,) = read(one, {"messages": messages}, chat_template=template)
        assert list(example.ids) == found["input_ids"]
        assert [bool(weight) for weight in example.all_weights] == list(
            map(bool, [0, *found["assistant_masks"][1:]])
        )


def test_each_marked_part_has_the_weight_of_its_message(read, families):
    one, _ = families["phi 4"]
    (example,) = read(one, {"messages": TURNS})
    assert [each for each in runs(one, example) if each[1]] == [
        ("the cat<|im_end|>", 1.0),
        ("went home<|im_end|>", 0.5),
    ]
    twice = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(
        UsageError, match="marks 4 parts as the assistant's, of 2 messages with diff"
    ):
        read(one, {"messages": TURNS}, chat_template=twice)
    nothing = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}"
    nothing += "{% endgeneration %}{% endif %}"
    with pytest.raises(UsageError, match="marks nothing in this chat"):
        read(one, {"messages": TURNS}, chat_template=nothing)
    changed = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(UsageError, match="is changed or stands within another"):
        read(one, {"messages": TURNS}, chat_template=changed)


def test_real_templates_llama_2_and_the_older_one_of_llama_3(read, llama2, llama3):
    (one,) = read(llama2, {"messages": TURNS})
    assert learnt(llama2, one) == [" the cat </s>", " went home </s>"]
    assert list(one.ids).count(llama2.bos_token_id) == 2  # the template's, one for each user's turn
    (one,) = read(llama3, {"messages": TURNS})  # ends with the beginning of an answer, always
    assert learnt(llama3, one) == ["the cat<|eot_id|>", "went home<|eot_id|>"]
    assert list(one.ids).count(llama3.bos_token_id) == 1


def test_words_that_are_special_tokens_stay_text_in_messages(read, llama3):
    content = "a <|eot_id|> b<|end_of_text|>"
    (one,) = read(llama3, {"messages": [user(content), said(content)]})
    (found,) = learnt(llama3, one)
    assert found == content + "<|eot_id|>"
    real = [token for token in one.ids if token in llama3.special_tokens.values()]
    assert real.count(llama3.special_tokens["<|eot_id|>"]) == 2
    assert llama3.eos_token_id not in real


def test_a_prompt_of_messages_is_silent(read, families):
    one, _ = families["gemma 3"]
    (example,) = read(one, {"prompt": TURNS[:3], "completion": TURNS[3:]})
    (whole,) = read(one, {"messages": TURNS})
    assert list(example.ids) == list(whole.ids)
    assert learnt(one, example) == ["went home<end_of_turn>"]


def test_tools_and_calls_are_as_the_template_takes_them(read, families):
    one, other = families["qwen 3"]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"a": 1}}}
    as_text = {**call, "function": {"name": "weather", "arguments": '{"a": 1}'}}  # OpenAI's form
    found = []
    for each in (call, as_text):
        messages = [user("x"), said("", tool_calls=[each])]
        found += read(one, {"messages": messages, "tools": [tool]})
    assert found[0] == found[1]
    (text,) = learnt(one, found[0])
    assert '{"a": 1}' in text
    assert text.endswith("</tool_call><|im_end|>")
    expected = other.apply_chat_template(
        [user("x"), said("", tool_calls=[call])], tools=[tool], return_dict=False
    )
    assert list(found[0].ids) == expected
    line = {"messages": TURNS[:2], "chat_template_kwargs": {"enable_thinking": False}}
    assert learnt(one, read(one, line)[0]) == ["the cat<|im_end|>"]  # the prompt has the thoughts


def test_a_prompt_that_the_turn_does_not_begin_with_is_refused(read, llama3):
    thinks = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    words = r"messages\[1\]: the chat template begins this turn in another way: .*<think>"
    with pytest.raises(UsageError, match=words):
        read(llama3, {"messages": TURNS[:2]}, chat_template=thinks, turns_apart=True)
    with pytest.raises(UsageError, match=r"messages\[0\]: the assistant's, so no prompt"):
        read(llama3, {"messages": [said("x"), user("y")]}, chat_template=CHATML)


# What is wrong is said in one line

GOOD = {"text": "a king"}
BAD = {
    "no JSON": (b"{'text': 1}", "not JSON"),
    "cut off": (b'{"text": "a', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "a list": (b'[{"text": "a"}]', "found a JSON list, expected an object a line"),
    "text alone": (b'"a"', "found a JSON str, expected an object"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "a key twice": (b'{"text": "a", "text": "b"}', "'text' stands twice"),
    "deep": (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
    "an unknown key": ({"txt": "a"}, "key 'txt' is not known: did you mean 'text'"),
    "an extra key": ({"text": "a", "id": 3}, "key 'id' is not known"),
    "ShareGPT": ({"conversations": []}, "expected messages: a list of"),
    "nothing": ({}, "found no key; expected exactly one of"),
    "a weight alone": ({"weight": 1}, "found weight; expected exactly one of"),
    "two forms": ({"text": "a", "messages": []}, "found text, messages; expected exactly one"),
    "half a form": ({"prompt": "a"}, "no completion; expected prompt and completion together"),
    "half of Alpaca's": ({"instruction": "a", "input": "b"}, "no output; expected instruction"),
    "a number": ({"text": 3}, "text: found a number, expected text"),
    "null": ({"text": None}, "text: found null, expected text"),
    "empty": ({"text": ""}, "text: is empty"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "completion: is empty"),
    "an empty output": ({"instruction": "a", "output": ""}, "output: is empty"),
    "no instruction": ({"instruction": "", "output": "a"}, "instruction: is empty"),
    "an input of numbers": ({"instruction": "a", "input": 1, "output": "a"}, "input: found a num"),
    "half a pair": ({"text": "a\ud800"}, "not valid Unicode"),
    "half a pair in a key": ({"\ud800": "a"}, r"key '\\ud800' is not known"),
    "tools of a text": ({"text": "a", "tools": []}, "tools beside text"),
    "tools of a prompt": ({"prompt": "a", "completion": "b", "tools": []}, "tools beside a prompt"),
    "NaN": (b'{"text": "a", "weight": NaN}', "NaN is not JSON"),
    "infinity": (b'{"text": "a", "weight": 1e999}', "weight: found inf, expected 0, or a number"),
    "a negative weight": ({"text": "a", "weight": -1}, "weight: found -1, expected 0, or"),
    "a tiny weight": ({"text": "a", "weight": 1e-60}, "weight: found 1e-60"),
    "a huge weight": ({"text": "a", "weight": 10**40}, r"weight: found 10000"),
    "a weight that is text": ({"text": "a", "weight": "1"}, "weight: found text, expected"),
    "a weight that is true": ({"text": "a", "weight": True}, "weight: found a boolean, expected"),
    "no messages": ({"messages": []}, "no message of the assistant among 0"),
    "messages of text": ({"messages": "hi"}, "messages: found text, expected a list"),
    "a message of text": ({"messages": ["hi"]}, r"messages\[0\]: found text, expected an object"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\]: role is null, expected text"),
    "an odd role": ({"messages": [{"role": "\n"}, said("x")]}, r"messages\[0\]: role is"),
    "no assistant": ({"messages": [user("a")]}, "no message of the assistant among 1"),
    "no answer": (
        {"messages": [user("a"), said("")]},
        r"messages\[1\]: the assistant says nothing",
    ),
    "null for an answer": ({"messages": [user("a"), said(None)]}, "says nothing"),
    "a user's weight": ({"messages": [user("a") | {"weight": 1}, said("b")]}, "of the user; only"),
    "a wrong weight": (
        {"messages": [user("a"), said("b", weight=-1)]},
        r"messages\[1\].weight: fo",
    ),
    "mixed": ({"prompt": "a", "completion": [said("b")]}, "prompt: found text, expected a list of"),
    "mixed too": ({"prompt": [user("a")], "completion": "b"}, "completion: found text, expected"),
    "a silent completion": ({"prompt": [user("a")], "completion": [user("b")]}, "nothing to learn"),
    "a template's own": (
        {"messages": TURNS, "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs: add_generation_prompt is none of them",
    ),
    "a template's name": ({"messages": TURNS, "chat_template_kwargs": [1]}, "found a list"),
    "wrong tools": ({"messages": TURNS, "tools": "x"}, "tools: found a str"),
    "a template that refuses": ({"messages": TURNS[:1] * 2 + TURNS[1:]}, "roles must alternate"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_its_number(read, name):
    line, words = BAD[name]
    with pytest.raises(UsageError, match=words) as caught:
        read(load("llama2"), GOOD, b"", line, GOOD)
    message = str(caught.value)
    assert "data.jsonl line 3: " in message
    assert "\n" not in message
    assert len(message) < 500


def test_a_model_without_a_chat_template_takes_no_messages(read):
    with pytest.raises(UsageError, match="line 1: this model has no chat template") as caught:
        read(bundled(), {"messages": TURNS})
    assert "--chat-template" in caught.value.command_line
    with pytest.raises(CheckpointError, match=r"line 1: chat template: line 1: "):
        read(bundled(), {"messages": TURNS}, chat_template="{% for %}")


def test_a_text_of_which_nothing_is_predicted_is_refused(read, families):
    one, _ = families["qwen 3"]  # adds no BOS
    (example,) = read(one, {"text": "a"})
    assert len(example.ids) == 2  # the end of text
    with pytest.raises(UsageError, match="has 1 token, none of which is predicted"):
        read(
            one,
            {"prompt": "", "completion": one.decode([one.eos_token_id], skip_special_tokens=False)},
        )


def test_a_bad_file_is_refused(read, tmp_path, monkeypatch):
    one = bundled()
    with pytest.raises(UsageError, match=r"its name ends in '.csv', expected one of .jsonl"):
        read(one, GOOD, name="data.csv")
    with pytest.raises(UsageError, match=r"ends in '.gz'"):
        read(one, GOOD, name="data.jsonl.gz")
    for name, words in (("data.jsonl", "has no line that is not empty"), ("data.txt", "no text")):
        with pytest.raises(UsageError, match=words):
            read(one, b"  ", b"\r", name=name)
    with pytest.raises(UsageError, match=r"data.txt: not UTF-8 \(byte 1\); convert"):
        read(one, b"a\xff", name="data.txt")
    with pytest.raises(UsageError, match="does not exist"):
        read_examples(tmp_path / "missing.jsonl", one)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match="not a regular file"):
        read_examples(tmp_path / "folder.jsonl", one)
    for name in ("data.jsonl", "data.txt"):
        with pytest.raises(UsageError, match="Git LFS pointer"):
            read(one, b"version https://git-lfs.github.com/spec/v1", name=name)
    monkeypatch.setattr(data, "MOST_LINE_BYTES", 20)
    monkeypatch.setattr(data, "MOST_PLAIN_BYTES", 20)
    line = json.dumps({"text": "a" * 8}).encode()
    assert len(read(one, line.ljust(20), line.ljust(20) + b"\r")) == 2
    with pytest.raises(UsageError, match="line 2: longer than 20 bytes"):
        read(one, line, line.ljust(21))
    with pytest.raises(UsageError, match="over 20 bytes, which is the limit of one text"):
        read(one, b"a" * 21, name="data.txt")


def test_lines_are_read_as_a_batch_reads_them(read, tmp_path):
    """A byte order mark, carriage returns, empty lines, no newline at the end."""
    found = read(bundled(), b'\xef\xbb\xbf{"text": "a"}\r', b"", b"  \t", b' {"text": "b"} ')
    assert [learnt(bundled(), one) for one in found] == [["a<|end_of_text|>"], ["b<|end_of_text|>"]]
    told = []
    read(bundled(), GOOD, GOOD, on_bytes=told.append)
    assert told == [19, 38 - 1]


# Many chats in one process


def test_one_process_renders_many_chats_as_one_for_each_does():
    chat = {"messages": [user("a")], "add_generation_prompt": True}
    with Renderer() as renderer:
        for template in (
            CHATML,
            "{{ messages[0].content }}",
            "{% generation %}a{% endgeneration %}",
        ):
            for generation in (False, True):
                asked = template, [chat, chat], "⟦⟧"
                expected = render(*asked, generation=generation)
                assert renderer.render(*asked, generation=generation) == expected
        clock = {renderer.render("{{ strftime_now('%f') }}", [chat], "⟦⟧") for _ in range(3)}
        assert len(clock) == 1


def test_a_chat_that_ends_the_process_is_the_only_one_that_fails():
    with Renderer() as renderer:
        for _ in range(2):
            assert renderer.render("{{ x }}", [{"x": "a"}], "⟦⟧")[0] == "a"
            with pytest.raises(CheckpointError, match=r"beyond the limits|stopped by signal"):
                renderer.render("{% set x = 'a' * 10**12 %}", [{}], "⟦⟧")
            with pytest.raises(UsageError, match="no such thing"):
                renderer.render("{{ raise_exception('no such thing') }}", [{}], "⟦⟧")
        with pytest.raises(CheckpointError, match="stopped by signal"):
            renderer.render(
                "{% for i in x %}{% for j in x %}{% endfor %}{% endfor %}",
                [{"x": "a" * 99999}],
                "⟦⟧",
            )
        long = "a" * (MOST_BYTES + 1)
        assert renderer.render("{{ x }}", [{"x": long}], "⟦⟧")[0] == long
    assert renderer.render("{{ x }}", [{"x": "b"}], "⟦⟧")[0] == "b"
    renderer.close()
