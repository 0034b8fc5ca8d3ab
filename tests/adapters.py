"""An adapter of random numbers, written as PEFT writes it, without PEFT."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jlayer.checkpoint.adapter import CONFIG, WEIGHTS
from jlayer.config import read_config
from jlayer.families.registry import published_tensors

TARGETS = ("q_proj", "k_proj", "down_proj")


def write_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 2,
    size: float = 0.1,
    targets: tuple[str, ...] = TARGETS,
    dtype: str = "float32",
    seed: int = 0,
    has_lengths: bool = False,
) -> Path:
    """One for some matrices of every layer of the model in `base`. `has_lengths`: a DoRA."""
    generator, tensors = np.random.default_rng(seed), {}
    for name, shape in published_tensors(read_config(base)).items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            out, width = shape
            for end, axes in (("A", (rank, width)), ("B", (out, rank))):
                numbers = generator.normal(0, size, axes).astype(getattr(ml_dtypes, dtype, dtype))
                tensors[f"base_model.model.{module}.lora_{end}.weight"] = numbers
            if has_lengths:
                numbers = generator.uniform(0.5, 2, out).astype(np.float32)
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = numbers
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": targets}
    said |= {"use_dora": has_lengths}
    (folder / CONFIG).write_text(json.dumps(said))
    return folder
