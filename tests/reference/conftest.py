"""The models that parity is shown on: one for each style of published configuration, tiny, all axes
of different size."""

import pytest

from tests.campaigns import slow_but

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that a tiny model's positions and head size reach all three ranges of wavelengths.
    "original_max_position_embeddings": 128,
}
STYLES = {
    "llama2": {
        "num_key_value_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {"rope_parameters": LLAMA3_ROPE},
    "llama3.2": {"tied": True, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1},
}
QUICK = ("llama3.2", "one-kv-head")


@pytest.fixture(params=slow_but(STYLES, QUICK))
def style(request):
    return STYLES[request.param]
