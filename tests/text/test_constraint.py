"""Texts held to schemas, expressions and choices: walks over allowed tokens against a validator,
masks against a search through the whole vocabulary."""

import json
import random
import re

import numpy as np
import pytest

from jlayer.errors import UsageError
from jlayer.text.constraint import Constraint
from jlayer.text.guidance import tokenizer_of
from tests.campaigns import slow_but
from tests.text.built import files_of
from tests.text.families import FAMILIES
from tests.text.held import sizes, text_of, walked
from tests.text.reference import ours, write
from tests.text.samples import LARGE, SMALL, bundled, load

pytest.importorskip("llguidance")

# Schemas

SHORT = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "an object": {
        "type": "object",
        "properties": {
            "name": SHORT,
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["a", "é", 3, None, {"x": [1]}]},
            "tags": {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    },
    "a pattern": {"type": "string", "pattern": "^[a-c]{2,5}-\\d{1,3}$"},
    "one of two": {"anyOf": [{"type": "boolean"}, {"const": 'a "quote"'}]},
    "a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "a tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
}
TYPES = {"string": str, "integer": int, "boolean": bool, "null": type(None)}
TYPES |= {"object": dict, "array": list}


def is_valid(value, schema, root=None):
    """What the schemas above use of JSON Schema."""
    root = root or schema
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema and not any(is_valid(value, part, root) for part in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        return False
    if isinstance(value, str):
        fits = len(value) <= schema.get("maxLength", len(value))
        return fits and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, int) and "minimum" in schema:
        return schema["minimum"] <= value <= schema["maximum"]
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        parts = [*first, *[schema.get("items", True)] * (len(value) - len(first))]
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(map(lambda v, s: is_valid(v, s, root), value, parts))
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        has_all = set(schema.get("required", ())) <= set(value) <= set(known)
        return has_all and all(is_valid(value[key], known[key], root) for key in value)
    return True


def is_complete(text, schema):
    try:
        return text == text.strip() and is_valid(json.loads(text), schema)
    except ValueError:
        return False


@pytest.mark.parametrize("name", slow_but([*LARGE, *SMALL[:3]], SMALL))
def test_a_walk_under_a_schema_parses_and_validates(name):
    tokenizer, rng, n_ended = load(name), random.Random(name), 0
    for schema in SCHEMAS.values():
        begun = Constraint.json_schema(tokenizer, schema, **sizes(tokenizer))
        for _ in range(4):
            ids, ended = walked(tokenizer, begun.copy(), rng)
            text = text_of(tokenizer, ids)
            assert not ended or is_valid(json.loads(text), schema), text
            n_ended += ended
    assert n_ended > 10


@pytest.mark.parametrize("name", ["fable-3m", "stories260K"])
def test_an_end_is_allowed_exactly_where_the_value_is_complete(name):
    tokenizer, rng, n_complete = load(name), random.Random(2), 0
    for schema in SCHEMAS.values():
        constraint = Constraint.json_schema(tokenizer, schema, **sizes(tokenizer))
        ids = []
        for _ in range(60):
            mask, complete = constraint.allowed(), is_complete(text_of(tokenizer, ids), schema)
            assert mask[tokenizer.eos_token_id] == complete, text_of(tokenizer, ids)
            n_complete += complete
            rest = np.flatnonzero(mask)
            rest = rest[rest != tokenizer.eos_token_id]
            assert constraint.is_over == (not len(rest))
            if not len(rest):
                break
            ids.append(int(rng.choice(rest)))
            constraint.accept(ids[-1:])
    assert n_complete >= 3


@pytest.mark.parametrize("family", ["qwen 3", "gemma 3", "phi 3 mini", "mistral 7b v0.3", "helium"])
def test_tokenizers_of_other_forms(family, tmp_path):
    tokenizer = ours(write(tmp_path, files_of(FAMILIES[family])))
    constraint = Constraint.json_schema(
        tokenizer, SCHEMAS["a pattern"], **sizes(tokenizer, tokenizer.eos_token_id)
    )
    ids, ended = walked(tokenizer, constraint, random.Random(3))
    assert ended
    assert is_valid(json.loads(text_of(tokenizer, ids)), SCHEMAS["a pattern"])


def test_any_object():
    tokenizer, rng = bundled(), random.Random(4)
    begun = Constraint.json_object(tokenizer, **sizes(tokenizer))
    for _ in range(20):
        ids, ended = walked(tokenizer, begun.copy(), rng, most=60)
        assert text_of(tokenizer, ids).startswith("{")
        assert not ended or isinstance(json.loads(text_of(tokenizer, ids)), dict)


def test_white_space_ends():
    """A weak model may write nothing else."""
    tokenizer = bundled()
    constraint = Constraint.json_object(tokenizer, **sizes(tokenizer))
    constraint.accept(tokenizer.encode("{", add_special_tokens=False))
    space = tokenizer.encode("\n", add_special_tokens=False)
    for _ in range(20):
        constraint.accept(space)
    assert not constraint.allowed()[space[0]]


# Expressions and choices


def whole_search(tokenizer, texts, so_far):
    """The tokens that lead on to one of some texts, found by trying all."""
    found = set()
    for token in range(tokenizer.vocab_size):
        if tokenizer.library.id_to_token(token) in tokenizer.special_tokens:
            continue
        text = so_far + tokenizer.decode([token], continues=True)
        if text != so_far and any(each.startswith(text) for each in texts):
            found.add(token)
    return found | ({tokenizer.eos_token_id} if so_far in texts else set())


