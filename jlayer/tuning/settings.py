"""The settings of a run of tuning."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from jlayer.errors import UsageError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained.

    `learning_rate` is reached after `warmup` of all steps (a share) and follows `schedule` to 0
    from there. `weight_decay`, `beta1`, `beta2`, `epsilon`: of AdamW (arXiv 1711.05101). `clip`:
    the most length of all gradients together; 0: any. `dropout`: the share of an adapter's inputs
    that is dropped. `tokens_per_step`, `length`: a step has that many tokens, in texts, or pieces
    of such, of at most `length`. `epochs`: how often the data is gone through; `steps`, if given,
    says instead how many there are. `packs`: short texts share a lane of `length` tokens.
    `eval_every`, `save_every`: in steps; 0: at the end alone.
    """

    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    dropout: float = 0.0
    tokens_per_step: int = 4096
    length: int = 512
    epochs: float = 1.0
    steps: int | None = None
    seed: int = 0
    packs: bool = True
    eval_every: int = 0
    save_every: int = 20

    def __post_init__(self):
        for name, (least, most, words) in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            whole = name in WHOLE
            is_number = type(value) is int or (type(value) is float and not whole)
            if not is_number or not math.isfinite(value) or not least <= value <= most:
                kind = "a whole number" if whole else "a number"
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{name}: found {value!r}, expected {kind} {words}",
                    command_line=f"{option}: found {value!r}, expected {kind} {words}",
                )
        if self.schedule not in SCHEDULES:
            found = f"schedule: found {self.schedule!r}, expected {', '.join(SCHEDULES)}"
            raise UsageError(found, command_line=f"--{found}")
        if self.tokens_per_step < self.length:
            found = (
                f"tokens_per_step: found {self.tokens_per_step}, expected at least one text of "
                f"length {self.length}: take more, or a smaller length"
            )
            raise UsageError(found)

    @property
    def lanes(self) -> int:
        """The lanes of a step."""
        return self.tokens_per_step // self.length

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


_LARGE = 1 << 31
# Setting -> (the least, the most, the same in words).
RANGES = {
    "learning_rate": (5e-324, 1e3, "above 0 and at most 1000"),
    "warmup": (0, 1, "from 0 to 1: a share of the steps"),
    "weight_decay": (0, 1e3, "from 0 to 1000"),
    "beta1": (0, 1 - 1e-16, "from 0 and below 1"),
    "beta2": (0, 1 - 1e-16, "from 0 and below 1"),
    "epsilon": (5e-324, 1.0, "above 0 and at most 1"),
    "clip": (0, 1e30, "from 0, which is no limit"),
    "dropout": (0, 0.99, "from 0 to 0.99"),
    "tokens_per_step": (1, _LARGE, "of 1 or more"),
    "length": (2, _LARGE, "of 2 or more"),
    "epochs": (5e-324, 1e6, "above 0"),
    "steps": (1, _LARGE, "of 1 or more"),
    "seed": (0, (1 << 63) - 1, "from 0"),
    "eval_every": (0, _LARGE, "from 0, which is at the end alone"),
    "save_every": (0, _LARGE, "from 0, which is at the end alone"),
}
WHOLE = ("tokens_per_step", "length", "steps", "seed", "eval_every", "save_every")
