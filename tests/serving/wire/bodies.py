"""Bodies for the tests of the wire: what is right, and a table of what is wrong with it."""

from dataclasses import dataclass

from jlayer.engine.options import SamplingOptions
from jlayer.serving.wire.served import Served
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTEXT, VOCABULARY = 1024, 4096


def served(**more) -> Served:
    """The bundled model without its weights."""

    def sampling(options):
        return SamplingOptions.from_mapping(options, vocab_size=VOCABULARY, sampling_implied=True)

    return Served(
        **{
            "names": ("fable-3m", "fable"),
            "context": CONTEXT,
            "vocab_size": VOCABULARY,
            "folder": str(BUNDLED),
            "text": Tokenizer.from_folder(BUNDLED),
            "sampling": sampling,
            "chat_template": TEMPLATE,
            **more,
        }
    )


def messages(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@dataclass(frozen=True)
class Wrong:
    """A part of a body, and what the refusal names."""

    part: dict
    param: str | None
    code: str | None = None
    status: int = 400


# Of bodies of both kinds.
SAMPLING = [
    Wrong({"max_tokens": -1}, "max_tokens"),
    Wrong({"max_tokens": "7"}, "max_tokens"),
    Wrong({"max_tokens": 2.5}, "max_tokens"),
    Wrong({"max_tokens": True}, "max_tokens"),
    Wrong({"max_tokens": 1 << 40}, "max_tokens"),
    Wrong({"max_tokens": 2000}, None, "context_length_exceeded"),
    Wrong({"n": 0}, "n"),
    Wrong({"n": -1}, "n"),
    Wrong({"n": 65}, "n"),
    Wrong({"n": 1.0}, "n"),
    Wrong({"n": 1 << 70}, "n"),
    Wrong({"temperature": -0.1}, "temperature"),
    Wrong({"temperature": "hot"}, "temperature"),
    Wrong({"temperature": 1e999}, "temperature"),
    Wrong({"temperature": True}, "temperature"),
    Wrong({"temperature": [1]}, "temperature"),
    Wrong({"top_p": 0}, "top_p"),
    Wrong({"top_p": 1.01}, "top_p"),
    Wrong({"top_k": -2}, "top_k"),
    Wrong({"min_p": 2}, "min_p"),
    Wrong({"typical_p": 0}, "typical_p"),
    Wrong({"epsilon_cutoff": 1}, "epsilon_cutoff"),
    Wrong({"eta_cutoff": -1}, "eta_cutoff"),
    Wrong({"presence_penalty": 2.1}, "presence_penalty"),
    Wrong({"frequency_penalty": -2.1}, "frequency_penalty"),
    Wrong({"repetition_penalty": 0}, "repetition_penalty"),
    Wrong({"seed": -1}, "seed"),
    Wrong({"seed": 1 << 64}, "seed"),
    Wrong({"seed": "1"}, "seed"),
    Wrong({"stop": [""]}, "stop"),
    Wrong({"stop": ""}, "stop"),
    Wrong({"stop": 7}, "stop"),
    Wrong({"stop": ["a", 7]}, "stop[1]"),
    Wrong({"stop": ["a"] * 65}, "stop"),
    Wrong({"stop": "a" * 2001}, "stop"),
    Wrong({"logit_bias": {"4096": 1}}, "logit_bias"),
    Wrong({"logit_bias": {"-1": 1}}, "logit_bias"),
    Wrong({"logit_bias": {"the": 1}}, "logit_bias"),
    Wrong({"logit_bias": {"5": -1e999}}, "logit_bias"),
    Wrong({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
    Wrong({"logit_bias": [5]}, "logit_bias"),
    Wrong({"logit_bias": {str(n): 1 for n in range(4097)}}, "logit_bias"),
    Wrong({"min_tokens": -1}, "min_tokens"),
    Wrong({"stop_token_ids": [4096]}, "stop_token_ids"),
    Wrong({"stream": "yes"}, "stream"),
    Wrong({"stream_options": [1]}, "stream_options"),
    Wrong({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    Wrong({"user": 5}, "user"),
    Wrong({"user": "u" * 1001}, "user"),
    Wrong({"model": 5}, "model"),
    Wrong({"model": "gpt-9"}, "model", "model_not_found", 404),
    Wrong({"response_format": "json"}, "response_format"),
    Wrong({"response_format": {"type": "xml"}}, "response_format.type"),
    Wrong({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    Wrong(
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        "response_format.json_schema.schema",
    ),
    Wrong({"guided_regex": "("}, "guided_regex"),
    Wrong({"guided_choice": []}, "guided_choice"),
    Wrong({"guided_json": "{"}, "guided_json"),
    Wrong({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    Wrong({"structured_outputs": {"yaml": "a"}}, "structured_outputs"),
    Wrong({"prompt_logprobs": 0}, "prompt_logprobs", "unsupported_parameter"),
]
CHAT = [
    Wrong({"messages": None}, "messages"),
    Wrong({"messages": []}, "messages"),
    Wrong({"messages": "hello"}, "messages"),
    Wrong({"messages": ["hello"]}, "messages[0]"),
    Wrong({"messages": [{"content": "x"}]}, "messages[0].role"),
    Wrong({"messages": [{"role": "user"}]}, "messages[0].content"),
    Wrong({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    Wrong({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]"),
    Wrong(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "unsupported_content",
    ),
    Wrong({"messages": messages(*["x"] * 4097)}, "messages"),
    Wrong({"messages": messages("x " * 2000)}, "messages", "context_length_exceeded"),
    Wrong({"max_completion_tokens": -1}, "max_completion_tokens"),
    Wrong({"logprobs": 3}, "logprobs"),
    Wrong({"top_logprobs": 3}, "top_logprobs"),
    Wrong({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    Wrong({"modalities": ["text", "audio"]}, "modalities"),
    Wrong({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    Wrong({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    Wrong({"best_of": 3}, "best_of", "unsupported_parameter"),
    Wrong({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    Wrong({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    Wrong({"tools": "all"}, "tools"),
    Wrong({"tools": [5]}, "tools[0]"),
]
COMPLETION = [
    Wrong({"prompt": None}, "prompt"),
    Wrong({"prompt": []}, "prompt"),
    Wrong({"prompt": [[]]}, "prompt"),
    Wrong({"prompt": 7}, "prompt"),
    Wrong({"prompt": {"a": 1}}, "prompt"),
    Wrong({"prompt": ["a", 7]}, "prompt[1]"),
    Wrong({"prompt": [[1, 2], [1, "a"]]}, "prompt[1]"),
    Wrong({"prompt": [1, True]}, "prompt[0]"),
    Wrong({"prompt": [4096]}, "prompt"),
    Wrong({"prompt": [-1]}, "prompt"),
    Wrong({"prompt": [1 << 70]}, "prompt"),
    Wrong({"prompt": ["a"] * 257}, "prompt"),
    Wrong({"prompt": "x " * 3000}, "prompt", "context_length_exceeded"),
    Wrong({"logprobs": 21}, "logprobs"),
    Wrong({"logprobs": -1}, "logprobs"),
    Wrong({"logprobs": True}, "logprobs"),
    Wrong({"best_of": 2}, "best_of", "unsupported_parameter"),
    Wrong({"suffix": "x"}, "suffix", "unsupported_parameter"),
    Wrong({"echo": "x"}, "echo"),
    Wrong({"prompt": ["a"] * 256, "n": 3, "temperature": 1}, "n"),
]
EMBEDDING = [
    Wrong({"input": None}, "input"),
    Wrong({"input": []}, "input"),
    Wrong({"input": [[]]}, "input"),
    Wrong({"input": 7}, "input"),
    Wrong({"input": {"a": 1}}, "input"),
    Wrong({"input": ["a", 7]}, "input[1]"),
    Wrong({"input": [[1, 2], [1, "a"]]}, "input[1]"),
    Wrong({"input": [1, True]}, "input[0]"),
    Wrong({"input": [1.5]}, "input[0]"),
    Wrong({"input": [4096]}, "input"),
    Wrong({"input": [[5], [-1]]}, "input"),
    Wrong({"input": [1 << 70]}, "input"),
    Wrong({"input": ["a"] * 2049}, "input"),
    Wrong({"input": "x " * 3000}, "input", "context_length_exceeded"),
    Wrong({"input": [5] * 1025}, "input", "context_length_exceeded"),
    Wrong({"model": 5}, "model"),
    Wrong({"model": "gpt-9"}, "model", "model_not_found", 404),
    Wrong({"encoding_format": 5}, "encoding_format"),
    Wrong({"encoding_format": "int8"}, "encoding_format"),
    Wrong({"pooling": "cls"}, "pooling"),
    Wrong({"pooling": ["mean"]}, "pooling"),
    Wrong({"normalize": 1}, "normalize"),
    Wrong({"dimensions": 8}, "dimensions", "unsupported_parameter"),
    Wrong({"dimensions": 0}, "dimensions", "unsupported_parameter"),
    Wrong({"messages": messages("x")}, "messages", "unsupported_parameter"),
    Wrong({"stream": True}, "stream", "unsupported_parameter"),
    Wrong({"user": 5}, "user"),
    Wrong({"user": "u" * 1001}, "user"),
]
# The whole of a body, as bytes.
NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"prompt": "a"',
    "an array": b"[]",
    "a text": b'"a"',
    "a number": b"7",
    "null": b"null",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "minus infinity": b'{"temperature": -Infinity}',
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "65 levels": b'{"a":' * 65 + b"1" + b"}" * 65,
    "100,000 levels": b"[" * 100_000,
    "Latin-1": b'{"prompt": "\xe9"}',
    "a cut character": b'{"prompt": "\xf0\x9f"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "half a surrogate pair": b'{"prompt": "\\ud83d"}',
    "a number of 10,000 digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "a comment": b'{"prompt": "a" // it\n}',
    "single quotes": b"{'prompt': 'a'}",
    "something behind": b'{"prompt": "a"} {"prompt": "b"}',
    "a form": b"prompt=a&max_tokens=3",
}
