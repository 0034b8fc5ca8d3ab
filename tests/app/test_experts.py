"""What is said of experts: by a plan, and after a run."""

from types import SimpleNamespace

import pytest

from jlayer.app.cli import main
from jlayer.app.running import details
from jlayer.engine.report import Stats


@pytest.mark.parametrize(
    ("device_memory", "said"),
    [("6GiB", "in host memory, and 8 may be put by guess\n"), ("80GiB", "in host memory\n")],
)
def test_a_plan_says_how_many_experts_may_be_put_by_guess(device_memory, said, capsys):
    words = ["qwen3-30b-a3b-thinking-2507", "--device-memory", device_memory]
    assert main(["plan", *words, "--host-memory", "100GiB"]) == 0
    assert said in capsys.readouterr().out


def test_a_run_says_how_many_guesses_were_in_vain():
    memory = {
        f"{side}_{what}_bytes": 0 for side in ("device", "host") for what in ("peak", "budget")
    }
    memory |= {"device_peak_how": "measured", "host_peak_how": "measured"}
    used = {"experts_used": 200, "experts_on_device": 50, "experts_in_host": 150}
    found = []
    for guesses in ({}, {"experts_guessed": 40, "experts_wasted": 10}):
        stats = Stats(moved=used | guesses).as_dict()
        found += [
            line
            for line in details(SimpleNamespace(stats=stats, memory=memory))
            if line.startswith("experts")
        ]
    without, guessed = found
    assert without.endswith("75% in host memory when they were asked for")
    assert guessed == f"{without}; 40 put by guess, 25% of them in vain"
