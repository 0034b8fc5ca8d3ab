"""What is kept of many things: those that were used last."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Taken:
    """What a use of several numbers at once found, and changed.

    `hits`: those that were kept. `placed`: of the others, in order, number -> the slot that it
    gets, as far as there are slots; the rest are not kept. `evicted`: slot -> the number that it
    held until now.
    """

    hits: frozenset[int]
    placed: dict[int, int] = field(default_factory=dict)
    evicted: dict[int, int] = field(default_factory=dict)


class Lru:
    """Numbers in `n_slots` slots, the least recently used of which go first.

    Numbers that are used at once count as used in order, those that are kept first: so none of them
    makes room for another one.
    """

    def __init__(self, n_slots: int):
        self._slots: OrderedDict[int, int] = OrderedDict()  # number -> slot, oldest first
        self._free = deque(range(n_slots))
        self._n_made = n_slots  # slots that there ever were

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, number: int) -> int:
        """The slot of a number that is kept."""
        return self._slots[number]

    def take(self, numbers: Sequence[int]) -> Taken:
        """Uses these numbers, each once."""
        hits = [number for number in numbers if number in self._slots]
        for number in hits:
            self._slots.move_to_end(number)
        n_old = len(self._slots) - len(hits)  # those that may go: the first ones
        placed, evicted = {}, {}
        for number in numbers:
            if number in self._slots:
                continue
            if self._free:
                slot = self._free.popleft()
            elif n_old:
                old, slot = self._slots.popitem(last=False)
                evicted[slot] = old
                n_old -= 1
            else:
                break
            self._slots[number] = placed[number] = slot
        return Taken(frozenset(hits), placed, evicted)

    def forget(self, numbers: Iterable[int]) -> None:
        """Drops these numbers; their slots are free."""
        for number in numbers:
            self._free.append(self._slots.pop(number))

    def resize(self, n_slots: int) -> list[int]:
        """Has so many slots from now on -> the slots that are gone: free ones first, then those of
        the least recently used."""
        gone = []
        while len(self._free) + len(self._slots) > n_slots:
            gone.append(self._free.pop() if self._free else self._slots.popitem(last=False)[1])
        n_more = n_slots - len(self._free) - len(self._slots)
        self._free.extend(range(self._n_made, self._n_made + n_more))
        self._n_made += n_more
        return gone

    def numbers(self) -> tuple[int, ...]:
        """Those that are kept, the least recently used first."""
        return tuple(self._slots)
