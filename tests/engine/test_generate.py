"""Generation through the public functions: tokens, text, stops, figures, and refusals."""

import gc
import json
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlayer
from jlayer.convert import convert_checkpoint
from jlayer.engine import alike
from jlayer.engine.prompts import encode_prompts
from jlayer.errors import CheckpointError, DoesNotFitError, UsageError
from jlayer.plan.shapes import RunShape
from jlayer.text.stream import TextStream
from tests.conftest import BUNDLED

PROMPT = "Once upon a time there was a little girl who"


@pytest.fixture(scope="module")
def model(fable):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as model:
        yield model


def test_greedy_is_the_argmax_of_the_logits_at_every_step(model):
    found = jlayer.generate(model, PROMPT, max_new_tokens=12, temperature=0)
    ids = model.text.encode(PROMPT)
    for token in found.token_ids:
        assert token == model.logits(ids)[0, -1].argmax()
        ids.append(token)
    assert found.finish_reason == "length"
    assert found.text == model.text.decode(found.token_ids, continues=True)


def test_a_stream_is_the_generation_in_pieces(model):
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 11}
    whole = jlayer.generate(model, PROMPT, **options)
    steps = list(jlayer.stream(model, PROMPT, **options))
    assert "".join(step.text for step in steps) == whole.text
    assert [token for step in steps for token in step.token_ids] == whole.token_ids


def test_a_stream_says_at_the_call_what_is_wrong_and_at_the_end_why_it_ends(model, fable):
    for prompt, options, words in (
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens"),
        ([PROMPT, PROMPT], {}, "stream: takes one prompt"),
        (PROMPT, {"temprature": 1}, "did you mean"),
        ([7] * 1025, {}, "1025 tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            jlayer.stream(model, prompt, **options)
    gc.collect()
    alive, threads = model.engine.n_alive, threading.active_count()
    with pytest.raises(CheckpointError, match="no such file or folder"):
        jlayer.stream("/no/such/model", PROMPT)
    steps = jlayer.stream(fable, PROMPT, max_new_tokens=3, device="cpu")
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    jlayer.stream(model, PROMPT)  # nobody iterates
    jlayer.stream(fable, PROMPT, device="cpu")
    gc.collect()
    assert (model.engine.n_alive, threading.active_count()) == (alive, threads)


def test_a_generation_prints_as_what_it_says(model):
    found = jlayer.generate(model, PROMPT, max_new_tokens=3, temperature=0, logprobs=2)
    shown = repr(found)
    assert repr(found.text) in shown
    assert f"token_ids={found.token_ids}" in shown
    assert all(name not in shown for name in ("plan=", "stats=", "memory=", "logprobs="))
    assert found.as_dict()["plan"] == found.plan


def test_no_piece_holds_half_a_character(model):
    ids = model.text.encode("日本語 🎈", add_special_tokens=False)
    assert len(ids) > 8
    replies = iter(ids)
    stream = TextStream(model.text, continues=True)
    pieces = [stream.step(next(replies)) for _ in ids] + [stream.finish()]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) == "日本語 🎈"


def test_a_seed_means_the_same_alone_and_in_a_batch_and_after_a_restart(model, fable):
    options = {"max_new_tokens": 15, "temperature": 1.0, "seed": 5}
    prompts = [PROMPT, "The king said", PROMPT]
    together = jlayer.generate(model, prompts, **options)
    assert together[0].token_ids == jlayer.generate(model, PROMPT, **options).token_ids
    assert together[0].token_ids == together[2].token_ids  # each is what it would be alone
    again = jlayer.generate(fable, prompts, device="cpu", dtype="float32", **options)
    assert [one.token_ids for one in again] == [one.token_ids for one in together]
    other = jlayer.generate(model, PROMPT, **{**options, "seed": 6})
    assert other.token_ids != together[0].token_ids


def test_batches_equal_single_runs_whatever_the_padding(model):
    prompts = ["The", PROMPT, PROMPT * 7, '"Who are you?" asked Dorothy.']
    together = jlayer.generate(model, prompts, max_new_tokens=10, temperature=0)
    for prompt, found in zip(prompts, together, strict=True):
        alone = jlayer.generate(model, prompt, max_new_tokens=10, temperature=0)
        assert found.token_ids == alone.token_ids


def test_kinds_of_ids_come_back_as_they_went_in(model):
    torch = pytest.importorskip("torch")
    row = model.text.encode(PROMPT)
    options = {"max_new_tokens": 3, "do_sample": False}
    listed = model.generate([row], **options)
    assert listed[0][: len(row)] == row
    assert len(listed[0]) == len(row) + 3
    assert model.generate(row, **options) == listed[0]
    for given in (
        np.array([row]),
        np.array([row], np.int32),
        jnp.array([row]),
        torch.tensor([row]),
    ):
        found = model.generate(given, **options)
        assert type(found) is type(given)
        assert found.dtype == given.dtype
        assert found.tolist() == listed
    wrapped = model.generate(torch.tensor([row]), return_dict_in_generate=True, **options)
    assert wrapped.sequences.tolist() == listed


def test_several_end_tokens_and_where_they_come_from(model, tmp_path):
    free = jlayer.generate(model, PROMPT, max_new_tokens=30, temperature=0).token_ids
    ends = sorted({free[7], free[11]})
    first = min(free.index(token) for token in ends)
    found = jlayer.generate(model, PROMPT, max_new_tokens=30, temperature=0, eos_token_id=ends)
    assert found.token_ids == free[: first + 1]
    assert found.finish_reason == "stop"
    # generation_config.json wins whole over config.json, and config.json counts where it is alone.
    source = shutil.copytree(BUNDLED, tmp_path / "model")
    published = json.loads((source / "generation_config.json").read_text())
    changed = {**published, "eos_token_id": ends, "max_new_tokens": 25}
    (source / "generation_config.json").write_text(json.dumps(changed))
    convert_checkpoint(source, tmp_path / "both")
    found = jlayer.generate(tmp_path / "both", PROMPT, temperature=0, device="cpu", dtype="float32")
    assert found.token_ids == free[: first + 1]
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [free[0]]}))
    convert_checkpoint(source, tmp_path / "one")
    found = jlayer.generate(tmp_path / "one", PROMPT, temperature=0, device="cpu", dtype="float32")
    assert found.token_ids == free[:1]


