"""lm-evaluation-harness: the figures of its `hf` backend, in few passes."""

import json
import math

import pytest

from jlayer import AutoModel, UsageError
from jlayer.app.cli import main
from tests.conftest import BUNDLED

lm_eval = pytest.importorskip("lm_eval")  # a package of its own extra, 600 MB
pytestmark = pytest.mark.slow

NAMES = ("Tom", "Lily", "the wolf", "a bird", "the old king")
PLACES = ("house", "wood", "garden", "river")
STORY = (
    "Once upon a time there was a little girl who lived with her mother in a small house by the "
    'wood. One day her mother said, "Take this basket to your grandmother." '
)
QUESTIONS = [
    {
        "q": f"Once upon a time {name} lived near the {place}. One day {name} went",
        "choices": [f"to the {other}." for other in PLACES] + ["away"],
        "gold": n % 4,
    }
    for n, (name, place) in enumerate((name, place) for name in NAMES for place in PLACES[:2])
]
DATA = {
    "choices": QUESTIONS,
    "letters": QUESTIONS,
    "texts": [{"q": f"Once upon a time there was {name} in the wood.", "a": "x"} for name in NAMES],
    "rolling": [{"text": STORY * count} for count in (1, 2, 40)] + [{"text": "The king."}],
}
MEAN = "{metric: %s, aggregation: mean, higher_is_better: true}"
FORMS = {
    "choices": "output_type: multiple_choice\nfewshot_split: test\ndoc_to_text: '{{q}}'\n"
    "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
    f"metric_list: [{MEAN % 'acc'}, {MEAN % 'acc_norm'}]\n",
    "letters": "output_type: multiple_choice\ndoc_to_text: '{{q}} A B C D'\n"
    "doc_to_choice: [A, B, C, D]\ndoc_to_target: gold\n"
    f"metric_list: [{MEAN % 'acc'}]\n",
    "texts": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    "generation_kwargs: {until: ['.', \"\\n\\n\"], max_gen_toks: 40, do_sample: false}\n"
    f"metric_list: [{MEAN % 'exact_match'}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, "
    "higher_is_better: false}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of one's own, over data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, form in FORMS.items():
        (folder / f"{name}.json").write_text(json.dumps(DATA[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.json}}}}\n{form}"
        )
    return folder


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
        pairs = zip(ours["samples"][task], theirs["samples"][task], strict=True)
        for one, other in pairs:
            for (found,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                same(found, expected)
    # One for all answers, one for all texts that are scored whole, one for each token of a text.
    assert passes <= (1 if n_examples else 1 + 2 + 40)


def same(found, expected):
    """A text; a log-probability, and whether it is greedy; or a log-probability alone, of which the
    hf backend adds up thousands of nats in float32."""
    if isinstance(expected, str):
        assert found == expected
    elif isinstance(expected, tuple):
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]
    else:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)


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
        "dataset_kwargs: {data_files: {test: /none.json}}\n" + FORMS["letters"]
    )
    with pytest.raises(UsageError, match="lm_eval cannot load"):
        evaluated(model, tasks, [str(broken)])
    broken.unlink()
