"""Conversations with their cache, as folders: the next turn costs its new tokens alone, in another
process too."""

from __future__ import annotations

from collections.abc import Callable

from jlayer.app.chat.conversation import Conversation
from jlayer.app.chat.files import conversation_of
from jlayer.engine.saved_text import load_text, save_text
from jlayer.engine.states import StateFolder
from jlayer.errors import DoesNotFitError, UsageError

MESSAGES = "messages"


def holds_one(path: str) -> bool:
    """Whether something is saved in a folder."""
    return StateFolder(path).holds_one


def save(path: str, model, conversation: Conversation, *, replace: bool) -> int:
    """Writes the whole conversation or nothing of it; -> of how many tokens the cache is there.
    Raises UsageError (one is there, and `replace` is not set), LockedError or StorageError."""
    if not replace and holds_one(path):
        raise UsageError(f"{path} holds a saved run already; /save! {path} replaces it")
    return save_text(path, model.engine, {MESSAGES: conversation.as_dicts()})


def load(path: str, model, *, say: Callable[[str], None]) -> Conversation:
    """Raises UsageError, CheckpointError, LockedError or StorageError."""
    try:
        facts = load_text(path, model.engine)
    except DoesNotFitError:
        with StateFolder(path).reading() as state:
            facts = state.facts["facts"]
        say("there is no room for its cache; the next turn computes it anew")
    return conversation_of(facts[MESSAGES], where=path)
