"""Tasks of lm-evaluation-harness over data of one's own, so that nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def write(folder: Path) -> Path:
    """Writes the tasks own_choices, own_letters, own_texts and own_rolling, with their data."""
    for name, form in FORMS.items():
        (folder / f"{name}.json").write_text(json.dumps(DATA[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.json}}}}\n{form}"
        )
    return folder


def check_same(found, expected) -> None:
    """A text; a log-probability, and whether it is greedy; or a log-probability alone, of which the
    hf backend adds up thousands of nats in float32."""
    if isinstance(expected, str):
        assert found == expected
    elif isinstance(expected, tuple):
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]
    else:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)


def check_answers(ours: dict, theirs: dict) -> None:
    """All answers of two evaluations are the same."""
    for task, samples in ours["samples"].items():
        for one, other in zip(samples, theirs["samples"][task], strict=True):
            for (found,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                check_same(found, expected)
