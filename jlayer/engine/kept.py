"""Texts that have ended and whose cache entries stay, for a prompt that begins alike: the next turn
of a conversation costs its new tokens.

Each still counts against the budgets. The one that was used longest ago goes first, as soon as a
run needs its room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from jlayer.engine.ledger import Ledger, Ticket
from jlayer.engine.pool import Table
from jlayer.engine.riders import LEAST_SHARED


@dataclass(frozen=True)
class Ended:
    """`tokens`: those that `table` has entries of, which `ticket` counts. `is_long`, `adapter`: see
    `Lane`."""

    tokens: list[int]
    table: Table
    ticket: Ticket
    is_long: bool
    adapter: int


class Kept:
    """At most `most` ended texts, the one used last at the end."""

    def __init__(self, ledger: Ledger):
        self._ledger, self.most = ledger, 0
        self._ended: list[Ended] = []

    def __len__(self) -> int:
        return len(self._ended)

    @property
    def latest(self) -> Ended | None:
        """The one that was used last."""
        return self._ended[-1] if self._ended else None

    def put(self, ended: Ended) -> None:
        self._ended.append(ended)
        while len(self._ended) > self.most:
            self.drop_oldest()

    def find(
        self, prompt: Sequence[int], *, is_long: bool, adapter: int
    ) -> tuple[Ended, int] | None:
        """The text that most tokens of a prompt can be taken from, and how many; None where no text
        of this adapter has enough of them."""
        best, n_best = None, LEAST_SHARED - 1
        for ended in self._ended:
            n_alike = _n_alike(ended.tokens, prompt[:-1])  # the last one's logits are needed
            is_of_its_kind = (ended.is_long, ended.adapter) == (is_long, adapter)
            if is_of_its_kind and n_alike > n_best:
                best, n_best = ended, n_alike
        return None if best is None else (best, n_best)

    def has(self, ended: Ended) -> bool:
        return any(one is ended for one in self._ended)

    def take(self, ended: Ended) -> None:
        """Keeps it no longer: another run has taken it over, or is about to."""
        self._ended = [one for one in self._ended if one is not ended]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is kept is not counted inside: it gives way to a run. Only within a turn."""
        with ExitStack() as stack:
            for ended in self._ended:
                stack.enter_context(self._ledger.without(ended.ticket))
            yield

    def drop_oldest(self) -> bool:
        """Whether there was one."""
        if not self._ended:
            return False
        with self._ledger.turn():
            self._ledger.remove(self._ended.pop(0).ticket)
        return True

    def clear(self) -> None:
        while self.drop_oldest():
            pass


def _n_alike(one, other):
    """How many first tokens are equal."""
    pairs = zip(one, other, strict=False)
    return next(
        (n for n, (a, b) in enumerate(pairs) if a != b),
        min(len(one), len(other)),
    )
