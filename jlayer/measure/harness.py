"""lm-evaluation-harness (`lm_eval`) with a model of ours: all requests of its tasks at once.

Tokens, what is cut and what is left out are as in its `hf` backend, so the figures are the same.
Importing this registers the model as "jlayer"; how requests become forward passes is in `scoring`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jlayer.api import AutoModel, Model
from jlayer.errors import JlayerError, UsageError
from jlayer.interrupts import released
from jlayer.measure.scoring import Told, continue_all, score
from jlayer.text.tokenizer import NO_TOKENIZER

BOOTSTRAPS = 1000  # for the standard errors of perplexities, in one process
MOST_NEW_TOKENS = 256  # where a task does not say, as in the hf backend
# Of the hf backend: all fit, or the budgets say how many.
_UNREAD = ("batch_size", "max_batch_size")


@register_model("jlayer")
class JlayerLM(TemplateLM):
    """A model for lm_eval. `pretrained`: an open one, or what `AutoModel.from_pretrained` takes,
    with its `options`. `told(what, done, of)`: called as requests are done."""

    def __init__(self, pretrained: Model | str, *, told=lambda what, done, of: None, **options):
        super().__init__()
        options = {name: value for name, value in options.items() if name not in _UNREAD}
        is_open = isinstance(pretrained, Model)
        self.model = pretrained if is_open else AutoModel.from_pretrained(pretrained, **options)
        self._told = told
        self.tokenizer = self.model.tokenizer

    @property
    def max_length(self) -> int:
        return self.model.context_limit

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Ids, with the beginning token where the published tokenizer adds it and the text has none
        of its own."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scored = score(self.model, pairs, told=self._tell("continuations"))
        found = [(one.logprob, one.is_greedy) for one in scored]
        for (texts, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        pairs = [pair for some in windows for pair in some]
        scored = iter(score(self.model, pairs, told=self._tell("windows")))
        found = [sum(next(scored).logprob for _ in some) for some in windows]
        for text, total in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def _windows(self, text):
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked, stops = [], []
        end = self.tokenizer.decode(self.eot_token_id)
        for context, given in (request.args for request in requests):
            kwargs = normalize_gen_kwargs(given, MOST_NEW_TOKENS)
            until = [stop for stop in handle_stop_sequences(kwargs.pop("until"), end) if stop]
            ids, options = self._asked(context, kwargs, until)
            asked.append((ids, options))
            stops.append(until)
        told = self._tell("texts")
        found = []
        for request, ids, until in zip(
            requests, continue_all(self.model, asked, told=told), stops, strict=True
        ):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            text = postprocess_generated_text(text, until, think_end_token=None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _asked(self, context, kwargs, until):
        """(ids, options) of a request; its first tokens are left out where the context has no room
        for them beside the new ones."""
        count = kwargs.pop("max_gen_toks")
        most = self.max_length - count
        if most < 1:
            raise UsageError(
                f"max_gen_toks: found {count}, expected less than the context of {self.max_length}"
            )
        if not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)
        options = self.model.sampling_options(
            {**kwargs, "max_new_tokens": count, "stop": until}, implied=False
        )
        return self.tok_encode(context)[-most:], options

    def _tell(self, what) -> Told:
        return lambda done, of: self._told(what, done, of)


class Tasks(TaskManager):
    """lm_eval's own tasks, and those of a folder."""

    def named(self, tasks: Sequence[str]) -> list[str]:
        """The tasks that are meant: names, patterns such as mmlu_*, and files. Raises
        UsageError."""
        found = []
        for name in tasks:
            is_file = name.endswith((".yaml", ".yml"))
            some = [name] if is_file else self.match_tasks([name])
            if is_file and not os.path.isfile(name):
                raise UsageError(f"tasks: {name} is no file; give a name or the path of a task")
            if not some:
                close = difflib.get_close_matches(name, self.all_tasks, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UsageError(
                    f"tasks: {name!r} is no task of lm_eval: {hint}`lm-eval ls tasks` lists them, "
                    "and --include-path adds a folder of them"
                )
            found += some
        return found

    def load(self, task_list):
        """Loads tasks and what they ask about, which may come from the network. Raises
        UsageError."""
        try:
            with released():
                return super().load(task_list)
        except JlayerError:
            raise
        except Exception as error:  # a task is code and data of others
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"tasks: lm_eval cannot load {task_list}: {words:.300}") from error


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    told=lambda what, done, of: None,
    **options,
) -> dict:
    """The results of lm_eval's `simple_evaluate`, with its `options`. `tasks`: as in `Tasks.named`;
    `include_path`: a folder with more of them. Raises UsageError, and what a forward pass
    raises."""
    if model.text is None:
        raise UsageError(NO_TOKENIZER.format(folder=model.folder))
    manager = Tasks(include_path=include_path)
    names = manager.named(tasks)
    # It would fork for standard errors, which a process with threads of JAX must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return simple_evaluate(
        model=JlayerLM(model, told=told),
        tasks=names,
        task_manager=manager,
        **{"bootstrap_iters": BOOTSTRAPS, "log_samples": False, **options},
    )
