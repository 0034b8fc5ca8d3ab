"""Data to learn from -> tokens, and by how much the prediction of each counts.

A file of JSON lines has on each line one of the FORMS; a text file is one long text.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.strict import open_regular, parse_json_object
from jlayer.text.tokenizer import Tokenizer

MOST_LINE_BYTES = 32 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES, TEXT = (".jsonl", ".json"), (".txt", ".md")
# Form -> its keys, those that may be left out.
FORMS = {
    "text": (("text",), ()),
    "prompt and completion": (("prompt", "completion"), ("tools",)),
    "instruction and output": (("instruction", "output"), ("input",)),
    "messages": (("messages",), ("tools",)),
}
WEIGHT = "weight"  # of a line, or of a message of the assistant's
# The prompts of Stanford Alpaca's data, as everybody has them.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """A text. `weights`: of each id by how much its prediction from those before it counts; nothing
    predicts the first."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class Data:
    """The examples of a file, in its order. `sha256`: of its bytes."""

    examples: list[Example] = field(default_factory=list)
    sha256: str = ""

    @property
    def n_tokens(self) -> int:
        """Of those that are learned from."""
        return sum(sum(weight > 0 for weight in one.weights) for one in self.examples)


def read_data(
    path: str | os.PathLike, tokenizer: Tokenizer, *, chat_template: str | None = None
) -> Data:
    """All examples of a file. `chat_template`: for messages, in the place of the model's own.

    Raises UsageError, with the number of the line, for what cannot be learned from; StorageError.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in LINES + TEXT:
        raise UsageError(
            f"{path}: ends in {suffix or 'nothing'!r}, expected JSON lines ({', '.join(LINES)}) or "
            f"a text ({', '.join(TEXT)}); give it the name of what it is"
        )
    encoder = _Encoder(tokenizer, chat_template)
    data, digest = Data(), hashlib.sha256()
    if suffix in TEXT:
        raw = b"".join(_chunks(path))
        digest.update(raw)
        data.examples.append(encoder.example({"text": _decoded(raw, path)}, path))
    else:
        for number, raw in enumerate(_lines(path, digest), 1):
            where = f"{path}: line {number}"
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                data.examples.append(encoder.example(_object(raw, where), where))
    data.sha256 = digest.hexdigest()
    if not data.examples:
        raise UsageError(f"{path}: has no example, expected one a line; name a file with some")
    return data


def _opened(path):
    try:
        return os.fdopen(open_regular(path), "rb")
    except CheckpointError as error:
        raise UsageError(str(error)) from None


def _chunks(path) -> Iterator[bytes]:
    try:
        with _opened(path) as file:
            while raw := file.read(1 << 20):
                yield raw
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(path, digest) -> Iterator[bytes]:
    number = 0
    try:
        with _opened(path) as file:
            while raw := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                digest.update(raw)
                if len(raw) > MOST_LINE_BYTES:
                    raise UsageError(
                        f"{path}: line {number}: longer than {MOST_LINE_BYTES >> 20} MiB; cut it, "
                        f"or give a text of that length as a file ({TEXT[0]})"
                    )
                yield raw
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(raw, path):
    try:
        return raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None


def _object(raw, where):
    try:
        return parse_json_object(raw, what=where, advice="mend this line")
    except CheckpointError as error:
        raise UsageError(str(error)) from None


class _Encoder:
    """Makes examples of objects, with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None):
        self._tokenizer, self._template = tokenizer, chat_template
        self._end = tokenizer.eos_token_id

    def example(self, found: Mapping, where: str) -> Example:
        """The example in an object. Raises UsageError."""
        found = dict(found)
        weight = _weight(found.pop(WEIGHT, 1), where)
        form = _form_of(found, where)
        try:
            ids, weights = getattr(self, _READERS[form])(found, where)
        except UsageError as error:
            raise UsageError(_with_place(str(error), where)) from None
        weights[0] = 0.0
        if len(ids) < 2:
            raise UsageError(f"{where}: is a single token, expected more; leave it out")
        return Example(tuple(ids), tuple(weight * one for one in weights))

    def text(self, found, where):
        """A text, all of which is learned."""
        text = _text(found, "text", where)
        ids = self._ended(self._tokenizer.encode(text))
        return ids, [1.0] * len(ids)

    def completion(self, found, where):
        """A prompt, and a completion that is learned."""
        prompt, completion = found["prompt"], found["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise UsageError(f"{where}: prompt and completion: expected two texts or two lists")
            both = {"messages": [*prompt, *completion], **_tools(found)}
            return self.messages(both, where, first=len(prompt))
        if found.get("tools") is not None:
            raise UsageError(f"{where}: tools: expected with lists of messages alone")
        prompt, completion = (_text(found, name, where) for name in ("prompt", "completion"))
        return self._completed(prompt, completion)

    def instruction(self, found, where):
        """An instruction, perhaps an input, and an output that is learned."""
        more = found.get("input")
        if more is not None and not isinstance(more, str):
            raise UsageError(f"{where}: input: found {_kind(more)}, expected a text")
        form = _WITH_INPUT if more else _WITHOUT_INPUT
        instruction, output = (_text(found, name, where) for name in ("instruction", "output"))
        return self._completed(form.format(instruction=instruction, input=more), output)

    def _completed(self, prompt, completion):
        before = self._tokenizer.encode(prompt)
        ids = self._ended(self._tokenizer.encode(prompt + completion))
        # A token that begins in the prompt and ends in the completion is learned.
        n = _common(self._without_end(before), ids)
        return ids, [0.0] * n + [1.0] * (len(ids) - n)

    def messages(self, found, where, *, first=0):
        """A conversation, of which is learned what the assistant says from message `first` on."""
        messages = found["messages"]
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise UsageError(f"{where}: messages: expected a list of objects")
        answers = [
            number
            for number, message in enumerate(messages)
            if message.get("role") == "assistant" and number >= first
        ]
        if not answers:
            raise UsageError(f"{where}: messages: found none of the assistant's, expected one")
        own = {number: _weight(messages[number].get(WEIGHT, 1), where) for number in answers}
        messages = [{k: v for k, v in one.items() if k != WEIGHT} for one in messages]
        tools = _tools(found)
        ids = self._rendered(messages, tools, opens=False)
        weights = [0.0] * len(ids)
        for number in (number for number in answers if own[number]):
            before = self._rendered(messages[:number], tools, opens=True) if number else []
            through = self._through(messages[: number + 1], tools, before)
            if ids[: len(through)] != through or through[: len(before)] != before:
                raise UsageError(
                    f"{where}: messages[{number}]: this model's chat template writes this answer "
                    "in another way once more follows; give each answer a line of its own, with "
                    "what comes before it and weight 0 for earlier answers, or another "
                    "--chat-template"
                )
            end = self._end_of_turn(through, len(before))
            weights[len(before) : end] = [own[number]] * (end - len(before))
        return ids, weights

    def _rendered(self, messages, tools, *, opens):
        return self._tokenizer.encode_chat(
            messages, add_generation_prompt=opens, chat_template=self._template, **tools
        )

    def _through(self, messages, tools, before):
        """The ids of some messages, of which the last is an answer. `before`: those without it, up
        to where it begins."""
        found = self._rendered(messages, tools, opens=False)
        if found != self._rendered(messages, tools, opens=True):
            return found
        # The template opens another answer whatever it is told. How it does is how this one was
        # opened: what both end in alike, after the special token that ends a message.
        n = _common(before[::-1], found[::-1])
        special = set(self._tokenizer.special_tokens.values())
        for at in range(len(found) - n, len(found)):
            if found[at] in special:
                return found[: at + 1]
        return found

    def _end_of_turn(self, ids, first):
        """Where an answer ends: after its last special token, if only white space follows."""
        special = set(self._tokenizer.special_tokens.values())
        for end in range(len(ids), first, -1):
            if ids[end - 1] in special:
                rest = self._tokenizer.decode(ids[end:], continues=True)
                return end if not rest.strip() else len(ids)
        return len(ids)

    def _ended(self, ids):
        if self._end is None or (ids and ids[-1] == self._end):
            return ids
        return [*ids, self._end]

    def _without_end(self, ids):
        return ids[:-1] if ids and ids[-1] == self._end else ids


_READERS = {
    "text": "text",
    "prompt and completion": "completion",
    "instruction and output": "instruction",
    "messages": "messages",
}


def _form_of(found, where):
    for form, (needed, more) in FORMS.items():
        if found.keys() >= set(needed):
            if others := found.keys() - {*needed, *more}:
                raise UsageError(
                    f"{where}: found {', '.join(sorted(others))} beside {form}; leave it out"
                )
            return form
    keys = ", ".join(sorted(map(str, found)))[:200] or "nothing"
    raise UsageError(f"{where}: found {keys}, expected one of: {'; '.join(FORMS)}")


def _with_place(message, where):
    return message if message.startswith(where) else f"{where}: {message}"


def _text(found, name, where):
    value = found[name]
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {name}: found {_kind(value)}, expected some text")
    return value


def _kind(value):
    if value is None:
        return "null"
    if value == "":
        return "an empty text"
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}.get(
        type(value), "a number"
    )


def _tools(found):
    return {} if found.get("tools") is None else {"tools": found["tools"]}


def _weight(value, where):
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or not 0 <= value <= 1e6:
        raise UsageError(f"{where}: weight: found {value!r:.40}, expected a number from 0")
    return float(value)


def _common(one, other):
    """How many ids both begin with."""
    n = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        n += 1
    return n
