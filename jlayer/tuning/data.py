"""Data to learn from -> tokens, and by how much the prediction of each counts.

A file of JSON lines has on each line one of the FORMS; a text file is one long text.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.interrupts import check
from jlayer.strict import GIT_LFS, open_regular, parse_json_object
from jlayer.text.tokenizer import Tokenizer
from jlayer.tuning.answers import WEIGHT, Chats, common, kind_of, messages_of, weight_of

# The tokenizers library takes some 130 bytes of memory for each byte of a text that it encodes.
MOST_TEXT_BYTES = 32 << 20
MOST_MESSAGE = 600  # characters of an error
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = b" \t\r\n"
LINES, TEXT = (".jsonl", ".json"), (".txt", ".md")
# Form -> its keys, those that may be left out.
FORMS = {
    "text": (("text",), ()),
    "prompt and completion": (("prompt", "completion"), ("tools",)),
    "instruction and output": (("instruction", "output"), ("input",)),
    "messages": (("messages",), ("tools",)),
}
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
    """A text. `ids`: int32; `weights`: float32, of each id by how much its prediction from those
    before it counts; nothing predicts the first."""

    ids: array
    weights: array

    @classmethod
    def of(cls, ids: Iterable[int], weights: Iterable[float]) -> Example:
        """From numbers of any kind, of which there are as many."""
        return cls(array("i", ids), array("f", weights))


@dataclass
class Data:
    """The examples of a file, in its order. `sha256`: of its bytes."""

    examples: list[Example] = field(default_factory=list)
    sha256: str = ""

    @property
    def n_tokens(self) -> int:
        """Of those that are learned from."""
        return sum(len(one.weights) - one.weights.count(0.0) for one in self.examples)


def read_data(
    path: str | os.PathLike, tokenizer: Tokenizer, *, chat_template: str | None = None
) -> Data:
    """All examples of a file. `chat_template`: for messages, in the place of the model's own.

    Raises UsageError, with the number of the line, for what cannot be learned from; StorageError.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in LINES + TEXT:
        found = f"ends in {suffix}" if suffix else "has no ending"
        raise UsageError(
            f"{path}: its name {found}, expected {' or '.join(LINES)} (an example a line) or "
            f"{' or '.join(TEXT)} (one text); rename it to what it is"
        )
    encoder, digest = _Encoder(tokenizer, chat_template), hashlib.sha256()
    rows = _text_rows(path, digest) if suffix in TEXT else _line_rows(path, digest)
    data = Data(list(_in_threads(lambda row: _example(encoder, *row), rows)))
    data.sha256 = digest.hexdigest()
    if not data.examples:
        raise UsageError(f"{path}: has no example, expected one a line; name a file with some")
    return data


# Files -> rows: (what is read, its place, its bytes)


def _text_rows(path, digest):
    raw = next(_pieces(path, lambda file: file.read(MOST_TEXT_BYTES + 1)), b"")
    if len(raw) > MOST_TEXT_BYTES:
        raise UsageError(
            f"{path}: longer than {MOST_TEXT_BYTES >> 20} MiB, the most of one text; give it in "
            f'parts, as lines of {{"text": ...}} in a file {LINES[0]}'
        )
    _refuse_pointer(raw, path)
    digest.update(raw)
    try:
        text = raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    if not text:
        raise UsageError(f"{path}: is empty, expected a text; name a file with some")
    yield {"text": text}, path, len(raw)


def _line_rows(path, digest):
    lines = _pieces(path, lambda file: file.readline(MOST_TEXT_BYTES + 1))
    for number, raw in enumerate(lines, 1):
        where = f"{path}: line {number}"
        if len(raw) > MOST_TEXT_BYTES:
            raise UsageError(
                f"{where}: longer than {MOST_TEXT_BYTES >> 20} MiB; give it in parts, as lines"
            )
        digest.update(raw)
        if number == 1:
            _refuse_pointer(raw, path)
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if raw := raw.strip(_JSON_SPACE):
            yield raw, where, len(raw)


def _pieces(path, read) -> Iterator[bytes]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while raw := read(file):
                yield raw
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


def _refuse_pointer(raw, path):
    if raw.startswith(GIT_LFS):
        raise UsageError(f"{path}: a Git LFS pointer, not the file; run: git lfs pull")


def _in_threads(make, rows):
    """What `make` gives for each row, in their order. A chat template runs in a process of its own,
    for which a thread only waits."""
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        for some in _blocks(rows, 8 * n_threads):
            check()
            yield from pool.map(make, some) if len(some) > 1 else map(make, some)


def _blocks(rows, most, most_bytes=1 << 20):
    """Rows in lists, so that long ones are not encoded at the same time."""
    block, size = [], 0
    try:
        for found, where, n_bytes in rows:
            block.append((found, where))
            size += n_bytes
            if len(block) == most or size > most_bytes:
                yield block
                block, size = [], 0
    except UsageError:
        yield block  # a line before it may be the first that is wrong
        raise
    yield block