@pytest.mark.parametrize("name", ["fable-3m", "stories260K"])
def test_an_expression_allows_every_token_that_leads_on_and_no_other(name):
    tokenizer, rng = load(name), random.Random(5)
    texts = ["the cat", "the end", "then", "théâtre", "the cat sat", "12", "12/3 \\d"]
    pattern = r"the (cat( sat)?|end)|th(en|éâtre)|12(/3 \\d)?"
    begun = Constraint.regex(tokenizer, pattern, **sizes(tokenizer))
    for _ in range(8):
        constraint, ids = begun.copy(), []
        while True:
            text = text_of(tokenizer, ids)
            allowed = set(np.flatnonzero(constraint.allowed()).tolist())
            if "\N{REPLACEMENT CHARACTER}" not in text + tokenizer.decode(sorted(allowed)):
                assert allowed == whole_search(tokenizer, texts, text), text
            drawn = rng.choice(sorted(allowed))
            constraint.accept([drawn])
            if drawn == tokenizer.eos_token_id:
                break
            ids.append(drawn)
        assert text_of(tokenizer, ids) in texts


@pytest.mark.parametrize("name", ["fable-3m", "mistral-v1"])
def test_a_choice(name):
    tokenizer, rng = load(name), random.Random(6)
    choices = ["yes", "yesterday", "", 'é😀"\\\n', "<s>", "no/"]
    begun = Constraint.choice(tokenizer, choices, **sizes(tokenizer))
    found = set()
    for _ in range(200):
        ids, ended = walked(tokenizer, begun.copy(), rng)
        assert ended
        found.add(text_of(tokenizer, ids))
    assert found == set(choices)


def test_a_grammar_names_tokens_by_id(tmp_path):
    tokenizer = ours(write(tmp_path, files_of(FAMILIES["qwen 3"])))
    call = tokenizer.library.token_to_id("<tool_call>")
    constraint = Constraint.lark(tokenizer, f'start: <[{call}]> "ab"', **sizes(tokenizer))
    assert np.flatnonzero(constraint.allowed()).tolist() == [call]
    constraint.accept([call, *tokenizer.encode("ab", add_special_tokens=False)])
    assert constraint.is_over


def test_text_that_looks_like_a_token_can_be_written(tmp_path):
    """The library's own mask would hold the token, which it then does not take."""
    tokenizer = ours(write(tmp_path, files_of(FAMILIES["qwen 3"])))
    value = "a<tool_call>b<|im_end|>"
    options = sizes(tokenizer)
    for constraint in (
        Constraint.json_schema(tokenizer, {"const": value}, **options),
        Constraint.json_schema(
            tokenizer, {"type": "string", "pattern": f"^{value[:12]}$"}, **options
        ),
        Constraint.regex(tokenizer, "(a<tool_[c]all>)", **options),
        Constraint.choice(tokenizer, [value], **options),
    ):
        ids, ended = walked(tokenizer, constraint, random.Random(7))
        assert ended
        text = text_of(tokenizer, ids)
        assert text.strip('"') in (value, "a<tool_call>")


# What a constraint is asked


def test_looking_ahead_changes_nothing(fable):
    rng = random.Random(8)
    constraint = Constraint.json_schema(fable, SCHEMAS["an object"], **sizes(fable))
    ids, _ = walked(fable, constraint.copy(), rng, most=40)
    for n in range(len(ids)):
        before = constraint.allowed().copy()
        for m in range(len(ids) - n):
            other = constraint.copy()
            other.accept(ids[n : n + m])
            assert (constraint.allowed(ids[n : n + m]) == other.allowed()).all()
        assert (constraint.allowed() == before).all()
        constraint.accept([ids[n]])
    assert not constraint.allowed([ids[-1], 10**6]).any()


def test_what_is_not_allowed_cannot_be_accepted(fable):
    constraint = Constraint.choice(fable, ["yes"], **sizes(fable))
    before = constraint.allowed()
    no = fable.encode("no", add_special_tokens=False)
    for wrong in (no[0], fable.eos_token_id, fable.bos_token_id, fable.vocab_size, -1, 10**6):
        with pytest.raises(UsageError, match=f"token {wrong} is not allowed here"):
            constraint.accept([wrong])
        assert not constraint.allowed([wrong]).any()
        assert (constraint.allowed() == before).all()


def test_any_ids_may_be_end_tokens(fable):
    """Also several, and such as are text otherwise."""
    letter = fable.encode("s", add_special_tokens=False)[0]
    constraint = Constraint.regex(fable, "(yes)+", **sizes(fable, 0, 3, letter))
    ends = [0, 3, letter]
    assert not constraint.allowed()[ends].any()
    constraint.accept(fable.encode("yes", add_special_tokens=False))
    assert constraint.allowed()[ends].all()
    assert not constraint.allowed()[fable.eos_token_id]
    assert not constraint.is_over
    assert np.flatnonzero(constraint.allowed([3])).tolist() == sorted(ends)
    constraint.accept([letter])
    assert constraint.is_over
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(ends)


def test_fewer_logits_than_tokens(fable):
    constraint = Constraint.json_object(fable, vocab_size=300, eos_ids=[1, 4000])
    assert constraint.allowed().shape == (300,)


def test_a_tokenizer_is_prepared_once(fable):
    assert tokenizer_of(fable) is tokenizer_of(fable)
