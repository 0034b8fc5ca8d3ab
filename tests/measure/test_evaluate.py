"""Perplexity and divergence, against transformers and against plain sums of whole logits."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer import AutoModel
from jlayer.app.cli import main
from jlayer.convert import convert_checkpoint
from jlayer.engine import scores
from jlayer.errors import UsageError
from jlayer.measure import evaluate
from jlayer.measure.evaluate import compare, perplexity, windows
from jlayer.plan import making
from jlayer.plan.shapes import RunShape
from tests.conftest import BUNDLED

TEXT = (
    "Once upon a time there was a little girl who lived with her mother in a small house by the "
    'wood. One day her mother said, "Take this basket to your grandmother, and do not leave the '
    'path." But the wolf had heard every word, and he ran on before her.\n'
) * 2


@pytest.fixture(scope="module")
def ids(fable):
    with AutoModel.from_pretrained(fable, device="cpu") as model:
        return model.text.encode(TEXT)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    target = tmp_path_factory.mktemp("quantized") / "layered"
    convert_checkpoint(BUNDLED, target, quantize="int4")
    return target


@pytest.fixture
def float32(fable):
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        yield model


@given(st.integers(2, 300), st.integers(2, 60), st.integers(1, 60))
def test_every_token_but_those_that_begin_is_predicted_once(n_tokens, length, stride):
    stride = min(stride, length)
    seen = []
    for window in windows(n_tokens, length=length, stride=stride):
        assert window.begin < window.first < window.end <= n_tokens
        assert window.end - window.begin <= length
        seen += range(window.first, window.end)
    assert len(seen) == len(set(seen))
    missing = set(range(1, n_tokens)) - set(seen)
    assert missing == (set() if stride < length else set(range(length, n_tokens, length)))


@pytest.mark.reference
@pytest.mark.parametrize(("length", "stride"), [(64, 64), (48, 20)])
def test_perplexity_is_that_of_transformers(float32, ids, length, stride):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):  # as transformers' own guide has it
        end = min(begin + length, len(ids))
        part = torch.tensor([ids[begin:end]])
        labels = part.clone()
        labels[:, : -(end - done)] = -100
        n = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + reference(part, labels=labels).loss.item() * n, count + n
        done = end
        if end == len(ids):
            break
    found = perplexity(float32, ids, length=length, stride=stride)
    assert found.n_predicted == count
    assert found.nll == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.sweeps == 1 < found.n_windows


@pytest.mark.slow
@pytest.mark.parametrize("tile_bytes", [None, 30_000])
def test_it_does_not_depend_on_how_windows_and_the_vocabulary_are_cut(
    fable, ids, monkeypatch, tile_bytes
):
    monkeypatch.setattr(making, "TILE_BYTES", (tile_bytes,))
    with AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        expected = [
            nll
            for window in windows(len(ids), length=40, stride=30)
            for nll in plain_nll(model, ids[window.begin : window.end])[window.first - window.end :]
        ]
        for most, piece in ((64, 1 << 20), (3, 5_000)):
            monkeypatch.setattr(evaluate, "MOST_WINDOWS", most)
            monkeypatch.setattr(scores, "PIECE", piece)
            found = perplexity(model, ids, length=40, stride=30)
            assert found.n_predicted == len(expected)
            assert found.nll == pytest.approx(np.mean(expected), rel=1e-6)
            assert found.sweeps == -(-found.n_windows // min(most, found.n_windows))


def log_probabilities(model, ids):
    logits = model.logits(ids)[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def plain_nll(model, ids):
    found = log_probabilities(model, ids)
    return -found[np.arange(len(ids) - 1), ids[1:]]


def test_comparison_is_that_of_whole_distributions(fable, quantized, ids):
    ids = ids[:50]
    options = {"device": "cpu", "dtype": "float32"}
    with (
        AutoModel.from_pretrained(fable, **options) as a,
        AutoModel.from_pretrained(quantized, **options) as b,
    ):
        p, q = (log_probabilities(model, ids)[:-1] for model in (a, b))
        kl = (np.exp(p) * (p - q)).sum(1).mean()
        same = (p.argmax(1) == q.argmax(1)).mean()
    found = compare(
        lambda: AutoModel.from_pretrained(fable, **options),
        lambda: AutoModel.from_pretrained(quantized, **options),
        lambda model: ids,
    )
    assert found.mean_kl == pytest.approx(kl, rel=1e-4)
    assert found.same_top_1 == same
    assert found.first.nll == pytest.approx(-p[np.arange(49), ids[1:]].mean(), rel=1e-6)
    assert found.second.nll == pytest.approx(-q[np.arange(49), ids[1:]].mean(), rel=1e-6)


def test_as_many_windows_a_sweep_as_the_promises_allow(fable, ids):
    with AutoModel.from_pretrained(fable, device="cpu") as model:
        found = perplexity(model, ids[:128], length=16)
        assert found.windows_a_sweep == found.n_windows == 8
        needed = making.make_plan(
            model.engine.weights,
            replace(model.plan.machine, device_budget=1),
            RunShape(8, 16, 16, all_logits=True),
        ).device_peak_bytes
    with AutoModel.from_pretrained(fable, device="cpu", device_memory=needed - 1) as model:
        again = perplexity(model, ids[:128], length=16)
        assert 1 < again.windows_a_sweep < 8
        assert model.engine.device_peak_bytes < needed
    assert again.nll == pytest.approx(found.nll, rel=1e-2)


def test_logits_of_all_tokens_are_part_of_the_plan(float32, ids):
    float32.logits(ids[:16])
    planned = float32.plan.device.activation_bytes
    without = float32.engine.plan_for(RunShape(1, 16, 16)).device.activation_bytes
    assert planned >= without + 3 * 4 * (16 - 2) * float32.plan.tiling.head_rows


def test_an_evaluation_that_is_interrupted_gives_its_memory_back(float32, ids):
    def told(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        perplexity(float32, ids[:40], told=told)
    assert interrupt.traceback  # whoever looks at it keeps every frame alive
    assert float32.engine.n_alive == 0


def test_the_command_line(fable, quantized, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ["--text", str(text), "--device", "cpu", "--window", "64", "--json"]
    assert main(["eval", "perplexity", str(fable), *common]) == 0
    one = json.loads(capsys.readouterr().out)
    n_tokens = one["n_predicted"] + one["n_windows"]
    bits = one["nll"] / math.log(2) * n_tokens / len(TEXT.encode())
    assert one["bits_per_byte"] == pytest.approx(bits)
    assert (one["window"], one["stride"]) == (64, 64)
    words = ["eval", "compare", str(fable), str(quantized), *common[:-1], "--max-tokens", "40"]
    assert main([*words, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["a"]["n_predicted"] == both["b"]["n_predicted"] == 39
    assert 0 < both["mean_kl"] < 0.2
    assert both["perplexity_ratio"] == both["b"]["perplexity"] / both["a"]["perplexity"]
    assert main(words) == 0
    assert "same top-1 token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "1"], "window"),
        (["--window", "2000"], "context of 1024"),
        (["--window", "50", "--stride", "51"], "stride"),
        (["--stride", "0"], "stride"),
        (["--max-tokens", "1"], "max-tokens"),
    ],
)
def test_windows_that_cannot_be_are_refused(fable, tmp_path, capsys, options, words):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["eval", "perplexity", str(fable), "--text", str(text), "--device", "cpu"]
    assert main([*command, *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "1"], "--window: found 1, expected at least 2"),
        (["--window", "-5", "--stride", "2"], "--window: found -5"),
        (["--window", "50", "--stride", "51"], "--stride: found 51, expected from 1 to the window"),
        (["--stride", "0"], "--stride: found 0, expected from 1 up"),
        (["--max-tokens", "0"], "--max-tokens: found 0"),
        (["--host-memory", "lots"], "host_memory: found 'lots'"),
        (["--dtype", "float8"], "dtype 'float8' is not known"),
    ],
)
@pytest.mark.parametrize("kind", [["perplexity", "/none"], ["compare", "/none", "/none"]])
def test_options_are_checked_before_a_file_is_opened(capsys, kind, options, words):
    assert main(["eval", *kind, "--text", "/none", *options]) == 2
    assert words in capsys.readouterr().err


def test_texts_that_cannot_be_read_are_refused(fable, tiny, tmp_path, capsys):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    for text, words in ((bad, "not UTF-8 at byte 2"), (tmp_path / "none", "does not exist")):
        assert main(["eval", "perplexity", str(fable), "--text", str(text)]) == 2
        assert words in capsys.readouterr().err
    bad.write_text("a")
    assert main(["eval", "perplexity", str(tiny), "--text", str(bad), "--device", "cpu"]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_models_that_read_a_text_differently_are_not_compared(fable, tiny):
    def opened(folder):
        return lambda: AutoModel.from_pretrained(folder, device="cpu")

    with pytest.raises(UsageError, match="different tokens"):
        compare(opened(fable), opened(tiny), lambda model: [1, 2, 3])
