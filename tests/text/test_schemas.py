"""What clients may not ask a text to be held to: refused with its place, and quickly."""

import random
import resource
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from jlayer.errors import UsageError
from jlayer.text import guidance
from jlayer.text.constraint import Constraint
from jlayer.text.guidance import RefusedGrammar
from tests.text.held import sizes, walked

pytest.importorskip("llguidance")

NOT = {"not": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([1], "schema: found list, expected a JSON schema"),
        (False, "schema: found False, expected"),
        (NOT, r"schema: keywords not supported: \[.not.\]"),
        ({"properties": {"x": {"items": NOT}}}, r"schema\.properties\.x\.items: keywords not"),
        ({"anyOf": [{}, {"allOf": [NOT]}]}, r"schema\.anyOf\[1\]\.allOf\[0\]: keywords not"),
        ({"$defs": {"d": NOT}, "$ref": "#/$defs/d"}, r"schema\.\$defs\.d: keywords not"),
        ({"additionalProperties": {"type": "strin"}}, r"schema\.additionalProperties: .*strin"),
        ({"type": "string", "pattern": "(("}, "schema: regex parse error.*unclosed group"),
        ({"type": "string", "pattern": "(?=a)"}, "schema: .*look-around"),
        ({"type": "string", "format": "x"}, "schema: Unknown format: x"),
        ({"$ref": "#/$defs/x"}, "schema: .*does not exist"),
        ({"$ref": "http://127.0.0.1:1/x"}, "schema: a .*another document"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, "schema: 'oneOf' .* use 'anyOf'"),
        ({"const": float("nan")}, "schema: not JSON"),
        ({"const": {1, 2}}, "schema: not JSON"),
        ({"const": "x" * 66_000}, "schema: over the limit of 65536 bytes"),
        ({"enum": [10**20] * 4_000}, "schema: .* bytes, over the limit of 65536"),
        ({"properties": {f"p{i}": {} for i in range(2_001)}}, "over the limit of 2000 properties"),
    ],
)
def test_a_schema_that_is_refused_names_the_place(fable, schema, words):
    with pytest.raises(UsageError, match=words) as caught:
        Constraint.json_schema(fable, schema, **sizes(fable))
    assert "\n" not in str(caught.value)


def test_the_options_of_the_library_are_not_a_clients(fable):
    lenient = {"x-guidance": {"lenient": True, "whitespace_pattern": "x"}}
    with pytest.raises(UsageError, match="keywords not supported"):
        Constraint.json_schema(fable, NOT | lenient, **sizes(fable))
    constraint = Constraint.json_schema(fable, {"type": "object"} | lenient, **sizes(fable))
    constraint.accept(fable.encode("{ ", add_special_tokens=False))


def test_a_place_begins_where_the_caller_says(fable):
    with pytest.raises(UsageError, match=r"^response_format\.schema\.items: keywords"):
        Constraint.json_schema(
            fable, {"items": NOT}, where="response_format.schema", **sizes(fable)
        )


def nested(n):
    schema = inner = {}
    for _ in range(n):
        inner["items"] = inner = {}
    return schema


def test_depth_is_limited_without_recursion(fable):
    Constraint.json_schema(fable, nested(63), **sizes(fable))
    for n in (64, 50_000):
        with pytest.raises(UsageError, match=r"nested deeper than 64 levels|over the limit"):
            Constraint.json_schema(fable, nested(n), **sizes(fable))


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (Constraint.regex, "((", "regex: regex parse error.*unclosed group"),
        (Constraint.regex, "a(?!b)", "regex: .*look-around"),
        (Constraint.regex, r"(a)\1", "regex: .*backreferences"),
        (Constraint.regex, "", "regex: found '', expected a regular expression"),
        (Constraint.regex, 3, "regex: found 3, expected"),
        (Constraint.regex, "\ud800", "regex: not valid Unicode"),
        (Constraint.regex, "é" * 2_049, "regex: 4098 bytes, over the limit of 4096"),
        (Constraint.choice, [], "choice: found list, expected a list of texts"),
        (Constraint.choice, "yes", "choice: found 'yes', expected a list"),
        (Constraint.choice, ["a", 3], r"choice\[1\]: found 3, expected a text"),
        (Constraint.choice, ["a"] * 1_001, "choice: 1001 choices, over the limit of 1000"),
        (Constraint.choice, ["a" * 66_000], "choice: 66000 bytes, over the limit"),
        (Constraint.lark, "start: nobody", "nobody"),
    ],
)
def test_what_else_is_refused(fable, make, given, words):
    with pytest.raises(UsageError, match=words) as caught:
        make(fable, given, **sizes(fable))
    assert "\n" not in str(caught.value)


def properties(make, n):
    return {"type": "object", "properties": {f"p{i}": make(i) for i in range(n)}}


def references(n):
    part = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(n)}
    return {"$defs": part | {f"d{n}": {"type": "object"}}, "$ref": "#/$defs/d0"}


# Within the limits on size. Without the other process, some take 5 s to six minutes.
HOSTILE = {
    "2,000 properties": properties(lambda i: {"type": "string"}, 2_000),
    "60 references": references(60),
    "reference to itself": {"$defs": {"d": {"$ref": "#/$defs/d"}}, "$ref": "#/$defs/d"},
    "a large enum": {"enum": [f"value {i}" for i in range(4_000)]},
    "repetitions": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "look-back": {"type": "string", "pattern": "^(.*a.{200}){9}$"},
    "50 patterns at once": {"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(50)]},
    "patterns of keys": {
        "patternProperties": {f"^a{i}_.*x$": {"type": "null"} for i in range(600)}
    },
    "a prime": {"type": "integer", "multipleOf": 1_000_003},
    "two primes": {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
    "products": {"allOf": [{"anyOf": [properties(lambda i: {}, n)] * 6} for n in range(1, 9)]},
    "long lists": properties(lambda i: {"type": "array", "minItems": 10**5 + i}, 400),
    "ranges": properties(lambda i: {"type": "number", "minimum": -1.2345678901 * i}, 800),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_takes_less_than_a_second(fable, name):
    """Taken or refused, by the processor's clock: a loaded machine does not count."""
    start = time.thread_time(), children_s()
    with suppress(UsageError):
        Constraint.json_schema(fable, HOSTILE[name], **sizes(fable)).allowed()
    assert time.thread_time() - start[0] + children_s() - start[1] < 1.3


def children_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_limit_met_in_a_text_is_said_there(fable, monkeypatch):
    monkeypatch.setitem(guidance.LIMITS, "max_lexer_states", 1_000)
    rng = random.Random(9)
    constraint = Constraint.regex(fable, "(.*a.{200}){9}", **sizes(fable))
    with pytest.raises(RefusedGrammar, match="too complex: its patterns reach too many states"):
        walked(fable, constraint, rng)


def test_without_llguidance_the_message_says_what_to_install(fable, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r'pip install -e "\.\[serve\]"'):
        Constraint.json_object(fable, **sizes(fable))


def test_importing_needs_no_llguidance():
    code = (
        "import sys; import jlayer.text.constraint\n"
        "print([name for name in ('llguidance', 'jax', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