def test_a_stop_string_is_cut_exactly(model):
    free = jlayer.generate(model, PROMPT, max_new_tokens=40, temperature=0).text
    stop = free[21:26]  # begins and ends inside tokens as it falls
    found = jlayer.generate(model, PROMPT, max_new_tokens=40, temperature=0, stop=[stop, "never"])
    assert found.text == free[: free.index(stop)]
    assert found.finish_reason == "stop"


def test_nothing_asked_for_is_nothing_done(model):
    before = model.engine.totals.sweeps
    found = jlayer.generate(model, PROMPT, max_new_tokens=0)
    assert (found.text, found.token_ids, found.finish_reason) == ("", [], "length")
    assert model.engine.totals.sweeps == before


def test_figures_add_up(fable):
    options = {"max_new_tokens": 9, "temperature": 0, "device": "cpu", "keeps_layers": False}
    found = jlayer.generate(fable, PROMPT, **options)
    stats, memory = found.stats, found.memory
    assert stats["sweeps"] == 9
    assert stats["tokens_per_sweep"] == pytest.approx(9 / 8, abs=1e-4)
    assert stats["put_bytes"] == 9 * stats["sweep_bytes"]
    # Every tile that was put was read, but for those that the first fill had put already.
    assert stats["read_bytes"] == stats["put_bytes"]
    assert 0 < memory["device_peak_bytes"] <= found.plan["device"]["peak_bytes"]
    assert memory["device_peak_how"] == "accounted"
    assert memory["host_peak_bytes"] > 10 << 20


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt: an empty list"),
        ([5, 4096], {}, "id 4096 is outside the vocabulary of 4096"),
        ([-1], {}, "id -1 is outside"),
        ([7] * 1025, {}, "1025 tokens, longer than the context of 1024"),
        ([7] * 1000, {"max_new_tokens": 25}, "25.*1024"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens"),
        (PROMPT, {"temperature": -0.5}, "temperature"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"temperature": float("inf")}, "temperature"),
        (PROMPT, {"top_p": 0.0}, "top_p"),
        (PROMPT, {"top_p": 1.5}, "top_p"),
        (PROMPT, {"top_k": -1}, "top_k"),
        (PROMPT, {"min_p": 1.1}, "min_p"),
        (PROMPT, {"repetition_penalty": 0}, "repetition_penalty"),
        (PROMPT, {"seed": 1.5}, "seed"),
        (PROMPT, {"stop": [""]}, "stop"),
        (PROMPT, {"temprature": 1}, "did you mean 'temperature'"),
        (b"bytes", {}, "found bytes"),
        (None, {}, "give a prompt or messages"),
        (["a", 3.5], {}, "found float in a list of prompts"),
        (PROMPT, {"suppress_tokens": [4]}, "suppress_tokens"),
        (PROMPT, {"num_return_sequences": 2, "temperature": 0}, "num_return_sequences"),
        (PROMPT, {"logit_bias": {4096: 1.0}}, "vocabulary"),
    ],
)
def test_refused_requests(model, prompt, options, words):
    with pytest.raises(UsageError, match=words):
        jlayer.generate(model, prompt, **options)