# A row -> an example


def _example(encoder, found, where):
    """Raises UsageError, with the place."""
    try:
        return encoder.example(_object(found) if isinstance(found, bytes) else found)
    except (UsageError, CheckpointError) as error:
        both = (f"{where}: {_shortened(words)}" for words in (str(error), error.command_line))
        raise UsageError(next(both), command_line=next(both)) from None


_THIS = "this line"


def _object(raw):
    try:
        return parse_json_object(raw, what=_THIS, advice="mend it")
    except CheckpointError as error:
        if raw.startswith(b"["):
            words = "found a list, expected an object a line; jq -c '.[]' makes lines of a list"
        elif raw == b"{":
            words = "found an object that goes on, expected one a line; jq -c . makes such lines"
        else:
            words = str(error).removeprefix(f"{_THIS}: ")
            words = words.replace(" at line 1, column", " at column")
        raise UsageError(words) from None


class _Encoder:
    """Makes examples of objects, with one tokenizer. Errors do not name the place."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None):
        self._tokenizer, self._chats = tokenizer, Chats(tokenizer, chat_template)
        self._begin, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._adds_end = self._end is not None and tokenizer.encode("")[-1:] == [self._end]

    def example(self, found: Mapping) -> Example:
        """The example in an object. Raises UsageError."""
        found = dict(found)
        weight = weight_of(found.pop(WEIGHT, 1), WEIGHT)
        ids, weights = getattr(self, _READERS[_form_of(found)])(found)
        if len(ids) < 2:
            raise UsageError(
                f"makes {len(ids)} tokens, expected 2 or more: each is learned from those before "
                "it; leave it out"
            )
        return Example.of(ids, [0.0, *(weight * one for one in weights[1:])])

    def text(self, found):
        """A text, all of which is learned."""
        ids = self._ended(self._encoded(_text(found, "text")))
        return ids, [1.0] * len(ids)

    def completion(self, found):
        """A prompt, and a completion that is learned."""
        prompt, completion = found["prompt"], found["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = messages_of(prompt, "prompt") + messages_of(completion, "completion")
            return self._chats.encoded(messages, found.get("tools"), first=len(prompt))
        if isinstance(prompt, list) or isinstance(completion, list):
            raise UsageError(
                f"prompt is {kind_of(prompt)}, completion {kind_of(completion)}; expected two "
                "texts, or two lists of messages"
            )
        prompt, completion = (_text(found, name) for name in ("prompt", "completion"))
        if found.get("tools") is not None:
            raise UsageError("tools: found beside texts, expected only with messages; leave it out")
        return self._completed(prompt, completion)

    def instruction(self, found):
        """An instruction, perhaps an input, and an output that is learned."""
        instruction, output = (_text(found, name) for name in ("instruction", "output"))
        if found.get("input") in (None, ""):
            return self._completed(_WITHOUT_INPUT.format(instruction=instruction), output)
        form = _WITH_INPUT.format(instruction=instruction, input=_text(found, "input"))
        return self._completed(form, output)

    def messages(self, found):
        """A conversation, of which is learned what the assistant says."""
        return self._chats.encoded(messages_of(found["messages"], "messages"), found.get("tools"))

    def _completed(self, prompt, completion):
        before = self._encoded(prompt)
        ids = self._ended(self._encoded(prompt + completion))
        # A token that begins in the prompt and ends in the completion is learned.
        n = common(before[:-1] if self._adds_end else before, ids)
        return ids, [0.0] * n + [1.0] * (len(ids) - n)

    def _encoded(self, text):
        """With the token that begins a text once, where the text has it too."""
        ids = self._tokenizer.encode(text)
        twice = self._begin is not None and ids[:2] == [self._begin] * 2
        return ids[1:] if twice else ids

    def _ended(self, ids):
        return ids if self._end is None or ids[-1:] == [self._end] else [*ids, self._end]


_READERS = {
    "text": "text",
    "prompt and completion": "completion",
    "instruction and output": "instruction",
    "messages": "messages",
}  # form -> who reads it


def _form_of(found):
    for form, (needed, more) in FORMS.items():
        if found.keys() >= set(needed):
            if others := found.keys() - {*needed, *more}:
                raise UsageError(
                    f"found {', '.join(sorted(others))} beside {form}; leave out what is not of "
                    "one form"
                )
            return form
    keys = ", ".join(sorted(found)) or "nothing"
    raise UsageError(f"found {keys}, expected one of: {'; '.join(FORMS)}")


def _text(found, name):
    value = found[name]
    if not isinstance(value, str) or not value:
        raise UsageError(
            f"{name}: found {kind_of(value)}, expected some text; mend the line, or leave it out"
        )
    return value


def _shortened(words):
    """On one line, and of a length that can be read: names and texts of any kind stand in it."""
    if len(words) > MOST_MESSAGE:
        words = f"{words[: MOST_MESSAGE // 2]} ... {words[-MOST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
