"""Meta's form: parts joined, rotary rows put in order, the config and the ends of text derived.

What is converted is written here by the reference's rules, not by ours: rows permuted as
transformers' own conversion script does, and back.
"""

import base64
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from jlayer.config import model_config, read_config, read_generation_config
from jlayer.convert import convert_checkpoint, verify_folder
from jlayer.convert.sources.files import CHUNK_BYTES
from jlayer.convert.sources.meta import Params, derive_config, facts_of, read_params
from jlayer.convert.sources.names import META, find_row, find_source
from jlayer.convert.sources.rules import JOIN_COLUMNS, JOIN_ROWS, KEEP, UNPERMUTE_ROPE
from jlayer.errors import CheckpointError
from jlayer.families.registry import published_tensors
from tests.conftest import REPOSITORY, SHARED_DATA, needs_shared_data
from tests.convert.checkpoints import (
    assert_logits_of_transformers,
    edit_json,
    files_of,
    read_tensors,
)
from tests.convert.pickled import refused
from tests.tiny import tiny_llama

torch = pytest.importorskip("torch")

# Meta's form has no head size of its own: width = heads x head_dim. The rest differs, and all of
# it can be divided by 4. A head of 6 rows: of 4, the order of its pairs would be its own inverse.
SHAPE = {
    "vocab_size": 132,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PARAMS = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": -1,
    "multiple_of": 20,
    "ffn_dim_multiplier": 0.75,  # int(0.75 * int(8 * 48 / 3)) = 96, up to 100
    "norm_eps": 1e-5,
}
GATE, NORM = "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """kind -> folder of safetensors whose model Meta's form can hold; read only."""
    home = tmp_path_factory.mktemp("originals")
    kinds = {"plain": {}, "bfloat16": {"dtype": "bfloat16"}, "tied": {"tied": True}}
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tiny_llama(home / kind, **(SHAPE | kinds[kind]))
        return made[kind]

    return make


@pytest.fixture
def meta_of(originals, tmp_path):
    """A fresh folder in Meta's form of one of the originals, to be damaged."""

    def make(n_parts=1, kind="plain", **options):
        return write_meta(originals(kind), tmp_path / "source", n_parts, **options)

    return make


