"""Needs of memory, and their sums.

Each thing states its own bytes as a Need. A plan adds them up by term and compares the sums with
the budgets; nothing is allocated before the sums fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from jlayer.sizes import human


@dataclass(frozen=True)
class Need:
    """Bytes of one thing, counted under `term`.

    `device`: memory of the accelerator (on a CPU: memory held by JAX). `host`: anonymous and pinned
    memory.
    """

    term: str
    device: int = 0
    host: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device, by term. On a CPU: memory held by JAX, and no context."""

    budget_bytes: int
    context_bytes: int = 0
    slots_bytes: int = 0
    resident_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    temporary_bytes: int = 0
    draft_bytes: int = 0


@dataclass(frozen=True)
class HostMemory:
    """Anonymous and pinned bytes of the process, by term."""

    budget_bytes: int
    slots_bytes: int = 0
    resident_bytes: int = 0
    cache_bytes: int = 0
    embedding_bytes: int = 0
    runtime_bytes: int = 0


# The terms of each; a plan adds them up thousands of times.
TERMS = {
    memory: tuple(field.name for field in fields(memory) if field.name != "budget_bytes")
    for memory in (DeviceMemory, HostMemory)
}


def device_memory(budget: int, needs: Iterable[Need]) -> DeviceMemory:
    return DeviceMemory(budget, **_by_term(DeviceMemory, needs, "device"))


def host_memory(budget: int, needs: Iterable[Need]) -> HostMemory:
    return HostMemory(budget, **_by_term(HostMemory, needs, "host"))


def total(memory: DeviceMemory | HostMemory) -> int:
    """The sum of all terms, in bytes."""
    return sum(getattr(memory, name) for name in TERMS[type(memory)])


def memory_name(field: str) -> str:
    """What a field of DeviceMemory or HostMemory is called in text. The driver's context is called
    after the driver, since --context is one of tokens."""
    return "driver" if field == "context_bytes" else field.removesuffix("_bytes")


def terms(memory: DeviceMemory | HostMemory) -> str:
    """The sum as text, without terms of 0 bytes."""
    sizes = {memory_name(name): getattr(memory, name) for name in TERMS[type(memory)]}
    return " + ".join(f"{name} {human(value)}" for name, value in sizes.items() if value)


def _by_term(memory, needs, side):
    sums = dict.fromkeys(TERMS[memory], 0)
    for need in needs:
        if n_bytes := getattr(need, side):
            sums[f"{need.term}_bytes"] += n_bytes
    return sums
