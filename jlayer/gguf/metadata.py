"""A file's metadata, read by type and by name, with a record of what was read.

A key of the model's own that nothing has asked for may change its numbers, so it is refused by
name at the end.
"""

from __future__ import annotations

import struct

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.gguf.reader import Head, LongArray, short

# Keys of a model that say nothing of its numbers, whatever their value.
_SAYS_NOTHING = frozenset(
    (
        *("vocab_size", "rope.scaling.finetuned", "tensor_data_layout"),
        # Of positions of several numbers, which are one and the same in a text.
        *("attention.causal_mask_type", "rope.dimension_sections"),
    )
)
# Keys that some writers leave in files of models that have no such thing -> the values that say so.
_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "nextn_predict_layers": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}
_MISSING = object()


class Metadata:
    """The metadata of one model. Keys are given without the architecture's name before them."""

    def __init__(self, head: Head):
        self.head, self.where = head, head.path
        self.architecture = self._typed("general.architecture", str, "a name")
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.head.values

    def integer(self, key: str, default: object = _MISSING):
        """A whole number; of a list for each layer the number that all have."""
        return self._number(key, int, "a whole number", default)

    def number(self, key: str, default: object = _MISSING):
        """A number. One of 32 bits becomes the shortest decimal that stands for it, as a config
        has it: 1e-05 and not 9.999999747378752e-06."""
        value = self._number(key, (int, float), "a number", default)
        return shortest(value) if type(value) is float else value

    def word(self, key: str, default: object = _MISSING):
        return self._typed(self._own(key), str, "a name", default)

    def boolean(self, key: str, default: object = _MISSING):
        return self._typed(self._own(key), bool, "true or false", default)

    def each(self, key: str, n_layers: int) -> list | None:
        """A list with an entry for each layer; None where the key is absent or is no list."""
        name = f"{self.architecture}.{key}"
        value = self.head.values.get(name)
        if not isinstance(value, (tuple, LongArray)):
            return None
        self._read.add(name)
        if isinstance(value, LongArray) or len(value) != n_layers:
            raise self.refusal(name, value, f"one entry for each of {n_layers} layers")
        return list(value)

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError where the model has a key that nothing has asked for."""
        start = f"{self.architecture}."
        for name, value in self.head.values.items():
            key = name.removeprefix(start)
            if not name.startswith(start) or name in self._read or key in _SAYS_NOTHING:
                continue
            if value not in _NEUTRAL.get(key, ()):
                raise UnsupportedModelError(
                    f"{self.where}: {name} is {short(value)}, which is not known here of "
                    f"{self.architecture}, and may change the model's numbers; take the model's "
                    "checkpoint of safetensors files"
                )

    def refusal(self, name: str, value: object, expected: str) -> CheckpointError:
        found = "missing" if value is _MISSING else short(value)
        return CheckpointError(
            f"{self.where}: {name} is {found}, expected {expected}; fetch the file again"
        )

    def _own(self, key):
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        return name

    def _number(self, key, types, expected, default):
        name = self._own(key)
        value = self.head.values.get(name, _MISSING)
        if isinstance(value, tuple) and value and len(set(value)) == 1:
            value = value[0]
        elif isinstance(value, tuple):
            raise UnsupportedModelError(
                f"{self.where}: {name} differs by layer ({short(value)}), which is not supported"
            )
        return self._checked(name, value, types, expected, default)

    def _typed(self, name, types, expected, default=_MISSING):
        return self._checked(name, self.head.values.get(name, _MISSING), types, expected, default)

    def _checked(self, name, value, types, expected, default):
        if value is _MISSING and default is not _MISSING:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.refusal(name, value, expected)
        return value


def shortest(value: float) -> float:
    """The decimal with the fewest digits that is the same number of 32 bits; `value` itself where
    it has more bits."""
    for digits in range(1, 10):
        found = float(f"{value:.{digits}g}")
        if _as_float32(found) == value:
            return found
    return value


def _as_float32(value):
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return None
