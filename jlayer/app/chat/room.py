"""What can be dropped where the context, or the memory, holds no more of a conversation."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache

from jlayer.app.chat.conversation import Conversation
from jlayer.app.chat.turns import Speaker
from jlayer.sizes import counted

MOST_LINES = 8
MOST_WORDS = 40  # characters of a message that are shown of it


def offers(
    speaker: Speaker, conversation: Conversation, user: str, *, after: int | None = None
) -> list[str]:
    """A line for each thing that can be dropped, with the tokens that it gives. `after`: as in
    `Conversation.prompt`."""
    n_before = len(conversation.exchanges[:after])

    @cache
    def n_tokens(drop):
        return len(speaker.ids(conversation.prompt(user, after=after, drop=drop)))

    n_needed = 1 + bisect_left(
        range(1, n_before + 1), True, key=lambda drop: speaker.fits(n_tokens(drop))
    )
    lines = []
    for drop in range(1, min(n_before, n_needed, MOST_LINES) + 1):
        gained = n_tokens(drop - 1) - n_tokens(drop)
        lines.append(f"/drop {drop:<4}{_named(conversation, drop)}: {counted(gained, 'token')}")
    if MOST_LINES < n_needed <= n_before:
        gained = n_tokens(MOST_LINES) - n_tokens(n_needed)
        lines.append(f"/drop {n_needed:<4}and those up to {n_needed}: {counted(gained, 'token')}")
    if lines and n_needed <= n_before:
        lines[-1] += "; then it fits"
    if conversation.system is not None:
        lines.append(
            f"/system   the system message, {counted(_of_system(speaker, conversation), 'token')}"
        )
    if n_needed > n_before:
        lines.append(
            f"{'':10}the message itself has {n_tokens(n_before):,} tokens: make it shorter"
        )
    else:
        lines.append("/clear    all of them")
    return lines


def _named(conversation, number):
    """An exchange by its number and the beginning of its message."""
    text = " ".join(conversation.exchanges[number - 1].user.split())
    shown = text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS - 1]}…"
    return f"{'and ' if number > 1 else ''}{number}, {shown!r}"


def _of_system(speaker, conversation):
    """The tokens that a system message takes."""
    user = [{"role": "user", "content": "x"}]
    return len(speaker.ids([*conversation.messages([]), *user])) - len(speaker.ids(user))
