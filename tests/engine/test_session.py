"""Runs that are put down and taken up give the tokens of runs that nobody disturbed."""

import pytest

from tests.campaigns import slow_but
from tests.engine.sessions import (
    DRAWN,
    KINDS,
    PLAIN,
    PROMPT,
    PROMPTS,
    draft_of,
    opened,
    saved_model,
    tokens_of,
    undisturbed,
)

SEVERAL = {**DRAWN, "num_return_sequences": 2, "repetition_penalty": 1.3}
DRAFTED = {"speculate": "draft", "draft_tokens": 4}


@pytest.fixture(scope="module", params=slow_but(KINDS, ("llama", "qwen3_5")))
def folder(request, tmp_path_factory):
    return saved_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder):
    with opened(folder) as found:
        yield found
        assert not found.engine.n_alive


def put_down_everywhere(model, folder, prompt, **options):
    """Saves a run after each of its passes -> the folders."""
    session = model.session(prompt, **options)
    folders = []
    for _ in session:
        folders.append(folder / str(len(folders)))
        model.save_session(folders[-1], session)
    return folders


def check_each(model, folders, expected):
    """Every saved run goes on to the same tokens, without a prompt being computed again."""
    for number, folder in enumerate(folders):
        session = model.load_session(folder)
        n_before = [len(ids) for ids in session.token_ids]
        found = session.result()
        assert tokens_of(found) == expected
        stats = (found if isinstance(found, list) else [found])[0].stats
        if number < len(folders) - 1:
            assert stats["kept_tokens"] > 0
            n_new = sum(map(len, expected)) - sum(n_before)
            # Each text's next token, and guesses that were right once more where a layer has a
            # state: no prompt.
            assert stats["rows"] <= 8 * len(n_before) * n_new
        assert not model.engine.n_alive


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(PROMPT, PLAIN), (PROMPTS, SEVERAL)],
    ids=["greedy alone", "drawn in a batch"],
)
def test_a_run_goes_on_from_every_token_to_the_same_tokens(model, tmp_path, prompt, options):
    expected = undisturbed(model, prompt, **options)
    folders = put_down_everywhere(model, tmp_path, prompt, **options)
    assert len(folders) == options["max_new_tokens"]
    check_each(model, folders, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPTS], ids=["alone", "in a batch"])
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
def test_all_ways_of_a_run(folder, tmp_path, prompt, options, drafts):
    plain = {**options, "max_new_tokens": 16}
    with opened(folder, **({"draft": draft_of(tmp_path)} if drafts else {})) as model:
        expected = undisturbed(model, prompt, **plain)
        own = {**plain, **(DRAFTED if drafts else {})}
        check_each(model, put_down_everywhere(model, tmp_path / "runs", prompt, **own), expected)
