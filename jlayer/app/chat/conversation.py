"""What was said so far: a system message, and exchanges of a message and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STOPPED = "interrupted"  # the finish_reason of an answer that Ctrl-C ended


@dataclass(frozen=True)
class Exchange:
    """`answer`: None where there is none yet, as in a file that ends with a message. `reasoning`:
    what the model thought before it. `finish_reason`: as in a Generation."""

    user: str
    answer: str | None = None
    reasoning: str = ""
    finish_reason: str = "stop"

    def messages(self) -> list[dict]:
        """As templates read them. A template decides itself what of the reasoning it renders; most
        leave that of earlier answers out."""
        found = [{"role": "user", "content": self.user}]
        if self.answer is not None:
            found.append({"role": "assistant", "content": self.answer})
            if self.reasoning:
                found[-1]["reasoning_content"] = self.reasoning
        return found


@dataclass
class Conversation:
    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def prompt(self, user: str, *, after: int | None = None, drop: int = 0) -> list[dict]:
        """The messages that a new one is sent with: after so many exchanges (None: all), without
        the oldest `drop`."""
        return [*self.messages(self.exchanges[drop:after]), {"role": "user", "content": user}]

    def messages(self, exchanges: Sequence[Exchange] | None = None) -> list[dict]:
        exchanges = self.exchanges if exchanges is None else exchanges
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [message for one in exchanges for message in one.messages()]

    def as_dicts(self) -> list[dict]:
        """The messages as files hold them: an answer that is no whole one says why."""
        found = self.messages([])
        for one in self.exchanges:
            found += one.messages()
            if one.answer is not None and one.finish_reason != "stop":
                found[-1]["finish_reason"] = one.finish_reason
        return found
