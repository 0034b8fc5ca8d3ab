"""From prompts to new tokens: prefill, decode, stop. One loop serves generate, stream,
transformers-style ids and the CLI.

A prompt is encoded elsewhere (`tokens`), a sweep is run elsewhere (`forward`), an id is drawn
elsewhere (`sample`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np

from jlayer.config import RunConfig, unknown_name
from jlayer.engine.model import AutoModel, Model, as_id_lists
from jlayer.engine.options import SamplingOptions, is_option, option_names
from jlayer.engine.report import Clock, Stats
from jlayer.engine.sample import Choice, choose
from jlayer.errors import UsageError
from jlayer.text.chat import chat_messages
from jlayer.text.stream import StopWatcher, TextStream
from jlayer.text.tokenizer import NO_TOKENIZER


@dataclass(frozen=True)
class Step:
    """What one sweep added to a text: complete characters only, so `text` may lag behind
    `token_ids`."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """A finished text. `token_ids` are the new ones only; `logprobs`, where asked for, has a row
    for each with the likeliest tokens beside it; `stats`, `memory` and `plan` are as `generate
    --json` prints them."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    device: str
    dtype: str
    seed: int | None
    logprobs: list[dict] | None
    stats: dict
    memory: dict
    plan: dict

    def as_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Continuation:
    """One sequence being continued: its ids, its text, and whether and why it has ended."""

    def __init__(
        self, prompt: list[int], *, options: SamplingOptions, limit: int, number: int, text=None
    ):
        self.history = list(prompt)
        self.n_prompt = len(prompt)
        self.finish_reason: str | None = "length" if limit == 0 else None
        self.choices: list[Choice] = []
        self._options, self._limit, self._number = options, limit, number
        # What follows text keeps its leading space; what follows nothing but BOS has none.
        self._stream = TextStream(text, continues=bool(text.decode(prompt))) if text else None
        self._stops = StopWatcher(options.stop)
        self._pieces: list[str] = []

    @property
    def token_ids(self) -> list[int]:
        return self.history[self.n_prompt :]

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def draw(self, logits: np.ndarray) -> Step:
        """Adds the token that `logits` [V] give, and says what it added to the text."""
        choice = choose(
            logits,
            options=self._options,
            history=self.history,
            n_prompt=self.n_prompt,
            sequence=self._number,
        )
        self.choices.append(choice)
        self.history.append(choice.token_id)
        ended = choice.token_id in self._options.eos_token_id
        piece = self._read(choice.token_id)
        if ended or self._stops.stopped is not None:
            self.finish_reason = "stop"
        elif len(self.history) - self.n_prompt >= self._limit:
            self.finish_reason = "length"
        if self.finish_reason and self._stream:
            piece += self._rest()
        self._pieces.append(piece)
        return Step(piece, (choice.token_id,))

    def interrupt(self):
        """Ends the sequence where it is; the text so far stays."""
        if self.finish_reason is None:
            self.finish_reason = "interrupted"
            if self._stream:
                self._pieces.append(self._rest())

    def _read(self, token):
        return "" if self._stream is None else self._stops.feed(self._stream.step(token))

    def _rest(self):
        return self._stops.feed(self._stream.finish()) + self._stops.finish()


