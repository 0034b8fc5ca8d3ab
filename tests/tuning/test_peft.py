"""What is written is an adapter for PEFT: it loads there with nothing missing, changes the matrices
that were trained and no others, and gives the logits that it gives here."""

import json
import warnings
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.checkpoint.adapter import CONFIG
from jlayer.config import model_config, read_config
from jlayer.families.holders import module_lead
from jlayer.families.registry import FAMILIES
from jlayer.tuning.adapter import (
    AdapterConfig,
    fresh,
    load_adapter,
    save_adapter,
    targets_of,
)
from jlayer.tuning.modules import (
    is_named_by_weight,
    name_there,
    said_of_targets,
    trainable,
    untrained,
)
from tests.reference import dense_forms, latent_forms, mixture_forms, test_multimodal
from tests.reference.adapters import FORMS, adapted
from tests.tuning.states import assert_equal_states, drawn, drawn_for

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
pytestmark = pytest.mark.reference

IDS = np.random.default_rng(0).integers(3, 60, (1, 24))


def save(folder, state, cfg, how, **more):
    save_adapter(folder, state, cfg, how, **{"base": "org/model", "card": "", **more})
    return folder


def in_peft(model, adapter):
    """The model with the adapter in a folder, of which nothing is missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's own, of keys that it does not find
        return peft.PeftModel.from_pretrained(model, adapter)


def changed(tuned):
    """The names of the modules that PEFT changes, as the model without it has them."""
    by_weight = tuned.base_model.targeted_parameter_names
    return {
        *tuned.base_model.targeted_module_names,
        *(n.removesuffix(".weight") for n in by_weight),
    }


def logits_there(tuned):
    with torch.no_grad():
        return tuned(torch.tensor(IDS)).logits.numpy()


def assert_same(model, adapter, expected):
    with AutoModel.from_pretrained(
        model, adapter=adapter, device="cpu", dtype="float32", host_share=0
    ) as own:
        found = own.logits(IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# The family's forms, its name, how the adapter is.
MODELS = {
    "llama": (dense_forms, "llama", {}),
    "qwen3-moe": (mixture_forms, "qwen3_moe", {}),
    "deepseek": (latent_forms, "deepseek_v3", {}),
    "gemma3": (dense_forms, "gemma3", {"targets": ("q_proj", "mlp.down_proj"), "layers": (0, 2)}),
    "shared-expert": (mixture_forms, "qwen2_moe", {"rslora": True, "targets": ("up_proj",)}),
    "some-layers-of-experts": (mixture_forms, "ernie4_5_moe-some", {"targets": ("gate_proj",)}),
    "fused": (dense_forms, "phi3", {"alpha": 3.5}),
    "shared-experts-alone": (latent_forms, "deepseek_v2", {"targets": ("gate_proj",)}),
    "experts-here-too": (mixture_forms, "glm4_moe", {"layers": (0, 2)}),
    "delta": (dense_forms, "qwen3_next", {"layers": (0, 1)}),
}


AT_ONCE = ("llama", "qwen3-moe")  # the others are a campaign


@pytest.mark.parametrize(
    "case", [c if c in AT_ONCE else pytest.param(c, marks=pytest.mark.slow) for c in MODELS]
)
def test_it_loads_in_peft_with_the_same_logits(tmp_path, case):
    forms, name, values = MODELS[case]
    forms.save(tmp_path / "model", name)
    cfg, how, state = drawn_for(tmp_path / "model", **{"rank": 3, "alpha": 2, **values})
    save(tmp_path / "adapter", state, cfg, how)
    tuned = in_peft(forms.load(tmp_path / "model", torch.float32), tmp_path / "adapter")
    assert changed(tuned) == {one.removesuffix(".weight") for one in state}
    expected = logits_there(tuned)
    with tuned.disable_adapter():
        assert np.abs(logits_there(tuned) - expected).max() > 0.1
    assert_same(tmp_path / "model", tmp_path / "adapter", expected)


def described(forms, name):
    """A model without numbers, and its config here."""
    if forms is latent_forms:
        config, kind = forms.reference_config(name), forms.FORMS[name].model_type
    else:
        form = getattr(forms, "DENSE", None) or forms.MIXTURES
        kind = form[name].model_type
        config = transformers.CONFIG_MAPPING[kind](**deepcopy(form[name].config))
    of_auto = transformers.AutoModelForCausalLM.from_config
    if kind == "mistral4":  # which has no class by itself that transformers would choose
        of_auto = transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM._from_config
    with torch.device("meta"):
        return of_auto(config), model_config(json.loads(config.to_json_string()), where=name)


def all_linear(model):
    """Before PEFT makes experts of some of them."""
    config = peft.LoraConfig(target_modules="all-linear")
    return set(tuners_utils._maybe_include_all_linear_layers(config, model).target_modules)


def assert_all(forms, name):
    """What is left out is told by `untrained`: but an indexer, which is not run here at all, and a
    router whose published name is another (PhiMoE)."""
    model, cfg = described(forms, name)
    own = {one.removesuffix(".weight") for one in targets_of(cfg, AdapterConfig())}
    left = {one.removesuffix(".weight") for one in untrained(cfg)}
    there = all_linear(model)
    assert own <= there
    others = {one for one in there - own if ".indexer." not in one}
    assert {one for one in others if not one.endswith(".mlp.router")} <= left
    return others


@pytest.mark.parametrize("name", dense_forms.DENSE)
def test_all_is_all_linear(name):
    assert assert_all(dense_forms, name) == set()


@pytest.mark.parametrize("name", mixture_forms.MIXTURES)
def test_all_of_a_mixture_is_all_linear_without_routers(name):
    ends = {one.split(".")[-1] for one in assert_all(mixture_forms, name)}
    assert ends <= {"shared_expert_gate", "wg", "router", "proj"}


@pytest.mark.parametrize("name", latent_forms.FORMS)
def test_all_of_latents_is_all_linear_without_what_is_used_uncut(name):
    assert {one.split(".")[-1] for one in assert_all(latent_forms, name)} == {"kv_b_proj"}


SUBSETS = [
    (dense_forms, "llama"),
    (dense_forms, "qwen3_next"),
    (mixture_forms, "qwen2_moe-some"),
    (mixture_forms, "ernie4_5_moe-some"),
    (mixture_forms, "llama4"),
    (latent_forms, "deepseek_v3"),
]


@pytest.mark.parametrize(("forms", "name"), SUBSETS)
def test_any_matrices_are_named_so_that_peft_finds_them_alone(forms, name):
    """Also among the modules that older transformers has for experts, which are published names."""
    model, cfg = described(forms, name)
    known = [*trainable(cfg), *untrained(cfg)]
    modules = {name for name, _ in model.named_modules()} | {
        one.removesuffix(".weight") for one in known
    }
    draw = np.random.default_rng(0)
    some = list(trainable(cfg))
    by_layer = [[one for one in some if f".layers.{n}." in one] for n in (0, 1)]
    by_end = [
        [one for one in some if one.endswith(end)] for end in ("q_proj.weight", "gate_proj.weight")
    ]
    drawn_ones = [[one for one in some if draw.random() < share] for share in (0.1, 0.5, 0.9)]
    for names in filter(None, (some, *by_layer, *by_end, *drawn_ones)):
        for lead in ("model.", "model.language_model."):
            there = {lead + one.removeprefix("model.") if one.startswith("model.") else one
                     for one in modules}  # fmt: skip
            config = peft.LoraConfig(**said_of_targets(cfg, names, lead))
            by_weight = tuple(f".{end}" for end in config.target_parameters or ())
            found = {
                one
                for one in there
                if tuners_utils.check_target_module_exists(config, one)
                or f".{one}.weight".endswith(by_weight)
            }
            assert found == {name_there(one, lead) for one in names}


def test_where_peft_takes_names_for_those_of_experts():
    from peft.utils import transformers_weight_conversion as there

    for kind in FAMILIES:
        style = there._MODEL_TO_CONVERSION_PATTERN.get(kind)
        fused = set(there._MOE_TARGET_MODULE_MAPPING.get(style, ()))
        for words in ("up_proj", "down_proj", "gate_proj", "q_proj", "o_proj"):
            name = f"model.layers.0.mlp.{words}.weight"
            found = is_named_by_weight(SimpleNamespace(model_type=kind), name)
            # minimax_m2 and others of mixtral's style have no such names beside those of experts.
            assert found == (words in fused), (kind, words)


@pytest.mark.slow
def test_ranks_and_alphas_of_shared_experts(tmp_path):
    """Which PEFT finds by their parameters: a pattern has to match the names of those."""
    latent_forms.save(tmp_path / "model", "deepseek_v3")
    cfg, how, state = drawn_for(tmp_path / "model", rank=3, alpha=2)
    names = [name for name in state if "shared_experts.up_proj" in name or "q_b_proj" in name]
    alphas = dict.fromkeys(names, 5.0)
    for name in names:
        (out, _), width = state[name]["b"].shape, state[name]["a"].shape[1]
        draw = np.random.default_rng(1)
        for part, shape in (("a", (4, width)), ("b", (out, 4))):
            state[name][part] = draw.normal(0, 0.2, shape).astype(np.float32)
    save(tmp_path / "adapter", state, cfg, how, alphas=alphas, dropout=0.1)
    tuned = in_peft(latent_forms.load(tmp_path / "model", torch.float32), tmp_path / "adapter")
    assert_same(tmp_path / "model", tmp_path / "adapter", logits_there(tuned))
    begun = load_adapter(tmp_path / "adapter", cfg)
    assert begun.alphas == alphas
    assert_equal_states(begun.state, state)


def test_a_begins_as_in_peft():
    model, cfg = described(dense_forms, "llama")
    how = AdapterConfig(rank=64)
    state = fresh(targets_of(cfg, how), how, seed=0)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        transformers.LlamaForCausalLM(model.config),
        peft.LoraConfig(target_modules="all-linear", r=64),
    )
    there = {name: value.detach().numpy() for name, value in tuned.named_parameters()}
    for name, parts in state.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (there[f"{stem}.lora_{end}.default.weight"] for end in "AB")
        assert a.shape == parts["a"].shape
        assert not b.any()
        assert not parts["b"].any()
        bound = 1 / np.sqrt(a.shape[1])
        for one in (a, parts["a"]):
            assert 0.98 * bound < np.abs(one).max() <= np.float32(bound)
            assert np.std(one) == pytest.approx(bound / np.sqrt(3), rel=0.05)
            assert abs(np.mean(one)) < 0.05 * bound


@pytest.mark.parametrize("rslora", [False, True])
def test_the_config_is_what_peft_writes(tmp_path, rslora):
    dense_forms.save(tmp_path / "model", "llama")
    how = {"rank": 3, "alpha": 6, "rslora": rslora, "targets": ("q_proj", "v_proj"), "layers": (1,)}
    cfg, how, state = drawn_for(tmp_path / "model", **how)
    save(tmp_path / "own", state, cfg, how, dropout=0.1)
    theirs = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=rslora,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        base_model_name_or_path="org/model",
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    theirs.save_pretrained(tmp_path / "theirs")
    own, other = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("own", "theirs"))
    other["target_modules"].sort()  # a set there
    assert own == {key: other[key] for key in own}
    assert peft.LoraConfig.from_pretrained(tmp_path / "own").to_dict() == theirs.to_dict()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dora"])
def test_an_adapter_of_pefts_is_gone_on_from(tmp_path, form):
    """Read and written again it is the same, with ranks and alphas of single matrices."""
    dense_forms.save(tmp_path / "model", "llama")
    expected = logits_there(adapted(tmp_path / "model", tmp_path / "theirs", **FORMS[form]))
    cfg = read_config(tmp_path / "model")
    begun = load_adapter(tmp_path / "theirs", cfg)
    save(tmp_path / "own", begun.state, cfg, begun.how, alphas=begun.alphas)
    tuned = in_peft(dense_forms.load(tmp_path / "model", torch.float32), tmp_path / "own")
    np.testing.assert_allclose(
        logits_there(tuned), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    again = load_adapter(tmp_path / "own", cfg)
    assert_equal_states(again.state, begun.state)
    assert (again.how, again.alphas) == (begun.how, begun.alphas)


WHOLE = {"mistral3"}  # transformers makes no text model of these


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("gemma3", "gemma4", "mistral3", "qwen3_5", "llama4")
        ),
    ],
)
def test_a_text_model_inside_another(tmp_path, name):
    """Its modules are called what transformers calls them there; nothing of the vision is."""
    model = test_multimodal.save(tmp_path / "model", name)
    raw = json.loads((model / "config.json").read_text())
    cfg, how, state = drawn_for(model, rank=3, alpha=2)
    lead = module_lead(raw)
    save(tmp_path / "adapter", state, cfg, how, lead=lead)
    auto = (
        transformers.AutoModelForImageTextToText
        if name in WHOLE
        else transformers.AutoModelForCausalLM
    )
    there = auto.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tuned = in_peft(there, tmp_path / "adapter")
    assert changed(tuned) == {name_there(one, lead) for one in state}
    assert_same(model, tmp_path / "adapter", logits_there(tuned))


def test_a_rank_larger_than_the_sides(tmp_path):
    dense_forms.save(tmp_path / "model", "llama")
    cfg, how = (
        read_config(tmp_path / "model"),
        AdapterConfig(rank=200, alpha=2, targets=("k_proj",)),
    )
    save(tmp_path / "adapter", drawn(cfg, how), cfg, how)
    tuned = in_peft(dense_forms.load(tmp_path / "model", torch.float32), tmp_path / "adapter")
    assert_same(tmp_path / "model", tmp_path / "adapter", logits_there(tuned))
