"""Routers: which experts a token goes through, and by what their outputs are multiplied, as the
routers of Transformers say."""

from copy import deepcopy

import jax.numpy as jnp
import numpy as np
import pytest

from jlayer.config import model_config
from jlayer.families.experts import OF_INPUT, OF_WEIGHTS, ROUTER
from jlayer.families.registry import FAMILIES
from jlayer.model.experts import route, weights_of
from jlayer.parts import Router
from tests.reference.mixture_forms import MIXTURES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4 as gemma4  # noqa: E402
from transformers.models.llama4 import modeling_llama4 as llama4  # noqa: E402

pytestmark = pytest.mark.reference

N_EXPERTS, N_CHOSEN, N_ROWS = 12, 4, 300
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (N_ROWS, N_EXPERTS)).astype(np.float32)
BIAS = RNG.normal(0, 0.3, N_EXPERTS).astype(np.float32)
PLAIN = [name for name in MIXTURES if name != "gemma4"]  # whose router looks at logits alone
EXACT = {"rtol": 0, "atol": 2e-7}  # two roundings of numbers up to 1


def mlp_of(layer):
    names = ("mlp", "block_sparse_moe", "feed_forward")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def router_of(name):
    """(Transformers' router of a tiny model, what we read of its config)."""
    dense = MIXTURES[name]
    raw = {**dense.config, "model_type": dense.model_type}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.CONFIG_MAPPING[dense.model_type](**dense.config)
    )
    model.eval()  # in training PhiMoE draws its experts
    cfg = model_config(raw, where="here")
    mlps = [mlp_of(layer) for layer in model.model.layers]
    mlp = next(mlp for mlp in mlps if hasattr(mlp, "gate") or hasattr(mlp, "router"))
    return mlp, cfg.experts.router


def chosen_there(mlp, logits, bias):
    """[R, E]: the weights that a router of Transformers gives these logits."""
    router = getattr(mlp, "gate", None) or mlp.router
    n_experts = logits.shape[1]
    weight = router.wg.weight if hasattr(router, "wg") else router.weight
    with torch.no_grad():
        weight.zero_()
        weight[:, :n_experts] = torch.eye(n_experts)
        for where in (mlp, router, getattr(router, "moe_statics", None)):
            if hasattr(where, "e_score_correction_bias"):
                where.e_score_correction_bias.copy_(torch.as_tensor(bias))
        inputs = torch.zeros(len(logits), weight.shape[1])
        inputs[:, :n_experts] = torch.as_tensor(logits)
        if isinstance(router, llama4.Llama4Router):
            return router(inputs)[0].numpy()  # those of all experts
        more = (mlp.e_score_correction_bias,) if hasattr(mlp, "e_score_correction_bias") else ()
        _, weights, chosen = router(inputs, *more)
        return torch.zeros(logits.shape).scatter(1, chosen, weights).numpy()


@pytest.mark.parametrize("name", PLAIN)
def test_weights_are_those_of_the_family(name):
    mlp, how = router_of(name)
    logits, bias = LOGITS[:, : how.n_experts], BIAS[: how.n_experts]
    found = weights_of(jnp.asarray(logits), jnp.asarray(bias) if how.has_bias else None, how)
    expected = chosen_there(mlp, logits, bias)
    np.testing.assert_array_equal((expected != 0).sum(axis=1), how.n_chosen)
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.parametrize("name", PLAIN)
def test_of_experts_that_score_the_same_as_many_are_chosen_and_their_weights_are_the_same(name):
    """Which of them is for each library to say."""
    mlp, how = router_of(name)
    logits = np.round(LOGITS[:, : how.n_experts] / 2)
    bias = np.zeros(how.n_experts, np.float32)
    found = weights_of(jnp.asarray(logits), jnp.asarray(bias) if how.has_bias else None, how)
    expected = chosen_there(mlp, logits, bias)
    np.testing.assert_array_equal((np.asarray(found) != 0).sum(axis=1), how.n_chosen)
    if how.n_groups == 1:  # of groups that score the same, others have other experts in them
        np.testing.assert_allclose(np.sort(found), np.sort(expected), **EXACT)


