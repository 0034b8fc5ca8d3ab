"""lm-evaluation-harness against the server (`local-completions`), and as `jlayer eval harness`."""

import pytest

from tests.conftest import BUNDLED
from tests.measure import own_tasks
from tests.serving.http.conftest import NAMES, served

lm_eval = pytest.importorskip("lm_eval")  # a package of its own extra, 600 MB
pytestmark = pytest.mark.slow

# Whose tokenizer it takes. The server's is asked for tokens alone, without a beginning token.
TOKENIZERS = {
    "published": {
        "tokenizer_backend": "huggingface",
        "tokenizer": str(BUNDLED),
        "add_bos_token": True,
    },
    "server": {"tokenizer_backend": "remote"},
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_its_figures_are_those_of_the_command(model, tmp_path, monkeypatch, tokenizer):
    """It takes a text's last token for one more to predict, so its texts are a token shorter than
    the context: no long ones here."""
    from jlayer.measure.harness import JlayerLM, Tasks

    class WithoutBeginning(JlayerLM):
        """As a client of the server's tokenizer does it."""

        prefix_token_id = JlayerLM.eot_token_id

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return self.tokenizer.encode(string, add_special_tokens=False)

    tasks = Tasks(include_path=str(own_tasks.write(tmp_path)))
    options = {"tasks": tasks.named(["own_*"]), "task_manager": tasks, "log_samples": True}
    options |= {"limit": 2, "bootstrap_iters": 0}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = model.engine.scheduler.n_passes
    with served(model) as serving:
        theirs = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{serving.address}/v1/completions",
                "model": NAMES[0],
                "max_length": model.context_limit,
                "timeout": 600,
                "max_retries": 1,
                **TOKENIZERS[tokenizer],
            },
            batch_size=16,
            **options,
        )
    passes = model.engine.scheduler.n_passes - before
    own = JlayerLM if tokenizer == "published" else WithoutBeginning
    ours = lm_eval.simple_evaluate(model=own(model), **options)
    assert len(ours["results"]) == 4
    own_tasks.check_answers(ours, theirs)
    assert passes <= 40 + 8, "the answers of a batch share their passes"
