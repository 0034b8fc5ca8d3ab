"""Every family with embeddings in place of ids: its tiny model in Transformers gives the same
logits and tokens. Some scale what is given, and some the rows of their own table alone."""

import numpy as np
import pytest

from jlayer import AutoModel
from tests.reference import dense_forms, gpt_oss_forms, latent_forms, mixture_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.slow]

TOLERANCE = 1e-5  # of the largest logit: float32's rounding, in another order
FORMS = {
    **dict.fromkeys(dense_forms.DENSE, dense_forms),
    **dict.fromkeys(mixture_forms.MIXTURES, mixture_forms),
    **dict.fromkeys(latent_forms.FORMS, latent_forms),
}


@pytest.mark.parametrize("name", FORMS)
def test_logits_and_tokens(tmp_path, name):
    forms = FORMS[name]
    folder = forms.save(tmp_path / name, name)
    check(folder, forms.load(folder, torch.float32))


def test_gpt_oss(tmp_path):
    drawn = gpt_oss_forms.drawn()
    folder = gpt_oss_forms.write(tmp_path / "model", *drawn)
    check(folder, gpt_oss_forms.in_transformers(*drawn, torch.float32))


def check(folder, theirs):
    width = theirs.config.get_text_config().hidden_size
    made = np.random.default_rng(0).normal(scale=0.5, size=(1, 40, width))
    given = torch.tensor(made, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=given).logits.numpy()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    tokens = theirs.generate(inputs_embeds=given, max_new_tokens=6, do_sample=False)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        most = np.abs(expected).max()
        found = model.logits(inputs_embeds=given)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * most)
        drawn = model.generate(
            inputs_embeds=given, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert drawn.tolist() == tokens.tolist()