def paired(rows, n_heads):
    """From halves to pairs: the inverse of what transformers' script calls permute."""
    n, width = rows.shape
    return rows.view(n_heads, 2, n // n_heads // 2, width).transpose(1, 2).reshape(n, width)


def meta_weights(source):
    """Meta's tensors, whole, and the axis that each is divided along."""
    from safetensors.torch import load_file

    weights = load_file(os.path.join(source, "model.safetensors"))
    embedding = weights["model.embed_tokens.weight"]
    found = {
        "tok_embeddings.weight": (embedding, 1),
        "norm.weight": (weights["model.norm.weight"], None),
        "output.weight": (weights.get("lm_head.weight", embedding), 0),
        "rope.freqs": (torch.ones(3), None),
    }
    for n in range(SHAPE["num_hidden_layers"]):
        theirs, ours = f"layers.{n}.", f"model.layers.{n}."

        def get(name, ours=ours):
            return weights[f"{ours}{name}.weight"]

        layer = {
            "attention_norm": (get("input_layernorm"), None),
            "attention.wq": (paired(get("self_attn.q_proj"), 8), 0),
            "attention.wk": (paired(get("self_attn.k_proj"), 4), 0),
            "attention.wv": (get("self_attn.v_proj"), 0),
            "attention.wo": (get("self_attn.o_proj"), 1),
            "ffn_norm": (get("post_attention_layernorm"), None),
            "feed_forward.w1": (get("mlp.gate_proj"), 0),
            "feed_forward.w2": (get("mlp.down_proj"), 1),
            "feed_forward.w3": (get("mlp.up_proj"), 0),
        }
        found |= {f"{theirs}{name}.weight": entry for name, entry in layer.items()}
    return found


def write_meta(source, target, n_parts, *, embedding_axis=1, **params):
    """Writes Meta's form of a model: the parts and params.json, changed by `params`."""
    os.makedirs(target)
    parts = [{} for _ in range(n_parts)]
    for name, (whole, axis) in meta_weights(source).items():
        axis = embedding_axis if name == "tok_embeddings.weight" else axis
        pieces = [whole] * n_parts if axis is None else whole.chunk(n_parts, dim=axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone() if n_parts > 1 else piece
    for n, part in enumerate(parts):
        torch.save(part, target / f"consolidated.{n:02d}.pth")
    raw = {name: value for name, value in (PARAMS | params).items() if value is not None}
    (target / "params.json").write_text(json.dumps(raw))
    return target


def change_part(source, n, change):
    """Takes a part's tensors through `change`, which changes the dict it is given."""
    path = source / f"consolidated.{n:02d}.pth"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


def weights_of(folder):
    return {k: v for k, v in files_of(folder).items() if k.endswith(".safetensors")}


# The weights.


@pytest.mark.parametrize("kind", ["plain", "bfloat16"])
@pytest.mark.parametrize(
    ("n_parts", "embedding_axis"), [(1, 1), (2, 1), (4, 1), (4, 0)], ids=["1", "2", "4", "4-rows"]
)
def test_parts_convert_to_the_bytes_of_safetensors(
    originals, meta_of, tmp_path, n_parts, embedding_axis, kind
):
    convert_checkpoint(originals(kind), tmp_path / "safe")
    source = meta_of(n_parts, kind, embedding_axis=embedding_axis)
    convert_checkpoint(source, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "safe")
    assert verify_folder(tmp_path / "out").findings == ()


@pytest.mark.parametrize("chunk_bytes", [4, 700, 5000])
def test_however_large_the_blocks_are(originals, meta_of, tmp_path, monkeypatch, chunk_bytes):
    convert_checkpoint(originals("plain"), tmp_path / "safe")
    for module in ("jlayer.convert.sources.files", "jlayer.convert.sources.joined"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", chunk_bytes)
    convert_checkpoint(meta_of(4), tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "safe")


@pytest.mark.parametrize("n_parts", [1, 4])
def test_its_logits_are_those_of_transformers(originals, meta_of, tmp_path, n_parts):
    convert_checkpoint(meta_of(n_parts), tmp_path / "out")
    assert_logits_of_transformers(tmp_path / "out", originals("plain"))


def test_a_head_that_is_the_embedding_is_a_tied_one(originals, meta_of, tmp_path):
    """Llama 3.2 1B and 3B: two names of one storage."""
    convert_checkpoint(originals("tied"), tmp_path / "safe")
    convert_checkpoint(meta_of(1, "tied"), tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "safe")
    assert read_config(tmp_path / "out").tie_word_embeddings


def test_a_head_that_merely_equals_the_embedding_stays_one(originals, meta_of, tmp_path):
    source = meta_of(2, "tied")
    convert_checkpoint(source, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert not read_config(tmp_path / "out").tie_word_embeddings
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_of_large_parts_a_few_chunks_are_held(tmp_path):
    tensor = torch.zeros(1024, 1536)  # a half, 6.3 MB
    weights = {
        "tok_embeddings.weight": torch.zeros(512, 1536 // 2),
        "output.weight": torch.zeros(256, 1536),
        "norm.weight": torch.ones(1536),
        "layers.0.attention_norm.weight": torch.ones(1536),
        "layers.0.ffn_norm.weight": torch.ones(1536),
        "layers.0.attention.wq.weight": tensor[:768],
        "layers.0.attention.wk.weight": tensor[:768],
        "layers.0.attention.wv.weight": tensor[:768],
        "layers.0.attention.wo.weight": tensor[:768].t().contiguous(),
        "layers.0.feed_forward.w1.weight": torch.zeros(2048, 1536),
        "layers.0.feed_forward.w2.weight": torch.zeros(1536, 2048),
        "layers.0.feed_forward.w3.weight": torch.zeros(2048, 1536),
    }
    (tmp_path / "source").mkdir()
    for n in range(2):
        torch.save(weights, tmp_path / "source" / f"consolidated.{n:02d}.pth")
    params = {"dim": 1536, "n_layers": 1, "n_heads": 12, "multiple_of": 4096}
    (tmp_path / "source" / "params.json").write_text(json.dumps(params))
    tracemalloc.start()
    try:
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 * CHUNK_BYTES < 4 * 4096 * 1536 * 2
    finally:
        tracemalloc.stop()


# Names and rules.


def test_rotary_rows_go_from_pairs_to_halves():
    pairs = np.array([[10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61]]).T  # two heads of 6
    halves = [10, 20, 30, 11, 21, 31, 40, 50, 60, 41, 51, 61]
    assert UNPERMUTE_ROPE.reorder(pairs, head_dim=6)[:, 0].tolist() == halves
    for rule in (KEEP, JOIN_ROWS, JOIN_COLUMNS):
        assert rule.reorder(pairs, head_dim=6) is pairs


@pytest.mark.parametrize(
    ("rule", "shapes", "joined"),
    [
        (KEEP, [(6,), (6,)], (6,)),
        (KEEP, [(6,), (5,)], None),
        (JOIN_ROWS, [(2, 7), (3, 7)], (5, 7)),
        (JOIN_ROWS, [(2, 7), (3, 8)], None),
        (JOIN_ROWS, [(6,), (6,)], None),
        (JOIN_COLUMNS, [(7, 2), (7, 3)], (7, 5)),
        (JOIN_COLUMNS, [(7, 2), (8, 3)], None),
        (UNPERMUTE_ROPE, [(12, 5), (6, 5)], (18, 5)),
    ],
)
def test_a_rule_knows_the_shape_that_parts_make(rule, shapes, joined):
    assert rule.joined_shape(shapes) == joined


def test_every_published_name_has_one_row_and_every_row_one_name():
    config = json.loads((REPOSITORY / "configs" / "models" / "llama-2-7b-hf.json").read_text())
    names = published_tensors(model_config(config, where="here"))
    keys = {find_source(META, name)[1] for name in names}
    assert len(keys) == len(names) == 291
    for name in names:
        row, key = find_source(META, name)
        assert find_row(META, key) == (row, name)
    for row in META:
        matching = [found for found in META if find_row((found,), row.pattern.format(layer=7))]
        assert matching == [row]


@pytest.mark.parametrize(
    "key",
    ["layers.01.ffn_norm.weight", "layers.x.ffn_norm.weight", "norm.weight.x", "xnorm.weight"],
)
def test_keys_match_whole_or_not_at_all(key):
    assert find_row(META, key) is None


# The config.


def test_the_config_is_that_of_the_published_form(originals, meta_of, tmp_path):
    convert_checkpoint(meta_of(4), tmp_path / "out")
    convert_checkpoint(originals("plain"), tmp_path / "safe")
    assert read_config(tmp_path / "out") == read_config(tmp_path / "safe")


# params.json as Meta published it, and the config of the same model in Hugging Face's form.
LLAMA2 = {"norm_eps": 1e-5, "vocab_size": -1}
LLAMA3 = {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True}


def params_of(base, dim, n_layers, n_heads, multiple_of, **more):
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "multiple_of": multiple_of}
    return base | sizes | more


PUBLISHED = {
    "llama-2-7b-hf": params_of(LLAMA2, 4096, 32, 32, 256),
    "lzlv-70b": params_of(LLAMA2, 8192, 80, 64, 4096, ffn_dim_multiplier=1.3, n_kv_heads=8),
    "llama-3.1-8b-instruct": params_of(LLAMA31, 4096, 32, 32, 1024, ffn_dim_multiplier=1.3),
    "llama-3.1-70b-instruct": params_of(LLAMA31, 8192, 80, 64, 4096, ffn_dim_multiplier=1.3),
    "llama-3.1-405b": params_of(LLAMA31, 16384, 126, 128, 4096, ffn_dim_multiplier=1.2),
    "llama-3.2-1b-instruct": params_of(LLAMA31, 2048, 16, 32, 256, ffn_dim_multiplier=1.5),
    "llama-3.2-3b-instruct": params_of(LLAMA31, 3072, 28, 24, 256, ffn_dim_multiplier=1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_published_models_is_derived_exactly(name):
    """What only the weights tell, rows and whether the head is the embedding, is given here."""
    raw = json.loads((REPOSITORY / "configs" / "models" / f"{name}.json").read_text())
    published = model_config(raw, where=name)
    params = read_params(PUBLISHED[name], where="params.json")
    facts = facts_of([{}])
    given = {
        "vocab_size": published.vocab_size,
        "dtype": published.dtype,
        "tied": published.tie_word_embeddings,
    }
    facts = type(facts)(**(vars(facts) | given))
    config, notes = derive_config(params, facts, where="params.json")
    assert model_config(config, where="here") == published
    assert all("does not say" in note for note in notes)
    assert len(notes) == 1 + params.use_scaled_rope


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"norm_eps": 1e-6}, 2048),  # Llama 1
        ({"dim": 8192, "n_heads": 64, "n_kv_heads": 64, "multiple_of": 256}, 2048),  # its 65B
        ({}, 4096),
        ({"rope_theta": 1e6}, 16384),  # Code Llama
        ({"rope_theta": 5e5, "vocab_size": 128256}, 8192),  # Llama 3
        ({"max_seq_len": 777}, 777),
    ],
)
def test_the_context_is_that_of_the_models_generation(changes, context):
    base = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "norm_eps": 1e-5}
    params = read_params(base | changes, where="params.json")
    config, _ = derive_config(params, facts_of([{}]), where="params.json")
    assert config["max_position_embeddings"] == context


def test_what_was_assumed_is_told(meta_of, tmp_path):
    notes = convert_checkpoint(meta_of(use_scaled_rope=True), tmp_path / "out").notes
    assert any("131072" in note for note in notes)
    assert any("scaled; 8 is taken" in note for note in notes)
    assert any("tokenizer.model" in note for note in notes)
    assert read_config(tmp_path / "out").attention.rope.factor == 8.0


def test_a_config_beside_it_decides(originals, meta_of, tmp_path):
    source = meta_of(4, use_scaled_rope=True)
    shutil.copy(os.path.join(originals("plain"), "config.json"), source)
    edit_json(source / "config.json", max_position_embeddings=999)
    summary = convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert summary.notes == ()


def test_a_config_beside_it_that_is_of_another_model(originals, meta_of, tmp_path):
    source = meta_of(4)
    shutil.copy(os.path.join(originals("plain"), "config.json"), source)
    edit_json(source / "config.json", intermediate_size=96, rms_norm_eps=1e-6)
    words = ["intermediate_size 96, not 100", "rms_norm_eps 1e-06, not 1e-05", "params.json"]
    refused(source, tmp_path / "out", words)


def test_a_config_that_ties_what_is_stored_apart(originals, meta_of, tmp_path):
    """Both are used, as where a published folder has both."""
    source = meta_of(2, "tied")
    shutil.copy(os.path.join(originals("tied"), "config.json"), source)
    (note,) = convert_checkpoint(source, tmp_path / "out").notes
    assert "tie_word_embeddings is true" in note
    assert "output.weight" in note
    expected = read_tensors(originals("tied"))
    head = {"lm_head.weight": expected["model.embed_tokens.weight"]}
    assert read_tensors(tmp_path / "out") == expected | head
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


# The tokenizer.


def tiktoken_file(n_ranks):
    """Ranks as in Llama 3's tokenizer.model: a line each, base64 and number."""
    lines = (f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(n_ranks))
    return "".join(lines).encode()


def sentencepiece_file(**ids):
    """The least of a SentencePiece model: a piece, and the trainer's settings."""
    trainer = b"\x18\x02" + b"".join(
        bytes([field << 3 & 0x7F | 0x80, field >> 4, value])
        for field, value in ((41, ids.get("bos")), (42, ids.get("eos")))
        if value is not None
    )
    return b"\x0a\x05\x0a\x03<s>" + b"\x12" + bytes([len(trainer)]) + trainer


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos"),
    [
        (sentencepiece_file(bos=1, eos=2), 1, 2),
        (sentencepiece_file(), 1, 2),
        (sentencepiece_file(bos=5, eos=7), 5, 7),
        (tiktoken_file(100), 100, [101, 108, 109]),
        (tiktoken_file(130), 130, 131),  # ids beyond the vocabulary are left out
    ],
)
def test_the_ends_of_text_come_from_the_tokenizer(meta_of, tmp_path, tokenizer, bos, eos):
    source = meta_of()
    (source / "tokenizer.model").write_bytes(tokenizer)
    summary = convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, eos)
    generation = read_generation_config(tmp_path / "out")
    assert generation == {"bos_token_id": bos, "eos_token_id": eos}
    assert not any("tokenizer" in note for note in summary.notes)
    assert verify_folder(tmp_path / "out").findings == ()


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "vocab_size", "bos", "eos"),
    [("llama2", 32000, 1, 2), ("llama3", 128256, 128000, [128001, 128008, 128009])],
)
def test_the_ends_of_text_of_real_tokenizers(name, vocab_size, bos, eos):
    from jlayer.convert.sources.meta import special_ids
    from jlayer.text.tokenizer import Tokenizer

    folder = SHARED_DATA / "tokenizers" / name
    raw = (folder / "tokenizer.model").read_bytes()
    found = special_ids(raw, vocab_size=vocab_size, where=name)
    assert found == {"bos_token_id": bos, "eos_token_id": eos}
    assert Tokenizer.from_folder(folder).bos_token_id == bos


