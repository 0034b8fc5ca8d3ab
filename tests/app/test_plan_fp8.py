"""Plans of models whose weights are published in FP8, which does not run yet."""

import json

import pytest

from jlayer.app.cli import main
from tests.plan.test_latent import V3

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# Few experts: a plan of all of them takes minutes.
FEW = {**V3, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_hidden_layers": 6}


def test_fp8_is_planned_in_the_dtype_of_the_config(tmp_path, capsys):
    found = []
    for name, config in {"bf16": FEW, "fp8": {**FEW, "quantization_config": FP8}}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        assert main(["plan", str(path), "--device-memory", "8GiB", "--json"]) == 0
        captured = capsys.readouterr()
        found.append(json.loads(captured.out))
        assert ("its weights are FP8, which does not run yet" in captured.err) == (name == "fp8")
    assert found[0] == found[1]
    assert found[0]["fits"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_forms_are_refused_as_before(tmp_path, capsys, method):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**FEW, "quantization_config": {"quant_method": method}}))
    assert main(["plan", str(path), "--device-memory", "8GiB"]) != 0
    assert f"weights quantized by {method}" in capsys.readouterr().err