class Decoding:
    """One run: some prompts continued together, every sweep shared. Iterate for the steps; then ask
    for `generations`."""

    def __init__(
        self, model: Model, prompts: list[list[int]], options: SamplingOptions, *, text=None
    ):
        self._model, self.options = model, options.seeded() if not options.is_greedy else options
        for prompt in prompts:
            model.check_ids(prompt)
        limits = []
        for prompt in prompts:
            model.check_length(len(prompt), 0)
            limits.append(options.new_tokens_limit(len(prompt), context=model.context_limit))
        if options.stop and text is None:
            raise UsageError(
                "stop: the model has no tokenizer, so text cannot be watched; leave it out"
            )
        # A sequence's number is its place among those of one prompt, not in the batch: so each is
        # what it would be alone.
        self.continuations = [
            Continuation(prompt, options=self.options, limit=limit, number=number, text=text)
            for prompt, limit in zip(prompts, limits, strict=True)
            for number in range(options.num_return_sequences)
        ]
        self._longest = max(map(len, prompts))
        self._context = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
        self._forward = model.forward(
            batch=len(self.continuations), longest=self._longest, context=self._context
        )
        self.stats = Stats(load_s=model.load_s, sweep_bytes=model.sweep_bytes)
        self._compiles_before = dict(model.compiles)

    def __iter__(self) -> Iterator[list[Step | None]]:
        """One list a sweep: what each sequence gained, None for those that have ended."""
        if self._all_ended():
            return
        model, stats = self._model, self.stats
        clock = Clock()
        forward = self._forward
        forward.compile(self._longest)
        forward.compile(1)
        forward.fill()
        stats.load_s += clock.lap()
        before = replace(model.totals)
        ids, starts = [c.history for c in self.continuations], [0] * len(self.continuations)
        try:
            while True:
                clock.lap()
                logits = forward.sweep(ids, starts)
                steps = [
                    None if c.finish_reason else c.draw(row[-1])
                    for c, row in zip(self.continuations, logits, strict=True)
                ]
                self._count(clock.lap(), steps, before, forward)
                yield steps
                if self._all_ended():
                    return
                # An ended sequence goes on as padding: its row would change the compiled shape.
                ids = [[] if c.finish_reason else c.history[-1:] for c in self.continuations]
                starts = [len(c.history) - 1 for c in self.continuations]
        finally:
            self._count_bytes(before)

    def generations(self) -> list[Generation]:
        """The texts so far; what has not ended is marked as interrupted."""
        for continuation in self.continuations:
            continuation.interrupt()
        model = self._model
        before = self._compiles_before
        self.stats.compiles = {
            shape: n - before.get(shape, 0)
            for shape, n in model.compiles.items()
            if n > before.get(shape, 0)
        }
        memory = model.memory()
        return [
            Generation(
                text=c.text,
                token_ids=c.token_ids,
                prompt_tokens=c.n_prompt,
                finish_reason=c.finish_reason,
                device=model.device_name,
                dtype=model.dtype,
                seed=self.options.seed,
                logprobs=_logprobs(c.choices) if self.options.logprobs is not None else None,
                stats=self.stats.as_dict(),
                memory=memory,
                plan=model.plan.as_dict(),
            )
            for c in self.continuations
        ]

    def _all_ended(self):
        return all(c.finish_reason for c in self.continuations)

    def _count(self, seconds, steps, before, forward):
        stats = self.stats
        if stats.sweeps == 0:
            stats.prefill_s = seconds
        else:
            stats.decode_s += seconds
            stats.decode_sweeps += 1
        stats.sweeps += 1
        stats.new_tokens += sum(step is not None for step in steps)
        self._model.note_peaks(forward)
        self._count_bytes(before)

    def _count_bytes(self, before):
        now = self._model.totals
        self.stats.read_bytes = now.read_bytes - before.read_bytes
        self.stats.put_bytes = now.put_bytes - before.put_bytes
        self.stats.bounced_bytes = now.bounced_bytes - before.bounced_bytes
        self.stats.stall_s = now.stall_s - before.stall_s
        self.stats.reads = "direct" if self._forward.reads_directly else "buffered"


def _logprobs(choices):
    return [
        {"token_id": c.token_id, "logprob": c.logprob, "top": [list(pair) for pair in c.top]}
        for c in choices
    ]


def generate(model_or_ref, prompt=None, **options):
    """Continues a prompt: a str, ids, messages, or a list of these.

    -> a Generation, or a list where a list came in or num_return_sequences is above 1 (those of one
    prompt next to each other). `options`: transformers' generation options, `seed`, `stop`,
    `logprobs`; `messages`, `chat`, `system`, `chat_template` as in `encode_prompts`; where a ref is
    given, those of `AutoModel.from_pretrained`. Raises the errors of both.
    """
    with _opened(model_or_ref, options) as (model, sampling, chat):
        prompts, one = encode_prompts(model, prompt, **chat)
        decoding = Decoding(model, prompts, sampling_options(model, sampling), text=model.text)
        for _ in decoding:
            pass
        found = decoding.generations()
        return found[0] if one and len(found) == 1 else found


def stream(model_or_ref, prompt=None, **options) -> Iterator[Step]:
    """Continues one prompt, yielding a Step as each sweep ends. As `generate` otherwise."""
    with _opened(model_or_ref, options) as (model, sampling, chat):
        prompts, one = encode_prompts(model, prompt, **chat)
        decoding = Decoding(model, prompts, sampling_options(model, sampling), text=model.text)
        if not one or len(decoding.continuations) > 1:
            raise UsageError("stream: takes one prompt and gives one text; generate takes more")
        for (step,) in decoding:
            yield step


