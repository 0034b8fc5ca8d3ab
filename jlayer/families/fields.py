"""Reads the fields of a config.json, each checked by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from jlayer.errors import CheckpointError, UnsupportedModelError

# No published model comes near these limits. A larger value means damage or an attack, and is
# refused before any allocation.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "max_position_embeddings": (1 << 31) - 1,
}
_LENGTH = LIMITS["max_position_embeddings"]


def as_integer(value):
    """A float that is a whole number as an int, since some programs write 4096.0; all else as it
    is."""
    return int(value) if type(value) is float and value.is_integer() else value


def printable(word: str, *, longest: int = 80) -> str:
    """Text from outside, made printable for a message, and no longer than that."""
    return (word if word.isprintable() else ascii(word))[:longest]


@dataclass(frozen=True)
class Fields:
    """The fields of a config, or of an object in it. `where` names it in errors.

    What a method reads is refused with a CheckpointError by its name and value where it is not what
    the method promises. A default counts where the key is absent; where `null_is_absent`, also
    where it is null.
    """

    raw: dict
    where: str

    def changed(self, changes: Mapping, *, without: Iterable[str] = ()) -> Fields:
        """The same with other values of some keys, and without others."""
        raw = self.raw | changes
        for name in without:
            raw.pop(name, None)
        return replace(self, raw=raw)

    def filled(self, defaults: Mapping) -> Fields:
        """The same with these values of keys that are absent."""
        return self.changed({k: v for k, v in defaults.items() if k not in self.raw})

    def has(self, name: str) -> bool:
        """Whether the key is there with a value."""
        return self.raw.get(name) is not None

    def integer(
        self,
        name: str,
        *,
        default: int | None = None,
        null_is_absent: bool = False,
        limit: int | None = None,
    ) -> int:
        """From 1 to `limit`. A float is taken where it is a whole number."""
        if default is not None and self._is_absent(name, null_is_absent):
            return default
        limit = limit or LIMITS.get(name, _LENGTH)
        whole = as_integer(self.raw.get(name))
        if type(whole) is not int or not 1 <= whole <= limit:
            raise CheckpointError(
                f"{self.where}: {name} is {self._shown(name)}, "
                f"expected an integer from 1 to {limit}"
            )
        return whole

    def from_zero(self, name: str, *, default: int | None = None, limit: int | None = None) -> int:
        """As `integer`, from 0."""
        if as_integer(self.raw.get(name)) == 0 and type(self.raw[name]) is not bool:
            return 0
        return self.integer(name, default=default, limit=limit)

    def positive(
        self, name: str, *, default: float | None = None, null_is_absent: bool = False
    ) -> float:
        """A finite number above 0."""
        if default is not None and self._is_absent(name, null_is_absent):
            return default
        value = self.raw.get(name)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(
                f"{self.where}: {name} is {self._shown(name)}, expected a positive number"
            )
        return float(value)

    def positive_or_none(self, name: str, *, default: float | None = None) -> float | None:
        """A finite number above 0; None where it is null, or absent without a default."""
        if name not in self.raw:
            return default
        return self.positive(name) if self.has(name) else None

    def boolean(self, name: str, *, default: bool = False) -> bool:
        """Also null is refused, as transformers does: what it would mean differs by family."""
        value = self.raw.get(name, default)
        if type(value) is not bool:
            raise CheckpointError(
                f"{self.where}: {name} is {self._shown(name)}, expected true or false"
            )
        return value

    def choice(self, name: str, known: Mapping[str, str], *, default: str) -> str:
        """One of the keys of `known` -> its value. Raises UnsupportedModelError."""
        value = self.raw.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise UnsupportedModelError(
                f"{self.where}: {name} {value!r:.80} is not supported; supported: "
                f"{', '.join(known)}"
            )
        return known[value]

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        value = self.raw.get(name)
        is_list = isinstance(value, list) and value
        if not is_list or not all(type(n) in (int, float) and 0 < n < 1e30 for n in value):
            raise CheckpointError(
                f"{self.where}: {name} is {self._shown(name)[:80]}, "
                "expected a list of positive numbers"
            )
        return tuple(map(float, value))

    def section(self, name: str) -> Fields:
        """An object in it; empty where it is absent or null."""
        value = self.raw.get(name) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{self.where}: {printable(name)} is {value!r:.80}, expected an object or null"
            )
        return Fields(value, f"{self.where}: {printable(name)}")

    def refuse_unless(self, name: str, *values: object) -> None:
        """Raises UnsupportedModelError where the key is there with another value than these; the
        last of them is what is told."""
        if name in self.raw and self.raw[name] not in values:
            raise UnsupportedModelError(
                f"{self.where}: {name} is {self.raw[name]!a:.80}, supported: {values[-1]!r}, "
                "or none at all"
            )

    def _is_absent(self, name, null_is_absent):
        return name not in self.raw or (null_is_absent and self.raw[name] is None)

    def _shown(self, name):
        if name not in self.raw:
            return "missing"
        return "null" if self.raw[name] is None else f"{self.raw[name]!r:.80}"
