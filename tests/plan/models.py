"""Known models as plans see them: their sizes, without their weights."""

from __future__ import annotations

from jlayer.config import model_config
from jlayer.encodings.registry import SCHEMES
from jlayer.families.registry import is_matrix, published_tensors
from jlayer.plan.machine import PLATFORMS, Machine
from jlayer.plan.making import make_plan
from jlayer.plan.plan import Plan
from jlayer.plan.shapes import RunShape
from jlayer.plan.tiles import Weights
from jlayer.spec import ModelConfig

_LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


def llama(**sizes) -> ModelConfig:
    """A llama of these sizes, else those of Llama 3 70B."""
    return model_config({**_LLAMA_70B, **sizes}, where="here")


LLAMA_70B = llama()
LLAMA_405B = llama(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
)
# The width of an 8B model, with 8 layers.
SMALL_8B = llama(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=8,
    num_attention_heads=32,
)
# Small enough to compile programs for.
SMALL = llama(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=4096,
)


# The same of a gpt-oss, with experts in MXFP4.
SMALL_GPT_OSS = model_config(
    {
        "model_type": "gpt_oss",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    where="here",
)


def machine(**options) -> Machine:
    """A GPU with 4 GiB for us and a host with 16 GiB, or as the options say."""
    given = {"platform": "gpu", "device_budget": 4 << 30, "host_budget": 16 << 30, **options}
    return Machine(**{"context_bytes": PLATFORMS[given["platform"]].context_bytes, **given})


def weights_of(cfg: ModelConfig, *, stored="bfloat16", dtype="bfloat16") -> Weights:
    """A model's weights, its matrices stored as `stored`. What is no matrix of a quantized one is
    bfloat16."""
    shapes = published_tensors(cfg) if stored in SCHEMES else {}

    def form_of(name):
        return "bfloat16" if shapes and not is_matrix(name, shapes[name]) else stored

    return Weights(cfg, form_of, dtype)


def plan_of(
    cfg: ModelConfig,
    *,
    on: Machine | None = None,
    stored="bfloat16",
    dtype="bfloat16",
    keeps_layers=True,
    held=(),
    draft: Weights | None = None,
    **shape,
) -> Plan:
    """A plan of a run of this shape: by default 20 tokens at a time, 100 positions."""
    run = RunShape(**{"longest": 20, "context": 100, **shape})
    weights = weights_of(cfg, stored=stored, dtype=dtype)
    options = {"held": held, "keeps_layers": keeps_layers, "draft": draft}
    return make_plan(weights, on or machine(), run, **options)
