"""Runs that are put down and taken up: everything that their next tokens depend on, as a state on
disk, and a run that goes on from it to the same tokens as if nothing had been.

Text, stop strings and penalties are not kept: a lane that is taken up is given its tokens again and
finds them anew. Cache entries are, so that no prompt is computed a second time. Where they are
missing (the run was waiting for room, or there is no room for all texts now) they are computed
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np

from jlayer.engine import entries
from jlayer.engine.background import Handle
from jlayer.engine.deciding import is_one_of_several
from jlayer.engine.decoding import Decoding
from jlayer.engine.engine import Engine
from jlayer.engine.generation import Generation
from jlayer.engine.identity import check_identity, identity_of
from jlayer.engine.ids import Row
from jlayer.engine.lane import Lane, Step
from jlayer.engine.ledger import Ticket
from jlayer.engine.options import SamplingOptions
from jlayer.engine.pool import Table
from jlayer.engine.prompts import CHAT_OPTIONS
from jlayer.engine.sample import Choice, Padding
from jlayer.engine.saved_facts import check_facts, check_places
from jlayer.engine.states import Part, State, StateFolder
from jlayer.errors import CheckpointError, UsageError
from jlayer.plan.shapes import RunShape
from jlayer.text.tokenizer import Tokenizer

RUN = "run"  # what a state is of
TABLE, KNOWN = "table-{:05d}", "draft-known"


class Session:
    """A run that can be put down. Iterate over it for what each forward pass gives: the Step of
    each text, None where it has none. It holds its cache entries until it has ended or is closed;
    leaving a loop early does not end it."""

    def __init__(self, decoding: Decoding, *, is_single: bool, owner: object = None):
        """`owner`: held, since a model that nobody holds is closed."""
        self.decoding, self.is_single, self._owner = decoding, is_single, owner
        self._steps: Iterator | None = None

    def __iter__(self) -> Iterator[list[Step | None]]:
        return self

    def __next__(self) -> list[Step | None]:
        if self._steps is None:
            self._steps = iter(self.decoding)
        return next(self._steps)

    @property
    def texts(self) -> list[str]:
        """The texts so far, those before the run was put down among them."""
        return [lane.text for lane in self.decoding.lanes]

    @property
    def token_ids(self) -> list[list[int]]:
        """Of each text, the new ones so far."""
        return [lane.token_ids for lane in self.decoding.lanes]

    def save(self, folder) -> None:
        """See `save_run`."""
        save_run(folder, self.decoding, is_single=self.is_single)

    def result(self) -> Generation | list[Generation]:
        """Goes on to the end -> as `generate` gives it."""
        for _ in self:
            pass
        found = self.decoding.generations()
        return found[0] if self.is_single and len(found) == 1 else found

    def close(self) -> None:
        """Ends it now and frees its cache entries."""
        self.decoding.close()


class Sessions:
    """What a model can do with runs that are put down. Of `Model`, which has `engine`, `text` and
    `decoding`."""

    def session(self, prompt=None, **options) -> Session:
        """Begins a run that can be saved at any time. `prompt`, `options`: those of `generate`.

        Raises what `generate` does of the arguments, and DoesNotFitError.
        """
        names = (*CHAT_OPTIONS, "generation_config")
        form = {name: options.pop(name) for name in names if name in options}
        decoding, is_single = self.decoding(prompt, options=options, **form)
        return Session(decoding, is_single=is_single, owner=self)

    def save_session(self, folder, run: Session | Handle) -> None:
        """Saves a run of `session` or `submit` as it is now: its tokens, how it draws, and its
        cache entries. What an earlier call has saved in the folder stands until the new state is
        whole. The run goes on.

        Raises UsageError, LockedError or StorageError.
        """
        if isinstance(run, Session):
            run.save(folder)
        elif isinstance(run, Handle):
            save_run(folder, run.decoding, is_single=True)
        else:
            found = type(run).__name__
            raise UsageError(f"run: found {found}, expected what session or submit has given")

    def load_session(self, folder, *, max_new_tokens: int | None = None) -> Session:
        """Takes up a saved run: it goes on to the same tokens as if nothing had been.

        `max_new_tokens`: of each text in all, in place of what the run was begun with. Raises
        UsageError where the folder holds no run, or one of another model, dtype or adapter;
        CheckpointError where it is damaged; LockedError, DoesNotFitError or StorageError.
        """
        decoding, is_single = take_up(folder, self.engine, self.text, max_new_tokens=max_new_tokens)
        return Session(decoding, is_single=is_single, owner=self)


def save_run(folder, run: Decoding, *, is_single: bool) -> None:
    """Writes the state of a run into a folder, in the place of an earlier one, which stands until
    the new one is whole. Between two forward passes, from any thread.

    Raises UsageError (the folder holds something else, an option cannot be saved, or several
    processes run the model), LockedError or StorageError.
    """
    refuse_several()
    check_can_be_saved(run)
    engine, into = run.engine, StateFolder(folder)
    with engine.turn():
        lanes = [lane for lane in run.lanes if _has_entries(lane)]
        if lanes:
            engine.caches.ready()
        there = entries.listed(engine.caches.pool, [lane.table for lane in lanes])
        known = _known(engine, there)
        facts = {
            "of": RUN,
            "model": identity_of(engine.store, engine.dtype),
            "draft": _draft_of(engine) if len(known) else None,
            **_facts_of(run, lanes),
            "is_single": is_single,
        }
        into.save(
            facts,
            _parts(engine, there, known),
            n_bytes=_n_bytes(engine, there, known),
        )


def take_up(
    folder, engine: Engine, text: Tokenizer | None, *, max_new_tokens: int | None = None
) -> tuple[Decoding, bool]:
    """A run that goes on from the state in a folder, and whether it was a single prompt.
    `max_new_tokens`: of each text, those before it was put down among them; None: as it was.

    Raises UsageError (there is none, or it is of another model), CheckpointError for one that is
    damaged, LockedError, DoesNotFitError or StorageError.
    """
    refuse_several()
    with StateFolder(folder).reading() as state:
        facts = checked(state, engine, RUN, where=folder)
        with _damage_of(state):
            check_facts(facts, vocab_size=engine.cfg.vocab_size)
            past = _Past(state, engine, max_new_tokens)
        try:
            decoding = Decoding(engine, past.rows, past.options, text=text, past=past)
        finally:
            past.forget()
    return decoding, facts["is_single"]


@contextmanager
def _damage_of(state):
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        found = f"{state.path}: a damaged state ({error!a:.200}); remove it"
        raise CheckpointError(found) from None


def check_can_be_saved(run: Decoding) -> None:
    """Raises UsageError for a run of which not all that its tokens depend on can be saved."""
    options, found = run.options, None
    if options.searches:
        found = f"num_beams: found {options.num_beams}; a beam search"
    elif run.functions is not None:
        found = "logits_processor, stopping_criteria and other functions: a run with them"
    elif options.output_scores or options.output_logits:
        found = "output_scores, output_logits: a run that keeps all scores"
    elif any(row.vectors is not None for row in run.rows):
        found = "inputs_embeds: a prompt of embeddings"
    elif any(lane.constraint is not None for lane in run.lanes):
        found = "a text that a grammar constrains"
    if found is not None:
        raise UsageError(f"{found} cannot be saved; leave it out of a run that is saved")


def refuse_several() -> None:
    """Raises UsageError where several processes run the model."""
    if is_one_of_several():
        raise UsageError(
            "save: each of several processes has its own part of the cache, and such a run cannot "
            "be saved or taken up; run the model in one process"
        )


class _Past:
    """A run as it was saved. See `past.Past`."""

    def __init__(self, state: State, engine: Engine, max_new_tokens: int | None):
        facts = state.facts
        self._state: State | None = state
        self._facts, self._lanes = facts, facts["lanes"]
        self.rows = [_row_of(row) for row in facts["rows"]]
        self._limits = [lane["limit"] for lane in self._lanes]
        if max_new_tokens is not None:
            most = max(len(lane["tokens"]) for lane in self._lanes)
            if max_new_tokens < most:
                raise UsageError(
                    f"max_new_tokens: found {max_new_tokens}, and {state.path} has {most} new "
                    "tokens already; it counts these too, so give more"
                )
            self._limits = [max_new_tokens] * len(self._limits)
        self.options = SamplingOptions(
            **{
                **facts["options"],
                "max_new_tokens": max(self._limits),
                "max_length": None,
                "length_from": None,
            }
        )

    def forget(self) -> None:
        """Its entries are not read any more: the folder may hold another state from now on."""
        self._state = None

    def take_up(self, lanes: Sequence[Lane]) -> None:
        for lane, saved, limit in zip(lanes, self._lanes, self._limits, strict=True):
            lane.options = replace(lane.options, seed=saved["seed"])
            lane.limit = limit
            if limit > 0:
                lane.finish_reason = None
            lane.replay(_choices(saved))
            if saved["prompt_scores"] is not None:
                lane.scores.found = [one and _choice(*one) for one in saved["prompt_scores"]]
                lane.scores.next = len(lane.scores.found)
        self._taken = [id(lane) for lane in lanes]

    def board(
        self, engine: Engine, shape: RunShape, lanes: Sequence[Lane]
    ) -> tuple[Ticket, list[Table]]:
        ticket = engine.admit(shape)
        tables = [ticket.table() for _ in lanes]
        # Of some texts alone, the entries that they shared with others would take room twice.
        is_whole = [id(lane) for lane in lanes] == self._taken
        if self._state is not None and is_whole and any(lane.is_alive for lane in lanes):
            try:
                with _damage_of(self._state):
                    self._place(engine, tables, lanes)
            except BaseException:
                ticket.close()
                raise
        return ticket, tables

    def _place(self, engine, tables, lanes):
        of_lanes = list(zip(tables, lanes, self._lanes, strict=True))
        own = [
            (table, len(lane.history)) for table, lane, saved in of_lanes if saved["has_entries"]
        ]
        if not own:
            return
        caches, parts = engine.caches, self._state.parts()
        first = next(parts, {})
        places = [first[TABLE.format(number)] for number in range(len(own))]
        own, lengths = zip(*own, strict=True)
        check_places(places, lengths)
        draft = engine.draft
        if draft is None or self._facts["draft"] != _draft_of(engine):
            draft = None
        caches.ready()
        caches.make_room()
        with entries.placing(caches.pool, own, places) as new:
            engine.speculation.forget(new.rows)
            if draft is not None:
                draft.reserve(caches.pool.n_rows)
            missing = entries.kept_layers(caches, new.where)
            for part in parts:
                missing -= entries.place(caches, part, new.where)
                if draft is not None:
                    entries.place_draft(draft, part, new.rows[first[KNOWN]])
            if missing:
                raise ValueError(f"layer {min(missing)} is missing")


def _has_entries(lane):
    """Whether a lane has entries that it can go on from."""
    table = lane.table
    if table is None or table.is_closed or not len(table) or not table.can_go_on:
        return False
    # The first tokens of a prompt that is still being scored must ride for their logits.
    is_scored = lane.scores is None or lane.scores.is_done
    return is_scored and lane.is_long == lane.has_switched


def _known(engine, there):
    """Those of the entries that the draft model has too, as places."""
    draft = engine.draft
    if draft is None or draft.pools is None:
        return entries.NONE
    known = [place[: draft.n_known(there.rows[place])] for place in there.places]
    return np.unique(np.concatenate([entries.NONE, *known]))


def _parts(engine, there, known) -> Iterator[Part]:
    if there.places:
        yield {
            **{TABLE.format(number): place for number, place in enumerate(there.places)},
            KNOWN: known,
        }
        yield from entries.parts(engine.caches, there.where)
        if len(known):
            yield from entries.draft_parts(engine.draft, there.rows[known])


def _n_bytes(engine, there, known):
    n_bytes = entries.n_bytes(engine.caches, there.where)
    if len(known):
        draft = engine.draft
        n_bytes += draft.entry_bytes * len(known)
    return n_bytes + sum(place.nbytes for place in there.places)


def _draft_of(engine):
    return identity_of(engine.draft.store, engine.draft.dtype)


def _facts_of(run, with_entries):
    """What of a run JSON can hold. Raises UsageError for an option that it cannot."""
    has_entries = set(map(id, with_entries))
    options = asdict(run.options)
    for name, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UsageError(
                f"{name}: found {type(value).__name__}, which cannot be saved with a run; leave it "
                "out of a run that is saved"
            ) from None
    return {
        "options": options,
        "rows": [
            {
                "given": row.given,
                "ids": row.ids,
                "padding": [row.padding.n_tokens, row.padding.n_first],
                "scored_from": row.scored_from,
            }
            for row in run.rows
        ],
        "lanes": [_facts_of_lane(lane, id(lane) in has_entries) for lane in run.lanes],
    }


def _facts_of_lane(lane, has_entries):
    scores = lane.scores
    logprobs = lane.options.logprobs is not None
    return {
        "seed": lane.options.seed,
        "limit": lane.limit,
        "tokens": lane.token_ids,
        "logprobs": [[one.logprob, one.top] for one in lane.choices] if logprobs else None,
        "prompt_scores": [one and [one.token_id, one.logprob, one.top] for one in scores.found]
        if scores is not None and scores.is_done
        else None,
        "has_entries": has_entries,
    }


def _row_of(row):
    return Row(row["given"], row["ids"], Padding(*row["padding"]), row["scored_from"])


def _choices(lane):
    rest = lane["logprobs"] or [(None, ())] * len(lane["tokens"])
    return [_choice(token, *one) for token, one in zip(lane["tokens"], rest, strict=True)]


def _choice(token, logprob, top):
    return Choice(token, logprob, tuple(map(tuple, top)))


def checked(state: State, engine: Engine, kind: str, *, where) -> dict:
    """Its facts. Raises UsageError where it is of another model, or another kind."""
    facts = state.facts
    if not isinstance(facts, dict) or not isinstance(facts.get("model"), dict):
        raise CheckpointError(f"{state.path}: a damaged state (no model); remove it")
    if facts.get("of") != kind:
        found = str(facts.get("of"))
        raise UsageError(f"{where}: a saved {found!a:.40}, expected a saved {kind}")
    own = identity_of(engine.store, engine.dtype)
    check_identity(facts["model"], own, where=where)
    return facts