def test_a_generation_config_that_is_there_is_taken(meta_of, tmp_path):
    source = meta_of()
    (source / "tokenizer.model").write_bytes(sentencepiece_file())
    (source / "generation_config.json").write_text('{"eos_token_id": 9}')
    convert_checkpoint(source, tmp_path / "out")
    assert read_generation_config(tmp_path / "out") == {"eos_token_id": 9}


@pytest.mark.parametrize("raw", [b"", b"\x0a\xff\xff", b"<html>", b"\x12\x03abc"])
def test_a_damaged_tokenizer_is_refused(meta_of, tmp_path, raw):
    source = meta_of()
    (source / "tokenizer.model").write_bytes(raw)
    refused(source, tmp_path / "out", ["tokenizer.model", "neither"])


# Refusals.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, ["dim is missing"]),
        ({"dim": 0}, ["dim is 0", "from 1 to"]),
        ({"dim": 10**12}, ["dim is 1000000000000"]),
        ({"n_layers": "3"}, ["n_layers is '3'"]),
        ({"n_heads": 7}, ["dim is 48", "n_heads 7"]),
        ({"n_kv_heads": 3}, ["8", "3"]),
        ({"norm_eps": 0}, ["norm_eps is 0"]),
        ({"rope_theta": "x"}, ["rope_theta is 'x'"]),
        ({"use_scaled_rope": 1}, ["use_scaled_rope is 1"]),
        ({"multiple_of": 16}, ["feed_forward of 96", "100 rows", "multiple_of 16"]),
        ({"vocab_size": 128}, ["[128, 48]", "tok_embeddings.weight", "output.weight"]),
        ({"dim": 96}, ["feed_forward"]),
        ({"n_layers": 4}, ["missing", "layers.3.attention.wq.weight"]),
        ({"n_layers": 2}, ["layers.2.attention.wq.weight in consolidated.00.pth", "--allow-extra"]),
        ({"moe": {"num_experts": 8}}, ["moe", "not supported"]),
        ({"vision_chunk_size": 448}, ["vision_chunk_size", "not supported"]),
        ({"quantization_args": {"scheme": "int4"}}, ["quantized", "quantization_args"]),
    ],
)
def test_params_that_are_wrong(meta_of, tmp_path, changes, words):
    refused(meta_of(4, **changes), tmp_path / "out", [*words, "source"])


