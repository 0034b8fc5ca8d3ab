"""Embeddings in place of ids give what transformers gives, and nothing takes them for ids."""

import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine.decoding import Decoding
from jlayer.engine.ids import Row
from jlayer.engine.options import SamplingOptions
from jlayer.engine.session import save_run
from jlayer.engine.vectors import rows_of_vectors
from jlayer.errors import UsageError
from tests.campaigns import slow_but
from tests.engine.drop_in import Both
from tests.engine.sessions import draft_of
from tests.reference import dense_forms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

WIDTH, N = 24, 7
LEFT = torch.tensor([[1] * N, [0, 0, 0, 1, 1, 1, 1]])
IDS = [[5, 17, 80, 33, 121, 64, 17], [44, 101, 7, 9, 2, 3, 8]]


def drawn(*shape, seed=0, scale=0.5):
    made = np.random.default_rng(seed).normal(scale=scale, size=(*shape, WIDTH))
    return torch.tensor(made.astype(np.float32))


# The table's rows are scaled in the table itself (Gemma), after it (Granite), or not (Llama).
FAMILIES = ("llama", "gemma3", "granite")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, both, tmp_path_factory):
    if request.param == "llama":
        yield both
        return
    folder = tmp_path_factory.mktemp(request.param)
    found = Both(dense_forms.save(folder / "model", request.param))
    with found.published():
        yield found
    found.ours.close()


