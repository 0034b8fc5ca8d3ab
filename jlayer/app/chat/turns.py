"""One turn: the messages as ids, the room that they and the answer need, the answer as it comes.

The cache entries of a turn stay until the next one, which computes only what differs from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jlayer.app import progress
from jlayer.app.chat.page import Page
from jlayer.engine.decoding import Decoding
from jlayer.engine.generation import Generation
from jlayer.engine.ids import Row
from jlayer.engine.options import DEFAULT_NEW_TOKENS as LEAST_NEW_TOKENS
from jlayer.engine.options import SamplingOptions
from jlayer.errors import UsageError
from jlayer.interrupts import STOPS, check
from jlayer.plan.shapes import RunShape
from jlayer.sizes import counted
from jlayer.text.chat import select_template
from jlayer.text.reasoning import CONTENT, REASONING, ReasoningSplitter, reasoning_marks_of

MOST_NEW_TOKENS = 2048  # of an answer, where neither the user nor the makers set it
LENGTH_FROM = "jlayer chat"  # begins what a run says of its length, which the chat says itself


class ContextFull(UsageError):
    """The messages leave no room for an answer."""

    def __init__(self, n_prompt: int, *, context: int, least: int):
        super().__init__(
            f"context: {counted(n_prompt, 'token')} with this message, and an answer needs room "
            f"for {least}; the context is {context:,}, so {n_prompt + least - context:,} have to go"
        )


@dataclass(frozen=True)
class Answer:
    """`found`: what the run gave. `stop`: the signal that ended it. `limit`: the most new tokens
    that it had room for."""

    text: str
    reasoning: str
    found: Generation
    limit: int
    stop: BaseException | None = None

    @property
    def n_context(self) -> int:
        """The tokens of the prompt and the answer."""
        return self.found.prompt_tokens + len(self.found.token_ids)


@dataclass
class Totals:
    """Sums of turns. `rows`: tokens that forward passes computed, guesses included."""

    turns: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0
    rows: int = 0
    forward_passes: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, found: Generation) -> Totals:
        stats = found.stats
        return cls(
            turns=1,
            prompt_tokens=found.prompt_tokens,
            kept_tokens=stats["kept_tokens"],
            new_tokens=len(found.token_ids),
            rows=stats["rows"],
            forward_passes=stats["sweeps"],
            seconds=round(stats["prefill_s"] + stats["decode_s"], 4),
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(one + more for one, more in zip(self, other, strict=True)))

    def __iter__(self):
        return iter(vars(self).values())


class Speaker:
    """A model that answers, and keeps the cache entries of the last turn as long as no other run
    needs their room. `options`: the user's, of sampling; `template`: options of the template, as
    `encode_chat` takes them."""

    def __init__(self, model, *, options: dict, template: dict):
        self.model, self._template = model, template
        self._options: SamplingOptions = model.sampling_options(options)
        text = model.text
        source = select_template(
            text.chat_templates, template.get("chat_template"), has_tools="tools" in template
        )
        decoder = text.library.get_added_tokens_decoder()
        added = (str(token.content) for token in decoder.values())
        self._marks = reasoning_marks_of(source, added)
        self._shown = () if self._marks is None else self._marks.shown_tokens(text)
        model.engine.kept.most = 1

    @property
    def repeats_itself(self) -> bool:
        """Whether it gives the same answer to the same messages, whatever the seed."""
        return self._options.is_greedy

    @property
    def least(self) -> int:
        """So many new tokens there must be room for."""
        wanted = self._options.max_new_tokens
        return LEAST_NEW_TOKENS if wanted is None else min(LEAST_NEW_TOKENS, wanted)

    def ids(self, messages: Sequence[dict], **options) -> list[int]:
        """Raises UsageError, also where the template refuses the messages, or CheckpointError."""
        return self.model.text.encode_chat(messages, **self._template, **options)

    def fits(self, n_prompt: int) -> bool:
        """Whether so many tokens and a short answer have room in the context and the budgets."""
        engine, longest = self.model.engine, n_prompt + self.least
        if longest > engine.context_limit:
            return False
        shape = RunShape(longest=n_prompt, context=longest, sweeps=self.least, entries=longest)
        return engine.plan_for(shape, alone=True).fits

    def begin(self, ids: list[int], *, attempt: int = 0) -> Decoding:
        """A run that answers, with as many new tokens as the context and the budgets have room for.

        `attempt`: how often these messages were answered before; with a seed, each draws its own.
        Raises ContextFull, or DoesNotFitError where the budgets do not even hold a short answer.
        """
        engine, options = self.model.engine, self._options
        context, n_prompt = engine.context_limit, len(ids)
        if n_prompt + self.least > context:
            raise ContextFull(n_prompt, context=context, least=self.least)
        # What was asked for is cut to what fits, as published lengths are.
        options = replace(
            options,
            max_new_tokens=min(self._wanted(n_prompt), context - n_prompt),
            max_length=None,
            length_from=LENGTH_FROM,
            seed=None if options.seed is None else options.seed + attempt,
        )
        text, row = self.model.text, Row(ids, ids)
        decoding = Decoding(engine, [row], options, text=text, shown=self._shown)
        decoding.keeps = True
        return decoding

    def splitter(self, ids: list[int]) -> ReasoningSplitter:
        """What tells the reasoning of an answer to these ids from its text."""
        if self._marks is None:
            return ReasoningSplitter(None)
        end = self.model.text.decode(ids[-32:], skip_special_tokens=False)
        return ReasoningSplitter(self._marks, is_open=self._marks.are_left_open(end))

    def _wanted(self, n_prompt):
        options = self._options
        if options.max_new_tokens is not None:
            return options.max_new_tokens
        if options.max_length is not None:
            return max(LEAST_NEW_TOKENS, options.max_length - n_prompt)
        return MOST_NEW_TOKENS


def follow(model, decoding: Decoding, splitter: ReasoningSplitter, page: Page) -> Answer:
    """Shows an answer while it comes, to its end or to a signal."""
    (lane,) = decoding.lanes
    stop, n_shown = None, 0  # characters of the text
    parts = {REASONING: [], CONTENT: []}

    def split(pieces):
        for kind, text in pieces:
            parts[kind].append(text)
            write(kind, text)

    view = progress.AnswerView(model, words=_words_of(decoding), n_sweeps_left=_left_of(decoding))
    with page.showing(model, view) as write:
        steps = iter(decoding)
        try:
            for (step,) in steps:
                n_shown += len(step.text)  # a signal comes once it is written
                split(splitter.feed(step.text))
            check()
        except STOPS as error:
            stop = error
        finally:
            steps.close()
        (found,) = decoding.generations()
        split(splitter.feed(found.text[n_shown:]))
        split(splitter.finish())
    text, reasoning = ("".join(parts[kind]) for kind in (CONTENT, REASONING))
    return Answer(text, reasoning, found, lane.limit, stop)


def _words_of(decoding):
    """What the next sweep is for."""
    (lane,), stats = decoding.lanes, decoding.stats

    def words():
        if lane.token_ids:
            each = f", {stats.tokens_per_sweep:.1f} a forward pass" if stats.drafted else ""
            return f"token {len(lane.token_ids) + 1}{each}"
        n_done = 0 if lane.table is None else len(lane.table)
        return f"prompt, token {n_done + 1} of {lane.n_prompt}" if n_done else "prompt"

    return words


def _left_of(decoding):
    """The most sweeps that are still to come; None until the first token is there."""
    (lane,), stats = decoding.lanes, decoding.stats

    def n_sweeps():
        if not lane.token_ids:
            return None
        return round(lane.n_left / max(1.0, stats.tokens_per_sweep))

    return n_sweeps
