"""Random matrices of any encoding."""

import ml_dtypes
import numpy as np

from jlayer.encodings.blocks import BLOCKS
from jlayer.encodings.registry import ENCODINGS


def random_pieces(form, rows, width, *, seed=0):
    """The pieces of a matrix: every code is random, scales are between a half and two."""
    rng, found = np.random.default_rng(seed), {}
    for name, (dtype, shape) in ENCODINGS[form].pieces((rows, width)).items():
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if name == "order":
            found[name] = rng.permutation(width).astype(np.int32)
        elif kind.name == "float8_e4m3fn":
            numbers = rng.uniform(0.5, 2, shape).astype(kind)
            if name == "q":  # all but the codes of no number
                numbers = rng.integers(0, 127, shape) | rng.integers(0, 2, shape) << 7
                numbers = numbers.astype(np.uint8).view(kind)
            found[name] = numbers
        elif ENCODINGS[form].number_format(name) == "e8m0":
            found[name] = rng.integers(125, 130, shape, dtype=np.uint8)
        elif kind.itemsize == 1:
            found[name] = rng.integers(0, 256, shape, dtype=np.uint8).view(kind)
        else:
            found[name] = rng.uniform(0.5, 2, shape).astype(kind)
    if form in BLOCKS:
        blocks = found["q"].reshape(-1, BLOCKS[form].n_block_bytes)
        for at, dtype in BLOCKS[form].numbers:
            scales = rng.uniform(0.5, 2, len(blocks)).astype("<f2")
            if dtype == "e8m0":
                scales = rng.integers(125, 130, len(blocks)).astype(np.uint8)
            raw = scales.view(np.uint8).reshape(len(blocks), -1)
            blocks[:, at : at + raw.shape[1]] = raw
    return found


def compressed_tensors(form: str, **weights) -> dict:
    """The quantization_config of compressed-tensors for weights of one group, in this format."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
