"""Plans of models whose weights are published in FP8, from their configs alone."""

import json

import pytest

from jlayer.app.cli import main
from tests.plan.test_latent import V3

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# Few experts: a plan of all of them takes minutes.
FEW = {**V3, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_hidden_layers": 6}


def planned(capsys, path, config):
    path.write_text(json.dumps(config))
    assert main(["plan", str(path), "--device-memory", "8GiB", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_fp8_is_planned_as_it_is_published(tmp_path, capsys):
    plain = planned(capsys, tmp_path / "bf16.json", FEW)
    fp8 = planned(capsys, tmp_path / "fp8.json", {**FEW, "quantization_config": FP8})
    assert fp8["fits"]
    table = fp8["quantization"]["published"]
    assert table.pop("model.layers.*.self_attn.kv_b_proj.weight") == "fp8_128x128"
    assert not any("gate.weight" in name or "norm" in name or "head" in name for name in table)
    # All but the head and the routers: half the bytes, and four for 16384 of them.
    head = 2 * V3["vocab_size"] * V3["hidden_size"]
    ratio = (fp8["sweep"]["bytes"] - head) / (plain["sweep"]["bytes"] - head)
    assert 0.5 < ratio < 0.501


def test_modules_that_are_left_out_are_planned_in_the_dtype_of_the_config(tmp_path, capsys):
    left = {**FP8, "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.2.mlp"]}
    table = planned(capsys, tmp_path / "fp8.json", {**FEW, "quantization_config": left})
    table = table["quantization"]["published"]
    assert not any("self_attn" in name for name in table)
    assert table["model.layers.2.mlp.up_proj.weight"] is None
    assert table["model.layers.*.mlp.up_proj.weight"] == "fp8_128x128"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_forms_are_refused_as_before(tmp_path, capsys, method):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**FEW, "quantization_config": {"quant_method": method}}))
    assert main(["plan", str(path), "--device-memory", "8GiB"]) != 0
    assert f"weights quantized by {method}" in capsys.readouterr().err
