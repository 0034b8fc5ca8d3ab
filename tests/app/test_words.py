"""What a person reads: times, names of models, speeds, results on the stream that has them."""

import json
import re
from types import SimpleNamespace

import pytest

from benchmarks import table
from jlayer import catalogue
from jlayer.app.cli import main
from jlayer.app.running import pass_words, summary
from jlayer.app.verbs import bench
from jlayer.app.words import time_words
from jlayer.engine.report import Stats
from jlayer.errors import UsageError
from jlayer.measure.evaluate import compare
from tests.conftest import BUNDLED
from tests.test_house import MODULES


def test_a_prompt_of_several_passes_does_not_count_in_the_time_of_a_token():
    """Nor does its chunks' arithmetic in the prediction."""
    stats = Stats(decode_s=4.0, sweeps=5, decode_sweeps=2, new_tokens=3).as_dict()
    plan = {"sweep": {"seconds": 9.0, "decode_seconds": 1.5}}
    run = SimpleNamespace(
        stats=stats, plan=plan, finish_reason="length", seed=None, token_ids=[1, 2, 3]
    )
    assert "5 forward passes, one of a token 2 s (predicted 1.5 s), " in summary([run])


def test_a_run_that_guessed_tokens_says_what_that_gained():
    stats = Stats(sweeps=10, decode_sweeps=9, new_tokens=35, drafted=640, draft_s=0.031)
    plan = {"sweep": {"decode_seconds": 1.5}}
    run = SimpleNamespace(plan=plan, finish_reason="length", seed=None, token_ids=[1, 2, 3])
    run.stats = stats.as_dict()
    words = "3.9 tokens a forward pass (64 drafted each, 0.03 s of drafting)"
    assert words in summary([run])
    assert ", one with its guesses 0 µs (1.5 s predicted without guesses)" in summary([run])
    run.stats = Stats(sweeps=10, decode_sweeps=9, new_tokens=10).as_dict()
    assert "draft" not in summary([run])


def test_the_counter_names_the_next_token_and_what_a_pass_gives():
    lane = SimpleNamespace(token_ids=[1, 2, 3, 4, 5])
    decoding = SimpleNamespace(stats=Stats(new_tokens=5, decode_sweeps=2), lanes=[lane])
    words = pass_words(decoding)
    assert [words(0), words(1)] == ["prompt", "token 2"]
    decoding.stats.drafted = 9
    assert [words(0), words(2)] == ["prompt", "token 6, 2.5 a forward pass"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (2.5e-5, "25 µs"),
        (0.0047, "4.7 ms"),
        (0.5, "500 ms"),
        (9.44, "9.44 s"),
        (59.97, "1 min"),
        (397.2, "6 min 37 s"),
        (3599.8, "60 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (9e5, "10 days"),
        (4.8e8, "15 years"),
    ],
)
def test_a_time_is_said_in_its_own_unit(seconds, words):
    assert time_words(seconds) == words


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("llama-3-8b", "llama-3.1-8b-instruct"),
        ("llama3-70b", "llama-3.1-70b-instruct"),
        ("Llama-2-7B", "llama-2-7b-hf"),
        ("llama-405b", "llama-3.1-405b"),
        ("llama-3.1-80b-instruct", "llama-3.1-8b-instruct"),
    ],
)
def test_a_model_that_is_not_known_offers_one_of_its_size(name, offered):
    with pytest.raises(UsageError, match=f"did you mean '{offered}'"):
        catalogue.model_json(name)


@pytest.mark.parametrize("option", ["--disk-speed", "--link-speed"])
def test_a_speed_without_its_unit_is_refused(capsys, option):
    words = ["plan", "llama-3.2-1b-instruct", option]
    for speed in ("25", "25B/s", "900KB/s", "0.5MB"):
        assert main([*words, speed]) == 2
        assert "expected at least 1 MB/s" in capsys.readouterr().err
    for speed in ("25GB/s", "500MB", "1MB/s", "25000000000"):
        assert main([*words, speed]) == 0
        capsys.readouterr()


def test_a_plan_tells_the_driver_s_memory_from_a_context_of_tokens(capsys):
    assert main(["plan", "llama-3.2-1b-instruct", "--device-memory", "1MiB"]) == 4
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "driver" in text
        assert "context" not in text


def test_a_plan_says_a_long_time_in_minutes(capsys):
    assert main(["plan", "llama-3.1-70b-instruct", "--disk-speed", "100MB/s"]) == 0
    assert re.search(r"; about \d+ min", capsys.readouterr().out)


def test_the_result_of_an_export_is_on_stdout(fable, tmp_path, capsys):
    words = ["export", str(fable), str(tmp_path / "out"), "--format", "huggingface"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out'}: holds {fable} as huggingface, ")


def test_bench_prints_no_json_on_a_terminal(monkeypatch, capsys):
    """The figures are lines for a person there; measuring itself is left out."""
    monkeypatch.setattr(bench, "measure", lambda model, say, **_: say("a line") or {"a": 1})
    words = ["bench", str(BUNDLED), "--device", "cpu"]
    for is_terminal, last in ((True, "a line"), (False, '{"model": "fable-3m", "a": 1}')):
        monkeypatch.setattr(bench, "is_terminal", lambda _, answer=is_terminal: answer)
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_two_models_that_read_differently_are_refused_before_the_first_runs(
    fable, tiny, tmp_path, monkeypatch, capsys
):
    def runs(*_, **__):
        pytest.fail("the first model ran")

    monkeypatch.setattr("jlayer.engine.forward.Forward.score", runs)
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    words = ["eval", "compare", str(fable), str(tiny), "--text", str(text), "--device", "cpu"]
    assert main([*words, "--json"]) == 2
    assert "tokenizer" in json.loads(capsys.readouterr().out)["error"]


def test_a_window_that_the_second_model_cannot_take_is_refused_before_the_first_runs():
    """The order alone: both models are stand-ins."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    opened = []

    def opener(name, context):
        engine = SimpleNamespace(check_ids=lambda ids: None, plan_for=lambda shape: plan)
        plan = SimpleNamespace(check=lambda: None)
        config = SimpleNamespace(vocab_size=9)
        model = SimpleNamespace(config=config, context_limit=context, engine=engine)
        return lambda: opened.append(name) or nullcontext(model)

    with pytest.raises(UsageError, match="window: found 50, expected from 2 to the context of 40"):
        compare(opener("a", 100), opener("b", 40), lambda model: [1, 2, 3], length=50)
    assert opened == ["b"]


def test_a_forward_pass_and_quantized_weights_have_one_name_for_a_user():
    """`sweep` is a word of the code and of the JSON object, which docs/architecture.md defines."""
    pages = {page: page.read_text() for page in table.PAGES if page.name != "architecture.md"}
    for page, text in pages.items():
        own = re.sub(r"[\w/]*sweeps?\.(py|png)|<!-- table: sweeps -->|`\w*sweep\w*`", "", text)
        assert not re.findall(r"(?i).*sweep.*", own), page
    texts = [*table.PAGES, *MODULES.values()]
    assert not [path for path in texts if re.search("(?i)quantis", path.read_text())]
