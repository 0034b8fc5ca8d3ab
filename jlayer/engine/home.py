"""What the runs of a model share, as they see it: see `Engine`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from jlayer.engine.caches import Caches
from jlayer.engine.programs import Programs
from jlayer.engine.sweep import Sweeper
from jlayer.plan.plan import Plan
from jlayer.spec import ModelConfig
from jlayer.streaming.embedding import Embedding
from jlayer.streaming.executor import Executor
from jlayer.streaming.watch import Totals, Watch


class Home(Protocol):
    """The shared things, and the turn that gives the executor for a forward pass."""

    cfg: ModelConfig
    plan: Plan
    programs: Programs
    caches: Caches
    sweeper: Sweeper
    embedding: Embedding
    totals: Totals
    watch: Watch

    @property
    def compiles(self) -> dict[str, int]: ...

    def turn(self) -> AbstractContextManager[Executor]: ...

    def note_peaks(self) -> None: ...