def test_an_empty_prompt_is_told_of_the_beginning_token_of_a_model_that_has_one(model, tmp_path):
    """It was told that there is none."""
    for ask in (model.generate, model.logits):
        with pytest.raises(UsageError, match=r"or the model's beginning token, 0$") as found:
            ask([[]])
        assert found.value.command_line.endswith("(--prompt-ids 0)")
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    with (
        jlayer.AutoModel.from_pretrained(folder, device="cpu") as without,
        pytest.raises(UsageError, match="no beginning token"),
    ):
        without.generate([[]])


def test_an_unknown_option_is_refused_before_the_model_is_opened():
    with pytest.raises(UsageError, match="did you mean 'device_memory'"):
        jlayer.generate("/no/such/model", "x", device_memroy="1GiB")


def test_a_budget_too_small_is_refused_with_the_sum(fable):
    with pytest.raises(DoesNotFitError, match=r"slots .* give at least") as refusal:
        jlayer.AutoModel.from_pretrained(fable, device="cpu", device_memory="1MiB")
    plan = refusal.value.report["plan"]
    assert plan["fits"] is False
    assert plan["smallest_device_memory_bytes"] > 1 << 20


def test_non_finite_weights_give_an_error_and_no_token(tmp_path):
    source = shutil.copytree(BUNDLED, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, :100] = np.nan
    save_file(weights, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "model", allow_nonfinite=True)
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match="layer 3: its output is not finite"):
        jlayer.generate(tmp_path / "model", PROMPT, max_new_tokens=3, device="cpu")
    assert threading.active_count() == threads


def test_several_sequences_of_a_prompt_are_what_they_would_be_alone(model):
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    prompts = [PROMPT, "The king said"]
    found = jlayer.generate(model, prompts, num_return_sequences=2, **options)
    alone = [jlayer.generate(model, p, num_return_sequences=2, **options) for p in prompts]
    assert [one.token_ids for one in found] == [one.token_ids for pair in alone for one in pair]
    assert found[0].token_ids != found[1].token_ids
    first = jlayer.generate(model, PROMPT, **options)
    assert first.token_ids == found[0].token_ids


