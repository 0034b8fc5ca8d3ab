"""The settings of a run of tuning."""

from __future__ import annotations

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
            kinds = (int,) if name in WHOLE else (int, float)
            if type(value) not in kinds or not least <= value <= most:  # NaN is in no range
                kind = "a whole number" if name in WHOLE else "a number"
                raise _error(name, value, f"{kind} {words}")
        if self.schedule not in SCHEDULES:
            raise _error("schedule", self.schedule, ", ".join(SCHEDULES))
        if type(self.packs) is not bool:
            raise _error("packs", self.packs, "True or False")
        if self.tokens_per_step < self.length:
            words = f"at least one text of length {self.length}; take more, or a smaller length"
            raise _error("tokens_per_step", self.tokens_per_step, words)

    @property
    def lanes(self) -> int:
        """The lanes of a step."""
        return self.tokens_per_step // self.length

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def _error(name, value, expected):
    is_long = type(value) is int and value.bit_length() > 200  # Python writes no number that long
    found = f"found {'a number too large' if is_long else ascii(value)[:60]}, expected {expected}"
    return UsageError(f"{name}: {found}", command_line=f"--{name.replace('_', '-')}: {found}")


_LARGE = 1 << 31
# The optimiser computes in float32: below it a learning rate would be 0, AdamW's division by 0, and
# a beta 1, which divides by 0 too.
_SMALL, _BELOW_1 = 1e-30, 0.999999
# Setting -> (the least, the most, the same in words).
RANGES = {
    "learning_rate": (_SMALL, 1e3, "above 0 (1e-30 or more) and at most 1000"),
    "warmup": (0, 1, "from 0 to 1: a share of the steps"),
    "weight_decay": (0, 1e3, "from 0 to 1000"),
    "beta1": (0, _BELOW_1, f"from 0 to {_BELOW_1}"),
    "beta2": (0, _BELOW_1, f"from 0 to {_BELOW_1}"),
    "epsilon": (_SMALL, 1.0, "above 0 (1e-30 or more) and at most 1"),
    "clip": (0, 1e30, "from 0, which is no limit, to 1e30"),
    "dropout": (0, 0.99, "from 0 to 0.99"),
    "tokens_per_step": (1, _LARGE, f"from 1 to {_LARGE}"),
    "length": (2, _LARGE, f"from 2 to {_LARGE}"),
    "epochs": (_SMALL, 1e4, "above 0 and at most 10000"),
    "steps": (1, _LARGE, f"from 1 to {_LARGE}"),
    "seed": (0, (1 << 63) - 1, "from 0 to 2^63 - 1"),
    "eval_every": (0, _LARGE, f"from 0, which is at the end alone, to {_LARGE}"),
    "save_every": (0, _LARGE, f"from 0, which is at the end alone, to {_LARGE}"),
}
WHOLE = ("tokens_per_step", "length", "steps", "seed", "eval_every", "save_every")