def test_where_scores_are_all_the_same_the_logits_say_which_is_chosen():
    """As in Llama 4: the sigmoid of a large number is 1."""
    mlp, how = router_of("llama4")
    logits = 50 + np.abs(LOGITS[:, : how.n_experts]) * 20
    found = weights_of(jnp.asarray(logits), None, how)
    np.testing.assert_array_equal(found, chosen_there(mlp, logits, None))
    assert set(np.unique(found)) == {0, 1}
    np.testing.assert_array_equal(np.argmax(found, axis=1), np.argmax(logits, axis=1))


def test_a_router_with_a_norm_and_factors_of_its_own():
    """That of Gemma 4."""
    dense = MIXTURES["gemma4"]
    config = transformers.Gemma4TextConfig(**deepcopy(dense.config))
    router = gemma4.Gemma4TextRouter(config)
    inputs = RNG.normal(0, 3, (N_ROWS, config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.as_tensor(RNG.normal(0.5, 1, weight.shape)))
        _, weights, chosen = router(torch.as_tensor(inputs))
    expected = torch.zeros(N_ROWS, config.num_experts).scatter(1, chosen, weights).numpy()
    how = model_config({**dense.config, "model_type": "gemma4_text"}, where="here").experts.router
    names = {ROUTER: "proj.weight", OF_INPUT: "scale", OF_WEIGHTS: "per_expert_scale"}
    whole = {ours: jnp.asarray(router.state_dict()[name].numpy()) for ours, name in names.items()}
    found, start = route({}, whole, jnp.asarray(inputs), how=how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert start.shape == inputs.shape
    assert not start.any()


def deepseek_config(module, **changes):
    return module(
        hidden_size=N_EXPERTS,
        num_attention_heads=4,
        n_routed_experts=N_EXPERTS,
        num_experts_per_tok=N_CHOSEN,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        **changes,
    )


def test_the_best_group_may_be_that_of_the_best_expert():
    """As in DeepSeek V2."""
    config = deepseek_config(
        transformers.DeepseekV2Config, topk_method="group_limited_greedy", norm_topk_prob=False
    )
    mlp = deepseek_v2.DeepseekV2Moe(config)
    with torch.no_grad():
        mlp.gate.weight.copy_(torch.eye(N_EXPERTS))
        out = mlp.gate(torch.as_tensor(LOGITS)[None])
    weights, chosen = out[1:] if out[1].is_floating_point() else (out[2], out[1])
    weights, chosen = (each.reshape(N_ROWS, -1) for each in (weights, chosen))
    expected = torch.zeros(LOGITS.shape).scatter(1, chosen, weights).numpy()
    how = Router(N_EXPERTS, N_CHOSEN, n_groups=3, n_chosen_groups=2, group_score="max", scale=2.5)
    np.testing.assert_allclose(
        weights_of(jnp.asarray(LOGITS), None, how), expected, rtol=0, atol=1e-6
    )


def test_a_bias_and_groups_together():
    """As in DeepSeek V3."""
    config = deepseek_config(transformers.DeepseekV3Config, norm_topk_prob=True)
    mlp = deepseek_v3.DeepseekV3MoE(config)
    expected = chosen_there(mlp, LOGITS, BIAS)
    how = Router(
        N_EXPERTS,
        N_CHOSEN,
        scores="sigmoid",
        has_bias=True,
        n_groups=3,
        n_chosen_groups=2,
        group_score="best_two",
        renormalizes=True,
        above_sum=1e-20,
        scale=2.5,
    )
    found = weights_of(jnp.asarray(LOGITS), jnp.asarray(BIAS), how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_sum_that_is_too_small_is_another_number():
    how = Router(2, 1, scores="sigmoid", renormalizes=True, least_sum=0.8)
    found = weights_of(jnp.asarray([[0.0, -9.0]]), None, how)
    np.testing.assert_allclose(found, [[0.625, 0]], rtol=1e-6)


def test_every_router_of_a_family_is_here():
    seen = {router_of(name)[1].scores for name in PLAIN}
    assert seen == {"softmax", "sigmoid", "sparsemixer"}
    assert {dense.model_type for dense in MIXTURES.values()} <= set(FAMILIES)
