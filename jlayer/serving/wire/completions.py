"""/v1/completions: prompts of text or ids → orders, and their texts in OpenAI's older form.

lm-eval scores answers through it: `echo` with `logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.engine.lane import Step
from jlayer.serving.job import Order
from jlayer.serving.wire.asked import Asked, Identity, Teller, Usage, new_identity
from jlayer.serving.wire.conversation import client_of
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import check_range, is_ids, read_form, refuse_given
from jlayer.serving.wire.logprobs import Legacy, as_choice
from jlayer.serving.wire.sampling import (
    Sampling,
    constraint_of,
    options_of,
    wanted_form,
    with_length,
    with_texts,
)
from jlayer.serving.wire.served import Served
from jlayer.text.stream import TextStream

MOST_TOP = 20
MOST_PROMPTS = 256
MOST_CHOICES = 512
NEW_TOKENS = 16  # OpenAI's default here: a model without a chat's end would fill its context
UNSUPPORTED = {
    "suffix": "leave it out",
    "prompt_embeds": "give text or token ids",
    "prompt_logprobs": "give echo: true and logprobs",
    "tools": "use /v1/chat/completions",
    "functions": "use /v1/chat/completions",
}


class Completion(Sampling, kw_only=True):
    prompt: str | list | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


def read_completion(
    body: dict, served: Served, *, client: str = "", identity: Identity | None = None
) -> Asked:
    """`identity`: of the answer, where it has one already. Raises Refused."""
    refuse_given(body, UNSUPPORTED)
    form = read_form(body, Completion)
    served = served.asked_for(form.model)
    form.check()
    n = 1 if form.n is None else form.n
    if form.best_of not in (None, n):
        raise invalid(
            f"best_of: found {form.best_of} with n {n}; only as many texts as are told are drawn",
            param="best_of",
            code="unsupported_parameter",
        )
    check_range(form.logprobs, "logprobs", 0, MOST_TOP)
    prompts = prompts_of(form.prompt)
    if len(prompts) * n > MOST_CHOICES:
        raise invalid(f"n: {len(prompts)} prompts with {n} texts each are too many", param="n")
    scores = bool(form.echo) and form.logprobs is not None
    of_prompt = form.logprobs if scores else None
    options = options_of(form, served, logprobs=form.logprobs, prompt_logprobs=of_prompt)
    n_new = NEW_TOKENS if form.max_tokens is None else form.max_tokens
    wanted = wanted_form(form)
    constraint = constraint_of(wanted, served, options.eos_token_id)
    orders, views, texts = [], [], []
    for number, prompt in enumerate(prompts):
        ids = ids_of(prompt, served, adds=form.add_special_tokens is not False)
        most = _cut(n_new, form, served, ids)
        drawn, sequences = with_texts(
            with_length(options, served, len(ids), most, param="prompt"), n
        )
        orders.append(
            Order(tuple(ids), drawn, constraint=constraint, client=client_of(client, form.user))
        )
        views += [(number, sequence) for sequence in sequences]
        texts.append(_prompt_text(prompt, served))
    streaming = form.stream_options
    own = Own(
        identity=identity or new_identity("cmpl"),
        prompts=tuple((tuple(order.ids), text) for order, text in zip(orders, texts, strict=True)),
        views=tuple(views),
        n_top=form.logprobs,
        echo=bool(form.echo),
        tells_usage=bool(streaming and streaming.include_usage),
    )
    return Asked(
        orders=tuple(orders),
        views=own.views,
        teller=lambda: CompletionTeller(own, served),
        stream=bool(form.stream),
        progress=bool(streaming and streaming.jlayer_progress),
        waits_for_prompt=scores,
        identity=own.identity,
        model=served.name,
    )


def prompts_of(
    prompt: str | list | None, *, param: str = "prompt", most: int = MOST_PROMPTS
) -> list[str | list[int]]:
    """Each prompt of a body, which may hold one or a list, as text or ids. Raises Refused."""
    if prompt is None:
        raise invalid(f"{param}: none given; expected text, token ids, or a list", param=param)
    if isinstance(prompt, str) or (prompt and is_ids(prompt)):
        return [prompt]
    if not prompt:
        raise invalid(f"{param}: an empty list; give at least one {param}", param=param)
    if len(prompt) > most:
        raise invalid(
            f"{param}: found {len(prompt)} {param}s, at most {most} are taken at a time",
            param=param,
        )
    for at, one in enumerate(prompt):
        if not isinstance(one, str) and not is_ids(one):
            found = type(one).__name__
            raise invalid(
                f"{param}[{at}]: found a {found}, expected text or a list of token ids",
                param=f"{param}[{at}]",
            )
    return prompt


def ids_of(
    prompt: str | list[int], served: Served, *, adds: bool = True, param: str = "prompt"
) -> list[int]:
    """Ids are taken as they are; text gets what the model's texts begin with, if it `adds` that.
    Raises Refused."""
    if isinstance(prompt, str):
        served.check_text(len(prompt), param=param)
        ids = served.tokenizer().encode(prompt, add_special_tokens=adds)
    else:
        ids = prompt
    if not ids:
        raise invalid(f"{param}: empty, and nothing to begin a text with; give text", param=param)
    wrong = next((token for token in ids if not 0 <= token < served.vocab_size), None)
    if wrong is not None:
        raise invalid(
            f"{param}: id {wrong} is outside the vocabulary of {served.vocab_size}", param=param
        )
    return ids


def _cut(n_new, form, served, ids):
    """The default is cut to what the context leaves; what was asked for is not."""
    room = served.context - len(ids)
    return min(n_new, room) if form.max_tokens is None and room > 0 else n_new


def _prompt_text(prompt, served):
    if isinstance(prompt, str):
        return prompt
    return "" if served.text is None else served.text.decode(prompt)


@dataclass(frozen=True)
class Own:
    """What all chunks of an answer have. `prompts`: ids and text of each."""

    identity: Identity
    prompts: tuple[tuple[tuple[int, ...], str], ...]
    views: tuple[tuple[int, int], ...]
    n_top: int | None
    echo: bool
    tells_usage: bool


class CompletionTeller(Teller):
    def __init__(self, own: Own, served: Served):
        self._own, self._served = own, served
        self._texts = [_Text(own, served, order) for order, _ in own.views]
        self._reasons: list[str | None] = [None] * len(own.views)

    def begin(self):
        return []

    def prompt(self, choice, logprobs):
        if not self._own.echo:
            return []
        text = self._texts[choice]
        return [self._chunk(choice, text.prompt_text, text.add_prompt(logprobs))]

    def step(self, choice, step: Step):
        logprobs = self._texts[choice].add(step)
        if not step.text and logprobs is None:
            return []
        return [self._chunk(choice, step.text, logprobs)]

    def finish(self, choice, reason):
        self._reasons[choice] = reason
        return [self._chunk(choice, "", None, reason)]

    def end(self, usage: Usage):
        return [{**self._head(), "choices": [], "usage": usage.as_dict()}] * self._own.tells_usage

    def whole(self, usage: Usage):
        choices = [
            {
                "index": choice,
                "text": text.text,
                "logprobs": text.logprobs,
                "finish_reason": reason,
            }
            for choice, (text, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
        ]
        return {**self._head(), "choices": choices, "usage": usage.as_dict()}

    def _head(self):
        return {
            "id": self._own.identity.id,
            "object": "text_completion",
            "created": self._own.identity.created,
            "model": self._served.name,
            "system_fingerprint": None,
        }

    def _chunk(self, choice, text, logprobs, reason=None):
        shown = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(), "choices": [shown]}
        if self._own.tells_usage:
            chunk["usage"] = None
        return chunk


class _Text:
    """One choice: its text so far, and where in it each token stands."""

    def __init__(self, own, served, order):
        self._n_top, self._served = own.n_top, served
        self._ids, self.prompt_text = own.prompts[order]
        self._pieces: list[str] = []
        self._all = Legacy()
        self._end = 0  # of the text of the tokens so far
        self._stream = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def logprobs(self) -> dict | None:
        return None if self._n_top is None else self._all.as_dict()

    def add_prompt(self, logprobs) -> dict | None:
        self._pieces.append(self.prompt_text)
        if self._n_top is None:
            return None
        rows = logprobs or [None] * len(self._ids)
        stream = None if self._served.text is None else TextStream(self._served.text)
        entries = [as_choice(row, token) for row, token in zip(rows, self._ids, strict=True)]
        told = self._add(entries, stream)
        self._end = len(self.prompt_text)
        return told

    def add(self, step) -> dict | None:
        self._pieces.append(step.text)
        if self._n_top is None:
            return None
        text = self._served.text
        if self._stream is None and text is not None:
            self._stream = TextStream(text, continues=bool(text.decode(self._ids)))
        return self._add(step.choices, self._stream)

    def _add(self, choices, stream):
        told = Legacy()
        for choice in choices:
            for form in (told, self._all):
                form.add(self._served.tokens, choice, n_top=self._n_top, offset=self._end)
            self._end += 0 if stream is None else len(stream.step(choice.token_id))
        return told.as_dict()