def generate_ids(
    model: Model,
    input_ids,
    *,
    attention_mask=None,
    streamer=None,
    return_dict_in_generate=False,
    **options,
):
    """transformers' `generate`: ids [B, T] in, prompt and new ids out in the same kind.

    `attention_mask` marks padding with 0, at either end of a row. `streamer`: any object with `put`
    and `end`, for one sequence; it gets the prompt first, as in transformers.
    """
    rows = as_id_lists(input_ids)
    prompts = rows if attention_mask is None else _unpadded(rows, attention_mask)
    sampling = sampling_options(model, options, implied=False)
    text = model.text if sampling.stop else None
    decoding = Decoding(model, prompts, sampling, text=text)
    _drive(decoding, streamer)
    answers = [c.token_ids for c in decoding.continuations]
    n = sampling.num_return_sequences
    whole = [rows[i // n] + answer for i, answer in enumerate(answers)]
    sequences = _like(input_ids, whole, _padding(model, sampling))
    return Sequences(sequences) if return_dict_in_generate else sequences


def _drive(decoding, streamer):
    if streamer is None:
        for _ in decoding:
            pass
        return
    if len(decoding.continuations) > 1:
        raise UsageError("streamer: takes one sequence at a time; leave it out for a batch")
    streamer.put(np.array([decoding.continuations[0].history]))
    for (step,) in decoding:
        streamer.put(np.array(step.token_ids))
    streamer.end()


def _unpadded(rows, attention_mask):
    """Each row without the padding that its mask marks."""
    masks = as_id_lists(attention_mask, name="attention_mask")
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise UsageError("attention_mask: of another shape than input_ids")
    found = []
    for row, mask in zip(rows, masks, strict=True):
        kept = [i for i, mark in enumerate(mask) if mark]
        if not kept or kept != list(range(kept[0], kept[-1] + 1)):
            raise UsageError(
                "attention_mask: expected ones in a row, with padding around them only"
            )
        found.append([row[i] for i in kept])
    return found


@dataclass(frozen=True)
class Sequences:
    """What `generate` returns with return_dict_in_generate: ids [B, T] of prompt and answer."""

    sequences: object


def sampling_options(model: Model, options: dict, *, implied: bool = True) -> SamplingOptions:
    """The user's options over what the model's makers set, checked against the vocabulary.

    `implied`: a temperature or a filter means sampling, without `do_sample`.
    """
    return SamplingOptions.from_mapping(
        options,
        generation_config=model.generation_config,
        vocab_size=model.config.vocab_size,
        sampling_implied=implied,
    )


CHAT_OPTIONS = ("messages", "chat", "system", "chat_template")


def encode_prompts(
    model: Model, prompt=None, *, messages=None, chat=False, system=None, chat_template=None
) -> tuple[list[list[int]], bool]:
    """A str, ids, messages, or a list of these -> (ids of each, whether it was a single one).

    Messages ({"role": ..., "content": ...}) are put in the model's chat format; so is a str with
    `chat`, after a message of `system`. Raises UsageError, and what a chat template gives.
    """
    if (prompt is None) == (messages is None):
        raise UsageError("prompt: give a prompt or messages, and not both")
    prompt = messages if prompt is None else prompt
    form = {"chat": chat or system is not None, "system": system, "chat_template": chat_template}
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if _is_one(prompt):
        return [_encode(model, prompt, **form)], True
    if not isinstance(prompt, (list, tuple)):
        found = type(prompt).__name__
        raise UsageError(f"prompt: found {found}, expected a str, ids, messages, or a list of them")
    if not prompt:
        raise UsageError("prompt: an empty list; give at least one prompt")
    for one in prompt:
        if not _is_one(one):
            found = type(one).__name__
            raise UsageError(f"prompt: found {found} in a list of prompts, expected str or ids")
    return [_encode(model, one, **form) for one in prompt], False


def _is_one(prompt):
    """Whether this is a single prompt: text, ids, or messages."""
    if isinstance(prompt, str):
        return True
    kinds = {type(part) for part in prompt} if isinstance(prompt, (list, tuple)) else set()
    return kinds in ({int}, {dict})


def _encode(model, prompt, *, chat, system, chat_template):
    if not isinstance(prompt, str) and type(prompt[0]) is int:
        return list(prompt)
    if model.text is None:
        raise UsageError(NO_TOKENIZER.format(folder=model.folder))
    messages = chat_messages(prompt, chat=chat, system=system)
    if messages is None:
        return model.text.encode(prompt)
    return model.text.encode_chat(messages, chat_template=chat_template)


@contextmanager
def _opened(model_or_ref, options):
    """(model, options of generation, options of the prompt); closes a model that was opened
    here."""
    chat = {name: value for name, value in options.items() if name in CHAT_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
    if isinstance(model_or_ref, Model):
        yield model_or_ref, rest, chat
        return
    own = {field.name for field in fields(RunConfig)} | {"draft", "offline"}
    run = {name: value for name, value in rest.items() if name in own}
    rest = {name: value for name, value in rest.items() if name not in own}
    _check_names(rest, own)
    with AutoModel.from_pretrained(model_or_ref, **run) as model:
        yield model, rest, chat


def _check_names(options, own):
    """An unknown option is refused before the model is opened, and offers run options too."""
    known = [*own, *CHAT_OPTIONS, *option_names()]
    for name in options:
        if not is_option(name):
            raise UsageError(unknown_name("option", name, known))
    SamplingOptions.from_mapping(options)


def _padding(model, options):
    configured = model.generation_config.get("pad_token_id")
    return (
        configured
        if type(configured) is int
        else options.eos_token_id[0]
        if options.eos_token_id
        else 0
    )


def _like(given, rows, padding):
    """Rows of ids as the kind that `given` was: list, numpy, jax or torch; padded on the right
    where they are arrays."""
    if isinstance(given, (list, tuple)):
        return rows if given and isinstance(given[0], (list, tuple)) else rows[0]
    longest = max(map(len, rows))
    array = np.array([row + [padding] * (longest - len(row)) for row in rows])
    array = array if given.ndim == 2 else array[0]
    if isinstance(given, np.ndarray):
        return array.astype(given.dtype)
    if type(given).__module__.startswith("torch"):
        import torch

        return torch.from_numpy(array).to(device=given.device, dtype=given.dtype)
    import jax.numpy as jnp

    return jnp.asarray(array, dtype=given.dtype)
