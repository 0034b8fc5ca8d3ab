"""Greedy tokens of tiny models, here and in Transformers; and what quantized weights stand for."""

from __future__ import annotations

import warnings

import numpy as np

import jlayer
from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from tests.quantized import stand_for


def drawn_here(model, prompts, *, n_new: int) -> list[list[int]]:
    """The tokens that follow each prompt, all in one call."""
    found = jlayer.generate(
        model, prompts, temperature=0, max_new_tokens=n_new, eos_token_id=None, speculate="off"
    )
    return [each.token_ids for each in found]


def drawn_there(model, prompts, *, n_new: int) -> list[list[int]]:
    """Those that Transformers' model draws after each prompt by itself."""
    model.generation_config.eos_token_id = None
    return [_drawn_by(model, prompt, n_new) for prompt in prompts]


def _drawn_by(model, prompt, n_new):
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n_new,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


def assert_quantized_stands_for(source, layered, scheme, ids, reference_logits, *, tolerance):
    """Converts a model with `scheme`; its logits are those that Transformers has of the weights
    that the quantized ones stand for, which then lie in `source`."""
    import torch

    convert_checkpoint(source, layered, quantize=scheme)
    stand_for(source, layered)
    exact = reference_logits(source, ids, torch.float64).numpy()
    own = np.abs(reference_logits(source, ids, torch.float32).numpy() - exact).max()
    with AutoModel.from_pretrained(layered, device="cpu", dtype="float32") as model:
        found = model.logits(ids)
    allowed = max(tolerance * np.abs(exact).max(), 3 * own)
    np.testing.assert_allclose(found, exact, rtol=0, atol=allowed)
