"""Prompts: text and ids, messages in every form that clients send, and back."""

import pytest

from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.errors import Refused
from jlayer.serving.wire.messages_in import messages_of
from jlayer.serving.wire.tokens import detokenize, tokenize, tokenizer_info
from tests.serving.wire.bodies import TEMPLATE, messages, served

BEGIN = 0


@pytest.fixture(scope="module")
def model():
    return served()


def ids(model, **body):
    return [list(order.ids) for order in read_completion(body, model).orders]


def test_text_gets_its_beginning_and_ids_are_taken_as_they_are(model):
    text = model.text.encode("Once upon")
    assert text[0] == BEGIN
    assert ids(model, prompt="Once upon") == [text]
    assert ids(model, prompt=["Once upon", "Once upon"]) == [text, text]
    odd = [BEGIN, BEGIN, 1, 5, 1]  # 1 is also the padding token
    assert ids(model, prompt=odd) == [odd]
    assert ids(model, prompt=[odd, [7]]) == [odd, [7]]
    assert ids(model, prompt=[[7], "Once upon"]) == [[7], text]
    assert ids(model, prompt="Once upon", add_special_tokens=False) == [text[1:]]


def test_each_prompt_has_its_choices_next_to_each_other(model):
    asked = read_completion({"prompt": ["a", "b"], "n": 2, "temperature": 1}, model)
    assert asked.views == ((0, 0), (0, 1), (1, 0), (1, 1))


def chat_text(model, messages, **body):
    (order,) = read_chat({"messages": messages, **body}, model).orders
    return model.text.decode(order.ids, skip_special_tokens=False)


def test_messages_in_the_forms_that_clients_send(model):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat_text(model, [{"role": "user", "content": parts}]) == "user: one\ntwo\nassistant:"
    nulls = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    assert chat_text(model, [nulls]) == "assistant: \nassistant:"
    assert chat_text(model, [{"role": "developer", "content": "x"}]) == "system: x\nassistant:"
    assert chat_text(model, [{"role": "tool", "content": "x", "tool_call_id": "1"}]) == (
        "tool: x\nassistant:"
    )
    named = {"role": "user", "content": "x", "name": "ann"}
    assert chat_text(model, [named]) == "user: x\nassistant:"


def test_the_last_message_may_be_continued(model):
    found = chat_text(
        model,
        messages("x", "It is"),
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert found == "user: x\nassistant: It is"
    assert chat_text(model, messages("x"), add_generation_prompt=False) == "user: x\n"


def test_a_template_that_knows_the_role_developer_gets_it():
    (found,) = messages_of([{"role": "developer", "content": "x"}], template="'developer'")
    assert found["role"] == "developer"


def test_a_template_that_reads_parts_gets_parts():
    reads_parts = "{% for part in message['content'] %}{{ part.text }}{% endfor %}"
    (found,) = messages_of(messages("x"), template=reads_parts)
    assert found["content"] == [{"type": "text", "text": "x"}]
    reads_both = "{% if message['content'] is string %}" + reads_parts
    (found,) = messages_of([{"role": "user", "content": found["content"]}], template=reads_both)
    assert found["content"] == "x"


def test_calls_that_are_none_are_named():
    for calls in ({"a": 1}, [5], [{"function": 5}], [{"function": {"name": 5}}]):
        with pytest.raises(Refused) as found:
            messages_of([{"role": "assistant", "tool_calls": calls}], template=TEMPLATE)
        assert found.value.param.startswith("messages[0].tool_calls")


def test_without_a_template_chat_names_the_way_out():
    with pytest.raises(Refused) as found:
        read_chat({"messages": messages("x")}, served(chat_template=None))
    assert found.value.status == 400
    for word in ("/v1/completions", "--chat-template"):
        assert word in str(found.value)


def test_without_a_tokenizer_ids_are_served_all_the_same():
    model = served(text=None)
    assert ids(model, prompt=[5, 6]) == [[5, 6]]
    for body in ({"prompt": "x"}, {"prompt": ["x"]}):
        with pytest.raises(Refused) as found:
            read_completion(body, model)
        assert found.value.status == 400


def test_tokens_go_to_and_fro(model):
    text = "Once upon a time 🙂, é"
    found = tokenize({"prompt": text, "return_token_strs": True}, model)
    assert found["tokens"] == model.text.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == model.context
    bare = tokenize({"prompt": text, "add_special_tokens": False}, model)["tokens"]
    assert detokenize({"tokens": bare}, model) == {"prompt": text}
    chat = tokenize({"messages": messages("x")}, model)["tokens"]
    assert model.text.decode(chat) == "user: x\nassistant:"
    info = tokenizer_info(model)
    assert (info["bos_token"], info["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert info["chat_template"] == TEMPLATE


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"prompt": 5}])
def test_what_cannot_be_tokenized_is_refused(model, body):
    with pytest.raises(Refused):
        tokenize(body, model)


@pytest.mark.parametrize("tokens", [None, "a", [-1], [4096], [1.5], [True]])
def test_what_are_no_tokens_is_refused(model, tokens):
    with pytest.raises(Refused) as found:
        detokenize({"tokens": tokens}, model)
    assert found.value.param.startswith("tokens")
