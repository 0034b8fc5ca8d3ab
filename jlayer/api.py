"""The public interface: AutoModel, generate, stream, and the model that they use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np

from jlayer.checkpoint.hub import local_folder
from jlayer.config import RunConfig, read_generation_config, unknown_name
from jlayer.engine.decoding import Decoding, Generation
from jlayer.engine.engine import Engine
from jlayer.engine.ids import as_id_lists, like, unpadded
from jlayer.engine.lane import Step
from jlayer.engine.options import SamplingOptions, is_option, option_names
from jlayer.engine.prompts import CHAT_OPTIONS, encode_prompts
from jlayer.errors import UsageError
from jlayer.interrupts import deferred
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape
from jlayer.streaming.executor import Watch


class AutoModel:
    """Opens models. Named as in transformers, so that a script only changes an import."""

    @staticmethod
    def from_pretrained(
        ref: str | os.PathLike,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        dtype: str | None = None,
        draft: str | None = None,
        offline: bool = False,
        watch: Watch | None = None,
        **options,
    ) -> Model:
        """Opens a model for streaming: a layered folder, or a published folder without converting.

        A hub id (`owner/name[@revision]`) is fetched first, unless it is in the cache. `offline`:
        use the cache only.

        `device_memory`, `host_memory`: budgets for the whole process (bytes, or text such as
        "4GiB"). Defaults: 4 GiB of device memory, or what is free if less; 80% of the host memory
        that the system reports as available. `dtype`: compute dtype of activations; default: that
        of the weights. `watch` is notified of the phases of opening, and later of the model's
        steps. Further options: `device` ("cpu" or "gpu"), `context`.

        Raises CheckpointError, UnsupportedModelError, UsageError, DoesNotFitError, NetworkError or
        StorageError.
        """
        if draft is not None:
            raise UsageError(f"draft: found {draft!r}; speculation is not there yet, leave it out")
        run = RunConfig.from_options(
            device_memory=device_memory, host_memory=host_memory, dtype=dtype, **options
        )
        folder = local_folder(ref, offline=offline)
        with deferred():  # each phase of opening is a safe point
            return Model(folder, run, watch)


class Model:
    """A model that is streamed tile by tile.

    Close it, or use it in a `with`, to stop its reader threads. Several threads and several runs
    may use it at a time.
    """

    def __init__(self, ref: str | os.PathLike, run: RunConfig, watch: Watch | None = None):
        self.folder = os.fspath(ref)
        self.engine = Engine(self.folder, run, watch)
        self._end = weakref.finalize(self, self.engine.close)
        try:  # after the engine, which tells what is wrong with a folder that has no config
            self.generation_config = read_generation_config(self.folder)
        except BaseException:
            self.close()
            raise
        self._tokenizer = None
        self._text = None

    @property
    def config(self):
        return self.engine.cfg

    @property
    def dtype(self) -> str:
        """The compute dtype of activations."""
        return self.engine.dtype

    @property
    def plan(self) -> Plan:
        """The current plan, for all live runs. A run's own plan is in its Generation."""
        return self.engine.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the folder and the plan; none is an error."""
        return (*self.engine.store.notes, *self.plan.notes)

    @property
    def context_limit(self) -> int:
        """The most positions of a sequence: the option `context` if given, else the model's
        limit."""
        return self.engine.context_limit

    @property
    def tokenizer(self):
        """The published tokenizer, loaded by transformers, which is imported on first use."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return self._tokenizer

    @property
    def text(self):
        """The tokenizer that generation uses, without transformers; None if the folder has none."""
        if self._text is None:
            from jlayer.text.tokenizer import Tokenizer

            self._text = Tokenizer.from_folder(self.folder)
        return self._text

    def logits(self, input_ids) -> np.ndarray:
        """Logits of every position: ids [B, T] or [T] -> float32 [B, T, V] on the host.

        Raises UsageError: no tokens, rows of different lengths, ids outside the vocabulary, more
        tokens than the context.
        """
        ids = as_id_lists(input_ids)
        lengths = [len(row) for row in ids]
        if len(set(lengths)) > 1:
            raise UsageError(f"input_ids: rows of lengths {lengths}, expected equal ones")
        for row in ids:
            self.engine.check_ids(row)
        self.engine.check_length(lengths[0])
        forward = self.engine.start(
            RunShape(len(ids), lengths[0], lengths[0], all_logits=True, single_array=True)
        )
        try:
            return forward.sweep(ids, [0] * len(ids), all_logits=True)
        finally:
            forward.close()

    def generate(self, input_ids, **options):
        """Generates tokens after `input_ids`, as transformers' `generate` does; see
        `generate_ids`."""
        return generate_ids(self, input_ids, **options)

    def sampling_options(self, options: dict, *, implied: bool = True) -> SamplingOptions:
        """The user's options, then those published with the model, checked against the vocabulary.

        `implied`: a temperature or a filter turns `do_sample` on.
        """
        return SamplingOptions.from_mapping(
            options,
            generation_config=self.generation_config,
            vocab_size=self.config.vocab_size,
            sampling_implied=implied,
        )

    def decoding(self, prompt=None, *, options: dict, **form) -> tuple[Decoding, bool]:
        """(a run that continues one or several prompts, whether a single prompt was given).

        `form`: the options of `encode_prompts`.
        """
        prompts, is_single = encode_prompts(self.text, prompt, folder=self.folder, **form)
        sampling = self.sampling_options(options)
        return Decoding(self.engine, prompts, sampling, text=self.text), is_single

    def close(self):
        """Stops the reader threads and closes the files.

        A run in another thread fails with an error that names the reason.
        """
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def generate(model_or_ref, prompt=None, **options) -> Generation | list[Generation]:
    """Continues a prompt: a str, ids, messages, or a list of these.

    Returns a Generation. Returns a list for a list of prompts, or if num_return_sequences is above
    1; the sequences of one prompt are neighbours. `options`: transformers' generation options,
    `seed`, `stop`, `logprobs`; `messages`, `chat`, `system`, `chat_template` as in
    `encode_prompts`; with a ref, those of `AutoModel.from_pretrained`. Raises the errors of both.
    """
    with _opened(model_or_ref, options) as (model, sampling, form):
        decoding, is_single = model.decoding(prompt, options=sampling, **form)
        for _ in decoding:
            pass
        generations = decoding.generations()
        return generations[0] if is_single and len(generations) == 1 else generations


