"""Prompts of embeddings in place of ids, as transformers' `inputs_embeds`.

Each place of such a prompt has a number in place of an id, which no other place of any prompt has:
so nothing takes one prompt for another, and what looks for equal ids finds none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

import numpy as np

from jlayer.engine.arrays import as_floats
from jlayer.engine.batch import VECTOR
from jlayer.engine.deciding import is_one_of_several
from jlayer.engine.engine import Engine
from jlayer.engine.ids import Row, masks_of
from jlayer.engine.options import SamplingOptions
from jlayer.engine.sample import Padding
from jlayer.errors import UsageError

NAME = "inputs_embeds"
DTYPES = ("float16", "bfloat16", "float32")
# What acts on the ids of a prompt -> the value that asks for nothing.
_OF_IDS = {
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "prompt_logprobs": None,
}
_DRAFTING = (
    f"{{name}}: asks for guesses of a draft model with {NAME}, and a draft model reads ids; leave "
    "it out, or give input_ids"
)
_numbers = count(-VECTOR)  # the numbers of this process so far, below 0


def rows_of_vectors(inputs_embeds, attention_mask=None, *, width: int, dtype: str) -> list[Row]:
    """Embeddings [B, T, D] of any library as prompts without their padding, which the mask marks
    with 0. `width`: D of the model; `dtype`: of its activations, to which they are rounded, as the
    rows of its own table are.

    Raises UsageError: another shape or dtype, a row of padding alone, numbers that are not finite
    in `dtype`, or several processes.
    """
    if is_one_of_several():
        raise UsageError(
            f"{NAME}: several processes run the model, and embeddings reach process 0 alone; give "
            "input_ids, or run the model in one process"
        )
    values = as_floats(inputs_embeds, name=NAME)
    shape = list(values.shape)
    if len(shape) != 3 or shape[2] != width or 0 in shape:
        raise UsageError(f"{NAME}: found shape {shape}, expected [rows, tokens, {width}]")
    if values.dtype.name not in DTYPES:
        raise UsageError(f"{NAME}: found {values.dtype}, expected one of {', '.join(DTYPES)}")
    n_rows, n_tokens, _ = shape
    masks = [[1] * n_tokens] * n_rows
    if attention_mask is not None:
        masks = masks_of(attention_mask, [n_tokens] * n_rows, of=NAME)
    return [_row(values[n], masks[n], n, dtype=dtype) for n in range(n_rows)]


def _row(values, mask, number, *, dtype):
    kept = np.flatnonzero(mask)
    if not len(kept):
        raise UsageError(f"{NAME}: row {number} is padding alone; each needs a token to go on from")
    own = values if len(kept) == len(values) else values[kept]
    with np.errstate(over="ignore"):  # what overflows is refused below
        own = own.astype(dtype, copy=False)
    is_finite = np.isfinite(own).all(axis=1)
    if not is_finite.all():
        place = int(kept[np.argmin(is_finite)])
        raise UsageError(
            f"{NAME}: row {number}, place {place}: numbers that are not finite in {dtype}, which "
            "the model computes in"
        )
    ids = [-number for number in islice(_numbers, len(own))]
    padding = Padding(len(values) - len(own), int(kept[0]), n_embedded=len(values))
    return Row([], ids, padding, vectors=own)


def check_prompts(engine: Engine, rows: Sequence[Row], options: SamplingOptions) -> None:
    """Raises UsageError where a prompt is empty or has unknown ids, or where it is one of
    embeddings and an option needs ids of it."""
    for row in rows:
        if row.vectors is None:
            engine.check_ids(row.ids, begin=options.bos_token_id)
    if all(row.vectors is None for row in rows):
        return
    for name, neutral in _OF_IDS.items():
        if (found := getattr(options, name)) != neutral:
            raise UsageError(
                f"{name}: found {found!r} with {NAME}, and acts on the ids of a prompt, of which "
                "embeddings have none; leave it out, or give input_ids"
            )
    if options.speculate == "draft":
        raise UsageError(_DRAFTING.format(name="speculate"))


def check_assistant(assistant) -> None:
    """Raises UsageError where a prompt of embeddings comes with a draft model of its own."""
    if assistant is not None:
        raise UsageError(_DRAFTING.format(name="assistant_model"))
