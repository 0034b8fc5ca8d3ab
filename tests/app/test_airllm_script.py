"""The example of AirLLM's README, with its import and its model's path changed and nothing else."""

import io
from contextlib import redirect_stdout

import pytest

import jlayer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = """
from jlayer import AutoModel

MAX_LENGTH = 128
model = AutoModel.from_pretrained(MODEL)

input_text = [
        'What is the capital of United States?',
    ]

input_tokens = model.tokenizer(input_text,
    return_tensors="pt",
    return_attention_mask=False,
    truncation=True,
    max_length=MAX_LENGTH,
    padding=False)

generation_output = model.generate(
    input_tokens['input_ids'].cuda(),
    max_new_tokens=20,
    use_cache=True,
    return_dict_in_generate=True)

output = model.tokenizer.decode(generation_output.sequences[0])

print(output)
"""


def test_the_example_runs_and_says_what_transformers_says(fable, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    printed = io.StringIO()
    names = {"MODEL": str(fable)}
    with redirect_stdout(printed):
        exec(compile(SCRIPT, "script", "exec"), names)
    names["model"].close()
    reference = transformers.AutoModelForCausalLM.from_pretrained(fable, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(fable)
    ids = tokenizer(["What is the capital of United States?"], return_tensors="pt")["input_ids"]
    assert torch.equal(names["input_tokens"]["input_ids"], ids)
    found = names["generation_output"].sequences
    assert found.shape == (1, ids.shape[1] + 20)
    assert found.dtype == torch.int64
    assert torch.equal(found[:, : ids.shape[1]], ids)
    assert printed.getvalue().strip() == tokenizer.decode(found[0])
    # bfloat16 may branch where two tokens are nearly alike: each is the reference's best or close.
    with torch.no_grad():
        logits = reference(found).logits[0].float()
    for at in range(ids.shape[1], found.shape[1]):
        row = logits[at - 1]
        assert row.max() - row[found[0, at]] < 0.15


def test_transformers_text_streamer_works(fable, capsys):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu") as model:
        streamer = transformers.TextStreamer(model.tokenizer, skip_prompt=True)
        ids = model.tokenizer("Once upon a time", return_tensors="np")["input_ids"]
        found = model.generate(ids, max_new_tokens=12, do_sample=False, streamer=streamer)
        assert capsys.readouterr().out.strip("\n") == model.tokenizer.decode(
            found[0, ids.shape[1] :]
        )


def test_keywords_that_nobody_knows_offer_the_closest(fable):
    with jlayer.AutoModel.from_pretrained(fable, device="cpu") as model:
        with pytest.raises(jlayer.UsageError, match="did you mean 'max_new_tokens'"):
            model.generate([5], max_new_token=3)
        with pytest.raises(jlayer.UsageError, match="top_h"):
            model.generate([5], top_h=0.4)
    with pytest.raises(jlayer.UsageError, match="did you mean 'device_memory'"):
        jlayer.AutoModel.from_pretrained(fable, device_mem="4GiB")
