"""placeholder"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    weights: tuple[float, ...]