def test_whole_numbers_may_be_written_as_floats(meta_of):
    """As in config.json: some programs write 48.0."""
    raw = json.loads((meta_of() / "params.json").read_text())
    floats = {name: float(n) if type(n) is int else n for name, n in raw.items()}
    expected = read_params(raw, where="params.json")
    found = read_params(floats, where="params.json")
    assert found == expected
    assert type(found.dim) is type(found.multiple_of) is int
    for wrong in (48.5, float("inf"), float("nan"), True):
        with pytest.raises(CheckpointError, match="dim is"):
            read_params(raw | {"dim": wrong}, where="params.json")


def test_an_odd_head_is_refused(meta_of, tmp_path):
    refused(meta_of(1, n_heads=16, n_kv_heads=8), tmp_path / "out", ["head_dim is 3"])


def test_params_are_required(meta_of, tmp_path):
    source = meta_of()
    (source / "params.json").unlink()
    refused(source, tmp_path / "out", ["params.json", "missing"])


def test_parts_that_are_missing_are_listed(meta_of, tmp_path):
    source = meta_of(4)
    for n in (0, 2):
        (source / f"consolidated.{n:02d}.pth").unlink()
    words = ["consolidated.00.pth", "consolidated.02.pth", "2 of 4"]
    refused(source, tmp_path / "out", words)


