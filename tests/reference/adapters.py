"""Adapters of random weights, made and merged by PEFT."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FORMS = {
    "lora": {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    "few modules": {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "rslora": {"r": 4, "target_modules": r".*\.(k|gate)_proj", "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {r"layers\.\d\.self_attn\..*": 3},
    },
    "dora": {"r": 4, "target_modules": "all-linear", "use_dora": True},
}


def adapted(
    base,
    folder,
    *,
    dtype=torch.float32,
    load=transformers.AutoModelForCausalLM.from_pretrained,
    **options,
):
    """Saves an adapter of random weights for a model -> the model with it, merged by PEFT."""
    model = load(base, dtype=dtype)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(0)
    for name, value in tuned.named_parameters():
        if "magnitude" in name:
            value.data.mul_(1 + 0.2 * torch.rand_like(value))
        elif "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned.merge_and_unload()