def stream(model_or_ref, prompt=None, **options) -> Iterator[Step]:
    """Continues one prompt and yields a Step after each forward pass. Options as in `generate`."""
    with _opened(model_or_ref, options) as (model, sampling, form):
        decoding, is_single = model.decoding(prompt, options=sampling, **form)
        try:
            if not is_single or len(decoding.lanes) > 1:
                raise UsageError("stream: takes one prompt and gives one text; generate takes more")
            for (step,) in decoding:
                yield step
        finally:
            decoding.close()


def generate_ids(
    model: Model,
    input_ids,
    *,
    attention_mask=None,
    streamer=None,
    return_dict_in_generate=False,
    **options,
):
    """transformers' `generate`: ids [B, T] -> prompt and new ids, in the type that was given.

    `attention_mask` marks padding with 0, at either end of a row. `streamer`: any object with `put`
    and `end`, for one sequence; it gets the prompt first, as in transformers.
    """
    rows = as_id_lists(input_ids)
    prompts = rows if attention_mask is None else unpadded(rows, attention_mask)
    sampling = model.sampling_options(options, implied=False)
    decoding = Decoding(model.engine, prompts, sampling, text=model.text if sampling.stop else None)
    try:
        _drive(decoding, streamer)
    finally:
        decoding.close()
    n = sampling.num_return_sequences
    whole = [rows[i // n] + lane.token_ids for i, lane in enumerate(decoding.lanes)]
    sequences = like(input_ids, whole, _padding(model, sampling))
    return Sequences(sequences) if return_dict_in_generate else sequences


@dataclass(frozen=True)
class Sequences:
    """What `generate` returns with return_dict_in_generate: ids [B, T] of prompt and answer."""

    sequences: object


def _drive(decoding, streamer):
    if streamer is None:
        for _ in decoding:
            pass
        return
    if len(decoding.lanes) > 1:
        raise UsageError("streamer: takes one sequence at a time; leave it out for a batch")
    streamer.put(np.array([decoding.lanes[0].history]))
    for (step,) in decoding:
        streamer.put(np.array(step.token_ids))
    streamer.end()


@contextmanager
def _opened(model_or_ref, options):
    """Yields (model, generation options, prompt options); closes a model that it opened."""
    form = {name: value for name, value in options.items() if name in CHAT_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
    if isinstance(model_or_ref, Model):
        yield model_or_ref, rest, form
        return
    run_options = {field.name for field in fields(RunConfig)} | {"draft", "offline"}
    run = {name: value for name, value in rest.items() if name in run_options}
    rest = {name: value for name, value in rest.items() if name not in run_options}
    _check_names(rest, run_options)
    with AutoModel.from_pretrained(model_or_ref, **run) as model:
        yield model, rest, form


def _check_names(options, run_options):
    """Refuses unknown options before the model is opened; the hint may name a run option."""
    known = [*run_options, *CHAT_OPTIONS, *option_names()]
    for name in options:
        if not is_option(name):
            raise UsageError(unknown_name("option", name, known))
    SamplingOptions.from_mapping(options)


def _padding(model, options):
    """The id for padding: the model's pad token, else its first end token, else 0."""
    configured = model.generation_config.get("pad_token_id")
    if type(configured) is int:
        return configured
    return options.eos_token_id[0] if options.eos_token_id else 0
