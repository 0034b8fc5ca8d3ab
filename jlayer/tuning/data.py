"""The texts that a model is tuned on, as tokens: read from JSON lines, or from a plain text.

A line has exactly one of: `text`; `prompt` and `completion`; `instruction`, `input` and `output`
(Alpaca's); `messages`. Everything is checked as it is read, and the first bad line refuses the
file. What the assistant says in `messages` is found in `turns`; into lanes texts come in `lanes`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO

from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, JlayerError, StorageError, UsageError
from jlayer.sizes import counted
from jlayer.strict import GIT_LFS, open_regular, parse_json_object
from jlayer.text.inputs import plain_variables
from jlayer.text.tokenizer import Tokenizer
from jlayer.tuning.examples import Data, Example
from jlayer.tuning.turns import Span, Turns, weights_of

LINES, PLAIN = (".jsonl", ".json"), (".txt",)
MOST_LINE_BYTES = 32 << 20  # as of a batch's line
MOST_PLAIN_BYTES = 64 << 20  # encoding takes some thirty times that
# A weight is multiplied by another, and float32 must hold the product and sums of it.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The keys of each form; those in the second part may be missing.
_FORMS = (
    (("text",), ()),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input",)),
    (("messages",), ()),
)
_WEIGHT, _OF_CHATS = "weight", ("tools", "chat_template_kwargs")
# Options of a rendering, which are decided here.
_OWN_OPTIONS = (
    *("tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("render", "finds_generated"),
)
_EXPECTED = "text, prompt and completion, instruction (with input) and output, or messages"
_ALL = (_WEIGHT, *_OF_CHATS, *(key for form in _FORMS for part in form for key in part))
_WORDS = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}


def read_data(
    path: str | os.PathLike, tokenizer: Tokenizer, *, skips_bad: bool = False, **options
) -> Data:
    """The data of a file. `skips_bad`: without its bad lines. `options`, and what is raised: as of
    `read_examples`."""
    skipped = [] if skips_bad else None
    examples = read_examples(path, tokenizer, skipped=skipped, **options)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Data(examples, digest, tuple(skipped or ()))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


def read_examples(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    turns_apart: bool = False,
    skipped: list[str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[Example]:
    """The texts of a file, in its order: .jsonl or .json, with an object a line, or .txt, which is
    one text.

    A `text` counts whole; of a prompt and its completion the completion alone; of messages what the
    assistant says. All but messages end with the end-of-text token, which counts, where the
    tokenizer has one, and begin with BOS as the tokenizer was published; special tokens written in
    them are real, as in `Tokenizer.encode`. Messages are by the chat template: `chat_template` (a
    name or a source) or the model's own; words of messages that are special tokens stay text.
    `weight`, of a line or of the assistant's message, multiplies. `turns_apart`: a chat whose
    template writes turns in another way once others follow becomes a text for each turn, as
    the model would see it then; without it such a chat is refused. `skipped`: is told what is wrong
    with each bad line, in the place of the error.
    `on_bytes`: is told how many bytes were read so far.

    Raises UsageError ("FILE line N: ...": what is wrong), StorageError, or CheckpointError (a chat
    template or tokenizer that is damaged).
    """
    name = os.fspath(path)
    kind = os.path.splitext(name)[1].lower()
    if kind not in (*LINES, *PLAIN):
        known = ", ".join((*LINES, *PLAIN))
        raise UsageError(
            f"{name}: its name ends in {kind!a}, expected one of {known}: JSON with an object a "
            "line, or plain text; rename it to what it holds"
        )
    with (
        _opened(name) as file,
        Turns(tokenizer, chat_template=chat_template, apart=turns_apart) as t,
    ):
        reader = _Reader(tokenizer, t)
        try:
            if kind in PLAIN:
                read = _of_plain(file, name, reader)
            else:
                read = _of_lines(file, name, reader, skipped)
            found = []
            for examples in read:
                found += examples
                if on_bytes is not None:
                    on_bytes(file.tell())
        except OSError as error:
            raise StorageError(f"{name}: cannot be read ({error.strerror})") from None
    if not found and skipped:
        raise UsageError(f"no text is left; {counted(len(skipped), 'bad line')}: {skipped[0]}")
    if not found:
        raise UsageError(f"{name}: has no line that is not empty; expected {_EXPECTED}, one a line")
    return found


# The file


def _opened(name) -> BinaryIO:
    if not os.path.exists(name):
        raise UsageError(f"{name}: does not exist; name a file of texts")
    try:
        return os.fdopen(open_regular(name), "rb")
    except CheckpointError as error:
        raise UsageError(str(error)) from None


def _of_plain(file, name, reader):
    raw = file.read(MOST_PLAIN_BYTES + 1)
    if len(raw) > MOST_PLAIN_BYTES:
        raise UsageError(
            f"{name}: over {MOST_PLAIN_BYTES:,} bytes, which is the limit of one text; write it as "
            'several, a line each: {"text": ...}, in a file that ends in .jsonl'
        )
    _refuse_pointer(raw, name)
    try:
        text = raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise UsageError(f"{name}: has no text; expected the text to tune on")
    with _located(name):
        yield [reader.text(text, 1.0)]


def _of_lines(file, name, reader, skipped):
    for number, raw in _raw_lines(file):
        if number == 1 and raw is not None:
            _refuse_pointer(raw, name)
        try:
            with _located(f"{name} line {number}"):
                found = reader.line(_parsed(raw))
        except UsageError as error:
            if skipped is None:
                raise
            skipped.append(error.command_line)
        else:
            yield found


def _raw_lines(file) -> Iterator[tuple[int, bytes | None]]:
    """(number, its bytes) of each line that is not empty; None for the bytes of one that is too
    long."""
    number = 1
    while raw := file.readline(MOST_LINE_BYTES + 2):
        is_short = len(raw.rstrip(b"\r\n")) <= MOST_LINE_BYTES
        if number == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if not is_short:
            yield number, None
        elif raw := raw.rstrip():
            yield number, raw
        number += 1


def _refuse_pointer(raw, name):
    if raw.startswith(GIT_LFS):
        raise UsageError(f"{name}: a Git LFS pointer, not the file; run: git lfs pull")


def _parsed(raw):
    if raw is None:
        raise UsageError(
            f"longer than {MOST_LINE_BYTES:,} bytes, expected an object a line; split the text "
            "into several lines"
        )
    if raw.lstrip()[:1] == b"[":
        raise UsageError(
            "found a JSON list, expected an object a line; write each object of the list as a line"
        )
    try:
        return parse_json_object(raw, what="", advice="expected a JSON object a line")
    except CheckpointError as error:
        raise UsageError(str(error).removeprefix(": ")) from None


class _located:
    """Errors within are told with where they are."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, JlayerError):
            words = f"{self._where}: {error.command_line}"
            raise kind(f"{self._where}: {error}", command_line=words) from None