def test_a_last_part_that_is_missing_shows_in_the_shapes(meta_of, tmp_path):
    source = meta_of(4)
    (source / "consolidated.03.pth").unlink()
    refused(source, tmp_path / "out", ["feed_forward of 100", "75 rows"])


def test_norms_that_differ_between_parts(meta_of, tmp_path):
    source = meta_of(4)
    change_part(source, 2, lambda weights: weights[NORM].add_(1))
    words = [NORM, "consolidated.02.pth", "consolidated.00.pth", "differs"]
    refused(source, tmp_path / "out", words, begun=True)


def test_all_that_is_wrong_with_the_parts_is_told_at_once(meta_of, tmp_path):
    source = meta_of(4)

    def change(weights):
        weights["stray.weight"] = weights.pop("layers.0.attention.wo.weight")
        weights[GATE] = weights[GATE][:, :-1].clone()
        weights[NORM] = weights[NORM].half()
        weights["layers.2.attention.wv.weight"] = weights["layers.2.attention.wv.weight"].double()

    change_part(source, 1, change)
    words = [
        *("missing: layers.0.attention.wo.weight in consolidated.01.pth", "stray.weight"),
        *(f"{GATE} is [25, 48] and [25, 47]", "join_rows", "[100, 48]"),
        *(f"{NORM} is float16 and float32", "layers.2.attention.wv.weight is float32 and float64"),
    ]
    refused(source, tmp_path / "out", words)


