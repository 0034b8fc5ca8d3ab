"""Measures the host's cores as they multiply weights where they lie: alone, and beside a busy link.

No weights may move meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jlayer.cores.cores import Cores
from jlayer.cores.native import missing
from jlayer.encodings.int4 import INT4
from jlayer.engine.engine import Engine
from jlayer.engine.hosting import cores_beside
from jlayer.engine.speeds import host_speeds
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.making import matrix_forms
from jlayer.plan.plan import Plan
from jlayer.plan.tiles import Tier


@dataclass(frozen=True)
class CoresMeasured:
    """The speeds of the host's cores.

    `form`: the encoding that most of the passing bytes have. `alone`: of this one, with nothing
    else going on. `beside`: of all encodings of the model, and of 4 bits, beside a busy link; where
    there is none, with nothing else going on.
    """

    form: str
    n_threads: int
    alone: HostSpeeds
    beside: HostSpeeds

    def as_dict(self) -> dict:
        """The figures of the main encoding, as `bench --json` prints them."""
        link, rows = self.beside.link, []
        beside = dict(dict(self.beside.forms)[self.form])
        for tokens, speed in dict(self.alone.forms)[self.form]:
            row = {"tokens": tokens, "alone_bytes_per_s": speed}
            if link is not None:
                row |= {
                    "beside_bytes_per_s": beside[tokens],
                    "link_bytes_per_s": link,
                    "together_bytes_per_s": beside[tokens] + link,
                }
            rows.append(row)
        return {"encoding": self.form, "threads": self.n_threads, "speeds": rows}


def measure_cores(engine: Engine, plan: Plan) -> CoresMeasured | None:
    """Measures the cores that multiply for an engine. Where the user wanted none beside a link, it
    is measured what they could do; else None, where none multiply."""
    passing = [tier is not Tier.DEVICE for tier in plan.tiers]
    with _cores_of(engine, plan, can_help=any(passing)) as cores:
        if cores is None:
            return None
        forms, main = matrix_forms(engine.weights), main_form(plan)

        def speeds(forms: Sequence[str], **how) -> HostSpeeds:
            return host_speeds(cores, forms, engine.devices, dtype=engine.dtype, **how)

        # numpy would take seconds to multiply what the model does not have.
        more = (INT4.name,) if cores.is_native and INT4.name not in forms else ()
        beside = speeds((*forms, *more))
        alone = beside if beside.link is None else speeds((main,), link_is_busy=False)
        return CoresMeasured(main, cores.n_threads, alone, beside)


def main_form(plan: Plan) -> str:
    """The encoding that most of the matrices' bytes have, of those that are not on the device; of
    all where that leaves none. The cores multiply no experts, so these do not count."""
    certain = [
        (tile, tier)
        for tile, tier in zip(plan.tiling.shapes, plan.tiers, strict=True)
        if tile.expert is None
    ]
    n_bytes: dict[str, int] = {}
    for tile, _ in [pair for pair in certain if pair[1] is not Tier.DEVICE] or certain:
        for part in tile.parts:
            if len(part.shape) == 2 and part.of is None:
                n_bytes[part.form] = n_bytes.get(part.form, 0) + part.n_bytes
    return max(n_bytes, key=n_bytes.get)


def _cores_of(engine, plan, *, can_help) -> AbstractContextManager[Cores | None]:
    if not can_help:
        return nullcontext(None)
    if engine.host is not None:
        return nullcontext(engine.host.cores)
    if engine.run.host_share == 0 and plan.machine.kind.has_link and missing() is None:
        return cores_beside(plan.machine)
    return nullcontext(None)
