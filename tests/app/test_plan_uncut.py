"""What a plan says of large leaves that are used uncut."""

import json

import pytest

from jlayer.app.cli import main
from tests.plan.test_latent import K2

FEW = {**K2, "n_routed_experts": 80, "num_experts_per_tok": 2, "num_hidden_layers": 3}


@pytest.mark.parametrize(("budget", "kept"), [("3GiB", "50.19 MiB"), ("1100MiB", "0 B")])
def test_how_much_of_them_stays_on_the_device(tmp_path, capsys, budget, kept):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FEW))
    options = ["--device-memory", budget, "--context", "64", "--device", "gpu"]
    assert main(["plan", str(path), *options]) == 0
    # Three of 64 * 256 * 512 numbers, and two of 80 * 7168, of two bytes each.
    assert f"50.19 MiB of kv_b_proj and router: {kept} of it stays" in capsys.readouterr().out


def test_a_model_without_them_says_nothing_of_them(tmp_path, capsys):
    assert main(["plan", "qwen3-30b-a3b-thinking-2507", "--quantize", "int4"]) == 0
    assert "uncut" not in capsys.readouterr().out
