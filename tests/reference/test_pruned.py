"""Models without some of their layers give the logits of Transformers' model with the same layers
deleted: passed over as a model runs, and left out of a converted folder, which Transformers loads
too. And the influence of a layer is that of Transformers' hidden states."""

from pathlib import Path

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.transform.pruned import Pruning
from jlayer.errors import UnsupportedModelError
from jlayer.measure.influence import influences
from tests.campaigns import slow_but
from tests.reference import dense_forms, latent_forms, mixture_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = 2e-5  # of the largest logit: rounding in float32; a model with a state has 1.1e-5
IDS = np.random.default_rng(0).integers(3, 133, (1, 40))  # several windows, of 5 to 8
KINDS = {
    dense_forms: dense_forms.DENSE,
    mixture_forms: mixture_forms.MIXTURES,
    latent_forms: latent_forms.FORMS,
}
# A name is in two of them: Gemma 4 with experts and without.
FORMS = {
    f"{name}{'-experts' if name in dense_forms.DENSE and forms is not dense_forms else ''}": (
        forms,
        name,
    )
    for forms, names in KINDS.items()
    for name in names
}
# Types of layers, layers without rotary embedding, and experts in some layers.
FIRST = {"gemma3", "smollm3", "glm4_moe"}
# Name -> (layers whose others no config describes, what the refusal names). The last layer of a
# Gemma 4 attends to all tokens, Ernie's experts are in all layers from one to another, and a model
# with states has a layer without.
NO_FULL = "full_attention, supported: at least one"
REFUSED = {
    **{
        name: [((2,), "attentions"), ((1, 2), "attentions")]
        for name in ("gemma4", "gemma4-values", "gemma4-experts")
    },
    **{name: [((3,), NO_FULL), ((2, 3), NO_FULL)] for name in ("qwen3_5", "qwen3_5_moe")},
    **{
        name: [((1,), NO_FULL), ((0, 1), NO_FULL), ((1, 2), NO_FULL)]
        for name in ("qwen3_next", "qwen3_next-experts")
    },
    "ernie4_5_moe-some": [((1,), "(experts)"), ((0, 1), "(experts)")],
}


def without(model, dropped):
    """Transformers' model, the layers deleted."""
    kept = [n for n in range(model.config.num_hidden_layers) if n not in dropped]
    model.model.layers = torch.nn.ModuleList(model.model.layers[n] for n in kept)
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(model.config, key, None):
            setattr(model.config, key, [getattr(model.config, key)[n] for n in kept])
    model.config.num_hidden_layers = len(kept)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.as_tensor(IDS), use_cache=False).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def choices(n_layers):
    """Each layer by itself; the first ones and the last ones together."""
    return [*((n,) for n in range(n_layers)), (0, 1), (n_layers - 2, n_layers - 1)]


@pytest.mark.parametrize("name", slow_but(FORMS, FIRST))
def test_logits_are_those_of_the_model_with_these_layers_deleted(name, tmp_path):
    forms, own = FORMS[name]
    source = forms.save(tmp_path / "source", own)
    cfg = read_config(source)
    n_layers, stacks = cfg.num_hidden_layers, cfg.experts.stacks if cfg.experts else ()
    refused = []
    tried = choices(n_layers) if name not in FIRST else [(1,), (0, 1)]
    for dropped in tried:
        target = tmp_path / "-".join(map(str, dropped))
        prune = Pruning(n_layers, dropped, {}, {})
        try:
            convert_checkpoint(source, target, prune=prune)
        except UnsupportedModelError as refusal:
            refused.append((dropped, str(refusal)))
            continue
        expected = logits_of(without(forms.load(source, torch.float32), dropped))
        with AutoModel.from_pretrained(source, device="cpu", without_layers=dropped) as model:
            assert_close(model.logits(IDS), expected)
        with AutoModel.from_pretrained(target, device="cpu") as model:
            assert model.config.num_hidden_layers == n_layers - len(dropped)
            assert_close(model.logits(IDS), expected)
        # Transformers wants all experts of some as one tensor, which an export makes of a folder.
        if not any(stack.is_only for stack in stacks):
            assert_close(logits_of(forms.load(target, torch.float32)), expected)
    expected = REFUSED.get(name, [])
    assert [one[0] for one in refused] == [one[0] for one in expected], refused
    for (_, found), (_, said) in zip(refused, expected, strict=True):
        assert said in found


@pytest.mark.parametrize("name", slow_but(FORMS, ["glm4_moe"]))
def test_the_influence_is_that_of_transformers_hidden_states(name, tmp_path):
    forms, own = FORMS[name]
    source, found = Path(forms.save(tmp_path / "source", own)), []
    model = forms.load(source, torch.float32)

    def compare(_, inputs, output):
        output = output if torch.is_tensor(output) else output[0]
        one = torch.cosine_similarity(inputs[0].double(), output.double(), dim=-1)
        found.append(float((1 - one).mean()))

    for layer in model.model.layers:
        layer.register_forward_hook(compare)
    windows, n_tokens = [IDS[:, :16], IDS[:, 16:32], IDS[:, 32:]], [[16], [16], [8]]
    with torch.no_grad():
        for ids in windows:
            model(torch.as_tensor(ids), use_cache=False)
    expected = (np.array(found).reshape(3, -1) * n_tokens).sum(0) / 40
    with AutoModel.from_pretrained(source, device="cpu") as model:
        ours = influences(model, IDS[0].tolist(), length=16)
    assert ours.n_tokens == 40
    np.testing.assert_allclose(ours.of_layers, expected, atol=2e-5)
