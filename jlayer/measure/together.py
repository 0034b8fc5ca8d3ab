"""What the link and the host's cores move together, if the rows that pass are divided so that both
end at the same time. Pure arithmetic over measured speeds, without JAX."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.plan.hosting import EXCHANGE_S, all_stages, balanced, seconds_on_host
from jlayer.plan.machine import HostSpeeds
from jlayer.plan.plan import Plan
from jlayer.plan.tiles import Tier


@dataclass(frozen=True)
class Together:
    """A forward pass over link and cores.

    `link_s`, `cores_s`: seconds of each for all bytes that pass, while the other is busy.
    `exchange_s`: of the stages' inputs and products, in which the cores wait. `passing_bytes`:
    those that are not on the device, of `all_bytes` of a forward pass.
    """

    link_s: float
    cores_s: float
    exchange_s: float
    passing_bytes: int
    all_bytes: int

    @property
    def least_s(self) -> float:
        """Seconds with both busy all the time: the bytes over the sum of both speeds."""
        return self.link_s * self.cores_s / (self.link_s + self.cores_s)

    @property
    def share(self) -> float:
        """The share of the passing bytes at which both end at the same time."""
        return balanced(self.cores_s, self.link_s, self.link_s, self.exchange_s)

    @property
    def option(self) -> float:
        """The same as the user types it: a share of all rows, those on the device included."""
        return round(self.share * self.passing_bytes / self.all_bytes, 2)

    def seconds(self, share: float) -> float:
        """Where the cores multiply this share of the passing bytes."""
        on_host = share * self.cores_s + self.exchange_s if share else 0.0
        return max((1 - share) * self.link_s, on_host)

    def seconds_with(self, option: float) -> float:
        """Where the user types this share."""
        return self.seconds(min(1.0, option * self.all_bytes / self.passing_bytes))


def together(plan: Plan, speeds: HostSpeeds | None, n_tokens: int) -> Together | None:
    """Link and cores in a forward pass of so many tokens; None where there is no link, nothing
    passes, or the cores' speed is not known for all of it."""
    if speeds is None or speeds.link is None or not plan.put_bytes:
        return None
    passing = [index for index, tier in enumerate(plan.tiers) if tier is not Tier.DEVICE]
    parts = [part for index in passing for part in plan.tiling.shapes[index].parts]
    forms = {part.form for part in parts if part.of is None and len(part.shape) == 2}
    if not forms <= dict(speeds.forms).keys():
        return None
    return Together(
        link_s=plan.put_bytes / speeds.link,
        cores_s=seconds_on_host(speeds, plan.tiling, passing, n_tokens),
        exchange_s=EXCHANGE_S * all_stages(plan.tiling),
        passing_bytes=plan.put_bytes,
        all_bytes=plan.tiling.n_bytes,
    )
