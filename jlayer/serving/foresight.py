"""What a request will take, said before it begins: memory, forward passes, seconds."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass

from jlayer.engine.engine import Engine
from jlayer.engine.options import DEFAULT_NEW_TOKENS
from jlayer.errors import DoesNotFitError
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Tier
from jlayer.serving.job import Job, Order


@dataclass(frozen=True)
class Estimate:
    """`forward_passes`: at most, a token in each and those of the prompt. `seconds`: until the last
    token, waiting included; None where no pass was timed yet. `queued_before`: requests that wait
    already. `cache_bytes`: its cache, of all its texts."""

    prompt_tokens: int
    new_tokens: int
    forward_passes: int
    seconds: float | None
    seconds_a_pass: float | None
    queued_before: int
    fits: bool
    cache_bytes: int

    def as_dict(self) -> dict:
        return asdict(self)


class Foresight:
    """What is known of an engine's requests ahead of them."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._fitted: list[RunShape] = []  # none of which is within another
        self._cut: dict[tuple[int, int], int] = {}  # (positions, texts) -> positions that fit

    def check(self, order: Order, limit: int) -> None:
        """Raises DoesNotFitError, with the sum, where there would be no room for it even alone. A
        plan of a large model takes a second: what is smaller than what fitted needs none."""
        shape = _shape(len(order.ids), limit, order.options.n_lanes)
        if any(_is_within(shape, other) for other in self._fitted):
            return
        self._engine.plan_for(shape, alone=True).check()
        self._fitted = [one for one in self._fitted if not _is_within(one, shape)] + [shape]

    def most(self, order: Order, limit: int) -> int:
        """How many of `limit` new tokens, which nobody asked for, there is room for alone: a text
        is not to depend on who else is there. Raises DoesNotFitError where it is not even a few."""
        step = max(1, limit // 64)
        tried = [limit, *range(limit - step, DEFAULT_NEW_TOKENS, -step)]
        least = min(limit, DEFAULT_NEW_TOKENS)
        n_prompt, n = len(order.ids), order.options.n_lanes

        def fits(n_new):
            try:
                self.check(order, n_new)
            except DoesNotFitError:
                return False
            return True

        key = (n_prompt + limit, n)
        if key in self._cut:  # a plan of a large model takes a second
            tried = [n_new for n_new in tried if n_prompt + n_new <= self._cut[key]]
        if tried and fits(tried[0]):
            return tried[0]
        at = bisect_left(tried, True, key=fits)
        found = tried[at] if at < len(tried) else least
        self.check(order, found)
        self._cut[key] = n_prompt + found
        return found

    def estimate(
        self, n_prompt: int, n_new: int, n: int, *, seconds: float | None, n_before: int, wait_s
    ) -> Estimate:
        shape = _shape(n_prompt, n_new, n)
        plan, fits = self._engine.plan_for(shape, alone=True), True
        try:
            plan.check()
        except DoesNotFitError:
            fits = False
        passes = n_new + prompt_passes(n_prompt, plan.load.n_rows) - 1
        return Estimate(
            prompt_tokens=n_prompt,
            new_tokens=n_new,
            forward_passes=passes,
            seconds=None if seconds is None else round(passes * seconds + wait_s, 3),
            seconds_a_pass=None if seconds is None else round(seconds, 3),
            queued_before=n_before,
            fits=fits,
            cache_bytes=plan.host.cache_bytes
            if plan.cache is Tier.HOST
            else plan.device.cache_bytes,
        )

    def passes_left(self, job: Job) -> float:
        """The forward passes that a job still takes at most, at the tokens a pass that it got so
        far."""
        tokens = max(len(each.token_ids) for each in job.sequences)
        left = max(0, job.limit - tokens)
        decoding = job.decoding
        if not tokens or decoding is None:
            rows = self._engine.plan.load.n_rows
            return left - 1 + prompt_passes(len(job.order.ids), rows)
        sweeps = decoding.stats.decode_sweeps  # without that of the prompt, which gave one token
        each = (tokens - 1) / sweeps if sweeps else 1.0
        return left / max(1.0, each)


def prompt_passes(n_prompt: int, rows: int) -> int:
    """`rows`: of a pass."""
    return max(1, -(-n_prompt // max(1, rows)))


def _shape(n_prompt, n_new, n):
    n_shared = n_prompt - 1 if n > 1 else 0
    return RunShape(
        batch=n,
        longest=n_prompt,
        context=n_prompt + n_new,
        sweeps=max(1, n_new),
        entries=n_shared + n * (n_prompt - n_shared + n_new),
    )


def _is_within(one, other):
    return (
        one.batch <= other.batch
        and one.longest <= other.longest
        and one.context <= other.context
        and one.entries <= other.entries
    )
