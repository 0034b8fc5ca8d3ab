"""Tokenizers, chat templates and files to learn from, for the tests of this room."""

import functools
import json

import pytest

from jlayer.text.tokenizer import Tokenizer
from jlayer.tuning.data import read_data
from tests.conftest import BUNDLED
from tests.text.chats import GEMMA3, HARMONY, QWEN3

QUESTION = {"role": "user", "content": "Who lives in the wood?"}
ANSWER = {"role": "assistant", "content": "An old woman, and a cat."}
AGAIN = {"role": "user", "content": "And then?"}
END = {"role": "assistant", "content": "They went home."}
SYSTEM = {"role": "system", "content": "Tell a tale."}
CHAT = [QUESTION, ANSWER]
LONG = [QUESTION, ANSWER, AGAIN, END]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]

# Each with what an answer is learned with in {% generation %}: its text and its end.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
_OPENS = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = _LLAMA3 + "{% if add_generation_prompt %}" + _OPENS + "{% endif %}"
LLAMA3_FIRST = _LLAMA3 + _OPENS  # whatever it is told
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}{% generation %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\n' }}{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKED = {
    "chatml": CHATML,
    "llama 3": LLAMA3,
    "llama 3, first": LLAMA3_FIRST,
    "llama 2": LLAMA2,
    "gemma": GEMMA,
}
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
# A space that stands before an answer becomes a part of its first token.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'TELLER: ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'TELLER: ' }}{% endif %}"
)
OPENS_A_THOUGHT = CHATML.replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)
READS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
PUBLISHED = {"qwen 3": QWEN3, "gemma 3": GEMMA3, "gpt-oss": HARMONY}
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
)


@functools.cache
def folder(temporary):
    """The bundled tokenizer with the special tokens of all templates."""
    raw = json.loads((BUNDLED / "tokenizer.json").read_text())
    n = max([*raw["model"]["vocab"].values(), *(each["id"] for each in raw["added_tokens"])]) + 1
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    known = {each["content"] for each in raw["added_tokens"]}
    raw["added_tokens"] += [
        {"id": n + at, "content": text, "special": True, **flags}
        for at, text in enumerate(text for text in CONTROL if text not in known)
    ]
    (temporary / "tokenizer.json").write_text(json.dumps(raw))
    (temporary / "tokenizer_config.json").write_bytes(
        (BUNDLED / "tokenizer_config.json").read_bytes()
    )
    (temporary / "config.json").write_text('{"model_type": "llama"}')
    return temporary


class Reader:
    """Reads examples of a file that it writes. `theirs`: the tokenizer of transformers."""

    def __init__(self, of, files):
        self.of, self._files = of, files
        self.tokenizer = Tokenizer.from_folder(of)

    @functools.cached_property
    def theirs(self):
        return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(self.of)

    def raw(self, raw, name="data.jsonl", template=None):
        path = self._files / name
        path.write_bytes(raw)
        return read_data(path, self.tokenizer, chat_template=template)

    def __call__(self, *lines, template=None):
        raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return self.raw(raw, template=template).examples

    def one(self, line, template=None):
        (example,) = self(line, template=template)
        return list(example.ids), list(example.weights)

    def learned(self, line, template=None):
        """The texts, with their special tokens, of what is learned without a gap."""
        ids, weights = self.one(line, template)
        runs, before = [], 0.0
        for token, weight in zip(ids, weights, strict=True):
            if weight:
                runs = runs if before else [*runs, []]
                runs[-1].append(token)
            before = weight
        return [self.tokenizer.decode(run, skip_special_tokens=False) for run in runs]
