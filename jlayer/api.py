"""The public interface: AutoModel, generate, stream, and the model that they use."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial

import numpy as np

from jlayer.auto_tokenizer import AutoTokenizer, given_ref
from jlayer.checkpoint.hub import local_folder
from jlayer.config import generation_file, read_generation_config
from jlayer.engine.arrays import as_kind
from jlayer.engine.assistant import as_draft, of_call
from jlayer.engine.background import Background, Handle
from jlayer.engine.called import Output, all_logits, check_called, generate_ids
from jlayer.engine.deciding import follows
from jlayer.engine.decoding import Decoding
from jlayer.engine.engine import Engine
from jlayer.engine.following import follow
from jlayer.engine.functions import taken
from jlayer.engine.generation import Generation
from jlayer.engine.ids import encoded
from jlayer.engine.lane import Step
from jlayer.engine.loading import NAMES, check_names, translated
from jlayer.engine.options import SamplingOptions, check_draft, configured, is_option
from jlayer.engine.pooling import embed
from jlayer.engine.prompts import CHAT_OPTIONS, encode_prompts
from jlayer.engine.session import Sessions
from jlayer.errors import UsageError
from jlayer.interrupts import deferred
from jlayer.plan.plan import Plan
from jlayer.run_config import RunConfig
from jlayer.streaming.watch import Watch

FORMS = (*CHAT_OPTIONS, "generation_config")  # options of the prompt, not of drawing


class AutoModel:
    """Opens models. Named as in transformers, so that a script only changes an import."""

    @staticmethod
    def from_pretrained(
        ref: str | os.PathLike | None = None,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        dtype=None,
        draft: str | os.PathLike | None = None,
        host_share: float | str = "auto",
        offline: bool = False,
        watch: Watch | None = None,
        **options,
    ) -> Model:
        """Opens a model for streaming: a layered folder, or a published folder without converting.

        A hub id (`owner/name[@revision]`) is fetched first, unless it is in the cache. `offline`:
        use the cache only.

        `device_memory` and `host_memory` are budgets for the whole process (bytes, or words such
        as "4GiB"); by default 4 GiB, or what is free if less, and 80% of what the system says is
        available. `dtype` is what activations are computed in, by default ("auto") the weights'
        own: a name, or a dtype of torch, numpy or jax. `draft` is a smaller model with the same
        tokenizer, a folder or a hub id, which stays on the device and guesses tokens. `host_share`:
        of the weights in host memory, the share that its own cores multiply where they lie, from 0
        to 1; "auto": as measured, where it pays. `watch` is told what opening does, and becomes the
        model's own. Further options: `adapter` (a folder, as PEFT saves it: docs/adapters.md),
        `adapters` ({name: folder}: further ones, which `adapter=name` of a prompt asks for),
        `device` ("cpu" or "gpu"), `devices` (how many, or "all": each has `device_memory`, and its
        share of the rows of every layer), `coordinator`, `processes` and `process_id` (several
        hosts: docs/hosts.md), `context`, `follow_links` (take what links lead to outside of the
        folder), and those of transformers: what has a meaning here is taken (`device_map`,
        `torch_dtype`, `revision`, `local_files_only`), what changes nothing is passed over
        (`trust_remote_code`: code in a checkpoint is never run), the rest is refused. Raises
        CheckpointError, UnsupportedModelError, UsageError, DoesNotFitError, NetworkError or
        StorageError.
        """
        ref, options = translated(given_ref(ref, options), {"dtype": dtype, **options})
        offline = options.pop("offline", offline)
        run = RunConfig.from_options(
            device_memory=device_memory,
            host_memory=host_memory,
            draft=draft,
            host_share=host_share,
            **options,
        )
        if run.draft is not None:
            run = replace(run, draft=local_folder(run.draft, offline=offline, option="draft"))
        folder = local_folder(ref, offline=offline)
        with deferred():  # each phase of opening is a safe point
            return Model(folder, run, watch)


class AutoModelForCausalLM(AutoModel):
    """AutoModel under transformers' longer name."""