def test_extra_keys_can_be_left_out(originals, meta_of, tmp_path):
    source = meta_of(2)
    change_part(source, 0, lambda weights: weights.update(stray=torch.ones(3)))
    summary = convert_checkpoint(source, tmp_path / "out", allow_extra=True)
    assert any("stray in consolidated.00.pth" in note for note in summary.notes)
    convert_checkpoint(originals("plain"), tmp_path / "safe")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "safe")


def test_a_damaged_part_is_found_by_its_checksum(meta_of, tmp_path):
    from jlayer.checkpoint.source import regular_file
    from jlayer.convert.sources.torchfile import read_table

    source = meta_of(4)
    for key in (GATE, "layers.1.attention.wo.weight", "layers.1.attention.wq.weight"):
        place, info = read_table(regular_file(str(source), "consolidated.03.pth"))[key]
        raw = bytearray((source / "consolidated.03.pth").read_bytes())
        raw[place.offset + info.n_bytes - 1] ^= 1
        (source / "consolidated.03.pth").write_bytes(raw)
        words = [key, "consolidated.03.pth", "CRC-32"]
        refused(source, tmp_path / key, words, begun=True)
        raw[place.offset + info.n_bytes - 1] ^= 1
        (source / "consolidated.03.pth").write_bytes(raw)


def test_nonfinite_weights_are_named(meta_of, tmp_path):
    source = meta_of(2)
    change_part(source, 1, lambda weights: weights[GATE].fill_(float("nan")))
    words = ["model.layers.1.mlp.gate_proj.weight", "NaN", "--allow-nonfinite"]
    refused(source, tmp_path / "out", words, begun=True)


def test_published_weights_beside_metas_are_taken(originals, meta_of, tmp_path):
    """As in the hub's repositories, but in one folder."""
    source = meta_of(1)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(os.path.join(originals("plain"), name), source)
    summary = convert_checkpoint(source, tmp_path / "out")
    assert summary.notes == (f"{source}: has safetensors and pickles; the safetensors are taken",)


def test_a_change_of_dtype_goes_through_as_well(originals, meta_of, tmp_path):
    convert_checkpoint(originals("plain"), tmp_path / "safe", dtype="bfloat16")
    convert_checkpoint(meta_of(4), tmp_path / "out", dtype="bfloat16")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "safe")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_a_finished_conversion_is_known_again(meta_of, tmp_path):
    source = meta_of(4)
    first = convert_checkpoint(source, tmp_path / "out")
    again = convert_checkpoint(source, tmp_path / "out")
    assert (first.status, again.status) == ("converted", "unchanged")


def test_params_have_defaults():
    assert Params(48, 1, 8, 8).intermediate_size == 256
    with pytest.raises(CheckpointError, match="vocab_size is left to the weights"):
        derive_config(Params(48, 1, 8, 8), facts_of([{}]), where="x")
