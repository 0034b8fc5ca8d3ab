"""The real client of OpenAI against the server: what users' scripts do."""

import json
import threading

import openai
import pytest

import jlayer
from jlayer.serving.http.guard import Rules
from jlayer.serving.queue import Limits
from tests.serving.http.conftest import held, served
from tests.serving.http.test_connections import LONG, raw, until
from tests.serving.wire.bodies import messages

MODEL = "fable-3m"


def client_of(serving, **options):
    given = {"base_url": f"{serving.address}/v1", "api_key": "none", "timeout": 60, **options}
    return openai.OpenAI(**{"max_retries": 0, **given})


@pytest.fixture(scope="module")
def openai_client(serving):
    with client_of(serving) as found:
        yield found


def test_a_chat_and_its_stream(openai_client):
    asked = {"model": MODEL, "messages": messages("Once upon"), "max_tokens": 8, "temperature": 0}
    plain = openai_client.chat.completions.create(**asked)
    choice = plain.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert plain.usage.completion_tokens == 8
    text, usage = "", None
    stream = openai_client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == choice.message.content
    assert usage.total_tokens == plain.usage.total_tokens


def test_the_accumulating_stream_helper(openai_client):
    asked = {"model": MODEL, "messages": messages("Once upon"), "temperature": 0}
    held = {"extra_body": {"guided_choice": ["It is so.", "It is not."]}}  # so that it ends
    with openai_client.chat.completions.stream(**asked, **held) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


def test_completions_as_the_library_gives_them(model, openai_client):
    expected = jlayer.generate(model, "Once upon", max_new_tokens=8, temperature=0.8, seed=4)
    asked = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "temperature": 0.8, "seed": 4}
    assert openai_client.completions.create(**asked).choices[0].text == expected.text
    stream = openai_client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == expected.text


def test_several_texts_stop_and_log_probabilities(openai_client):
    found = openai_client.chat.completions.create(
        model=MODEL,
        messages=messages("Once upon"),
        n=3,
        seed=5,
        temperature=1,
        max_tokens=10,
        stop=[" the"],
        logprobs=True,
        top_logprobs=4,
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    for choice in found.choices:
        assert " the" not in choice.message.content
        assert choice.finish_reason in ("stop", "length")
        assert len(choice.logprobs.content[0].top_logprobs) == 4


def test_models(openai_client):
    assert [each.id for each in openai_client.models.list()] == [MODEL]
    assert openai_client.models.retrieve(MODEL).max_model_len == 1024
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-9")


def test_a_schema_is_parsed(openai_client):
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    found = openai_client.chat.completions.create(
        model=MODEL,
        messages=messages("Yes?"),
        max_tokens=200,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": schema, "strict": True},
        },
    )
    assert json.loads(found.choices[0].message.content)["answer"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "messages"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_errors_are_those_that_scripts_catch(openai_client, body, error, param, stream):
    asked = {"model": MODEL, "messages": messages("x"), "stream": stream, **body}
    with pytest.raises(error) as found:
        openai_client.chat.completions.create(**asked)
    assert found.value.param == param
    assert found.value.type == "invalid_request_error"


def test_a_prompt_beyond_the_context_has_its_code(openai_client):
    with pytest.raises(openai.BadRequestError) as found:
        openai_client.chat.completions.create(model=MODEL, messages=messages("fox " * 2000))
    assert found.value.code == "context_length_exceeded"
    assert "maximum context length is 1024 tokens" in str(found.value)


def test_a_client_comes_back_when_it_is_told_to(model):
    """429 with Retry-After: the client waits and gets its answer, without a word of the user's."""
    gate = threading.Event()
    with served(model, limits=Limits(people=1)) as serving:
        desk = serving.site.desk
        with held(model, gate), raw(serving, body=LONG) as first:
            until(lambda: desk.status().riders)
            with raw(serving, body=LONG) as second:
                until(lambda: desk.status().queued)
                answers = []

                def ask():
                    with client_of(serving, max_retries=3) as client:
                        answers.append(
                            client.completions.create(model=MODEL, prompt="Once", max_tokens=2)
                        )

                thread = threading.Thread(target=ask)
                thread.start()
                until(lambda: serving.site.answered["/v1/completions", 429])
                second.close()
                first.close()
                gate.set()
                thread.join()
        assert answers[0].usage.completion_tokens == 2


def test_a_stream_that_the_server_ends_is_an_error(model):
    gate = threading.Event()
    with served(model) as serving, client_of(serving) as client, held(model, gate):
        stream = client.completions.create(model=MODEL, prompt="Once", max_tokens=50, stream=True)
        found = []

        def read():
            try:
                list(stream)
            except openai.APIError as error:
                found.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        until(lambda: serving.site.desk.status().riders)
        serving.stop()
        thread.join()
    assert "stopping" in str(found[0])


def test_a_wrong_key_is_an_authentication_error(model, desk):
    with served(model, desk=desk, rules=Rules(key="right")) as serving:
        with (
            client_of(serving, api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with client_of(serving, api_key="right") as client:
            assert client.models.list().data[0].id == MODEL
