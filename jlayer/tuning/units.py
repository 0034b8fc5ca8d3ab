"""A layer as it is gone through forward and back: units of stages, and what of it is needed again.

A unit is a stage with the function that ends it and the one that makes the next unit's input; or
all stages of a layer's experts, which each expert goes through. On the way back a layer is begun
again from its input, which was kept; what is needed of it for the gradients is computed once more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

from jlayer.families.base import Function, LayerKind, Stage

# What a function reads or gives that has no gradient.
_NO_NUMBERS = frozenset({"cache", "rows", "expert"})
OF_AN_EXPERT = ("inputs", "routing", "mixed")  # what each expert reads, or adds to


@dataclass(frozen=True)
class Unit:
    """`stages`: one, or those of experts (`of_experts`). `following`: what makes the next unit's
    input, if a function does."""

    stages: tuple[Stage, ...]
    following: Function | None = None

    @property
    def of_experts(self) -> bool:
        return self.stages[0].per_expert

    @property
    def stage(self) -> Stage:
        """The stage of a unit that has one."""
        (stage,) = self.stages
        return stage

    @property
    def source(self) -> str:
        """The name in the flow of what its matrices multiply."""
        return self.stages[0].source

    @property
    def functions(self) -> tuple[Function, ...]:
        """What follows its products, in order."""
        if self.of_experts:
            return ()
        return tuple(each for each in (self.stage.finish, self.following) if each)

    @cached_property
    def gives(self) -> tuple[str, ...]:
        """The numbers of the flow that it gives."""
        if self.of_experts:
            return ("mixed",)
        given = (name for each in self.functions for name in each.gives)
        return tuple(dict.fromkeys(name for name in given if name not in _NO_NUMBERS))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The numbers of the flow that its functions read as they were before it."""
        if self.of_experts:
            return OF_AN_EXPERT
        found, given = [], set()
        for each in self.functions:
            found += [name for name in each.reads if name not in given | _NO_NUMBERS]
            given |= set(each.gives)
        return tuple(dict.fromkeys(found))

    @cached_property
    def is_linear(self) -> bool:
        """Whether the gradients of its functions need none of the numbers that they read."""
        finish = self.functions[0] if self.functions else None
        return self.following is None and (finish is None or _is_linear(finish))

    def needs_input(self, trained: Collection[str]) -> bool:
        """Whether the gradients of its matrices' products need what they multiply."""
        groups = [group for stage in self.stages for group in stage.groups]
        is_combined = any(group.combine is not None for group in groups)
        return self.of_experts or is_combined or any(leaf in trained for leaf in self.leaves)

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(leaf for stage in self.stages for leaf in stage.leaves)


def _is_linear(function: Function) -> bool:
    if function.name in ("join", "join_mixed"):
        return function.how.after is None
    return function.name == "pass_on"


@lru_cache(maxsize=64)
def units_of(kind: LayerKind) -> tuple[Unit, ...]:
    """The units of a layer of this kind, in order."""
    runs = []
    for per_expert, stages in groupby(kind.stages, lambda stage: stage.per_expert):
        some = tuple(stages)
        runs += [some] if per_expert else [(stage,) for stage in some]
    following = [run[0].input for run in runs[1:]] + [None]
    return tuple(map(Unit, runs, following))


@dataclass(frozen=True)
class Again:
    """What the way back through a layer needs. `multiplied`: of each unit, whether its products are
    computed again; `kept`: of each unit, the values of the flow that are kept as they are before
    it; `keeps_products`: of each, whether its own products are."""

    multiplied: tuple[bool, ...]
    kept: tuple[tuple[str, ...], ...]
    keeps_products: tuple[bool, ...]


@lru_cache(maxsize=256)
def again(kind: LayerKind, trained: frozenset[str]) -> Again:
    """What is needed again of a layer some of whose matrices have an adapter that is trained."""
    units, live = units_of(kind), set()
    multiplied, kept, keeps_products = [], [], []
    for unit in reversed(units):
        is_used = not live.isdisjoint(unit.gives)
        keeps = not unit.is_linear
        again = is_used or keeps
        names = {unit.source} if unit.needs_input(trained) else set()
        names |= set(unit.reads) if keeps else set()
        own = names - {"mixed"} if unit.of_experts else names
        live -= set(unit.gives)
        live |= own
        if again:  # to compute it
            live |= {unit.source, *unit.reads}
        if unit.of_experts:
            own, live = {"inputs", "routing"}, live | {"inputs", "routing"}
        multiplied.append(again)
        kept.append(tuple(sorted(own)))
        keeps_products.append(keeps)
    return Again(*(tuple(reversed(each)) for each in (multiplied, kept, keeps_products)))
