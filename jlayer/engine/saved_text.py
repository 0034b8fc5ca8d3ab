"""A text that has ended and whose cache entries are kept, as a state on disk: a conversation that
goes on in another process costs its new tokens there too."""

from __future__ import annotations

from collections.abc import Mapping

from jlayer.engine import entries
from jlayer.engine.engine import Engine
from jlayer.engine.identity import identity_of
from jlayer.engine.kept import Ended
from jlayer.engine.session import checked, refuse_several
from jlayer.engine.states import StateFolder
from jlayer.errors import CheckpointError
from jlayer.plan.shapes import RunShape

TEXT = "conversation"  # what a state is of
PLACES = "places"


def save_text(folder, engine: Engine, facts: Mapping) -> int:
    """Writes the text that was kept last, if there is one, and `facts`, what JSON can hold, in the
    place of what the folder holds; -> of how many tokens there are entries.

    Raises UsageError (the folder holds something else), LockedError or StorageError.
    """
    refuse_several()
    into = StateFolder(folder)
    with engine.turn():
        ended = engine.kept.latest
        tables = [] if ended is None or not ended.table.can_go_on else [ended.table]
        if tables:
            engine.caches.ready()
        there = entries.listed(engine.caches.pool, tables)
        whole = {
            "of": TEXT,
            "model": identity_of(engine.store, engine.dtype),
            "tokens": ended.tokens if tables else [],
            "is_long": bool(tables) and ended.is_long,
            "adapter": ended.adapter if tables else None,
            "facts": dict(facts),
        }

        def parts():
            if tables:
                yield {PLACES: there.places[0]}
                yield from entries.parts(engine.caches, there.where)

        n_bytes = entries.n_bytes(engine.caches, there.where)
        into.save(whole, parts(), n_bytes=n_bytes + there.rows.nbytes)
        return len(whole["tokens"])


def load_text(folder, engine: Engine) -> dict:
    """Keeps a saved text for a prompt that goes on from it; -> its facts.

    Raises UsageError (there is none, or it is of another model), CheckpointError for one that is
    damaged, LockedError, DoesNotFitError where there is no room for it, or StorageError.
    """
    refuse_several()
    with StateFolder(folder).reading() as state, engine.turn():
        whole = checked(state, engine, TEXT, where=folder)
        tokens = whole["tokens"]
        if not tokens:
            return whole["facts"]
        shape = RunShape(context=len(tokens), entries=len(tokens))
        ticket = engine.admit(shape)
        try:
            table, caches, parts = ticket.table(), engine.caches, state.parts()
            places = [next(parts)[PLACES]]
            if len(places[0]) != len(tokens):
                raise CheckpointError(f"{state.path}: a damaged state; remove it")
            caches.ready()
            caches.make_room()
            with entries.placing(caches.pool, [table], places) as new:
                engine.speculation.forget(new.rows)
                for part in parts:
                    entries.place(caches, part, new.where)
        except BaseException:
            ticket.close()
            raise
        ticket.keep(table, shape)
        engine.kept.put(Ended(tokens, table, ticket, whole["is_long"], whole["adapter"]))
        return whole["facts"]
