"""Bodies: what is wrong is refused with the place of it, what nobody knows is passed over."""

import json

import pytest

from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.embeddings import read_embeddings
from jlayer.serving.wire.errors import Refused, refused
from jlayer.serving.wire.fields import parse_body
from jlayer.text.tokenizer import Tokenizer
from tests.serving.wire.bodies import (
    CHAT,
    COMPLETION,
    EMBEDDING,
    NO_JSON,
    SAMPLING,
    messages,
    served,
)

TEXTS = {
    "chat": (read_chat, {"messages": messages("Hello")}),
    "completion": (read_completion, {"prompt": "Hello"}),
}
KINDS = {**TEXTS, "embedding": (read_embeddings, {"input": "Hello"})}
WRONG = [
    *(("chat", wrong) for wrong in (*SAMPLING, *CHAT)),
    *(("completion", wrong) for wrong in (*SAMPLING, *COMPLETION)),
    *(("embedding", wrong) for wrong in EMBEDDING),
]


@pytest.fixture(scope="module")
def model():
    return served()


def shown(value):
    words = json.dumps(value.part) if hasattr(value, "part") else str(value)
    return words[:60]


@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(Refused) as found:
        parse_body(raw)
    assert found.value.status == 400
    assert "body" in str(found.value)
    assert "fetch" not in str(found.value), "that is the advice for files"
    json.dumps(found.value.as_dict()).encode()


@pytest.mark.parametrize(("kind", "wrong"), WRONG, ids=shown)
def test_a_part_that_is_wrong_is_named(model, kind, wrong):
    read, right = KINDS[kind]
    with pytest.raises(Exception) as found:
        read({**right, **wrong.part}, model)
    error = refused(found.value)
    assert (error.status, error.code) == (wrong.status, wrong.code), error
    if wrong.param is not None:
        assert error.param == wrong.param, error
    assert len(str(error)) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_the_default_of_everything(model, kind):
    read, right = KINDS[kind]
    parts = (wrong.part for wrong in (*SAMPLING, *CHAT, *COMPLETION, *EMBEDDING))
    nulls = dict.fromkeys({name for part in parts for name in part} - right.keys())
    (plain,), (with_nulls,) = (read(body, model).orders for body in (right, {**right, **nulls}))
    assert plain == with_nulls


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_knows_is_passed_over(model, kind):
    read, right = KINDS[kind]
    odd = {"store": True, "metadata": {"a": 1}, "service_tier": "auto", "wibble": [1, {"a": None}]}
    assert read({**right, **odd}, model).orders == read(right, model).orders


@pytest.mark.parametrize(
    ("field", "option", "value"),
    [
        ("temperature", "temperature", 0.5),
        ("top_p", "top_p", 0.25),
        ("top_k", "top_k", 7),
        ("min_p", "min_p", 0.1),
        ("typical_p", "typical_p", 0.9),
        ("epsilon_cutoff", "epsilon_cutoff", 0.01),
        ("eta_cutoff", "eta_cutoff", 0.02),
        ("seed", "seed", 5),
        ("presence_penalty", "presence_penalty", 0.5),
        ("frequency_penalty", "frequency_penalty", -0.5),
        ("repetition_penalty", "repetition_penalty", 1.5),
        ("max_tokens", "max_new_tokens", 9),
        ("min_tokens", "min_new_tokens", 3),
    ],
)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_field_is_the_option_of_its_name(model, kind, field, option, value):
    read, right = TEXTS[kind]
    (order,) = read({**right, field: value}, model).orders
    assert getattr(order.options, option) == value


def test_fields_of_several_forms(model):
    def options(**body):
        (order,) = read_chat({"messages": messages("x"), **body}, model).orders
        return order.options

    assert options(stop="a").stop == ("a",)
    assert options(stop=["a", "b", "c", "d", "e"]).stop == tuple("abcde")
    assert options(stop=[]).stop == ()
    assert options(top_k=-1).top_k == 0
    assert options(logit_bias={"5": 1.5, "7": -100}).logit_bias == ((5, 1.5), (7, -100.0))
    assert options(max_completion_tokens=4, max_tokens=9).max_new_tokens == 4
    assert options(n=3, temperature=1).num_return_sequences == 3
    assert options(logprobs=True).logprobs == 0
    assert options(logprobs=True, top_logprobs=20).logprobs == 20
    assert options(stop_token_ids=[5], ignore_eos=True).eos_token_id == (5,)


def test_without_a_number_a_chat_may_fill_its_context(model):
    (order,) = read_chat({"messages": messages("Hello")}, model).orders
    assert order.options.max_new_tokens == model.context - len(order.ids)
    assert order.options.lengths_are_published, "it may be cut to what there is memory for"
    (order,) = read_completion({"prompt": "Hello"}, model).orders
    assert order.options.max_new_tokens == 16


def test_greedy_texts_are_drawn_once_and_told_n_times(model):
    asked = read_chat({"messages": messages("x"), "n": 3, "temperature": 0}, model)
    assert asked.orders[0].options.num_return_sequences == 1
    assert asked.views == ((0, 0),) * 3


def test_both_figures_stand_in_the_refusal_of_a_prompt_that_is_too_long(model):
    with pytest.raises(Refused) as found:
        read_completion({"prompt": [5] * 1000, "max_tokens": 25}, model)
    assert "maximum context length is 1024 tokens" in str(found.value)
    assert "1025 tokens (1000 in the prompt, 25 in the completion)" in str(found.value)
    asked = read_completion({"prompt": [5] * 1000, "max_tokens": 24}, model)
    assert len(asked.orders[0].ids) == 1000, "nothing is dropped of one that fits"


@pytest.mark.parametrize(
    ("reads", "part", "body"),
    [
        (read_completion, "prompt", lambda text: {"prompt": text}),
        (read_completion, "prompt", lambda text: {"prompt": ["a", text]}),
        (read_chat, "messages", lambda text: {"messages": messages("a", text[:-9], text[-9:])}),
    ],
)
def test_what_cannot_fit_is_refused_before_its_tokens_are_counted(
    model, monkeypatch, reads, part, body
):
    counted = []
    encode = Tokenizer.encode

    def counting(self, text, **options):
        counted.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    for n_characters, least, is_counted in ((8_000_000, "31250", False), (200_000, "", True)):
        counted.clear()
        with pytest.raises(Refused) as found:
            reads(body("a" * n_characters), model)
        assert (found.value.param, found.value.code) == (part, "context_length_exceeded")
        assert f"at least {least}" in str(found.value) or is_counted
        assert any(length > 1000 for length in counted) == is_counted


def test_people_behind_one_address_are_told_apart_by_what_they_say(model):
    body = {"messages": messages("x")}
    clients = [
        read_chat({**body, "user": user}, model, client="10.0.0.7").orders[0].client
        for user in (None, "ann", "bob")
    ]
    assert len(set(clients)) == 3
