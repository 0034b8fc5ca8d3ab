"""What a quantization_config from outside says: read, or refused in one line that is not long."""

import pytest

from jlayer.config import model_config
from jlayer.errors import CheckpointError

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}},
}
REFUSED = {
    "a name of thousands of characters": ({"quant_method": "x" * 5000}, "by x{80} are not support"),
    "a group's name of two lines": (
        {**COMPRESSED, "config_groups": {"a\nb": {"weights": 1}}},
        r"config_groups: 'a\\nb': weights is 1, expected an object",
    ),
    "an algorithm of thousands of characters": (
        {"quant_method": "modelopt", "quant_algo": "x" * 5000},
        "quant_algo 'x{79} is not supported",
    ),
    "a form of AutoRound that is no name": (
        {"quant_method": "auto-round", "packing_format": ["auto_round"]},
        r"packing_format is \['auto_round'\], supported: auto_round",
    ),
    "optional characters": (
        {**COMPRESSED, "ignore": ["re:" + ".?" * 60 + "!"]},
        r"up to 200 characters and 4 of \* \+ \? \{",
    ),
    "alternatives in many groups": (
        {**COMPRESSED, "ignore": ["re:" + "(.|..)" * 30 + "!"]},
        "ignore has 1 expressions that take up to 1073741824 steps for a name, supported: 67108864",
    ),
    "many expressions": (
        {**COMPRESSED, "ignore": ["re:.*.*.*.*!"] * 50},
        "ignore has 50 expressions that take up to 838860800 steps",
    ),
    "many globs": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*a*a*a*!"] * 50},
        "ignore has 50 expressions",
    ),
}


@pytest.mark.parametrize(("said", "words"), REFUSED.values(), ids=REFUSED)
def test_a_config_is_refused_in_one_line_that_is_not_long(said, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        model_config({**TINY, "quantization_config": said}, where="config.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_three_bits_without_groups_are_read():
    """As itdevwu/Genz-70b-GPTQ@1b1336fdba79 says it, which was refused once."""
    said = {"quant_method": "gptq", "bits": 3, "group_size": -1, "desc_act": True, "sym": True}
    raw = {**TINY, "quantization_config": {**said, "damp_percent": 0.1}}
    found = model_config(raw, where="config.json").quantized
    assert (found.method, found.bits, found.encoding) == ("gptq", 3, "packed4_row_float16")


def test_the_method_of_what_jlayer_quantized_is_no_matter():
    raw = {**TINY, "quantization_config": {"by": "jlayer", "quant_method": ["fp8"]}}
    assert model_config(raw, where="config.json").quantized is None


def test_expressions_as_they_are_published_are_taken():
    """Those of Kimi K2, and of models that llm-compressor has quantized."""
    ignore = [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:.*\.layers\.(0|1|2|3|4|58|59|60)\.linear_attn\.in_proj_(a|b)$",
        *(f"model.layers.{n}.mlp.gate" for n in range(1000)),
        *(f"re:model.layers.{n}.mlp.gate.*" for n in range(200)),
    ]
    raw = {**TINY, "quantization_config": {**COMPRESSED, "ignore": ignore}}
    assert model_config(raw, where="config.json").quantized.left == tuple(ignore)