# A line


class _Reader:
    """Makes examples of lines."""

    def __init__(self, tokenizer: Tokenizer, turns: Turns):
        self._tokenizer, self._turns = tokenizer, turns

    def line(self, body: Mapping) -> list[Example]:
        keys = _form_of(body)
        weight = _weight(body, "weight")
        if keys[0] == "text":
            return [self.text(_said(body, "text"), weight)]
        if keys[0] == "instruction":
            return [self._completed(_alpaca(body), _said(body, "output"), weight)]
        if keys[0] == "messages":
            return self._chat(body, _messages(body, "messages"), weight)
        prompt, completion = body["prompt"], body["completion"]
        if not isinstance(prompt, list) and not isinstance(completion, list):
            _refuse_of_chats(body, "a prompt that is text")
            return [self._completed(_text(body, "prompt"), _said(body, "completion"), weight)]
        messages, rest = _messages(body, "prompt"), _messages(body, "completion")
        silent = [(message, 0.0) for message, _ in messages]
        return self._chat(body, [*silent, *rest], weight)

    def text(self, text: str, weight: float) -> Example:
        return self._completed("", text, weight)

    def _completed(self, prompt, completion, weight):
        text = prompt + completion
        ids, offsets = self._tokenizer.spell(text)
        weights = weights_of(offsets, [Span(len(prompt), len(text), weight)])
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text begins with it, and it was added
            ids, weights = ids[1:], weights[1:]
        if eos is not None:
            if ids[-1:] != [eos]:
                ids, weights = [*ids, eos], [*weights, 0.0]
            weights[-1] = weight
        return self._example(ids, weights, is_silent=not weight)

    def _chat(self, body, messages, weight):
        shared = [weight * own for _, own in messages]
        found = self._turns.texts(
            [message for message, _ in messages],
            shared,
            tools=body.get("tools"),
            variables=_variables(body),
        )
        return [self._example(*each, is_silent=not any(shared)) for each in found]

    def _example(self, ids, weights, *, is_silent) -> Example:
        weights = [0.0, *weights[1:]]
        if not is_silent and not any(weights):
            raise UsageError(
                f"has {counted(len(ids), 'token')}, none of which is predicted "
                "from others before it; leave the line out, or give it weight 0"
            )
        return Example.of(ids, weights)


