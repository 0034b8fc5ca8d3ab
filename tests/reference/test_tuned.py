"""Runs of tuning end where PEFT's model, resident in torch, ends with the same steps of AdamW."""

import math
import os

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.run_config import RunConfig
from jlayer.text.tokenizer import Tokenizer
from jlayer.tuning.adapter import (
    AdapterConfig,
    fresh,
    load_adapter,
    low_ranks,
    save_adapter,
    targets_of,
)
from jlayer.tuning.examples import Example
from jlayer.tuning.lanes import cut, padded
from jlayer.tuning.run import Tuning, Work
from jlayer.tuning.settings import Settings
from tests.conftest import SHARED_DATA, needs_shared_data
from tests.quantized import converted, stand_for
from tests.reference import dense_forms, mixture_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RUN = {"device": "cpu", "device_memory": 1 << 30, "host_memory": 4 << 30, "dtype": "float32"}
STEPS = 30
SETTINGS = {"learning_rate": 5e-3, "weight_decay": 0.01, "warmup": 0.1, "steps": STEPS}


def some_texts(n_vocab, n=24):
    """Random texts in which some tokens follow others, so that there is something to learn."""
    draw = np.random.default_rng(0)
    after = draw.permutation(n_vocab)
    found = []
    for _ in range(n):
        ids = [int(draw.integers(3, n_vocab))]
        for _ in range(int(draw.integers(4, 40))):
            ids.append(int(after[ids[-1]] if draw.random() < 0.8 else draw.integers(3, n_vocab)))
        weights = draw.choice([0.0, 0.5, 1.0], len(ids) - 1, p=[0.3, 0.2, 0.5])
        found.append(Example.of(ids, [0.0, *weights]))
    return found


def work_of(folder, out, settings, how, examples, *, held_out=(), begun=None):
    cfg = read_config(folder)
    return Work(
        folder=os.fspath(folder),
        out=os.fspath(out),
        run=RunConfig(**RUN),
        settings=settings,
        how=how,
        begun=begun or fresh(targets_of(cfg, how), how, settings.seed),
        examples=cut(examples, settings.length),
        held_out=held_out,
        facts={},
    )


