"""What tests of saved runs share: models of each kind of cache, and what a run gives when nobody
disturbs it."""

from contextlib import contextmanager

import jlayer
from jlayer import AutoModel
from tests.reference import dense_forms, latent_forms
from tests.tiny import tiny_llama

# What a layer keeps of a text: all of it, what its window sees, a latent, a state.
KINDS = {
    "llama": dense_forms,
    "gemma3": dense_forms,
    "deepseek_v3": latent_forms,
    "qwen3_5": dense_forms,
}
PROMPT = [7 + n for n in range(40)]
# Two that begin alike, and a short one.
PROMPTS = [PROMPT, [*PROMPT[:20], 9, 11], [5, 6]]
PLAIN = {"temperature": 0, "max_new_tokens": 6, "eos_token_id": None, "speculate": "off"}
DRAWN = {**PLAIN, "temperature": 1.0, "do_sample": True, "seed": 5}


@contextmanager
def opened(folder, **options):
    options = {"device": "cpu", "dtype": "float32", **options}
    with AutoModel.from_pretrained(folder, **options) as model:
        yield model


def saved_model(kind, folder):
    return KINDS[kind].save(folder / "model", kind)


def draft_of(folder):
    """A small random model of the same tokens."""
    return tiny_llama(folder / "draft", seed=3)


def tokens_of(found):
    return [one.token_ids for one in (found if isinstance(found, list) else [found])]


def undisturbed(model, prompt, **options):
    return tokens_of(jlayer.generate(model, prompt, **options))
