"""lm-evaluation-harness: the figures of its `hf` backend, in few passes."""

import json
import math

import pytest

from jlayer import AutoModel, UsageError
from jlayer.app.cli import main
from tests.conftest import BUNDLED
from tests.measure import own_tasks

lm_eval = pytest.importorskip("lm_eval")  # a package of its own extra, 600 MB
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return own_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model():
    with AutoModel.from_pretrained(BUNDLED, device="cpu", dtype="float32") as opened:
        yield opened


def evaluated(model, tasks, names=("own_*",), **options):
    from jlayer.measure.harness import evaluate

    return evaluate(model, names, include_path=str(tasks), log_samples=True, **options)


@pytest.mark.reference
@pytest.mark.parametrize("n_examples", [0, 2])
def test_figures_are_those_of_the_hf_backend(model, tasks, n_examples):
    pytest.importorskip("accelerate")  # the hf backend imports it
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    before = model.engine.scheduler.n_passes
    options = {"num_fewshot": n_examples or None, "bootstrap_iters": 0}
    names = ("own_*",) if not n_examples else ("own_choices",)
    ours = evaluated(model, tasks, names, **options)
    passes = model.engine.scheduler.n_passes - before
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(BUNDLED), "dtype": "float32"},
        tasks=list(ours["results"]),
        task_manager=TaskManager(include_path=str(tasks)),
        device="cpu",
        log_samples=True,
        **options,
    )
    assert len(ours["results"]) == (1 if n_examples else 4)
    for task, figures in ours["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][name], rel=1e-4), (task, name)
    own_tasks.check_answers(ours, theirs)
    # One for all answers, one for all texts that are scored whole, one for each token of a text.
    assert passes <= (1 if n_examples else 1 + 2 + 40)


def test_answers_are_cached_for_who_asks_again(model, tasks, tmp_path):
    first = evaluated(model, tasks, ["own_choices"], use_cache=str(tmp_path / "cache"), limit=2)
    before = model.engine.scheduler.n_passes
    again = evaluated(model, tasks, ["own_choices"], use_cache=str(tmp_path / "cache"), limit=2)
    assert model.engine.scheduler.n_passes == before
    assert again["results"] == first["results"]


def test_it_is_a_model_by_name(tasks):
    import jlayer.measure.harness as own  # registers it

    found = lm_eval.simple_evaluate(
        model="jlayer",
        model_args={"pretrained": str(BUNDLED), "dtype": "float32"},
        tasks=["own_letters"],
        task_manager=own.Tasks(include_path=str(tasks)),
        device="cpu",
        limit=2,
    )
    assert 0 <= found["results"]["own_letters"]["acc,none"] <= 1


def test_on_the_command_line(tasks, capsys):
    args = ["eval", "harness", str(BUNDLED), "--include-path", str(tasks), "--device", "cpu"]
    assert main([*args, "--tasks", "own_choices,own_rolling", "--limit", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n-samples"]["own_choices"]["effective"] == 3
    assert math.isfinite(found["results"]["own_rolling"]["word_perplexity,none"])
    assert found["sweeps"] <= 4
    file = str(tasks / "letters.yaml")
    assert main([*args, "--tasks", file, "--limit", "2"]) == 0
    printed = capsys.readouterr()
    assert "|own_letters|" in printed.out
    assert "forward pass" in printed.err


def test_tasks_that_are_not_there_are_refused_by_name(model, tasks):
    with pytest.raises(UsageError, match="did you mean 'own_letters'"):
        evaluated(model, tasks, ["own_leters"])
    with pytest.raises(UsageError, match="is no file"):
        evaluated(model, tasks, [str(tasks / "none.yaml")])
    broken = tasks / "broken.yaml"
    broken.write_text(
        "task: own_broken\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: /none.json}}\n" + own_tasks.FORMS["letters"]
    )
    with pytest.raises(UsageError, match="lm_eval cannot load"):
        evaluated(model, tasks, [str(broken)])
    broken.unlink()
