"""Which experts a layer is guessed to use, and whether guessing pays.

The router of the next layer, applied to what the router of this layer looks at, says about which
experts the next layer will use (measured by others: 80 to 97% of them). Those that are in host
memory can be on their way before the next layer has decided, while the link would idle.
"""

from __future__ import annotations

from dataclasses import dataclass

# A layer may waste so many experts more than it has guessed right, and after a long time of good
# guesses MOST_CREDIT. Then it makes no guesses for LEAST_REST forward passes, the next time for
# twice as many, and so on up to MOST_REST.
CREDIT, MOST_CREDIT = 8, 32
LEAST_REST, MOST_REST = 64, 4096


@dataclass
class Score:
    """Whether guessing pays for a layer.

    A right guess hides the time of its bytes on the link at most, and a wrong one delays what is
    certain by that of its own at most. The experts of a layer have equal bytes. So guessing loses
    no more than `wrong - right` experts; it pauses where that is more than its credit.
    """

    credit: int = CREDIT
    rest: int = LEAST_REST  # how many passes the next pause takes
    left: int = 0  # passes of the present pause

    def may_guess(self) -> bool:
        """Whether the layer is guessed in this forward pass; counts the passes of a pause."""
        if self.left == 0:
            return True
        self.left -= 1
        return False

    def count(self, n_right: int, n_wrong: int) -> None:
        """Counts the guesses of a forward pass."""
        self.credit = min(self.credit + n_right - n_wrong, MOST_CREDIT)
        if self.credit < 0:
            self.left, self.rest = self.rest, min(2 * self.rest, MOST_REST)
            self.credit = CREDIT
