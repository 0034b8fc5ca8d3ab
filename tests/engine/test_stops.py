"""Stop strings: in model.generate where transformers' own criterion finds them, in jlayer's own
interface in new text, and by special tokens in both."""

import numpy as np
import pytest

import jlayer
from jlayer.engine.stops import StopStrings, given_tokenizer
from tests.conftest import BUNDLED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference


def byte_level():
    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


def byte_fallback():
    """As Llama 2's: ▁ is a space, <0xE2> a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "ab", "▁abc", "c", "ba", "é", "日", ".", "\n", "ab▁", "def"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    library = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>")


CASES = {
    byte_level: (
        ["the", "e", "日", "日本", "🎈", "|>", "<|end_of_text|>", "d 日", " 🎈\n"],
        "the end日本 🎈\n the 🎈 of<|end_of_text|>d 日 then",
    ),
    byte_fallback: (
        ["a", "ab", " a", "b a", "é", "日", "é日", "</s>", "c\n", "a b"],
        None,
    ),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_stop_strings_end_where_transformers_criterion_says(make):
    tokenizer, (stops, text) = make(), CASES[make]
    ours, rng = given_tokenizer(tokenizer), np.random.default_rng(5)
    if text is None:  # any ids: those of the pieces, and the bytes of é, 日 and broken ones
        bytes_of = [3 + byte for byte in "é日".encode()]
        chosen = [2, *range(259, len(tokenizer)), *bytes_of * 2]
        words = tokenizer.convert_tokens_to_ids(["c", "b", "▁a", "c", "\n", "a", "▁", "b"])
        rows = [rng.choice(chosen, 60).tolist(), [*bytes_of, *words, *bytes_of, 2, *bytes_of]]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = [ids, rng.permutation(ids).tolist()]
    found = set()
    for stop in (*((stop,) for stop in stops), tuple(stops)):
        criterion = transformers.StopStringCriteria(tokenizer, list(stop))
        for row in rows:
            for n_prompt in (1, 5):
                watch = StopStrings(stop, text=ours, prompt=row[:n_prompt])
                for end in range(n_prompt + 1, len(row) + 1):
                    expected = bool(criterion(torch.tensor([row[:end]]), None)[0])
                    assert watch.end_in(row[end - 1]) == expected, (stop, row[:end])
                    found |= {(stop, expected)}
    assert {stop for stop, ends in found if ends} >= {(stop,) for stop in stops}


@pytest.fixture(scope="module")
def fables(fable):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(fable, dtype=torch.float32)
    with jlayer.AutoModel.from_pretrained(fable, device="cpu", dtype="float32") as ours:
        yield ours, theirs


PROMPT = "Once upon a time there was"


def test_model_generate_stops_where_transformers_does(fables):
    ours, theirs = fables
    tokenizer = ours.tokenizer
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    free = theirs.generate(ids, max_new_tokens=16)
    text = tokenizer.decode(free[0, ids.shape[1] :])
    end = tokenizer.eos_token
    certain = {"eos_token_id": None, "sequence_bias": {(tokenizer.eos_token_id,): 100.0}}
    for stops, options in (
        (text[9:14], {}),
        ([text[20:23], text[5:7]], {}),
        (PROMPT[-3:] + text[:3], {}),  # begins in the prompt
        (PROMPT[-3:], {}),  # stands in the prompt alone
        (end, certain),
        (end[:5], certain),
        ("nowhere", {}),
    ):
        options = {"max_new_tokens": 16, "stop_strings": stops, "tokenizer": tokenizer, **options}
        expected = theirs.generate(ids, **options).tolist()
        assert ours.generate(ids, **options).tolist() == expected, stops
        assert (len(expected[0]) < free.shape[1]) == (stops not in (PROMPT[-3:], "nowhere"))


def test_a_special_token_as_a_stop_string_stops_jlayers_own_runs(fables):
    ours, _ = fables
    end = ours.text.eos_token_id
    stop = next(text for text, token in ours.text.special_tokens.items() if token == end)
    options = {"eos_token_id": None, "logit_bias": {end: 100.0}, "max_new_tokens": 5}
    assert len(jlayer.generate(ours, PROMPT, **options).token_ids) == 5
    found = jlayer.generate(ours, PROMPT, stop=[stop], **options)
    assert (found.token_ids, found.finish_reason, found.text) == ([end], "stop", "")


def test_a_model_without_a_tokenizer_takes_the_one_given(both):
    tokenizer = byte_fallback()
    ids = torch.tensor([[5, 17, 80]])
    free = both.same(ids, max_new_tokens=8)[0][3:]
    stop = tokenizer.convert_tokens_to_string([tokenizer.convert_ids_to_tokens(free[2])])
    with pytest.raises(jlayer.UsageError, match="no tokenizer"):
        both.ours.generate(ids, stop_strings=stop)
    both.same(ids, max_new_tokens=8, stop_strings=["<0x", "x", stop or "y"], tokenizer=tokenizer)