def _form_of(body) -> tuple[str, ...]:
    """The keys that a line's form needs."""
    if "conversations" in body:
        raise UsageError(
            'key \'conversations\', expected messages: a list of {"role": ..., "content": ...}'
        )
    for key in body:
        if key not in _ALL:
            raise UsageError(f"{unknown_name('key', key[:60], _ALL)}; a line has {_EXPECTED}")
    found = [form for form in _FORMS if any(key in body for part in form for key in part)]
    if len(found) != 1:
        keys = ", ".join(body) or "no key"
        raise UsageError(f"found {keys}; expected exactly one of {_EXPECTED}")
    needed, _ = found[0]
    missing = [key for key in needed if key not in body]
    if missing:
        raise UsageError(f"no {missing[0]}; expected {' and '.join(needed)} together")
    if needed[0] in ("text", "instruction"):
        _refuse_of_chats(body, needed[0])
    return needed


def _refuse_of_chats(body, what):
    for key in _OF_CHATS:
        if key in body:
            raise UsageError(f"{key} beside {what}; only messages have it, so leave it out")


def _variables(body) -> dict:
    variables = plain_variables(body.get("chat_template_kwargs"))
    for name in variables:
        if name in _OWN_OPTIONS:
            raise UsageError(f"chat_template_kwargs: {name} is none of them; leave it out")
    return variables


def _text(body, key) -> str:
    if not isinstance(body[key], str):
        raise UsageError(f"{key}: found {_kind(body[key])}, expected text")
    return body[key]


def _said(body, key) -> str:
    if not _text(body, key):
        raise UsageError(f"{key}: is empty, expected what to learn; leave the line out")
    return body[key]


def _kind(value):
    return _WORDS.get(type(value), "a number")


def _weight(body, where) -> float:
    weight = body.get(_WEIGHT, 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        found = f"{weight!a:.40}" if is_number else _kind(weight)
        raise UsageError(
            f"{where}: found {found}, expected 0, or a number from {LEAST_WEIGHT:g} to "
            f"{MOST_WEIGHT:g}"
        )
    return math.fabs(weight)  # -0.0 is 0


def _alpaca(body) -> str:
    """The prompt in Stanford Alpaca's words, which models tuned on such data are asked with."""
    instruction = _said(body, "instruction")
    given = _text(body, "input") if "input" in body else ""
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + "### Response:\n"
    )


def _messages(body, key) -> Sequence[tuple[dict, float]]:
    """Each message without its weight, and the weight, which is 0 unless it is the assistant's."""
    messages = body[key]
    if not isinstance(messages, list):
        raise UsageError(
            f"{key}: found {_kind(messages)}, expected a list of messages"
            + (" as the other of prompt and completion is" if key != "messages" else "")
        )
    found = [_message(message, f"{key}[{at}]") for at, message in enumerate(messages)]
    said = any(message["role"] == "assistant" for message, _ in found)
    if not said and key != "prompt":
        raise UsageError(f"{key}: no message of the assistant among {len(found)}; nothing to learn")
    return found


def _message(message, where):
    if not isinstance(message, dict):
        raise UsageError(f"{where}: found {_kind(message)}, expected an object")
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{where}: role is {_kind(message.get('role'))}, expected text")
    weight, rest = _weight(message, f"{where}.weight"), dict(message)
    has_weight = rest.pop(_WEIGHT, None) is not None
    if message["role"] != "assistant":
        if has_weight:
            raise UsageError(
                f"{where}: a weight on a message of the {message['role']:.20}; only the "
                "assistant's are learnt and have one"
            )
        return rest, 0.0
    content = message.get("content")
    is_empty = not (content.strip() if isinstance(content, str) else content)
    if weight and is_empty and not message.get("tool_calls"):
        raise UsageError(
            f"{where}: the assistant says nothing; give it content or tool_calls, or weight 0"
        )
    return rest, weight