def near(found, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_logits_are_those_of_transformers(family):
    given = drawn(2, N)
    near(family.ours(inputs_embeds=given).logits, family.theirs(inputs_embeds=given).logits)
    table = family.theirs.get_input_embeddings()
    rows = table(torch.tensor(IDS))  # scaled, where it is the table that does it
    np.testing.assert_allclose(
        family.ours.logits(inputs_embeds=rows), family.ours.logits(IDS), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", slow_but(FAMILIES, FAMILIES[:2]), indirect=True)
def test_texts_are_those_of_transformers(family):
    same = family.same
    alone = same(None, inputs_embeds=drawn(1, N), max_new_tokens=6)
    assert len(alone[0]) == 6
    same(None, inputs_embeds=drawn(2, N), max_new_tokens=6)
    padded = {"inputs_embeds": drawn(2, N), "attention_mask": LEFT}
    found = same(None, **padded, max_new_tokens=6)
    assert found[1] != same(None, inputs_embeds=drawn(2, N), max_new_tokens=6)[1]
    same(None, **padded, max_new_tokens=5, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2},  # of new tokens alone
        {"max_length": 12, "min_length": 10, "eos_token_id": [*range(90)]},  # of both
        {"sequence_bias": {(7,): 4.0, (7, 9): 9.0}, "bad_words_ids": [[5], [9, 9]]},
        {"num_beams": 3, "repetition_penalty": 1.9, "max_length": 12, "length_penalty": 0.3},
        {"min_new_tokens": 3, "eos_token_id": [*range(90)], "pad_token_id": 9},
        {"max_length": 12, "output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_options_see_no_ids_of_the_prompt(both, options, mask):
    given = {"inputs_embeds": drawn(2, N, seed=3), "attention_mask": mask, **options}
    if mask is None:
        del given["attention_mask"]
    if "max_length" not in options:
        given["max_new_tokens"] = 7
    if "return_dict_in_generate" not in options:
        both.same(None, **given)
        return
    found, expected = both.ours.generate(**given), both.theirs.generate(**given)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(found.scores, expected.scores, strict=True):
        near(one, other)


def test_functions_and_streamers_see_the_new_ids_alone(both):
    seen = {"ours": [], "theirs": []}

    def generated(model, name):
        def watch(ids, scores):
            seen[name].append(ids.tolist())
            return scores

        class Streamer:
            def put(self, ids):
                seen[name].append(ids.tolist())

            def end(self):
                seen[name].append("end")

        given = {"inputs_embeds": drawn(1, N), "max_new_tokens": 3, "streamer": Streamer()}
        model.generate(**given, logits_processor=transformers.LogitsProcessorList([watch]))

    generated(both.ours, "ours")
    generated(both.theirs, "theirs")
    assert seen["ours"] == seen["theirs"]


class Exchanged:
    """No more than DLPack."""

    def __init__(self, values):
        self._own = values

    def __dlpack__(self, **options):
        return self._own.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._own.__dlpack_device__()


def test_any_library_and_dtype(both):
    exact = drawn(1, N).to(torch.bfloat16).to(torch.float32) / 4  # what all dtypes hold
    plain = exact.numpy()
    kinds = [
        *(exact, exact.to(torch.bfloat16), exact.to(torch.float16), exact.requires_grad_()),
        *(plain, plain.astype(np.float16), plain.astype(ml_dtypes.bfloat16)),
        *(jnp.array(plain), jnp.array(plain, jnp.bfloat16)),
        *(Exchanged(plain), Exchanged(jnp.array(plain, jnp.bfloat16))),
    ]
    expected = both.theirs.generate(inputs_embeds=exact, max_new_tokens=4).tolist()
    logits = both.ours.logits(inputs_embeds=plain)
    for given in kinds:
        found = both.ours.generate(inputs_embeds=given, max_new_tokens=4)
        kind = np.ndarray if isinstance(given, Exchanged) else type(given)
        assert isinstance(found, kind)
        assert str(found.dtype).removeprefix("torch.") in ("int64", "int32")
        assert (str(found.dtype) == "int32") == isinstance(given, type(jnp.zeros(1)))
        assert np.asarray(found).tolist() == expected
        np.testing.assert_array_equal(both.ours.logits(inputs_embeds=given), logits)


@pytest.mark.slow
def test_they_are_rounded_to_the_compute_dtype(both):
    given = drawn(2, N)
    with AutoModel.from_pretrained(both.folder, device="cpu", dtype="bfloat16") as model:
        found = model.logits(inputs_embeds=given)
        rounded = model.logits(inputs_embeds=given.to(torch.bfloat16))
        np.testing.assert_array_equal(found, rounded)
    with AutoModel.from_pretrained(both.folder, device="cpu", dtype="float16") as model:
        given[1, 2, 3] = 1e5
        with pytest.raises(UsageError, match="row 1, place 2: numbers that are not finite in flo"):
            model.logits(inputs_embeds=given)


def rows_of(model, given, mask=None):
    width, dtype = model.config.hidden_size, model.dtype
    return rows_of_vectors(given, mask, width=width, dtype=dtype)


def test_no_prompt_is_taken_for_another(both, tmp_path, monkeypatch):
    """Long ones that begin alike, in one call and one after another; what is kept of them: nothing
    in memory, on disk, or in a saved run."""
    monkeypatch.setattr("jlayer.engine.prompt_cache.BLOCK", 8)
    n = 40
    one = drawn(1, n)
    other = one.clone()
    other[0, 30:] = drawn(1, n, seed=1)[0, 30:]
    given, how = torch.cat([one, other, one]), {"max_new_tokens": 5}
    expected = both.theirs.generate(inputs_embeds=given, **how).tolist()
    assert expected[0] != expected[1]
    options = {"device": "cpu", "prompt_cache": tmp_path / "cache"}
    with AutoModel.from_pretrained(both.folder, **options) as model:
        before = sorted(tmp_path.rglob("*"))
        model.engine.kept.most = 2
        assert model.generate(inputs_embeds=given, **how).tolist() == expected
        assert [
            model.generate(inputs_embeds=row[None], **how).tolist()[0] for row in given
        ] == expected
        draws = {"do_sample": True, "seed": 5, "num_return_sequences": 3, **how}
        several = model.generate(inputs_embeds=one, **draws).tolist()
        assert (
            several[0]
            == model.generate(inputs_embeds=one, **{**draws, "num_return_sequences": 1}).tolist()[0]
        )
        decoding = Decoding(
            model.engine,
            rows_of(model, one),
            SamplingOptions(max_new_tokens=5),
        )
        decoding.keeps = True
        with pytest.raises(UsageError, match="inputs_embeds: a prompt of embeddings cannot be sa"):
            save_run(tmp_path / "run", decoding, is_single=True)
        for _ in decoding:
            pass
        assert decoding.generations()[0].token_ids == expected[0]
        assert not len(model.engine.kept)
        assert sorted(tmp_path.rglob("*")) == before


def test_guesses_change_nothing(both, tmp_path):
    given, how = drawn(1, N, seed=2), {"max_new_tokens": 24}
    expected = both.theirs.generate(inputs_embeds=given, **how).tolist()
    draft = draft_of(tmp_path)
    with AutoModel.from_pretrained(both.folder, device="cpu", draft=draft) as model:
        for speculate in ("lookup", "auto"):
            guessing = {**how, "speculate": speculate, "draft_tokens": 4}
            decoding = Decoding(model.engine, rows_of(model, given), SamplingOptions(**guessing))
            for _ in decoding:
                pass
            (found,) = decoding.generations()
            assert [found.token_ids] == expected
            assert found.stats["drafted"] > 0
        for asked in ({"speculate": "draft"}, {"assistant_model": str(draft)}):
            with pytest.raises(UsageError, match="a draft model reads ids"):
                model.generate(inputs_embeds=given, **how, **asked)


def test_the_plan_counts_them(both):
    plans = []
    for rows in (rows_of(both.ours, drawn(1, 30)), [Row(IDS[0], [7] * 30)]):
        decoding = Decoding(both.ours.engine, rows, SamplingOptions(max_new_tokens=8))
        plans.append(decoding.plan)
        decoding.close()
    assert plans[0].host_peak_bytes - plans[1].host_peak_bytes == 30 * WIDTH * 4
    assert plans[0].device_peak_bytes == plans[1].device_peak_bytes


def test_several_processes_refuse_them(both, monkeypatch):
    monkeypatch.setattr("jlayer.engine.vectors.is_one_of_several", lambda: True)
    with pytest.raises(UsageError, match=r"^inputs_embeds: several processes run the model"):
        both.ours.generate(inputs_embeds=drawn(1, N))


def test_they_ride_beside_ids_and_are_computed_anew(both):
    """In the passes of a run of ids; and again where a run gave its room to others."""
    given, ids = drawn(1, 30, seed=4), [IDS[0]]
    expected = both.theirs.generate(inputs_embeds=given, max_new_tokens=8).tolist()[0]
    text = both.ours.generate(ids, max_new_tokens=30)
    decoding = Decoding(
        both.ours.engine, rows_of(both.ours, given), SamplingOptions(max_new_tokens=8)
    )
    found = []
    thread = threading.Thread(
        target=lambda: found.append(both.ours.generate(ids, max_new_tokens=30))
    )
    thread.start()
    steps = iter(decoding)
    for _ in range(3):
        next(steps)
    decoding.suspend()
    assert decoding.admit_waiting()
    for _ in steps:
        pass
    thread.join()
    assert decoding.generations()[0].token_ids == expected
    assert found == [text]


def test_what_goes_badly_with_embeddings_is_refused(both):
    given, ours = drawn(2, N), both.ours
    wrong = {
        r"found shape \[2, 7\], expected \[rows, tokens, 24\]": given[..., 0],
        r"found shape \[2, 7, 23\]": given[..., 1:],
        r"found shape \[2, 0, 24\]": given[:, :0],
        r"found int64, expected one of float16": given.to(torch.int64),
        r"found float64, expected one of float16": given.numpy().astype(np.float64),
        r"found list, expected an array": given.tolist(),
        r"row 0, place 1: numbers that are not finite in float32": given.index_fill(
            1, torch.tensor([1]), torch.nan
        ),
    }
    for ask in (ours, ours.logits, ours.generate):
        for message, embeds in wrong.items():
            with pytest.raises(UsageError, match=f"^inputs_embeds: {message}"):
                ask(inputs_embeds=embeds)
        with pytest.raises(UsageError, match=r"^inputs_embeds: .*was given too; leave one out"):
            ask(IDS, inputs_embeds=given)
        with pytest.raises(UsageError, match=r"^attention_mask: of another shape than inp"):
            ask(inputs_embeds=given, attention_mask=LEFT[:, 1:])
    with pytest.raises(UsageError, match=r"^inputs_embeds: row 1 is padding alone"):
        ours.generate(inputs_embeds=given, attention_mask=[[1] * N, [0] * N])
    with pytest.raises(UsageError, match=r"^logits: found padding"):
        ours.logits(inputs_embeds=given, attention_mask=LEFT)
    named = {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2}
    for name, value in {**named, "prompt_logprobs": 1}.items():
        with pytest.raises(UsageError, match=f"^{name}: found {value} with inputs_embeds"):
            ours.generate(inputs_embeds=given, **{name: value})
    with pytest.raises(UsageError, match=r"^inputs_embeds: found tens.*give it to model.gen"):
        jlayer.generate(ours, IDS, inputs_embeds=given)
    with pytest.raises(UsageError, match="longer than the context"):
        ours.generate(inputs_embeds=drawn(1, 600))