class Model(Sessions):
    """A model that is streamed tile by tile.

    Close it, or use it in a `with`, to stop its threads. Several threads and runs may use it.
    """

    def __init__(self, ref: str | os.PathLike, run: RunConfig, watch: Watch | None = None):
        self.folder = os.fspath(ref)
        self.engine = Engine(self.folder, run, watch)
        self._background = Background(self.engine.scheduler)
        self._end = weakref.finalize(self, _close, self.engine, self._background)
        try:  # after the engine, which tells what is wrong with a folder that has no config
            self.generation_config = read_generation_config(self.folder)
            self._generation_file = generation_file(self.folder)
        except BaseException:
            self.close()
            raise
        self._loading, self._own = threading.Lock(), threading.local()
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
    def device(self) -> str:
        """Where a script may send its ids, as it would to a model of transformers: they are read
        on the host. Where the model runs is in `engine.device_name`."""
        return "cpu"

    @property
    def plan(self) -> Plan:
        """The current plan, for all live runs. A run's own plan is in its Generation."""
        return self.engine.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the folder and the plan; none is an error."""
        return (*self.engine.store.notes, *self.engine.notes, *self.plan.notes)

    @property
    def context_limit(self) -> int:
        """The most positions of a sequence: the option `context` if given, else the model's
        limit."""
        return self.engine.context_limit

    @property
    def tokenizer(self):
        """The published tokenizer as transformers gives it, which is imported on first use.

        Each thread has its own, copied from the first as it then is: padding and truncation are
        settings of the object, and threads that share one get each other's.
        """
        if not hasattr(self._own, "tokenizer"):
            with self._loading:
                if self._tokenizer is None:
                    self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
                    self._own.tokenizer = self._tokenizer
                else:
                    self._own.tokenizer = copy.deepcopy(self._tokenizer)
        return self._own.tokenizer

    @property
    def text(self):
        """The tokenizer that generation itself uses: small, and without transformers. None where
        the folder has none."""
        with self._loading:
            if self._text is None:
                from jlayer.text.tokenizer import Tokenizer

                self._text = Tokenizer.from_folder(self.folder)
            return self._text

    def __call__(
        self, input_ids=None, attention_mask=None, *, inputs_embeds=None, **options
    ) -> Output:
        """`model(input_ids).logits`, as in transformers: see `logits`. Arguments of its `forward`
        that ask for more are refused."""
        check_called(options)
        return Output(self.logits(input_ids, attention_mask, inputs_embeds=inputs_embeds))

    def logits(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        inputs_embeds=None,
        adapter: str | None = None,
    ) -> np.ndarray:
        """Logits of every position: ids [B, T] or [T], or embeddings [B, T, D] as `inputs_embeds`
        -> float32 [B, T, V] on the host.

        What a tokenizer gives is taken too, without padding. `adapter`: as of `generate`. Raises
        UsageError: no tokens, rows of different lengths, padding, unknown ids, beyond the context.
        """
        how = {"begin": self.generation_config.get("bos_token_id"), "adapter": adapter}
        how["inputs_embeds"] = inputs_embeds
        return all_logits(self.engine, input_ids, attention_mask, **how)

    def encode(
        self,
        texts,
        pooling: str = "mean",
        *,
        normalize: bool = False,
        adapter: str | None = None,
    ):
        """Texts as vectors: their final hidden states, pooled -> float32 [texts, D]; [D] of one.

        `texts`: a str, ids, or a list of these; all share forward passes, and each gives what it
        would give alone. Ids in an array give an array of its kind, all else numpy's. `pooling`:
        "mean" of all tokens, or of the "last" one. `normalize`: to length 1. `adapter`: as of
        `generate`. Raises UsageError, DoesNotFitError, and what a forward pass raises.
        """
        rows, one = encode_prompts(self.text, texts, folder=self.folder)
        how = {"pooling": pooling, "normalize": normalize, "adapter": adapter}
        found = embed(self.engine, rows, **how)
        return as_kind(encoded(texts)[0], found[0] if one else found)

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        custom_generate=None,
        **options,
    ):
        """New tokens after `inputs` (`input_ids`, `inputs_embeds`), as transformers' `generate`
        gives them, with its arguments in its order; those that jlayer does not support are
        refused. See `generate_ids`."""
        named = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        return generate_ids(
            self,
            inputs,
            generation_config=generation_config,
            streamer=streamer,
            **{name: value for name, value in named.items() if value is not None},
            **options,
        )

    def sampling_options(
        self, options: dict, *, generation_config=None, implied: bool = True
    ) -> SamplingOptions:
        """The user's options over what the model's makers set, checked against the vocabulary.

        `generation_config`: transformers' object, or a mapping, with further options of the
        user's. `implied`: a temperature or a filter means sampling, without `do_sample`.
        """
        options, draft = of_call(options)
        found = SamplingOptions.from_mapping(
            {**configured(generation_config), **options},
            generation_config=self.generation_config,
            vocab_size=self.config.vocab_size,
            sampling_implied=implied,
            where=self._generation_file,
        )
        if draft is not None or not self.engine.n_alive:
            self.engine.use_draft(draft)
        check_draft(found.speculate, self.engine.run.draft)
        return found

    def submit(self, prompt=None, **options) -> Handle:
        """Continues a prompt in the background, from any thread: a handle that gives Steps as they
        come. All that are alive share every forward pass, and each text is what it would be alone.

        `prompt`, `options`: those of `generate`, for one prompt and one text. Where the budgets
        have no room for it beside the others, it begins as these end. Raises what `generate` does
        of the arguments, and DoesNotFitError where there would be no room for it alone.
        """
        form = {name: options.pop(name) for name in FORMS if name in options}
        begin, _ = self.prepared(prompt, options=options, **form)
        return self._background.submit(begin(most_unread=None, waits=True), owner=self)

    def decoding(self, prompt=None, *, options: dict, **form) -> tuple[Decoding, bool]:
        """A run that continues a prompt, or several, and whether it was a single one. `form`: as
        in `encode_prompts`, and `generation_config`."""
        begin, one = self.prepared(prompt, options=options, **form)
        return begin(), one

    def prepared(
        self, prompt=None, *, options: dict, generation_config=None, **form
    ) -> tuple[Callable[[], Decoding], bool]:
        """What begins the run of `decoding`, and whether it was a single prompt."""
        functions, options = taken(options)
        sampling = self.sampling_options(options, generation_config=generation_config)
        pad = sampling.padding_id
        rows, one = encode_prompts(self.text, prompt, folder=self.folder, pad=pad, **form)
        begin = partial(Decoding, self.engine, rows, sampling, text=self.text)
        return partial(begin, functions=functions), one

    @property
    def follows(self) -> bool:
        """Whether this process is one of several, and not process 0: then `follow` is all that it
        does."""
        return follows()

    def follow(self) -> None:
        """Does what process 0 does with the model, on the devices of this process, until process 0
        closes it. Raises UsageError in process 0, and what a forward pass raises."""
        with deferred():
            follow(self.engine)

    def close(self):
        """Stops the reader threads and closes the files.

        A run in another thread fails with an error that names the reason.
        """
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _close(engine, background):
    engine.close()
    background.join()


def generate(model_or_ref, prompt=None, **options) -> Generation | list[Generation]:
    """Continues a prompt: a str, ids, messages, or a list of these.

    -> a Generation, or a list where a list came in or num_return_sequences is above 1 (those of one
    prompt next to each other). `options`: transformers' generation options, `generation_config`,
    `seed`, `stop`, `logprobs`, `adapter` (the name of one, of an open model); `messages`, `chat`,
    `system`, and for the chat template `chat_template`, `tools`, `documents`,
    `continue_final_message` and `chat_template_kwargs` (its further variables), as in
    `encode_prompts`; where a ref is given, those of `from_pretrained`. Raises the errors of both.

    What is not given is as the model's makers published it: a published `do_sample` draws; without
    one it is greedy. temperature=0 is greedy, and a temperature, top_k, top_p or min_p draws.

    Each prompt of a list gives what it would give alone. So with a seed, equal prompts give equal
    texts: ask for several with num_return_sequences. Without a seed each prompt draws its own,
    which its Generation has.
    """
    with _opened(model_or_ref, options) as (model, sampling, form):
        decoding, is_single = model.decoding(prompt, options=sampling, **form)
        for _ in decoding:
            pass
        generations = decoding.generations()
        return generations[0] if is_single and len(generations) == 1 else generations


def stream(model_or_ref, prompt=None, **options) -> Iterator[Step]:
    """Continues one prompt, yielding a Step as each forward pass ends. As `generate` otherwise.

    What is wrong with the arguments is raised here, before the first step is asked for.
    """
    with ExitStack() as opening:
        model, sampling, form = opening.enter_context(_opened(model_or_ref, options))
        begin, _ = model.prepared(prompt, options=sampling, **form)
        decoding = begin()
        decoding.close()  # holds no cache until somebody asks for a step
        if len(decoding.lanes) > 1:
            raise UsageError("stream: takes one prompt and gives one text; generate takes more")
        # Where nobody does, a model that was opened here ends as it is dropped.
        return _steps(begin, model, opening.pop_all())


def _steps(begin, model, opened):
    """`model`: held, since a model that nobody holds is closed."""
    with opened:
        decoding = begin()
        try:
            for (step,) in decoding:
                yield step
        finally:
            decoding.close()


@contextmanager
def _opened(model_or_ref, options):
    """(model, options of generation, options of the prompt); closes a model that was opened
    here."""
    form = {name: value for name, value in options.items() if name in FORMS}
    rest = {name: value for name, value in options.items() if name not in FORMS}
    if isinstance(model_or_ref, Model):
        yield model_or_ref, rest, form
        return
    own = {field.name for field in fields(RunConfig)} | {"offline"}
    loads = own | {name for name in NAMES if not is_option(name)}
    run = {name: value for name, value in rest.items() if name in loads}
    rest = {name: value for name, value in rest.items() if name not in loads}
    rest, run = as_draft(rest, run)
    check_names(taken(rest)[1], own)
    check_draft(rest.get("speculate"), run.get("draft"), unused=True)
    with AutoModel.from_pretrained(model_or_ref, **run) as model:
        yield model, rest, form