class Resident:
    """PEFT's model, with the adapter that `state` has, and its steps."""

    def __init__(self, base, folder, load, cfg, how, state, settings):
        save_adapter(folder, state, cfg, how, base="", card="")
        model = load(base, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        own = [p for p in self.model.parameters() if p.requires_grad]
        self._adam = torch.optim.AdamW(
            own,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )
        warmup = math.ceil(settings.warmup * settings.steps)
        more = {"num_warmup_steps": warmup, "num_training_steps": settings.steps}
        name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
        self._rates = transformers.get_scheduler(name, self._adam, **more)
        self._own, self._clip = own, settings.clip

    def loss(self, lanes):
        """The sum of weighted losses of each text of some lanes by itself, and of the weights."""
        total = 0
        for lane in range(len(lanes.ids)):
            for text in range(1, lanes.texts[lane].max() + 1):
                own = lanes.texts[lane] == text
                ids, targets = (
                    torch.tensor(x[lane][own]).long() for x in (lanes.ids, lanes.targets)
                )
                logits = self.model(ids[None]).logits[0]
                each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                total = total + (each * torch.tensor(lanes.weights[lane][own])).sum()
        return total / float(lanes.weights.sum(dtype=np.float64))

    def step(self, lanes):
        loss = self.loss(lanes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._own, self._clip)
        self._adam.step()
        self._rates.step()
        self._adam.zero_grad()
        return float(loss.detach())


def compare(folder, source, tmp_path, load, targets, settings):
    cfg = read_config(folder)
    how = AdapterConfig(rank=4, alpha=8, targets=targets)
    work = work_of(folder, tmp_path / "out", settings, how, some_texts(min(60, cfg.vocab_size)))
    there = Resident(source, tmp_path / "begun", load, cfg, how, work.begun, settings)
    here = Tuning(work)
    try:
        own = [told.loss for told in here.go_on()]
        expected = [there.step(here.steps.step(number)) for number in range(settings.steps)]
    finally:
        here.close()
    assert np.mean(own[:5]) - np.mean(own[-5:]) > 0.1  # something is learned
    np.testing.assert_allclose(own, expected, rtol=0, atol=1e-3)


def settings_of(**more):
    return Settings(**SETTINGS, tokens_per_step=64, length=32, **more)


def test_thirty_steps(tmp_path):
    dense_forms.save(tmp_path / "model", "llama")
    where = tmp_path / "model", tmp_path / "model", tmp_path
    compare(*where, dense_forms.load, "all", settings_of())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen3_next"])
def test_other_families(tmp_path, name):
    dense_forms.save(tmp_path / "model", name)
    where = tmp_path / "model", tmp_path / "model", tmp_path
    settings = settings_of(packs=name != "qwen3_next", schedule="linear")
    compare(*where, dense_forms.load, "all", settings)


@pytest.mark.slow
def test_a_mixture(tmp_path):
    mixture_forms.save(tmp_path / "model", "qwen3_moe")
    where = tmp_path / "model", tmp_path / "model", tmp_path
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    compare(*where, mixture_forms.load, targets, settings_of(schedule="constant"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_over_quantized_weights(tmp_path, scheme):
    """As over the weights that they stand for."""
    source, layered = converted(tmp_path, scheme)
    stand_for(source, layered)
    load = transformers.AutoModelForCausalLM.from_pretrained
    compare(layered, source, tmp_path, load, "all", settings_of())


TEXTS, FABLE = SHARED_DATA / "text", SHARED_DATA / "checkpoints" / "fable-3m"


@pytest.mark.slow
@needs_shared_data
def test_another_author(tmp_path):
    """Perplexity of held-out text falls as far as with PEFT's resident run."""
    import gzip

    with gzip.open(TEXTS / "dickens.txt.gz", "rt") as file:
        text = file.read(3_060_000)[2_600_000:]
    tokenizer = Tokenizer.from_folder(FABLE)
    convert_checkpoint(FABLE, tmp_path / "model")

    def example(text):
        ids = tokenizer.encode(text)
        return Example.of(ids)

    settings = Settings(
        learning_rate=1e-3, steps=40, tokens_per_step=2048, length=256, eval_every=0
    )
    cfg, how = read_config(FABLE), AdapterConfig(rank=8, alpha=16)
    held_out = cut([example(text[400_000:])], settings.length)
    given = [example(text[:400_000])]
    work = work_of(tmp_path / "model", tmp_path / "out", settings, how, given, held_out=held_out)
    load = transformers.AutoModelForCausalLM.from_pretrained
    there = Resident(FABLE, tmp_path / "begun", load, cfg, how, work.begun, settings)
    here = Tuning(work)
    try:
        for _ in here.go_on():
            there.step(here.steps.step(here.step - 1))
        before, after = here.history.perplexity
        here.finish("a card", base="fable", lead="model.")
    finally:
        here.close()
    with torch.no_grad():
        expected = float(there.loss(padded(held_out, settings.length)).exp())
    assert after < 0.98 * before
    print(f"perplexity {before:.3f} -> {after:.3f}, PEFT's {expected:.3f}")
    assert abs(after / expected - 1) < 0.005
    # The adapter as PEFT loads it, and as it is used here.
    model = peft.PeftModel.from_pretrained(load(FABLE, dtype=torch.float32), tmp_path / "out")
    ids = [tokenizer.encode(text[:400])[:64]]
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
    with AutoModel.from_pretrained(
        tmp_path / "model", adapter=tmp_path / "out", dtype="float32", device="cpu"
    ) as own:
        found = own.logits(ids)
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
    assert load_adapter(tmp_path / "out", cfg).how.rank == how.rank
    assert low_ranks(here.state, how).of_matrix.keys() == here.state.keys()
