"""Streams against decode, and stop strings against a search in the whole text."""

import random
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlayer.text.stream import StopWatcher, TextStream
from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED
from tests.text.samples import TEXTS, bundled, edited, folder_of, load

words = st.lists(st.sampled_from([*TEXTS, " ", "\n", "a", "é", "日", "😀", "<s>", "<"]), max_size=5)
texts = words.map("".join) | st.text(max_size=30)


# Text as it arrives


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    return [*map(stream.step, ids), stream.finish()]


def test_a_stream_of_any_ids_adds_up_to_their_text(tokenizer):
    """Random ids, with many bytes, pieces of characters, and special tokens among them."""
    rng = random.Random(1)
    special = list(tokenizer.special_tokens.values())
    n = tokenizer.vocab_size
    for _ in range(400):
        pools = [range(n), range(min(n, 300)), special, range(n, n + 3)]
        weights = [rng.random(), rng.random() * 2, rng.random() / 4, rng.random() / 8]
        ids = [rng.choice(rng.choices(pools, weights)[0]) for _ in range(rng.randrange(25))]
        for skip in (True, False):
            found = "".join(streamed(tokenizer, ids, skip_special_tokens=skip))
            assert found == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_a_stream_of_real_text_is_that_text(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(texts)
@settings(max_examples=100, deadline=None)
def test_a_stream_gives_whole_characters(text):
    tokenizer = bundled()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == text
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert text.startswith(so_far)


def test_llama2_holds_back_bytes_and_spaces_only_where_it_must(llama2):
    emoji = [243, 162, 155, 131]  # <0xF0> <0x9F> <0x98> <0x80>
    king = llama2.encode("king", add_special_tokens=False)
    assert streamed(llama2, [*emoji, *king]) == ["", "", "", "", "😀 king", ""]
    assert streamed(llama2, emoji) == ["", "", "", "", "😀"]
    # One byte more and nothing of the run is text: that is why it was held back.
    assert llama2.decode([*emoji, 255]) == "\N{REPLACEMENT CHARACTER}" * 5
    assert streamed(llama2, king) == ["king", ""]
    assert streamed(llama2, king, continues=True) == [" king", ""]
    assert llama2.decode(king, continues=True) == " king"


def test_llama3_gives_a_character_with_its_last_byte(llama3):
    ids = llama3.encode("é😀!", add_special_tokens=False)
    pieces = streamed(llama3, ids)
    assert "".join(pieces) == "é😀!"
    assert pieces[-2:] == ["!", ""]
    cut = streamed(llama3, ids[:-2])
    assert "".join(cut) == llama3.decode(ids[:-2])


def test_added_tokens_that_no_byte_stands_for(tmp_path):
    rows = {"4096": {"content": "a token — with spaces"}, "4097": {"content": "naïve"}}
    folder = edited(tmp_path, BUNDLED, tokenizer_config={"added_tokens_decoder": rows})
    tokenizer = Tokenizer.from_folder(folder)
    ids = [*tokenizer.encode("x"), 4096, 4097, *tokenizer.encode("é")]
    assert tokenizer.decode(ids).startswith("xa token — with spacesna")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
BPE = {"type": "BPEDecoder", "suffix": "▁"}
CTC = {"type": "CTC", "pad_token": "e", "word_delimiter_token": "▁", "cleanup": True}
WORDPIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def sequence(*steps):
    return {"type": "Sequence", "decoders": list(steps)}


AT_ONCE = {
    "Metaspace": METASPACE,
    "Metaspace without a first space": METASPACE | {"prepend_scheme": "never"},
    "WordPiece": WORDPIECE,
    "Replace and Strip": sequence(REPLACE, STRIP),
    "no decoder": None,
    "unigram": sequence(REPLACE, FUSE, STRIP),
    "byte fallback alone": sequence(REPLACE, BYTES, FUSE),
    "byte fallback, then Metaspace": sequence(BYTES, METASPACE),
    "Metaspace on the text": sequence(FUSE, METASPACE | {"prepend_scheme": "never"}),
    "Replace on the text": sequence(FUSE, REPLACE, STRIP),
    "Sequence in a Sequence": sequence(sequence(REPLACE), sequence(BYTES, sequence(FUSE)), STRIP),
    "nothing but Fuse": FUSE,
    "CTC": CTC,
    "CTC, then others": sequence(CTC, FUSE, STRIP),
    "words end with e": {"type": "BPEDecoder", "suffix": "e"},
}
# Exact, and late by what a later token can change: a word's end, a pattern begun, the last spaces.
SOON = {
    "BPEDecoder": BPE,
    "BPEDecoder, then others": sequence(BPE, WORDPIECE),
    "BPEDecoder on the text": sequence(FUSE, BPE),
    "long Replace on the text": sequence(
        REPLACE, FUSE, {"type": "Replace", "pattern": {"String": "e a"}, "content": "#"}
    ),
    "all spaces gone": sequence(FUSE, METASPACE),
}
# No published tokenizer has these: a pattern can reach from the first token to the last.
LATE = {
    "a regular expression on the text": sequence(
        FUSE, REPLACE | {"pattern": {"Regex": "▁+a"}, "content": "#"}
    ),
    "WordPiece on the text": sequence(FUSE, WORDPIECE),
}


def with_decoder(tmp_path, decoder):
    """The tokenizer of a Llama 2 model, with many bytes and spaces, and another decoder."""
    folder = edited(tmp_path, folder_of("stories260K"), tokenizer={"decoder": decoder})
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", [*AT_ONCE, *SOON, *LATE])
def test_a_stream_adds_up_whatever_the_decoder(tmp_path, name):
    tokenizer = with_decoder(tmp_path, {**AT_ONCE, **SOON, **LATE}[name])
    rng = random.Random(3)
    spaces = [i for i in range(tokenizer.vocab_size) if "▁" in tokenizer.library.id_to_token(i)]
    pools = [range(tokenizer.vocab_size), spaces, list(tokenizer.special_tokens.values())]
    for _ in range(300):
        ids = [rng.choice(rng.choices(pools, [3, 3, 1])[0]) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            found = "".join(streamed(tokenizer, ids, skip_special_tokens=skip))
            assert found == tokenizer.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_stop_string_is_seen_with_its_last_token(tmp_path, name):
    """Not only when all tokens have arrived, which may be an hour later."""
    tokenizer = with_decoder(tmp_path, AT_ONCE[name])
    ids = tokenizer.encode("Once upon a time there was a girl", add_special_tokens=False)
    stop = tokenizer.decode(ids[:5])[-3:]
    if name == "words end with e":  # a space only if another token follows
        stop = "up"
    stream, watcher = TextStream(tokenizer), StopWatcher([stop])
    for n, token in enumerate(ids[:5], 1):
        watcher.feed(stream.step(token))
        assert (watcher.stopped == stop) == (stop in tokenizer.decode(ids[:n]))
    assert watcher.stopped == stop


@pytest.mark.parametrize("name", ["Metaspace", "WordPiece", "no decoder"])
def test_text_that_continues_another_keeps_its_space(tmp_path, name):
    tokenizer = with_decoder(tmp_path, AT_ONCE[name])
    prompt, rest = (tokenizer.encode(t, add_special_tokens=False) for t in ("a king", "and a girl"))
    whole = tokenizer.decode([*prompt, *rest])
    assert tokenizer.decode(prompt) + tokenizer.decode(rest, continues=True) == whole
    assert tokenizer.decode(rest, continues=True).startswith(" ")


def test_a_decoder_that_strips_both_ends(tmp_path):
    """The library itself fails where a text is shorter than what is to be taken from its end."""
    ends = {"type": "Strip", "content": "e", "start": 2, "stop": 2}
    tokenizer = with_decoder(tmp_path, sequence(REPLACE, FUSE, ends))
    for text in ("there were three trees free", "eeeeee tree", "we see"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert len(pieces[-1]) <= 2


@pytest.mark.parametrize("forced", [True, False])
def test_text_that_is_cleaned_up_comes_at_once(tmp_path, forced):
    name = "clean_up_tokenization_spaces"
    config = {name: True, f"{name}_for_bpe_even_though_it_will_corrupt_output": forced}
    tokenizer = Tokenizer.from_folder(edited(tmp_path, BUNDLED, tokenizer_config=config))
    for text in ("a king . a queen , it 's  ' hers ' ? no !", "they 've  ", " .", "do n't 'm"):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert (tokenizer.decode(ids) != text) == forced
        assert len(pieces[-1]) < len(" n't")


@pytest.mark.parametrize("name", SOON)
def test_a_decoder_that_looks_ahead_is_one_token_late(tmp_path, name):
    tokenizer = with_decoder(tmp_path, SOON[name])
    ids = tokenizer.encode("Once upon a time there was a girl", add_special_tokens=False)
    stream, given = TextStream(tokenizer), ""
    for n, token in enumerate(ids):
        given += stream.step(token)
        before = tokenizer.decode(ids[:n])
        # What a token before this one was given in full, apart from two characters at its end.
        assert len(given) >= len(before) - 3, (n, given, before)


@pytest.mark.parametrize("name", LATE)
def test_a_decoder_that_looks_ahead_is_exact_and_late(tmp_path, name):
    tokenizer = with_decoder(tmp_path, LATE[name])
    ids = tokenizer.encode("Once upon a time, there")
    pieces = streamed(tokenizer, ids)
    assert set(pieces[:-1]) == {""}
    assert pieces[-1] == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_stream_keeps_nothing_of_the_text_before(name):
    """So a step costs the same however long the text is."""
    tokenizer = load(name)
    ids = tokenizer.encode("a king, a queen 😀 ", add_special_tokens=False) * 100
    stream = TextStream(tokenizer)
    tracemalloc.start()
    try:
        for token in ids:
            stream.step(token)
        early, _ = tracemalloc.get_traced_memory()
        for token in ids * 4:
            stream.step(token)
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late - early < 4 * len(ids)  # a list of the ids would take 32 bytes for each of `ids`


# Stop strings


def watched(stops, pieces):
    watcher = StopWatcher(stops)
    found = [watcher.feed(piece) for piece in pieces]
    return [*found, watcher.finish()], watcher.stopped


def test_a_stop_string_across_pieces_is_cut_exactly():
    assert watched(["\n\nUser:"], ["Hi", "\n", "\nUs", "er: x"]) == (
        ["Hi", "", "", "", ""],
        "\n\nUser:",
    )
    assert watched(["abc"], ["ab", "x"]) == (["", "abx", ""], None)
    assert watched(["abc"], ["xab"]) == (["x", "ab"], None)
    assert watched(["aab"], ["aaab!"]) == (["a", ""], "aab")


def test_nothing_follows_a_stop():
    watcher = StopWatcher(["."])
    assert watcher.feed("a.b") == "a"
    assert watcher.feed("c") == ""
    assert watcher.finish() == ""


def test_without_stops_nothing_is_held_back():
    assert watched([], ["a", "b"]) == (["a", "b", ""], None)


def test_the_first_to_be_complete_stops_and_of_equals_the_longest():
    assert watched(["abcd", "bc"], ["abcd"]) == (["a", ""], "bc")
    assert watched(["c", "abc"], ["xabcd"]) == (["x", ""], "abc")


letters = st.text("ab", max_size=14)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(letters, max_size=6))
@settings(max_examples=300, deadline=None)
@example(["aab"], ["a", "a", "a", "b"])
def test_stops_do_not_depend_on_how_the_text_is_divided(stops, pieces):
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    found, stopped = watched(stops, pieces)
    assert "".join(found) == expected
    assert stopped == (min(ends)[2] if ends else None)
    # What is held back is the beginning of a stop string, never more, and never less.
    watcher, arrived, given_out = StopWatcher(stops), "", ""
    for piece in pieces:
        arrived += piece
        given_out += watcher.feed(piece)
        if watcher.stopped is None:
            ends = {n for stop in stops for n in range(1, len(stop)) if arrived.endswith(stop[:n])}
            assert len(arrived) - len(given_out) == max(ends, default=0)