def test_logprobs_are_the_log_softmax_of_the_logits(model):
    found = jlayer.generate(model, PROMPT, max_new_tokens=3, temperature=0, logprobs=2)
    ids = model.text.encode(PROMPT)
    for token, row in zip(found.token_ids, found.logprobs, strict=True):
        logits = model.logits(ids)[0, -1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert row["token_id"] == token
        assert row["logprob"] == pytest.approx(expected[token], abs=1e-4)
        assert [top for top, _ in row["top"]] == expected.argsort()[::-1][:2].tolist()
        ids.append(token)
    assert jlayer.generate(model, PROMPT, max_new_tokens=1).logprobs is None


def test_padding_that_a_mask_marks_changes_nothing(model):
    rows = [model.text.encode(PROMPT), model.text.encode("The king")]
    alone = [model.generate(row, max_new_tokens=5, do_sample=False)[len(row) :] for row in rows]
    width = len(rows[0])
    for left in (True, False):
        pads = [width - len(row) for row in rows]
        ids = [[1] * n + row if left else row + [1] * n for row, n in zip(rows, pads, strict=True)]
        mask = [
            [0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n
            for row, n in zip(rows, pads, strict=True)
        ]
        found = model.generate(
            np.array(ids), attention_mask=np.array(mask), max_new_tokens=5, do_sample=False
        )
        assert found[:, width:].tolist() == alone


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end(model):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    streamer, ids = Streamer(), [5, 6, 7]
    found = model.generate(ids, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert streamer.got == [[ids], *[[token] for token in found[3:]], "end"]
    with pytest.raises(UsageError, match="one sequence at a time"):
        model.generate([ids, ids], max_new_tokens=1, streamer=streamer)


def test_chat_and_messages_are_put_in_the_models_format(fable, tmp_path):
    folder = shutil.copytree(fable, tmp_path / "model")
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with jlayer.AutoModel.from_pretrained(folder, device="cpu") as model:
        expected = model.text.encode("[system] Be brief.\n[user] Hello\n[assistant]")
        for prompt, options in (
            (messages, {}),
            (None, {"messages": messages}),
            ("Hello", {"system": "Be brief."}),
            ("Hello", {"system": "Be brief.", "chat": True}),
        ):
            found = jlayer.generate(model, prompt, max_new_tokens=1, **options)
            assert found.prompt_tokens == len(expected)
        (row,), one = encode_prompts(model.text, messages, folder=model.folder)
        assert (row.ids, one) == (expected, True)
        prompts = [messages, "Hello"]
        both, one = encode_prompts(model.text, prompts, folder=model.folder, chat=True)
        assert (len(both), one) == (2, False)
    with pytest.raises(jlayer.JlayerError, match="chat template"):
        jlayer.generate(fable, messages, device="cpu")


def test_a_closed_model_says_so(fable):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu") as model:
        pass
    for use in (lambda: model.generate([[1]]), lambda: model.logits([[1]])):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_the_logits_of_a_prompt_are_part_of_the_promise(fable, monkeypatch):
    ids = [list(range(1000))]  # 16 MB of logits
    # What a plan finds the process to hold already grows from test to test.
    monkeypatch.setattr(alike, "anonymous_bytes", lambda: 100 << 20)
    options = {"device": "cpu", "keeps_layers": False}
    with jlayer.AutoModel.from_pretrained(fable, **options) as model:
        beside = model.plan.host.runtime_bytes
        assert model.logits(ids).nbytes == 1000 * 4096 * 4
    budget = beside + 5 * 1000 * 4096  # of each logit a float32, and whether it is finite
    with jlayer.AutoModel.from_pretrained(fable, host_memory=budget, **options) as model:
        assert model.engine.plan_for(RunShape(1, 1000, 1000, all_logits=True)).fits  # tile by tile
        with pytest.raises(DoesNotFitError, match="host_memory"):
            model.logits(ids)
